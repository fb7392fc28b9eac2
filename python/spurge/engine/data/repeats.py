"""Words and phrases of any length that several texts share, with the texts that have each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spurge.engine.base.checks import integer, share_of
from spurge.engine.data.words import GAP, Phrase, word_spans


@dataclass(frozen=True, eq=False)
class Repeat:
    """A word or phrase that several texts have.

    Attributes:
        words: folded.
        rows: numbers of the texts that have it, rising, int64.
        whole: no longer phrase stands in nearly all of these texts in its place.
    """

    words: Phrase
    rows: np.ndarray
    whole: bool

    @property
    def text(self) -> str:
        """The words, joined by blanks."""
        return " ".join(self.words)


def repeats(texts: Sequence[Sequence[str]], *, least: int, nearly: float = 0.95) -> list[Repeat]:
    """All words that enough texts have, and the phrases among them that say more than their parts.

    A phrase grows by a word as long as ``least`` texts have it, without a limit. Of phrases inside each other that
    stand in nearly the same texts the longest is given; words are all given, and say whether they are ``whole``. No
    phrase crosses a punctuation mark or the border of two segments.

    Args:
        texts: the segments of each of N texts: one, or two of a pair.
        least: texts that have a word or phrase, at least.
        nearly: share of a phrase's texts that a longer one has to have to stand for it.

    Returns:
        Words by their first occurrence, then phrases by length.

    Raises:
        ValueError: a number out of range.

    >>> [found.text for found in repeats([["in early spring"], ["in early spring"], ["in town"]], least=2)]
    ['in', 'early', 'spring', 'in early spring']
    """
    least, nearly = integer("least", least, 1), share_of("nearly", nearly)
    words, ids, row_of = _tokens(texts)
    level = _Level.of(ids, row_of, least)
    spelled: dict[int, tuple[int, ...]] = {gram: (gram,) for gram in level.grams.tolist()}
    found: list[Repeat] = []
    while len(level.grams):
        above, parts = level.longer(row_of, least)
        whole = level.not_absorbed(above, parts, nearly)
        for number, gram in enumerate(level.grams.tolist()):
            if whole[number] or len(spelled[gram]) == 1:
                text = tuple(words[word] for word in spelled[gram])
                found.append(Repeat(text, level.rows(number), bool(whole[number])))
        spelled = {
            gram: (*spelled[first], spelled[second][-1])
            for gram, first, second in zip(above.grams.tolist(), *(part.tolist() for part in parts), strict=True)
        }
        level = above
    return found


@dataclass(frozen=True, eq=False)
class _Level:
    """Grams of one length.

    Attributes:
        at: gram that begins at each place of the joined texts, -1 for none; int64 ``[P]``.
        grams: numbers of the G grams that enough texts have.
        pairs: text of each pair of a gram and a text that has it, by gram.
        bounds: where each gram's texts begin in ``pairs``, ``[G + 1]``.
    """

    at: np.ndarray
    grams: np.ndarray
    pairs: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, at: np.ndarray, row_of: np.ndarray, least: int) -> _Level:
        """The level of ``at``; grams that too few texts have are struck out of it."""
        places = np.flatnonzero(at >= 0)
        texts = int(row_of.max(initial=0)) + 1
        both = np.unique(at[places] * texts + row_of[places])
        gram, row = both // texts, both % texts
        grams, counts = np.unique(gram, return_counts=True)
        frequent = counts >= least
        kept = np.repeat(frequent, counts)
        known = np.zeros(int(at.max(initial=-1)) + 2, dtype=bool)
        known[grams[frequent]] = True
        at = np.where(known[at], at, -1)
        return cls(at, grams[frequent], row[kept], np.concatenate([[0], np.cumsum(counts[frequent])]))

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.bounds)

    def rows(self, number: int) -> np.ndarray:
        return self.pairs[self.bounds[number] : self.bounds[number + 1]]

    def longer(self, row_of: np.ndarray, least: int) -> tuple[_Level, tuple[np.ndarray, np.ndarray]]:
        """The grams that are longer by a word, and the two grams of this level that each consists of."""
        first, second = self.at, np.append(self.at[1:], -1)
        both = (first >= 0) & (second >= 0)
        size = int(self.at.max(initial=0)) + 1
        keys, numbers = np.unique(first[both] * size + second[both], return_inverse=True)
        at = np.full(len(first), -1)
        at[both] = numbers
        level = _Level.of(at, row_of, least)
        chosen = keys[level.grams]
        return level, (chosen // size, chosen % size)

    def not_absorbed(self, above: _Level, parts: tuple[np.ndarray, np.ndarray], nearly: float) -> np.ndarray:
        """Which grams no longer one stands for, bool ``[G]``."""
        most = np.zeros(len(self.grams), dtype=np.int64)
        for part in parts:
            np.maximum.at(most, np.searchsorted(self.grams, part), above.counts)
        return most < nearly * self.counts


def _tokens(texts: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Words by number; number of each word in the joined texts, -1 where a phrase must end; text of each."""
    numbers: dict[str, int] = {}
    ids: list[int] = []
    rows: list[int] = []
    for row, segments in enumerate(texts):
        for segment in segments:
            behind = 0
            for start, end, word in word_spans(segment, {}):
                if behind and GAP.fullmatch(segment, behind, start) is None:
                    ids.append(-1)
                    rows.append(row)
                ids.append(numbers.setdefault(word, len(numbers)))
                rows.append(row)
                behind = end
            ids.append(-1)
            rows.append(row)
    return list(numbers), np.asarray(ids, dtype=np.int64), np.asarray(rows, dtype=np.int64)
