"""Softmax regression with an L1 penalty: proximal gradient on the columns that matter, found as it goes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.last_layer.softmax import ScaledFeatures, Softmax, Solution

_MORE = 32  # columns that join at once, at least
_LOOK = 10  # steps between two looks at the slope


class _Some(ScaledFeatures):
    """Some columns of rows, held."""

    def __init__(self, rows: ScaledFeatures, index: Tensor) -> None:
        self._values = self._held = rows.columns(index)
        self.second_moments = rows.second_moments[index]


def minimise_l1(
    problem: Softmax,
    l1: float,
    weight: Tensor,
    bias: Tensor,
    *,
    tolerance: float,
    steps: int,
    progress: bool = False,
) -> Solution:
    r"""The minimum of :math:`J(V, b) + \lambda_1 \|V\|_1`; the bias is not penalised.

    Accelerated proximal gradient with restarts (FISTA; Beck and Teboulle, 2009; O'Donoghue and Candès, 2015) on the
    columns whose weights are not 0 or want not to be, which are few; the others are looked at in between.

    Args:
        problem: J.
        l1: of the penalty, above 0.
        weight, bias: where to start, float64 ``[O, M]`` and ``[O]``.
        tolerance: end when no subgradient is further from 0, a column's in units of the root of its spread.
        steps: end after so many.
        progress: show a progress bar.
    """
    weight, bias, taken = weight.clone(), bias.clone(), 0
    unit = (problem.rows.second_moments * problem.gates.square().amax(0)).sqrt()
    unit = unit.where(unit > 0, 1.0)
    active = (weight != 0).any(0)
    with tqdm(total=steps, desc="fit", disable=not progress, leave=False) as bar:
        while True:
            logits = problem.rows.times(weight * problem.gates) + bias
            slopes = problem.gradient(weight, problem.residual(logits))
            off = _distance(slopes, weight, l1)
            steepest = _largest(off[0] / unit, off[1])
            if steepest <= tolerance or taken >= steps:
                return Solution(weight, bias, taken, steepest)
            wanted = (off[0] / unit).amax(0).masked_fill(active, 0.0)
            room = max(_MORE, int(active.sum()))
            active[wanted.sort(descending=True, stable=True).indices[:room]] = True
            active &= (wanted > tolerance) | (weight != 0).any(0)
            index = active.nonzero()[:, 0]
            part = replace(problem, rows=_Some(problem.rows, index), gates=problem.gates[:, index])
            # Exact enough that what is left cannot hide among the columns that joined.
            weight[:, index], bias, more = _fista(
                part, l1, weight[:, index], bias, unit[index], tolerance / 2, steps - taken
            )
            taken += more
            bar.update(more)


def _distance(slopes: tuple[Tensor, Tensor], weight: Tensor, l1: float) -> tuple[Tensor, Tensor]:
    """How far the nearest subgradient of the whole is from 0, by weight and by bias."""
    at_zero = (slopes[0].abs() - l1).clamp_min(0)
    return torch.where(weight == 0, at_zero, (slopes[0] + l1 * weight.sign()).abs()), slopes[1].abs()


def _largest(*parts: Tensor) -> float:
    return float(torch.cat([part.reshape(-1) for part in parts]).max())


def _fista(
    problem: Softmax, l1: float, weight: Tensor, bias: Tensor, unit: Tensor, tolerance: float, steps: int
) -> tuple[Tensor, Tensor, int]:
    """Weight, bias and steps taken, on columns that are all held."""
    (_, rows), *_ = problem.rows
    # The Hessian of cross-entropy by the logits is at most 1/2, so this is at least the steepest curvature.
    gate = problem.gates.square().amax(0)
    scaled = rows * gate.sqrt() / unit
    whole = torch.cat([scaled, scaled.new_ones(len(rows), 1)], 1) * problem.weights.sqrt()[:, None]
    small = whole.T @ whole if len(whole) > whole.shape[1] else whole @ whole.T
    bound = 0.5 * float(torch.linalg.eigvalsh(small)[-1])
    metric = bound * unit.square() + problem.l2  # each column has a step of its own
    old, ahead = (weight, bias), (weight, bias)
    momentum, taken = 1.0, 0
    while taken < steps:
        logits = problem.rows.times(ahead[0] * problem.gates) + ahead[1]
        slopes = problem.gradient(ahead[0], problem.residual(logits))
        moved = ahead[0] - slopes[0] / metric
        new = (moved - torch.minimum(torch.maximum(moved, -l1 / metric), l1 / metric), ahead[1] - slopes[1] / bound)
        taken += 1
        if taken % _LOOK == 0:
            step = [n - a for n, a in zip(new, ahead, strict=True)]
            if _largest(step[0].abs() * metric / unit, bound * step[1].abs()) <= tolerance / 2:
                return *new, taken
        forth = [n - o for n, o in zip(new, old, strict=True)]
        back = [a - n for a, n in zip(ahead, new, strict=True)]
        uphill = float((back[0] * forth[0] * metric).sum() + bound * (back[1] @ forth[1])) > 0
        following = 1.0 if uphill else (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        share = 0.0 if uphill else (momentum - 1) / following
        ahead = (new[0] + share * forth[0], new[1] + share * forth[1])
        old, momentum = new, following
    return *old, taken
