"""What a model may lean on: words, phrases, pairs of words, and what else can be told of a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spurge.engine.data.bound import of_counts
from spurge.engine.data.examples import Example, Examples
from spurge.engine.data.rows import is_missing
from spurge.engine.data.words import split_words
from spurge.methods.golden.phrases import Finder

KINDS = ("word", "phrase", "pair", "overlap", "negation", "length", "punctuation", "column", "topic")
WORDED = ("word", "phrase")  # kinds that are words of golden sets
PLACES = ("text", "second text")
ARROW = " → "
_NEGATIONS = """
    not no never none nobody nothing neither nor nowhere without cannot n't don't doesn't didn't isn't aren't wasn't
    weren't won't wouldn't can't couldn't shouldn't hasn't haven't hadn't ain't hardly
"""
NEGATIONS = frozenset(_NEGATIONS.split())
MARKS = re.compile(r"!{2,}|\?{2,}|\.{3,}|…|[!?;:()\"*/%$&#@]|--+|—")
_AT_LEAST = re.compile(r"at least (\d+(?:\.\d+)?)\b.*")
_MOST_VALUES = 50  # of a column of names
_LEAST_PAIR_Z = 3.0
_PAIR_WORDS = 300  # of each text, the most frequent ones


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something that some texts have and others do not.

    Attributes:
        kind: one of `KINDS`.
        name: which of its kind: the words, the mark, ``"at least 12 words"``, ``"column = value"``.
        place: of pairs of texts, the one that has it, one of `PLACES`; "" where that is clear.
        rows: numbers of the texts that have it, rising, int64.
    """

    kind: str
    name: str
    place: str
    rows: np.ndarray

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.kind}: {self.name}" + (f" ({self.place})" if self.place else "")


def traits(examples: Examples, least: int) -> list[Candidate]:
    """Negation, length, punctuation, and of pairs their overlap: those that some texts have and some have not."""
    found = []
    paired = examples[0].pair is not None
    for number, place in enumerate(PLACES if paired else ("",)):
        texts = [row.segments[number] for row in examples]
        found.append(("negation", "a negation", place, [has_negation(text) for text in texts]))
        lengths = [len(split_words(text)) for text in texts]
        for edge in sorted({int(np.quantile(lengths, q)) for q in (0.5, 0.8)}):
            found.append(("length", f"at least {edge} words", place, [length >= edge for length in lengths]))
        marks = [set(MARKS.findall(text)) for text in texts]
        for mark in sorted(set().union(*marks)):
            found.append(("punctuation", mark, place, [mark in own for own in marks]))
    if paired:
        shares = [overlap_of(row) for row in examples]
        for least_share in sorted({round(float(np.quantile(shares, q)), 2) for q in (0.5, 0.8)}):
            name = f"at least {least_share} of the second text's words"
            found.append(("overlap", name, "", [share >= least_share for share in shares]))
    made = [Candidate(kind, name, place, np.flatnonzero(having)) for kind, name, place, having in found]
    return [one for one in made if least <= len(one.rows) <= len(examples) - least]


def columns_of(columns: Mapping[str, Sequence[Any]], least: int) -> list[Candidate]:
    """Values of columns beside the texts: each frequent name, and numbers of at least the median.

    Raises:
        ValueError: a column of names with more than 50 frequent ones.
    """
    found = []
    for name, values in columns.items():
        known = np.array([not is_missing(value) for value in values])
        if all(
            isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in np.array(values, object)[known]
        ):
            numbers = np.array([float(v) if ok else np.nan for v, ok in zip(values, known, strict=True)])
            edge = float(np.nanmedian(numbers)) if known.any() else 0.0
            found.append(Candidate("column", f"{name} at least {edge:g}", "", np.flatnonzero(numbers >= edge)))
            continue
        counts = Counter(str(value) for value, ok in zip(values, known, strict=True) if ok)
        frequent = sorted(value for value, count in counts.items() if count >= least)
        if len(frequent) > _MOST_VALUES:
            raise ValueError(
                f"columns: {name!r} has {len(frequent)} frequent values, at most {_MOST_VALUES} are looked at"
            )
        for value in frequent:
            rows = np.flatnonzero([ok and str(v) == value for v, ok in zip(values, known, strict=True)])
            found.append(Candidate("column", f"{name} = {value}", "", rows))
    total = max((len(values) for values in columns.values()), default=0)
    return [one for one in found if least <= len(one.rows) <= total - least]


def topics_of(labels: np.ndarray, names: Sequence[str], least: int) -> list[Candidate]:
    """One candidate for each topic; ``labels`` is the topic of each text, int64 ``[N]``."""
    made = [Candidate("topic", name, "", np.flatnonzero(labels == number)) for number, name in enumerate(names)]
    return [one for one in made if least <= len(one.rows) <= len(labels) - least]


def word_pairs(
    first: Sequence[Candidate], second: Sequence[Candidate], labels: np.ndarray, classes: int, least: int
) -> list[Candidate]:
    """Pairs of a word of the first text and one of the second that go with a label (``|z|`` of at least 3).

    Args:
        first, second: the words of either text, of which the most frequent ones are paired.
        labels: int64 ``[N]``.
        classes: Y.
        least: texts that have both, at least.
    """
    left, right = (sorted(words, key=lambda w: (-len(w.rows), w.name))[:_PAIR_WORDS] for words in (first, second))
    if not left or not right:
        return []
    tables = []
    for words in (left, right):
        table = np.zeros((len(words), len(labels)), dtype=np.float32)
        for number, word in enumerate(words):
            table[number, word.rows] = 1
        tables.append(table)
    together = [tables[0] * (labels == label) @ tables[1].T for label in range(classes)]
    counts = np.stack(together, 2).reshape(-1, classes).astype(np.float64)  # [left * right, Y]
    of_label = np.bincount(labels, minlength=classes).astype(np.float64)
    bound = np.abs(of_counts(counts, np.broadcast_to(of_label, counts.shape)).z) >= _LEAST_PAIR_Z
    chosen = np.flatnonzero(bound & (counts.sum(1) >= least))
    return [
        Candidate("pair", f"{one.name}{ARROW}{other.name}", "", np.intersect1d(one.rows, other.rows))
        for one, other in ((left[at // len(right)], right[at % len(right)]) for at in chosen.tolist())
    ]


def has_negation(text: str) -> bool:
    """Whether one of its words says no."""
    return any(is_negation(word) for word in split_words(text))


def is_negation(word: str) -> bool:
    """Whether a folded word says no."""
    return word in NEGATIONS or word.endswith("n't")


def overlap_of(row: Example) -> float:
    """Share of the second text's different words that the first one has, too."""
    second = set(split_words(row.pair or ""))
    return len(second & set(split_words(row.text))) / len(second) if second else 0.0


def presence(
    kind: str, name: str, place: str, examples: Examples, columns: Mapping[str, Sequence[Any]] | None = None
) -> np.ndarray:
    """Which texts have a candidate of a table, bool ``[N]``: of any texts, also others than it was found in.

    Raises:
        ValueError: a topic, which texts alone do not tell; or a column that is not given.
    """
    if kind == "topic":
        raise ValueError(f"candidate: {name!r} is a topic, which other texts do not tell; use spurge.find_topics")
    if kind == "column":
        return _column_presence(name, columns or {}, len(examples))
    number = PLACES.index(place) if place else None
    if kind in WORDED or kind == "pair":
        parts = name.split(ARROW) if kind == "pair" else [name]
        finders = [Finder([part]) for part in parts]
        having = []
        for row in examples:
            own = row.segments
            where = own if number is None else own[number : number + 1]
            if kind == "pair":
                having.append(all(finder.find(text) for finder, text in zip(finders, own, strict=False)))
            else:
                having.append(any(finders[0].find(text) for text in where))
        return np.array(having, dtype=bool)
    texts = [row.segments[number or 0] for row in examples]
    if kind == "negation":
        return np.array([has_negation(text) for text in texts])
    if kind == "punctuation":
        return np.array([name in MARKS.findall(text) for text in texts])
    edge = _AT_LEAST.fullmatch(name)
    if edge is None or kind not in ("length", "overlap"):
        raise ValueError(f"candidate: cannot tell which texts have {kind} {name!r}")
    values = [overlap_of(row) for row in examples] if kind == "overlap" else [len(split_words(t)) for t in texts]
    return np.array(values) >= float(edge[1])


def _column_presence(name: str, columns: Mapping[str, Sequence[Any]], count: int) -> np.ndarray:
    for column, values in columns.items():
        rest = name.removeprefix(column)
        if rest.startswith(" = "):
            return np.array([not is_missing(v) and str(v) == rest[3:] for v in values], dtype=bool)
        if rest.startswith(" at least "):
            edge = float(rest.removeprefix(" at least "))
            return np.array([not is_missing(v) and float(v) >= edge for v in values], dtype=bool)
    raise ValueError(f"columns: {name!r} is a column that was not given")
