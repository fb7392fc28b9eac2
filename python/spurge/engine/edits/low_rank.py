"""Changes of a matrix as products of two thin ones: exact where the rank allows it, else the nearest of that rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class RankTooHigh(ValueError):
    """A change of a matrix that no product of the allowed rank gives."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A change ``b a`` of a matrix ``[O, I]``.

    Attributes:
        a: float32 ``[r, I]``.
        b: float32 ``[O, r]``.
        error: what is missing, relative to the change: norm of the difference over norm of the change, both of
            Frobenius; 0 for an exact product.
    """

    a: Tensor
    b: Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a)


def factored(change: Tensor, slack: float, max_rank: int, *, truncate: bool = False) -> Factors:
    """A change ``[O, I]`` of a matrix as a product.

    A few columns or rows are taken as they are, beside ones that say which they are; what changes more is decomposed by
    its singular values (the nearest product of a rank, Eckart and Young, 1936).

    Args:
        change: floating; zero columns and rows cost nothing.
        slack: norm (Frobenius) of what may be missing of a product that counts as exact: the rounding of the weights.
        max_rank: at least 1.
        truncate: take the nearest product of that rank where none is exact.

    Raises:
        RankTooHigh: no product of that rank is exact, and ``truncate`` is False.
    """
    change = change.detach().to("cpu", torch.float64)
    rows, columns = change.any(1).nonzero()[:, 0], change.any(0).nonzero()[:, 0]
    few = min(len(rows), len(columns))
    if not few:
        return Factors(torch.zeros(1, change.shape[1]), torch.zeros(len(change), 1))
    thin = few <= max_rank
    if thin and 2 * few <= min(change.shape):
        return _selected(change, rows, columns)
    left, sizes, right = torch.linalg.svd(change[rows][:, columns], full_matrices=False)
    tails = torch.cat([sizes.square().flip(0).cumsum(0).flip(0).sqrt(), sizes.new_zeros(1)])  # without the first r
    rank = max(1, int((tails > slack).sum()))
    if rank > max_rank and not truncate:
        raise RankTooHigh(
            f"needs rank {rank} to be exact, {max_rank} is allowed, at which it would be off by "
            f"{float(tails[max_rank] / tails[0]):.2g} of its size"
        )
    if thin and rank == few:
        return _selected(change, rows, columns)
    kept = min(rank, max_rank)
    a, b = torch.zeros(kept, change.shape[1]), torch.zeros(len(change), kept)
    root = sizes[:kept].sqrt()
    a[:, columns] = (root[:, None] * right[:kept]).float()
    b[rows] = (left[:, :kept] * root).float()
    return Factors(a, b, float(tails[kept] / tails[0]) if kept < rank else 0.0)


def _selected(change: Tensor, rows: Tensor, columns: Tensor) -> Factors:
    """The changed columns, or rows where they are fewer, each with a one at its place."""
    if len(columns) <= len(rows):
        return Factors(_ones(columns, change.shape[1]), change[:, columns].float())
    return Factors(change[rows].float(), _ones(rows, len(change)).t().contiguous())


def _ones(places: Tensor, width: int) -> Tensor:
    """``[r, width]``: row i has its one at ``places[i]``."""
    ones = torch.zeros(len(places), width)
    ones[torch.arange(len(places)), places] = 1
    return ones
