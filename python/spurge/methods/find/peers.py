"""Whether words like a candidate go with labels, too: what decides a label comes as a class of words, a shortcut alone.

A reviewer who writes "superb" could have written "excellent" or "awful", and these go with a label as well. Whoever
writes "near the old station" could have written "behind the library", which goes with none. So a candidate whose peers,
the words most alike (`spurge.methods.find.likeness`), go with labels is likely a reason for its label; one that goes
with a label alone among its peers is likely a shortcut. The candidate's own texts have no say in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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


class Peers:
    """The words of a set of texts, where they lie, and how far each goes with labels.

    Args:
        words: W words.
        vectors: whose products say how alike they are, ``[W, D]``.
        excess: squared log-odds of each beyond chance, ``[W]``.
        rows: texts of each word; None where there are no texts, as for a list of words.
        total: number of texts, for weights of rare words.
    """

    def __init__(
        self,
        words: Sequence[str],
        vectors: np.ndarray,
        excess: np.ndarray,
        rows: Sequence[np.ndarray] | None = None,
        total: int = 0,
    ) -> None:
        self.words, self._vectors, self._excess, self._rows = list(words), vectors, excess, rows
        self._number: Mapping[str, int] = {word: number for number, word in enumerate(words)}
        self._count = max(1, round(len(words) ** 0.5))
        self._base = max(float(excess.mean()) if len(excess) else 0.0, _LEAST_BASE)
        shares = np.ones(len(words)) if rows is None else np.array([len(own) / total for own in rows])
        self._weight = np.log1p(1 / np.maximum(shares, 1e-9)) if rows is not None else shares

    def of(self, name: str, rows: np.ndarray | None = None) -> Witnesses:
        """What the peers of a candidate say.

        Args:
            name: words that are all known.
            rows: texts of the candidate.
        """
        own = [self._number[word] for word in name.split() if word in self._number]
        if not own:
            return Witnesses(float("nan"))
        vector = self._weight[own] @ self._vectors[own]
        nearness = self._vectors @ (vector / max(float(np.linalg.norm(vector)), 1e-12))
        nearness[own] = -np.inf
        chosen: list[int] = []
        for number in np.argsort(-nearness, kind="stable"):
            if len(chosen) == self._count or nearness[number] <= 0:
                break
            if not self._together(int(number), rows):
                chosen.append(int(number))
        if not chosen:
            return Witnesses(float("nan"))
        weight = nearness[chosen] ** 2
        mean = float(weight @ self._excess[chosen] / weight.sum())
        ratio = np.log((mean + _BASE * self._base) / ((1 + _BASE) * self._base))
        return Witnesses(float(ratio), tuple(self.words[number] for number in chosen[:3]))

    def _together(self, number: int, rows: np.ndarray | None) -> bool:
        """Whether a word stands mostly in the candidate's texts, or the candidate in the word's."""
        if rows is None or self._rows is None:
            return False
        other = self._rows[number]
        common = len(np.intersect1d(rows, other, assume_unique=True))
        return common > _OVERLAP * min(len(rows), len(other))
