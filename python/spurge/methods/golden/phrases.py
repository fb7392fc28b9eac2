"""Words that matter and words that should not: finding golden units in texts, and the shortcuts a training set offers.

A unit is a word or a multi-word unit of a golden set, folded, its words joined by one blank ("not fail").
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from spurge.engine.data.words import Phrase as Words
from spurge.engine.data.words import as_phrase, word_spans

_BLANKS = re.compile(r"\s{2,}")

Span = tuple[int, int, str]  # start, end (characters), folded unit


class Finder:
    """Finds units in texts; a longer unit is preferred, and units do not overlap.

    Args:
        units: words and multi-word units; an entry that is no word ("a+") is left out.
    """

    def __init__(self, units: Iterable[str]):
        split = {words for words in map(as_phrase, units) if words}
        self.units = frozenset(" ".join(words) for words in split)
        self._phrases: dict[str, list[Words]] = {}
        for words in sorted(split, key=len, reverse=True):
            if len(words) > 1:
                self._phrases.setdefault(words[0], []).append(words)

    def find(self, text: str) -> list[Span]:
        """The units in ``text``, in its order."""
        return [span for span in self.split(text) if span[2] in self.units]

    def split(self, text: str) -> list[Span]:
        """All words of ``text``, those of a multi-word unit as one."""
        return word_spans(text, self._phrases)


def cased(new: str, old: str) -> str:
    """``new`` written as ``old`` is: in capitals, with a capital in front, or as it stands."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def replaced(segment: str, edits: Sequence[tuple[int, int, str]]) -> str:
    """The segment with spans replaced; an emptied one leaves no double blank."""
    if not edits:
        return segment
    for start, end, new in reversed(edits):
        segment = segment[:start] + new + segment[end:]
    return _BLANKS.sub(" ", segment).strip()


@dataclass(frozen=True)
class TellingPhrase:
    """Irrelevant words that go with a label in the training set.

    Attributes:
        text: the words, folded, joined by blanks.
        label: index of the label they go with.
        strength: z, how many standard deviations their count with that label lies above the count expected by chance.
        count: training texts that hold them, without those that hold a stronger phrase.
    """

    text: str
    label: int
    strength: float
    count: int


def telling_phrases(
    texts: Sequence[Sequence[str]],
    labels: Sequence[int],
    irrelevant: Iterable[str],
    *,
    longest: int = 5,
    strength: float = 4.0,
    fewest: int = 5,
    limit: int = 20,
) -> list[TellingPhrase]:
    r"""Phrases of irrelevant words that go with a label.

    .. math:: z_{u,y} = (n_{uy} - n_u p_y) / \sqrt{n_u p_y (1 - p_y)}

    for a phrase u in :math:`n_u` texts, :math:`n_{uy}` of them labelled y, where y has the share :math:`p_y` of all
    texts. Of the phrases that reach ``strength``, the strongest is taken, the longest one of several that stand in the
    same texts; its texts are set aside; and so on with the texts left. So a phrase is listed once and not again in its
    parts.

    Args:
        texts: the segments (text and, where there is one, pair) of each of N examples.
        labels: index of each example's label, N.
        irrelevant: words and multi-word units that say nothing about any label.
        longest: units in a phrase, at most.
        strength: smallest z.
        fewest: smallest n_u.
        limit: how many phrases, at most.

    Returns:
        The phrases, strongest first. None means that no irrelevant phrase clearly goes with a label.
    """
    finder = Finder(irrelevant)
    of = np.asarray(labels, dtype=np.int64)
    classes = int(of.max(initial=0)) + 1
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(classes, dtype=np.int64))
    for segments, label in zip(texts, of, strict=True):
        for phrase in _phrases(segments, finder, longest):
            counts[phrase][label] += 1
    share = np.bincount(of, minlength=classes) / max(1, len(of))
    strong = {p for p, n in counts.items() if n.sum() >= fewest and _scored(p, n, share).strength >= strength}
    rows: dict[str, list[int]] = {phrase: [] for phrase in strong}  # which texts: for the strong ones alone
    for index, segments in enumerate(texts if strong else ()):
        for phrase in _phrases(segments, finder, longest) & strong:
            rows[phrase].append(index)
    where = {phrase: np.asarray(found) for phrase, found in rows.items()}
    left = np.ones(len(of), dtype=bool)
    phrases: list[TellingPhrase] = []
    while where and left.any() and len(phrases) < limit:
        share = np.bincount(of[left], minlength=classes) / left.sum()
        best = max(
            (
                _scored(phrase, np.bincount(of[found[left[found]]], minlength=classes), share)
                for phrase, found in where.items()
            ),
            key=_rank,
        )
        if best.strength < strength or best.count < fewest:
            break
        phrases.append(best)
        left[where.pop(best.text)] = False
    return phrases


def _phrases(segments: Sequence[str], finder: Finder, longest: int) -> set[str]:
    """All phrases of up to ``longest`` units in a text."""
    return {
        " ".join(run[start:end])
        for segment in segments
        for run in _runs(segment, finder)
        for start in range(len(run))
        for end in range(start + 1, min(start + longest, len(run)) + 1)
    }


def _runs(segment: str, finder: Finder) -> list[list[str]]:
    """Units that follow each other without another word or a punctuation mark between them."""
    runs: list[list[str]] = []
    behind = -1
    for start, end, unit in finder.find(segment):
        if runs and not segment[behind:start].strip():
            runs[-1].append(unit)
        else:
            runs.append([unit])
        behind = end
    return runs


def _scored(phrase: str, counts: np.ndarray, share: np.ndarray) -> TellingPhrase:
    """The label a phrase goes with, from its texts by label ``[Y]`` and the labels' shares ``[Y]``."""
    count = int(counts.sum())
    deviation = np.sqrt(count * share * (1 - share))
    excess = counts - count * share
    z = np.divide(excess, deviation, out=np.zeros_like(excess), where=deviation > 0)
    return TellingPhrase(phrase, int(z.argmax()), float(z.max()), count)


def _rank(phrase: TellingPhrase) -> tuple[float, int, str]:
    return round(phrase.strength, 9), len(phrase.text.split()), phrase.text
