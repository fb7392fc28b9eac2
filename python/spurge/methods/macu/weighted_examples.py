"""Texts with how much each counts in a sum over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.files import canonical_json, fingerprint
from spurge.engine.data.examples import Examples


@dataclass(frozen=True, eq=False)
class WeightedExamples:
    """Texts and their weights. Made by :meth:`of`.

    Attributes:
        examples: N texts.
        weights: float64 ``[N]`` on the CPU, at least 0 and of mean 1, but for parts of :meth:`batches`.
    """

    examples: Examples
    weights: Tensor

    @classmethod
    def of(cls, examples: Examples, weights: Tensor | Sequence[float] | None = None) -> WeightedExamples:
        """The texts whose weight is above 0, with weights of mean 1; None: all texts, alike.

        Weights that are all equal become 1, exactly.

        Args:
            weights: ``[N]``, at least 0.

        Raises:
            TypeError: no numbers.
            ValueError: another shape, a number that is negative or not finite, or nothing but 0.
        """
        if weights is None:
            return cls(examples, torch.ones(len(examples), dtype=torch.float64))
        checked = _checked(weights, len(examples))
        counts = checked / checked.max() > 0
        if not bool(counts.all()):
            examples, checked = examples.subset(counts.nonzero()[:, 0].tolist()), checked[counts]
        return cls(examples, _scaled(checked))

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def even(self) -> bool:
        """True where all texts count alike."""
        return bool((self.weights == 1).all())

    @property
    def effective(self) -> float:
        r"""Kish's effective number of texts, :math:`(\sum_b w_b)^2 / \sum_b w_b^2`."""
        return float(self.weights.sum().square() / self.weights.square().sum())

    def sample(self, count: int | None, seed: int) -> WeightedExamples:
        """``count`` of the texts as `Examples.sample` draws them, with their own weights scaled to mean 1.

        All of them, in their order, where there are no more than that or ``count`` is None.
        """
        if count is None or count >= len(self):
            return self
        rows = self.examples.draw(count, seed)
        return WeightedExamples(self.examples.subset(rows), _scaled(self.weights[rows]))

    def batches(self, size: int) -> Iterator[WeightedExamples]:
        """Consecutive runs of ``size`` texts with the weights they have here."""
        return (
            WeightedExamples(*part) for part in zip(self.examples.batches(size), self.weights.split(size), strict=True)
        )

    def fingerprint(self) -> str:
        """SHA-256 of texts and weights."""
        return fingerprint(canonical_json([self.examples.fingerprint(), fingerprint(self.weights)]))


def _scaled(weights: Tensor) -> Tensor:
    """Weights of mean 1; by the greatest first, so that no sum overflows and equal ones are exactly 1."""
    shares = weights / weights.max()
    return shares / shares.mean()


def _checked(weights: Any, rows: int) -> Tensor:
    if isinstance(weights, Tensor):
        found = weights.detach().cpu()
        numeric = found.dtype != torch.bool and not found.is_complex()
    else:
        try:
            array = np.asarray(weights)
        except ValueError as error:
            raise TypeError(f"weights: expected a number for each text, got {type(weights).__name__}") from error
        numeric = array.dtype.kind in "iuf"
        found = torch.from_numpy(array.astype(np.float64)) if numeric else torch.empty(0)
    if not numeric:
        raise TypeError(f"weights: expected a number for each text, got {getattr(weights, 'dtype', weights)!r:.60}")
    if found.shape != (rows,):
        raise ValueError(f"weights: expected shape ({rows},), one for each text, got {tuple(found.shape)}")
    found = found.double()
    wrong = ((found < 0) | ~found.isfinite()).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"weights: expected finite numbers of at least 0, got {float(found[wrong[0]])} at row {wrong[0]}"
        )
    if not bool(found.any()):
        raise ValueError(f"weights: need at least 1 text with a weight above 0, got 0 for all {rows}")
    return found
