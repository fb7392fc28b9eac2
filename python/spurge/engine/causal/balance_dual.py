"""The dual of one large entropy balancing problem, and the way down to its minimum by L-BFGS."""

from __future__ import annotations

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.base.checks import checked_values
from spurge.engine.base.lbfgs import minimise

_BLOCK = 1 << 16  # numbers of a block that stays in a core's own cache
_ROUNDING = 1e-14  # of a weighted mean in float64, relative to its size
_PATIENCE = (12, 80)  # passes before the Hessian, as dear as a sixth of the covariates in passes, is worth it


class Dual:
    r"""f(lambda) = log sum base exp((c - t) lambda) at the point that was evaluated last.

    Args:
        covariates: ``[N, K]``.
        base: ``[N]``.
        target: t, ``[K]``.
        mean, deviation: of the covariates under ``base``, which give value and gradient at 0 without a pass.
        tolerance: greatest standardised difference.

    Attributes:
        point: lambda, in the covariates' own units, ``[K]``.
        limit: tolerance and what float64 cannot resolve, in standard deviations, ``[K]``.
        proved: the target lies outside the convex hull of the rows: the largest (c - t) lambda is negative.
        evaluations: passes over the covariates.
    """

    def __init__(
        self, covariates: Tensor, base: Tensor, target: Tensor, mean: Tensor, deviation: Tensor, tolerance: float
    ) -> None:
        self.covariates, self.base, self.target = covariates, base, target
        self.scale = torch.where(deviation > 0, 1 / deviation, 0.0)
        self.limit = tolerance + 1e-12 + _ROUNDING * target.abs() * self.scale
        self.point = torch.zeros_like(target)
        self.proved, self.evaluations = False, 0
        self._scores = torch.zeros_like(base)
        self._mean, self._value = mean, base.sum().log()

    def at(self, point: Tensor) -> tuple[float, Tensor]:
        """Value and gradient ``[K]`` at ``point``."""
        self.point = point
        self._scores, self._mean, value = ops.balance_sweep(self.covariates, self.base, point)
        self._value = value[0]
        self.evaluations += 1
        reach = float(point @ self.target)
        # The margin is the rounding of the products that were added.
        self.proved = float(value[1]) - reach < -1e-10 * (1 + float(point.abs() @ self.target.abs()))
        return float(value[0]) - reach, self._mean - self.target

    def differences(self) -> Tensor:
        """Standardised differences of the weighted means from the target, ``[K]``."""
        return (self._mean - self.target) * self.scale

    def balanced(self) -> bool:
        """Whether all of them are within the limit."""
        return bool((self.differences().abs() <= self.limit).all())

    def weights(self) -> Tensor:
        """``[N]``, sum 1."""
        return self.base * (self._scores - self._value).exp()

    def descend(self, evaluations: int) -> None:
        """L-BFGS from 0 until it is balanced, proved out of reach, or has taken so many passes.

        First in the units of standardised covariates, in which the Hessian at 0 has a unit diagonal. Where these are so
        correlated that this does not get there, in coordinates in which the Hessian at the point it reached is 1.
        """
        value, gradient = float(self._value), self._mean - self.target
        if self.evaluations:
            value, gradient = self.at(torch.zeros_like(self.target))
        least, most = _PATIENCE
        patience = min(most, max(least, len(self.target) // 6))
        basis = self.scale
        while not self.balanced() and self.evaluations < evaluations:
            origin, begun = self.point, self.evaluations

            def evaluate(at: Tensor, origin: Tensor = origin, basis: Tensor = basis) -> tuple[float, Tensor]:
                value, gradient = self.at(origin + _times(basis, at))
                return value, _times(basis.t(), gradient)

            moved, _ = minimise(
                evaluate,
                torch.zeros_like(self.target),
                known=(value, _times(basis.t(), gradient)),
                finished=lambda _: self.proved or self.balanced(),
                evaluations=min(patience, evaluations - self.evaluations),
            )
            if self.proved or self.balanced():
                return
            stuck = self.evaluations - begun < min(patience, evaluations - begun)
            value, gradient = self.at(origin + _times(basis, moved))  # the last point tried need not be the best
            if stuck or self.evaluations >= evaluations:
                return
            basis = self.scale[:, None] * _inverse_root(self._hessian())

    def _hessian(self) -> Tensor:
        """Covariance of the standardised covariates under the weights, float64 ``[K, K]``."""
        weights = self.weights()
        found = torch.zeros(len(self.target), len(self.target), dtype=torch.float64, device=self.target.device)
        size = max(1, 16 * _BLOCK // len(self.target))
        for start in range(0, len(self.covariates), size):
            part = (self.covariates[start : start + size].double() - self._mean) * self.scale
            found += part.t() @ (weights[start : start + size, None] * part)
        return found


def moments(covariates: Tensor, base: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column under ``base``, float64 ``[K]``; sd 0 where a column is constant.

    One pass in blocks; narrow types are squared about ``centre`` in float32, which scales need no better.

    Raises:
        ValueError: a number that is not finite.
    """
    rows, width = covariates.shape
    kind = torch.float64 if covariates.dtype == torch.float64 else torch.float32
    share = base / base.sum()
    narrow, middle = share.to(kind), centre.to(kind)
    first = torch.zeros(width, dtype=torch.float64, device=covariates.device)
    second = torch.zeros_like(first)
    size = max(1, _BLOCK // width)
    for start in range(0, rows, size):
        part = covariates[start : start + size].to(kind) - middle
        first += narrow[start : start + size] @ part
        second += narrow[start : start + size] @ part.square_()
    mean, deviation = first + centre, (second - first.square()).clamp_min(0).sqrt()
    # A column that is constant, far from the centre, or too large to square: decided exactly.
    for k in (~(deviation.square() > 1e-4 * second) | ~second.isfinite()).nonzero()[:, 0].tolist():
        column = checked_values("covariates", covariates[:, k : k + 1])[:, 0].double()
        own = column[base > 0]
        constant = bool((own == own[0]).all())
        mean[k] = own[0] if constant else share @ column
        deviation[k] = 0.0 if constant else (share @ (column - mean[k]).square()).sqrt()
    return mean, deviation


def _times(basis: Tensor, vector: Tensor) -> Tensor:
    """A diagonal ``[K]`` or a matrix ``[K, K]`` times a vector."""
    return basis * vector if basis.dim() == 1 else basis @ vector


def _inverse_root(hessian: Tensor) -> Tensor:
    """A matrix B with ``B' H B = 1``; directions in which H is 0 are long, so that a target out there shows."""
    values, vectors = torch.linalg.eigh(hessian)
    return vectors * values.clamp_min(1e-12 * float(values[-1])).rsqrt()
