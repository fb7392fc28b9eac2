"""Whether words like a candidate go with labels, too: what decides a label comes as a class of words, a shortcut alone.

A reviewer who writes "superb" could have written "excellent" or "awful", and these go with a label as well. Whoever
writes "near the old station" could have written "behind the library", which goes with none. So a candidate whose peers,
the words most alike (`spurge.methods.find.likeness`), go with labels is likely a reason for its label; one that goes
with a label alone among its peers is likely a shortcut. The candidate's own texts have no say in it: where one word
decides a label, whatever is said beside it goes with that label, too. Nor have other forms of it, as "stations".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spurge.engine.data.bound import label_counts, of_counts

_OVERLAP = 0.5  # share of the smaller set of texts from which two words are no independent witnesses
_BASE = 0.1  # of the mean over all words: what is added to a candidate's peers, so that few of them cannot say much
_LEAST_BASE = 0.02  # squared log-odds: where no word goes with a label, ratios to the mean say nothing


@dataclass(frozen=True)
class Witnesses:
    """What the peers of a candidate say.

    Attributes:
        ratio: log of how far they go with labels against all words; NaN without any.
        nearest: the nearest of them.
    """

    ratio: float
    nearest: tuple[str, ...] = ()


class Texts:
    """The texts of W words.

    Args:
        rows: numbers of the texts that have each word.
        labels: of all N texts, int64.
        classes: Y.
    """

    def __init__(self, rows: Sequence[np.ndarray], labels: np.ndarray, classes: int) -> None:
        self._rows, self._labels, self._classes = rows, labels, classes

    @property
    def rarity(self) -> np.ndarray:
        """The weight of each word in a phrase, ``[W]``."""
        return np.log1p(len(self._labels) / np.maximum([len(own) for own in self._rows], 1e-9))

    def together(self, number: int, rows: np.ndarray) -> bool:
        """Whether a word stands mostly in a candidate's texts, or the candidate in the word's."""
        other = self._rows[number]
        common = len(np.intersect1d(rows, other, assume_unique=True))
        return common > _OVERLAP * min(len(rows), len(other))

    def excess(self, numbers: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """Squared log-odds of some words beyond chance, in the texts without a candidate."""
        without = np.ones(len(self._labels), dtype=bool)
        without[rows] = False
        counts = label_counts(
            [own[without[own]] for own in (self._rows[n] for n in numbers)], self._labels, self._classes
        )
        of_label = np.bincount(self._labels[without], minlength=self._classes)
        return of_counts(counts.astype(float), np.broadcast_to(of_label.astype(float), counts.shape)).excess


class Peers:
    """The words of a set of texts, where they lie, and how far each goes with labels.

    Args:
        words: W words.
        vectors: whose products say how alike they are, ``[W, D]``.
        excess: squared log-odds of each beyond chance, ``[W]``.
        texts: of each word, and the labels of all; None where there are no texts, as for a list of words.
    """

    def __init__(
        self,
        words: Sequence[str],
        vectors: np.ndarray,
        excess: np.ndarray,
        texts: Texts | None = None,
    ) -> None:
        self.words, self._vectors, self._excess, self._texts = list(words), vectors, excess, texts
        self._number: Mapping[str, int] = {word: number for number, word in enumerate(words)}
        self._count = max(1, round(len(words) ** 0.5))
        self._base = max(float(excess.mean()) if len(excess) else 0.0, _LEAST_BASE)
        self._weight = np.ones(len(words)) if texts is None else texts.rarity

    def of(self, name: str, rows: np.ndarray | None = None) -> Witnesses:
        """What the peers of a candidate say.

        Args:
            name: words that are all known.
            rows: texts of the candidate.
        """
        parts = name.split()
        own = [self._number[word] for word in parts if word in self._number]
        if not own:
            return Witnesses(float("nan"))
        vector = self._weight[own] @ self._vectors[own]
        nearness = self._vectors @ (vector / max(float(np.linalg.norm(vector)), 1e-12))
        chosen: list[int] = []
        for number in np.argsort(-nearness, kind="stable"):
            if len(chosen) == self._count or nearness[number] <= 0:
                break
            if _is_form(self.words[number], parts):
                continue
            if self._texts is None or rows is None or not self._texts.together(int(number), rows):
                chosen.append(int(number))
        if not chosen:
            return Witnesses(float("nan"))
        weight = nearness[chosen] ** 2
        excess = self._excess[chosen] if self._texts is None or rows is None else self._texts.excess(chosen, rows)
        mean = float(weight @ excess / weight.sum())
        ratio = np.log((mean + _BASE * self._base) / ((1 + _BASE) * self._base))
        return Witnesses(float(ratio), tuple(self.words[number] for number in chosen[:3]))


def _is_form(word: str, others: Sequence[str]) -> bool:
    """Whether a word is one of others, or a form of one: four letters in common, and at most two more at the end."""
    for other in others:
        short, long = sorted((word, other), key=len)
        if word == other or (len(short) >= 4 and len(long) <= len(short) + 2 and long.startswith(short)):
            return True
    return False
