"""Words that matter and words that should not: finding golden units in texts, and the shortcuts a training set offers.

A unit is a word or a multi-word unit of a golden set, folded, its words joined by one blank ("not fail").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from spurge.engine.words import Phrase as Words
from spurge.engine.words import as_phrase, word_spans

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
    texts. The strongest (u, y) is taken, the longest one of several that stand in the same texts; its texts are set
    aside; and so on. So a phrase is listed once and not again in its parts.

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
    where: dict[str, set[int]] = defaultdict(set)
    for index, segments in enumerate(texts):
        for segment in segments:
            for run in _runs(segment, finder):
                for start in range(len(run)):
                    for end in range(start + 1, min(start + longest, len(run)) + 1):
                        where[" ".join(run[start:end])].add(index)
    of = np.asarray(labels, dtype=np.int64)
    classes = int(of.max(initial=0)) + 1
    left = np.ones(len(of), dtype=bool)
    rows = {unit: np.fromiter(found, np.int64) for unit, found in where.items() if len(found) >= fewest}
    phrases: list[TellingPhrase] = []
    while rows and left.any() and len(phrases) < limit:
        share = np.bincount(of[left], minlength=classes) / left.sum()
        best = max((_telling(unit, of[found[left[found]]], share) for unit, found in rows.items()), key=_rank)
        if best.strength < strength or best.count < fewest:
            break
        phrases.append(best)
        left[rows.pop(best.text)] = False
    return phrases


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


def _telling(unit: str, labels: np.ndarray, share: np.ndarray) -> TellingPhrase:
    count = len(labels)
    deviation = np.sqrt(count * share * (1 - share))
    excess = np.bincount(labels, minlength=len(share)) - count * share
    z = np.divide(excess, deviation, out=np.zeros_like(excess), where=deviation > 0)
    return TellingPhrase(unit, int(z.argmax()), float(z.max()), count)


def _rank(phrase: TellingPhrase) -> tuple[float, int, str]:
    return round(phrase.strength, 9), len(phrase.text.split()), phrase.text
