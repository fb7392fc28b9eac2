"""Counterfactual texts made from golden words and the training set alone.

From a training text of label y up to three rows are made:

* *kept*: the text itself; the unedited model's prediction should stay.
* *swapped*: every causal word of y replaced by one of another label y', the nearest by the model's input embeddings,
  and every word of y' by one of y; the prediction should be y'.
* *neutral*: the phrases that go with a label without being a reason for it taken out, and one that goes with another
  label put in; the prediction should be the unedited model's for the text without them.

No new data and no annotation beyond the golden words is used.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from spurge.engine.data.examples import Example
from spurge.engine.data.words import as_phrase
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.embedding import word_vectors
from spurge.methods.golden.phrases import Finder, TellingPhrase, cased, replaced

Kind = Literal["kept", "swapped", "neutral"]
Nearest = Mapping[tuple[int, int], Mapping[str, str]]

_BLANKS = re.compile(r"\s{2,}")


@dataclass(frozen=True)
class Row:
    """One text of the counterfactual set.

    Attributes:
        example: what the model reads, with the label it should give; that of its source unless swapped.
        kind: how it was made.
        source: index of the training text it comes from.
        reference: the text for which the unedited model's prediction is what is wanted; None where the label is.
    """

    example: Example
    kind: Kind
    source: int
    reference: Example | None


def nearest_words(handle: Handle, causal: Sequence[Sequence[str]]) -> dict[tuple[int, int], dict[str, str]]:
    """For labels (y, y'): each causal unit of y, and the causal unit of y' nearest to it.

    Nearest by the cosine of the mean input embeddings of the units' sub-words; ties by the order of the list. A unit
    that two labels share belongs to neither.

    Args:
        handle: of a ``transformers`` model with input embeddings.
        causal: words and multi-word units of each label.
    """
    own = own_units(causal)
    vectors = [word_vectors(handle, units) for units in own]
    nearest: dict[tuple[int, int], dict[str, str]] = {}
    for a, here in enumerate(own):
        for b, there in enumerate(own):
            if a == b or not here or not there:
                continue
            # In parts, so that two lists of 10,000 words do not make a matrix of 400 MB.
            closest = torch.cat([(part @ vectors[b].T).argmax(1) for part in vectors[a].split(2048)])
            nearest[a, b] = {unit: there[i] for unit, i in zip(here, closest.tolist(), strict=True)}
    return nearest


def own_units(causal: Sequence[Sequence[str]]) -> list[list[str]]:
    """The folded units of each label that no other label has, each once."""
    folded = [list(dict.fromkeys(" ".join(w) for w in map(as_phrase, words) if w)) for words in causal]
    times = Counter(unit for units in folded for unit in units)
    return [[unit for unit in units if times[unit] == 1] for units in folded]


class Counterfactuals:
    """Makes the rows of training texts.

    Args:
        nearest: as :func:`nearest_words` gives it.
        causal: words and multi-word units of each label.
        phrases: as :func:`spurge.methods.golden.phrases.telling_phrases` gives them.
        seed: of all choices; the rows of a text depend on the seed, its index and its words alone.
    """

    def __init__(
        self, nearest: Nearest, causal: Sequence[Sequence[str]], phrases: Sequence[TellingPhrase], *, seed: int = 0
    ):
        self.seed, self.phrases, self._nearest = seed, tuple(phrases), nearest
        self._labels = len(causal)
        self.label_of = {unit: label for label, units in enumerate(own_units(causal)) for unit in units}
        self.causal = Finder(self.label_of)
        self._phrase = Finder(phrase.text for phrase in phrases)

    def rows(self, index: int, example: Example) -> list[Row]:
        """One kept row, and a swapped and a neutral one where the words of the text allow."""
        draw = random.Random(f"{self.seed}-{index}")
        segments = example.segments
        out = [Row(example, "kept", index, example)]
        other = draw.choice([y for y in range(self._labels) if y != example.label])
        swapped = self.swapped(segments, example.label, other, self._nearest_to)
        if swapped is not None:
            out.append(Row(example_of(swapped, other), "swapped", index, None))
        neutral = self.neutral(segments, example.label, draw)
        if neutral is not None:
            changed, bare = neutral
            out.append(Row(example_of(changed, example.label), "neutral", index, example_of(bare, example.label)))
        return out

    def swapped(
        self,
        segments: Sequence[str],
        label: int,
        other: int,
        replacement: Callable[[str, int], str | None],
        *,
        every: bool = False,
    ) -> list[str] | None:
        """Units of ``label`` and ``other`` exchanged; None unless those of ``label`` outnumber each other label's.

        A text whose causal words speak for another label than its own is noise, negation or irony: swapping its words
        would not turn it into one of ``other``.

        Args:
            segments: the text, or both of a pair.
            label: of the text.
            other: label it should have afterwards.
            replacement: gives, for a unit of the text and a label, the unit of that label to put in its place; None
                leaves it. Units of third labels are asked for with their own label.
            every: None, too, where a unit of ``label`` is left.
        """
        found = [self.causal.find(segment) for segment in segments]
        votes = Counter(self.label_of[unit] for spans in found for _, _, unit in spans)
        if not votes[label] or any(votes[y] >= votes[label] for y in range(self._labels) if y != label):
            return None
        partner = {label: other, other: label}
        changed = []
        for segment, spans in zip(segments, found, strict=True):
            edits = []
            for start, end, unit in spans:
                own = self.label_of[unit]
                new = replacement(unit, partner.get(own, own))
                if new is not None:
                    edits.append((start, end, cased(new, segment[start:end])))
                elif every and own == label:
                    return None
            changed.append(replaced(segment, edits))
        return changed if changed != list(segments) else None

    def _nearest_to(self, unit: str, label: int) -> str | None:
        return self._nearest.get((self.label_of[unit], label), {}).get(unit)

    def neutral(self, segments: Sequence[str], label: int, draw: random.Random) -> tuple[list[str], list[str]] | None:
        """The text with another label's phrase in place of its own phrases, and the text with none."""
        bare = [replaced(s, [(start, end, "") for start, end, _ in self._phrase.find(s)]) for s in segments]
        if not all(bare):  # nothing but phrases
            return None
        foreign = [phrase for phrase in self.phrases if phrase.label != label]
        if not foreign:
            return (bare, bare) if bare != list(segments) else None
        (phrase,) = draw.choices(foreign, [p.strength**2 for p in foreign])
        changed, at = list(bare), draw.randrange(len(bare))
        changed[at] = self._insert(changed[at], phrase.text, draw)
        return changed, bare

    def _insert(self, segment: str, phrase: str, draw: random.Random) -> str:
        """The segment with a phrase in front, at its end, or between two words."""
        spans = self.causal.split(segment)
        place = draw.choice([0, len(spans), draw.randrange(len(spans) + 1)])
        at = spans[place][0] if place < len(spans) else spans[-1][1] if spans else len(segment)
        return _BLANKS.sub(" ", f"{segment[:at]} {phrase} {segment[at:]}").strip()


def example_of(segments: Sequence[str], label: int) -> Example:
    """The text, or pair of texts, under a label."""
    return Example(segments[0], label, segments[1] if len(segments) > 1 else None)
