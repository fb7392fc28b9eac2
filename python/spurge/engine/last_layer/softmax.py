"""Softmax regression on fixed features: its loss, its gradient, and where that gradient is zero.

Columns are centred when there is a bias to take up the difference: features behind a ReLU have large means, and a
quasi-Newton method would spend its first hundred steps on them. Nothing else changes by it. The line search is free:
along a direction the logits are a straight line, so after one product with the features any number of steps can be
tried on ``[N, O]`` numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.base.budgets import budget
from spurge.engine.base.lbfgs import InverseHessian

_HISTORY = 10  # pairs that L-BFGS remembers
_BLOCK = 2**23  # bytes of a float64 block, about what the last cache holds
_TRIALS = 30  # of a line search; two or three are usual


class ScaledFeatures:
    """Features ``[N, M]`` as ``(x - centre) / scale`` in float64: held so, or block by block where memory is short.

    Args:
        values: floating ``[N, M]``.
        weights: float64 ``[N]`` that sum to 1; the centre is the mean by them.
        centred: subtract the centre; else it is 0.
        scale: ``[M]``, above 0; by default 1.
        memory: bytes that the copy may take.
    """

    def __init__(
        self,
        values: Tensor,
        weights: Tensor,
        *,
        centred: bool,
        scale: Tensor | None = None,
        memory: str | int | None = None,
    ) -> None:
        self._values = values
        self._held: Tensor | None = None
        self._step = _block(values)
        self.centre = values.new_zeros(values.shape[1], dtype=torch.float64)
        self.scale = torch.ones_like(self.centre) if scale is None else scale.to(self.centre)
        if centred:
            self.centre = _sum(weights[at] @ block for at, block in _blocks(values, self._step))
        if 8 * values.numel() <= budget(memory, values.device):
            self._held = values.to(torch.float64, copy=True).sub_(self.centre).div_(self.scale)
        # Second moments by the weights, [M]: how much a weight of each column moves the logits.
        self.second_moments = _sum(weights[at] @ block.square() for at, block in self)

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        if self._held is not None:
            yield slice(0, len(self)), self._held
            return
        for at, block in _blocks(self._values, self._step):
            yield at, block.sub_(self.centre).div_(self.scale)

    def times(self, weight: Tensor) -> Tensor:
        """weight ``[O, M]`` -> ``[N, O]``."""
        out = weight.new_empty(len(self), len(weight))
        for at, block in self:
            torch.mm(block, weight.T, out=out[at])
        return out

    def back(self, residual: Tensor) -> Tensor:
        """residual ``[N, O]`` -> ``[O, M]``."""
        return _sum(residual[at].T @ block for at, block in self)

    def columns(self, index: Tensor) -> Tensor:
        """Some columns of all rows, ``[N, n]``."""
        return torch.cat([block[:, index] for _, block in self])


def deviations(values: Tensor) -> Tensor:
    """Standard deviation of each column of floating ``[N, M]``, in float64 and divided by N; 1 for constant columns."""
    step = _block(values)
    mean = _sum(block.sum(0) for _, block in _blocks(values, step)) / len(values)
    square = _sum((block - mean).square().sum(0) for _, block in _blocks(values, step)) / len(values)
    found = square.sqrt()
    return found.where(found > 1e-12 * mean.abs(), 1.0)  # what rounding leaves of a constant is no spread


def _block(values: Tensor) -> int:
    return max(1, _BLOCK // (8 * values.shape[1]))


def _blocks(values: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Own float64 copies of ``step`` rows at a time."""
    for start in range(0, len(values), step):
        at = slice(start, min(start + step, len(values)))
        yield at, values[at].to(torch.float64, copy=True)


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


@dataclass(frozen=True, eq=False)
class Softmax:
    r"""Weighted cross-entropy of gated weights with an L2 penalty.

    .. math:: J(V, b) = \sum_n s_n \,\mathrm{CE}(y_n, (g \circ V) x_n + b) + \tfrac{\lambda_2}{2} \|V\|^2

    Attributes:
        rows: x, N of them.
        labels: y, int64 ``[N]``.
        weights: s, float64 ``[N]``, sum 1.
        gates: g, float64 ``[1, M]`` or ``[O, M]``.
        l2: of the penalty.
        biased: whether b may differ from what it starts with.
    """

    rows: ScaledFeatures
    labels: Tensor
    weights: Tensor
    gates: Tensor
    l2: float
    biased: bool

    def loss(self, logits: Tensor, square: float) -> float:
        """J at these logits ``[N, O]``, where ``square`` is the squared norm of V."""
        true = logits.gather(1, self.labels[:, None])[:, 0]
        return float(self.weights @ (logits.logsumexp(1) - true)) + self.l2 / 2 * square

    def residual(self, logits: Tensor) -> Tensor:
        """Derivative of the cross-entropy by the logits, ``[N, O]``."""
        slope = logits.softmax(1)
        slope.scatter_add_(1, self.labels[:, None], slope.new_full((len(slope), 1), -1.0))
        return slope.mul_(self.weights[:, None])

    def gradient(self, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of J by V and b."""
        by_bias = residual.sum(0) if self.biased else residual.new_zeros(residual.shape[1])
        return self.rows.back(residual) * self.gates + self.l2 * weight, by_bias

    def curvature(self, outputs: int) -> tuple[Tensor, Tensor]:
        """A guess of the second derivatives' diagonal at even predictions, of V ``[O, M]`` and b ``[O]``, above 0."""
        even = (outputs - 1) / outputs**2
        diagonal = (even * self.rows.second_moments * self.gates.square() + self.l2).expand(outputs, -1)
        return diagonal.where(diagonal > 0, 1.0), diagonal.new_full((outputs,), even)


@dataclass(frozen=True, eq=False)
class Solution:
    """Where a search ended: V ``[O, M]``, b ``[O]``, steps taken, and the slope left."""

    weight: Tensor
    bias: Tensor
    steps: int
    slope: float


def minimise(
    problem: Softmax, weight: Tensor, bias: Tensor, *, tolerance: float, steps: int, progress: bool = False
) -> Solution:
    """The minimum of J by L-BFGS with a diagonal start and an exact line search; deterministic.

    Args:
        problem: J.
        weight, bias: where to start, float64 ``[O, M]`` and ``[O]``.
        tolerance: end when the steepest slope is below it: a partial derivative over the root of its column's spread,
            which has no unit.
        steps: end after so many.
        progress: show a progress bar.
    """
    shape = weight.shape
    point = torch.cat([weight.reshape(-1), bias])

    def parts(vector: Tensor) -> tuple[Tensor, Tensor]:
        return vector[: shape.numel()].view(shape), vector[shape.numel() :]

    diagonal = torch.cat([part.reshape(-1) for part in problem.curvature(shape[0])])
    unit = (diagonal * shape[0] ** 2 / (shape[0] - 1)).sqrt()  # a feature of spread 1 without a penalty has unit 1
    logits = problem.rows.times(weight * problem.gates) + bias
    inverse = InverseHessian(_HISTORY, diagonal)
    last: tuple[Tensor, Tensor] | None = None
    with tqdm(total=steps, desc="fit", disable=not progress, leave=False) as bar:
        for step in range(steps + 1):
            slope = torch.cat([p.reshape(-1) for p in problem.gradient(parts(point)[0], problem.residual(logits))])
            steepest = float((slope.abs() / unit).max())
            if steepest <= tolerance or step == steps:
                break
            if last is not None:
                inverse.learn(point - last[0], slope - last[1])
            move = -inverse.times(slope)
            by_weight, by_bias = parts(move)
            along = problem.rows.times(by_weight * problem.gates) + by_bias
            length = _line(problem, logits, along, parts(point)[0], by_weight)
            if length == 0:
                break  # no lower point in float64
            last = (point, slope)
            point, logits = point + length * move, logits + length * along
            bar.update()
    found = parts(point)
    return Solution(found[0].clone(), found[1].clone(), step, steepest)


def _line(problem: Softmax, logits: Tensor, along: Tensor, weight: Tensor, move: Tensor) -> float:
    """How far to go along a direction: Newton's method on the derivative, inside a bracket; 0 if it leads nowhere."""
    norms = [float((a * b).sum()) for a, b in ((weight, weight), (weight, move), (move, move))]

    def at(t: float) -> tuple[float, float, float]:
        """J and its first two derivatives by t."""
        moved = logits + t * along
        square = norms[0] + t * (2 * norms[1] + t * norms[2])
        chance = moved.softmax(1)
        mean = (chance * along).sum(1)
        true = along.gather(1, problem.labels[:, None])[:, 0]
        first = float(problem.weights @ (mean - true)) + problem.l2 * (norms[1] + t * norms[2])
        bend = (chance * (along - mean[:, None]).square()).sum(1)
        return problem.loss(moved, square), first, float(problem.weights @ bend) + problem.l2 * norms[2]

    value, begin, _ = at(0.0)
    if not begin < 0:
        return 0.0
    low, high, t = 0.0, math.inf, 1.0
    for _ in range(_TRIALS):
        height, first, second = at(t)
        if abs(first) <= 0.1 * -begin and height <= value:
            return t
        if first < 0:
            low = t
        else:
            high = t
        t = t - first / second if second > 0 else math.inf
        if not low < t < high:
            t = 2 * low if high == math.inf else (low + high) / 2
        elif high == math.inf:
            t = min(t, 10 * max(low, 1.0))
    return low if at(low)[0] < value else 0.0
