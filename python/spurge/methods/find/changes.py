"""Texts changed at one candidate: it is taken out, exchanged for a neutral one, or put into texts that lack it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from spurge.engine.data.examples import Example
from spurge.methods.find.candidates import ARROW, MARKS, PLACES, WORDED, Candidate, is_negation
from spurge.methods.golden.phrases import Finder, Span, cased, replaced

Change = Literal["delete", "swap", "insert"]
MEASURABLE = (*WORDED, "pair", "negation", "punctuation")
_BLANKS = re.compile(r"\s{2,}")
_MOST_LOG_ODDS = 1.0  # of a unit that stands in for others
_GAP_BEFORE_MARK = re.compile(r"\s+([,.;:!?])")


@dataclass(frozen=True)
class Pair:
    """Two texts that differ at one candidate: ``with_it`` has it and ``without`` has not.

    Attributes:
        change: how they were made.
        source: number of the text that they were made from.
    """

    change: Change
    source: int
    with_it: Example
    without: Example


class Neutral:
    """Units that go with no label, to stand in for others of the same length and frequency.

    Args:
        pool: words and phrases with the texts that have each.
        log_odds: of the label that each goes with, ``[len(pool)]``.
    """

    def __init__(self, pool: Sequence[Candidate], log_odds: np.ndarray) -> None:
        self._by_length: dict[int, list[tuple[Candidate, float]]] = {}
        for one, size in zip(pool, np.abs(log_odds).tolist(), strict=True):
            if size <= _MOST_LOG_ODDS:
                self._by_length.setdefault(len(one.name.split()), []).append((one, size))

    def nearest(self, name: str, frequency: int, most: int = 8) -> list[str]:
        """Units of as many words as ``name`` (or next to that many) that share none with it.

        They are the nearest in the logarithm of their frequency, plus twice their log-odds.
        """
        own, size = set(name.split()), len(name.split())
        for length in sorted(self._by_length, key=lambda n: (abs(n - size), n)):
            fit = [
                (abs(np.log(len(one.rows) / frequency)) + 2 * odds, one.name)
                for one, odds in self._by_length[length]
                if not own & set(one.name.split())
            ]
            if len(fit) >= 2:
                return [unit for _, unit in sorted(fit)[:most]]
        return []


class Changes:
    """Makes pairs of texts for one candidate at a time.

    Args:
        examples: all texts.
        neutral: what stands in for words and phrases.
        texts: how many texts are changed in each way, at most.
        seed: of all choices; those of a candidate depend on it and the candidate alone.
    """

    def __init__(self, examples: Sequence[Example], neutral: Neutral, *, texts: int, seed: int) -> None:
        self._examples, self._neutral, self._texts, self._seed = examples, neutral, texts, seed

    def of(self, one: Candidate, label: int) -> list[Pair]:
        """Pairs of texts with and without the candidate; none for kinds that no change of a text can tell apart.

        Half of the texts that have it, as far as there are such, are of other labels than ``label``, which it goes
        with: where all else says the same, a model that leans on it answers alike without it.
        """
        if one.kind not in MEASURABLE:
            return []
        draw = random.Random(f"{self._seed}-{one.key}")
        having = self._having(one, label, draw)
        stand_ins = self._stand_ins(one)
        pairs = []
        for number in having:
            row = self._examples[number]
            new: dict[Change, str] = {"delete": ""}
            if stand_ins:
                new["swap"] = draw.choice(stand_ins)
            for change, unit in new.items():
                changed = _changed(row, one, _replacing(one, unit))
                if changed is not None:
                    pairs.append(Pair(change, number, row, changed))
        if one.kind in WORDED or one.kind == "punctuation":
            pairs += self._insertions(one, stand_ins, draw)
        return pairs

    def _having(self, one: Candidate, label: int, draw: random.Random) -> list[int]:
        rows = one.rows.tolist()
        against = [number for number in rows if self._examples[number].label != label]
        chosen = draw.sample(against, min(self._texts // 2, len(against)))
        known = set(chosen)
        rest = [number for number in rows if number not in known]
        return chosen + draw.sample(rest, min(self._texts - len(chosen), len(rest)))

    def _stand_ins(self, one: Candidate) -> list[str]:
        if one.kind not in (*WORDED, "pair"):
            return []
        name = one.name.split(ARROW)[-1]
        return self._neutral.nearest(name, len(one.rows))

    def _insertions(self, one: Candidate, stand_ins: Sequence[str], draw: random.Random) -> list[Pair]:
        """Texts that lack the candidate, with it and, in the same place, with a neutral unit where there is one."""
        lacking = np.setdiff1d(np.arange(len(self._examples)), one.rows, assume_unique=True).tolist()
        pairs = []
        for number in draw.sample(lacking, min(self._texts, len(lacking))):
            row, at = self._examples[number], draw.random()
            other = draw.choice(stand_ins) if stand_ins else None
            without: Example | None = row
            if one.kind == "punctuation":
                with_it = _changed(row, one, lambda text: f"{text}{one.name}")
            else:
                with_it = _changed(row, one, partial(inserted, unit=one.name, at=at))
                if other is not None:
                    without = _changed(row, one, partial(inserted, unit=other, at=at))
            if with_it is not None and without is not None:
                pairs.append(Pair("insert", number, with_it, without))
        return pairs


def _changed(row: Example, one: Candidate, change: Callable[[str], str]) -> Example | None:
    """The example with one of its texts changed; None where nothing changes or nothing is left."""
    parts = row.segments
    number = PLACES.index(one.place) if one.place else len(parts) - 1 if one.kind == "pair" else 0
    before, parts[number] = parts[number], change(parts[number])
    if parts[number] == before or not parts[number].strip():
        return None
    return replace(row, text=parts[0], pair=parts[1] if len(parts) == 2 else None)


def _replacing(one: Candidate, new: str) -> Callable[[str], str]:
    """A change that puts ``new`` in the place of each occurrence."""
    if one.kind == "punctuation":
        return lambda text: _tidy(MARKS.sub(lambda found: new if found[0] == one.name else found[0], text))
    name = one.name.split(ARROW)[-1]
    finder = Finder(() if one.kind == "negation" else [name])

    def found(text: str) -> list[Span]:
        return [s for s in finder.split(text) if is_negation(s[2])] if one.kind == "negation" else finder.find(text)

    def change(text: str) -> str:
        edits = [(start, end, cased(new, text[start:end])) for start, end, _ in found(text)]
        return _tidy(replaced(text, edits)) if edits else text

    return change


def inserted(text: str, unit: str, at: float) -> str:
    """The text with a unit in front of a word, or behind the last; ``at`` in [0, 1) says where."""
    spans = Finder(()).split(text)
    place = int(at * (len(spans) + 1))
    cut = spans[place][0] if place < len(spans) else spans[-1][1] if spans else len(text)
    return _BLANKS.sub(" ", f"{text[:cut]} {unit} {text[cut:]}").strip()


def _tidy(text: str) -> str:
    return _GAP_BEFORE_MARK.sub(r"\1", _BLANKS.sub(" ", text)).strip()
