"""Texts to train on whose label follows from a swap of words: made from golden words and the training set alone.

Of each kind (`SwapShares`) the swap says what the label is, so that a model which answers by anything else is wrong:

* *flip*: every causal word of the label by one of another label, of the same ending and of near frequency, among the
  nearest by the model's input embeddings; the label is that other one.
* *random*: the same with any causal word of the other label that has the same ending.
* *same*: every causal word by another of its own label; the label stays.
* *negation*: a "not" put before a causal word or taken away; of two labels, it is the other one.
* *template*: a short sentence around one causal word.
* *neutral*: phrases that go with a label without being a reason for it, exchanged for another's; the label stays.

Negation and templates are English, and are left out where texts come in pairs. What a bag of words finds implausible
under its new label is dropped: of a text with "dull" and "but never boring" a swap of single words makes neither.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spurge.engine.base.checks import number
from spurge.engine.data.examples import Example, Examples
from spurge.engine.data.tfidf import BagOfWords
from spurge.engine.data.words import split_words
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.embedding import word_vectors
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.golden.phrases import telling_phrases
from spurge.methods.macu.counterfactual import Counterfactuals, example_of, own_units

Kind = Literal["flip", "random", "same", "negation", "template", "neutral"]

_SEARCHED = 20_000  # texts that words are counted in, telling phrases are looked for in and the bag of words learns
_ATTEMPTS = 2000  # texts that are tried in turn for one swap of a kind, before the kind is given up
_ENDINGS = (
    *("ingly", "fully", "lessly", "ously", "ably", "ibly", "ness", "less", "ful", "ous", "ive", "able", "ible"),
    *("ment", "tion", "sion", "ity", "ing", "ed", "ly", "est", "er", "ies", "s"),
)
_DENYING = (
    "not no never neither nor none nothing nobody nowhere hardly barely scarcely without cannot lack lacks lacking n't "
    "isn't wasn't aren't weren't don't doesn't didn't won't wouldn't can't couldn't shouldn't hasn't haven't ain't "
    "isnt wasnt dont doesnt didnt wont cant"
)
_NEGATORS = frozenset(_DENYING.split())
_DEGREE = r"(?:very|so|really|quite|too|truly|particularly|all that|that|just|pretty|rather|more|as)"
_COPULA = re.compile(
    rf"\b(?:is|was|are|were|'s|be|been|seems|seemed|feels|felt|looks|looked)(?:\s+{_DEGREE})?\s+$", re.IGNORECASE
)
_NOT = re.compile(r"\bnot\s+|\s*\bn't\b|(?<=\w)n't\b", re.IGNORECASE)
_NOUNS = (
    "camera phone battery screen picture software player service food staff room place waiter price quality sound "
    "story plot acting movie film book show performance script music ending product design delivery"
)
_THINGS = tuple(_NOUNS.split())
_FRAMES = (
    "the {thing} is {word}",
    "the {thing} was very {word}",
    "{word} {thing}",
    "a really {word} {thing}",
    "i found the {thing} {word}",
    "it is {word}",
    "the {thing} is so {word}",
)
_DENIALS = ("the {thing} is not {word}", "the {thing} was not very {word}", "it is not {word}", "not a {word} {thing}")


@dataclass(frozen=True, kw_only=True)
class SwapShares:
    """How many swaps of each kind there are, by their ratios.

    Raises:
        ValueError: a number below 0 or not finite, or none above 0.
        TypeError: no number.
    """

    flip: float = 1.0
    random: float = 0.5
    same: float = 1.0
    negation: float = 0.5
    template: float = 0.5
    neutral: float = 0.5

    def __post_init__(self) -> None:
        for part in fields(self):
            number(part.name, getattr(self, part.name), 0)
        if not sum(getattr(self, part.name) for part in fields(self)):
            raise ValueError("shares: one of them must be above 0")


@dataclass(frozen=True)
class Swap:
    """A swapped text under the label that it has now, and how it was made."""

    example: Example
    kind: Kind


def ending(word: str) -> str:
    """What a word ends in, of the usual English endings; "" for none, " " for several words."""
    if " " in word:
        return " "
    return next((end for end in _ENDINGS if word.endswith(end) and len(word) > len(end) + 2), "")


class SwapMaker:
    """Makes swaps of texts; the same for the same arguments.

    Args:
        handle: of a model with input embeddings, which say what words are near.
        train: where words are counted, telling phrases are looked for, and the bag of words learns.
        golden: causal and irrelevant words of the labels of ``train``.
        shares: of the kinds.
        nearest: of how many near words one is drawn.
        plausible: least probability of the new label by the bag of words, of flip and random.

    Attributes:
        kinds: those that can be made.
    """

    def __init__(
        self,
        handle: Handle,
        train: Examples,
        golden: GoldenTokens,
        shares: SwapShares,
        *,
        nearest: int = 12,
        plausible: float = 0.35,
        seed: int = 0,
    ) -> None:
        searched = train if len(train) <= _SEARCHED else train.sample(_SEARCHED, seed)
        segments = [row.segments for row in searched]
        causal = [list(golden.causal[label]) for label in golden.labels]
        phrases = telling_phrases(segments, searched.targets.tolist(), golden.irrelevant) if shares.neutral else []
        self._units = own_units(causal)
        self._texts = Counterfactuals({}, causal, phrases, seed=seed)
        self._counts = Counter(word for parts in segments for part in parts for word in split_words(part))
        self._vectors = [word_vectors(handle, units) for units in self._units]
        self._endings = [_by_ending(units) for units in self._units]
        self._near: dict[tuple[str, int], list[str]] = {}
        self._nearest, self._plausible, self._seed = nearest, plausible, seed
        english = searched[0].pair is None and len(self._units) == 2
        possible = {kind: getattr(shares, kind) for kind in get_args(Kind)}
        if not english:
            possible |= {"negation": 0.0, "template": 0.0}
        if not phrases:
            possible["neutral"] = 0.0
        self.kinds: dict[Kind, float] = {kind: share for kind, share in possible.items() if share}
        self._predicates = self._found_predicates(segments) if "template" in self.kinds else []
        self._bag = BagOfWords(searched) if {"flip", "random"} & self.kinds.keys() else None

    def make(self, texts: Examples, count: int, seed: int = 0) -> list[Swap]:
        """``count`` swaps of texts in random order, of all kinds by their shares; fewer where few can be made.

        Raises:
            ValueError: not one can be made.
        """
        draw = random.Random(f"{self._seed}-{seed}-{len(texts)}-{count}")
        made: list[Swap] = []
        kinds, order = dict(self.kinds), _endless(len(texts), draw)
        while kinds and len(made) < count:
            (kind,) = draw.choices(list(kinds), list(kinds.values()))
            tried = (self._made(kind, texts[next(order)], draw) for _ in range(_ATTEMPTS))
            example = next((example for example in tried if example is not None), None)
            if example is None:
                del kinds[kind]
            else:
                made.append(Swap(example, kind))
        if not made:
            raise ValueError(
                f"golden: nothing to swap in {len(texts)} texts: they hold no causal word of their own label, and no "
                "irrelevant phrase goes with a label"
            )
        return made

    def _made(self, kind: Kind, row: Example, draw: random.Random) -> Example | None:
        if kind == "template":
            return self._template(draw)
        if kind == "neutral":
            found = self._texts.neutral(row.segments, row.label, draw)
            return None if found is None else example_of(found[0], row.label)
        if kind == "negation":
            return self._negated(row)
        other = row.label
        if kind != "same":
            other = draw.choice([label for label in range(len(self._units)) if label != row.label])
        segments = self._swapped(row, other, kind, draw)
        if segments is None:
            return None
        example = example_of(segments, other)
        if kind != "same" and self._bag is not None and self._bag.probabilities(example)[other] < self._plausible:
            return None
        return example

    def _swapped(self, row: Example, other: int, kind: Kind, draw: random.Random) -> list[str] | None:
        """All causal words exchanged; None, too, where the text denies something: then its words decide no label."""
        segments = row.segments
        if other != row.label and any(_NEGATORS & {*split_words(segment)} for segment in segments):
            return None
        return self._texts.swapped(
            segments,
            row.label,
            other,
            lambda unit, label: self._replacement(unit, label, kind, draw),
            every=other != row.label,
        )

    def _replacement(self, unit: str, label: int, kind: Kind, draw: random.Random) -> str | None:
        if kind == "flip":
            among = self._near_words(unit, label)
        else:
            units = self._units[label]
            among = [units[i] for i in self._endings[label].get(ending(unit), ()) if units[i] != unit]
        return draw.choice(among) if among else None

    def _near_words(self, unit: str, label: int) -> list[str]:
        """The nearest units of a label with the same ending, nearer where they are about as frequent."""
        if (unit, label) not in self._near:
            indices = self._endings[label].get(ending(unit), [])
            units, own = self._units[label], self._texts.label_of[unit]
            vector = self._vectors[own][self._units[own].index(unit)]
            counts = torch.tensor([float(self._counts[units[i]]) for i in indices], dtype=torch.float64)
            apart = (counts.add(1).log() - torch.tensor(1.0 + self._counts[unit], dtype=torch.float64).log()).abs()
            scores: Tensor = self._vectors[label][torch.tensor(indices, dtype=torch.long)] @ vector
            best = (scores.double() - 0.05 * apart).topk(min(self._nearest, len(indices))).indices
            self._near[unit, label] = [units[indices[i]] for i in best.tolist()]
        return self._near[unit, label]

    def _negated(self, row: Example) -> Example | None:
        """A "not" taken away where there is one and nothing else denies, or put before a lone predicate."""
        text = row.text
        found = self._texts.causal.find(text)
        denials = list(_NOT.finditer(text))
        if len(found) != 1:
            return None
        start, _, unit = found[0]
        other = 1 - row.label
        said = self._texts.label_of[unit]
        negators = sum(word in _NEGATORS or word.endswith("n't") for word in split_words(text))
        if len(denials) == 1 and negators == 1 and said == other and 0 <= start - denials[0].end() < 40:
            bare = f"{_whole(text[: denials[0].start()])} {text[denials[0].end() :]}"
            return example_of([re.sub(r"\s{2,}", " ", bare).strip()], other)
        place = _COPULA.search(text[:start])
        if negators or said != row.label or place is None:
            return None
        verb = re.match(r"\S+\s+", text[place.start() :])
        assert verb is not None
        at = place.start() + verb.end()
        return example_of([f"{text[:at]}not {text[at:]}"], other)

    def _template(self, draw: random.Random) -> Example | None:
        label = draw.randrange(len(self._units))
        words = self._predicates[label]
        if not words:
            return None
        denied = draw.random() < 0.3
        frame = draw.choice(_DENIALS if denied else _FRAMES)
        return example_of(
            [frame.format(thing=draw.choice(_THINGS), word=draw.choice(words))], 1 - label if denied else label
        )

    def _found_predicates(self, segments: Sequence[Sequence[str]]) -> list[list[str]]:
        """Causal words of each label that a text says of something: after a copula, or a word of degree."""
        said: set[str] = set()
        for parts in segments:
            for part in parts:
                said.update(unit for start, _, unit in self._texts.causal.find(part) if _COPULA.search(part[:start]))
        return [[unit for unit in units if unit in said] for units in self._units]

    def facts(self, swaps: Sequence[Swap]) -> dict[str, Any]:
        """How many there are of each kind, JSON-able."""
        return dict(sorted(Counter(swap.kind for swap in swaps).items()))


def _whole(text: str) -> str:
    """The text with the verb at its end as it is without the "n't" that it has lost: "can" of "ca", "will" of "wo"."""
    return re.sub(r"\bwo$", "will", re.sub(r"\bca$", "can", text))


def _by_ending(units: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        places.setdefault(ending(unit), []).append(i)
    return places


def _endless(count: int, draw: random.Random) -> Iterator[int]:
    """All numbers below ``count`` in random order, again and again."""
    while True:
        yield from draw.sample(range(count), count)
