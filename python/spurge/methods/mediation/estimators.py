r"""Estimators of natural indirect effects, of many units at once, under a topic or other confounders x.

Treatment q is 0 or 1, n the activation of one unit, y the outcome. With sequential ignorability given x and overlap,
:math:`\mu_{ab} = E[Y(a, n(b))]` is a weighted mean of the outcomes of arm a; then NIE(1) = mu11 - mu10 and
NIE(0) = mu01 - mu00; their mean is this package's reading of the average indirect effect. The paper (Heckerman et al.,
arXiv 2412.02893) estimates propensities by entropy balancing; the moments that are balanced, and the two other
estimators, are this package's reconstruction.

An estimator is made for one set of prompts; ``prepare`` sorts the values of U units once, ``estimate`` is for one
vector of counts (all 1, or how often a bootstrap resample drew each prompt), beginning where a similar one ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.causal.balancing import CONVERGED, INFEASIBLE, balance

STEPS = 50
"""Newton steps of a unit; a bootstrap resample, which begins at the dual of the whole, takes three or four."""


@dataclass(frozen=True, eq=False)
class UnitEffects:
    """Effects of U units, all float64 ``[U]`` where their values are; NaN where there is none.

    Attributes:
        nie1, nie0: natural indirect effects NIE(1) and NIE(0); NaN for estimators that know one number only.
        aie: average indirect effect, read as the mean of both (of the continuous unit: its only one).
        ess: effective sample size as a share of the arm it weighs, the smaller of both arms'.
        worst: greatest standardised difference that balancing left.
        status: int32 ``[U]``: 0 balanced, 1 no overlap (proved infeasible), 2 not converged, 3 not finite; the worse
            of both arms.
    """

    nie1: Tensor
    nie0: Tensor
    aie: Tensor
    ess: Tensor
    worst: Tensor
    status: Tensor


@dataclass(frozen=True, eq=False)
class Estimate(UnitEffects):
    """Effects for one vector of counts.

    Attributes:
        warm: where a similar estimate may begin.
    """

    warm: Any = None


class Estimator(Protocol):
    """What the estimators of this module have in common."""

    def unit_bytes(self) -> int:
        """Memory that one unit needs."""

    def total(self, counts: Tensor) -> tuple[float, float]:
        """mu11 and mu00, for counts ``[N]``; NaN or `Unbalanced` where they cannot be had."""

    def prepare(self, values: Tensor) -> Any:
        """Sorts values ``[U, N]`` (``[U, N, p]`` of a unit with p numbers)."""

    def estimate(self, prepared: Any, counts: Tensor, warm: Any = None) -> Estimate:
        """Effects for counts ``[N]``."""


class _Arm:
    """Rows of one arm, or of all prompts, sorted by stratum."""

    def __init__(self, member: Tensor, outcome: Tensor, strata: Tensor, count: int) -> None:
        rows = member.nonzero()[:, 0]
        self.rows = rows[strata[rows].argsort(stable=True)]
        self.strata = strata[self.rows]
        self.outcome = outcome[self.rows]
        sizes = torch.bincount(self.strata, minlength=count)
        self.starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        self.count = count

    def sums(self, numbers: Tensor) -> Tensor:
        """Sums of ``[..., n]`` within each stratum, ``[..., S]``."""
        found = numbers.new_zeros(*numbers.shape[:-1], self.count)
        return found.index_add_(-1, self.strata, numbers)

    def shares(self, counts: Tensor, wanted: Tensor) -> Tensor:
        """``[n, S]`` whose product with values are means within each stratum of mass above 0."""
        own = counts[self.rows]
        size = self.sums(own)[self.strata]
        share = torch.where(wanted[self.strata] > 0, own / size, 0.0)
        found = share.new_zeros(len(share), self.count)
        return found.scatter_(1, self.strata[:, None], share[:, None])


class _Stratified:
    """Two arms under topics; with a single one, the unadjusted estimate."""

    def __init__(self, treatment: Tensor, outcome: Tensor, strata: Tensor, count: int) -> None:
        self.treated = _Arm(treatment, outcome, strata, count)
        self.control = _Arm(~treatment, outcome, strata, count)
        self.strata, self.count = strata, count

    def masses(self, counts: Tensor) -> Tensor:
        """Shares of the strata that have both arms, 0 for the others; NaN where none has."""
        both = (self.treated.sums(counts[self.treated.rows]) > 0) & (self.control.sums(counts[self.control.rows]) > 0)
        size = counts.new_zeros(self.count).index_add_(0, self.strata, counts)
        size = torch.where(both, size, 0.0)
        return size / size.sum()

    def total(self, counts: Tensor) -> tuple[float, float]:
        masses = self.masses(counts)
        if not bool(masses.isfinite().all()):
            return torch.nan, torch.nan
        means = [float(arm.outcome @ arm.shares(counts, masses) @ masses) for arm in (self.treated, self.control)]
        return means[0], means[1]


@dataclass(frozen=True, eq=False)
class _Values:
    """Values of one arm ``[U, n]``, for the kernel as they are and for means in float64, which every resample reads."""

    values: Tensor
    wide: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Values:
        values = values.contiguous()
        wide = values.double()
        return cls(values, wide, wide.square())


class BalancedStrata(_Stratified):
    r"""Entropy balancing within topics: the prompts of one arm weighted until its topics, the unit's mean within each,
    and its square overall are those of the other arm, whose topics are weighted to those of all prompts.

    The moments of w10 are [topic, n, n², n x topic]. Indicators of topics alone need no iteration: weights within them
    are equal.

    Args:
        treatment: bool ``[N]``.
        outcome: float64 ``[N]``.
        strata: int64 ``[N]`` below ``count``.
        count: strata.
        interact: balance the unit's mean within each stratum, not overall only.
        square: balance the square.
        tolerance: greatest standardised difference.
    """

    def __init__(
        self,
        treatment: Tensor,
        outcome: Tensor,
        strata: Tensor,
        count: int,
        *,
        interact: bool,
        square: bool,
        tolerance: float,
    ) -> None:
        super().__init__(treatment, outcome, strata, count)
        self.interact, self.square, self.tolerance = interact, square, tolerance

    def unit_bytes(self) -> int:
        return 48 * len(self.strata) + 64 * self.count

    def prepare(self, values: Tensor) -> tuple[_Values, _Values]:
        return _Values.of(values[:, self.treated.rows]), _Values.of(values[:, self.control.rows])

    def estimate(self, prepared: tuple[_Values, _Values], counts: Tensor, warm: Any = None) -> Estimate:
        masses = self.masses(counts)
        mu11, mu00 = self.total(counts)
        if math.isnan(mu11):
            return missing(prepared[0].values)
        treated, control = prepared
        first, second = warm or (None, None)
        mu10, one = self._across(treated, self.treated, control, self.control, counts, masses, first)
        mu01, two = self._across(control, self.control, treated, self.treated, counts, masses, second)
        return _joined(mu11 - mu10, mu01 - mu00, one, two)

    def _across(
        self,
        own: _Values,
        arm: _Arm,
        others: _Values,
        other: _Arm,
        counts: Tensor,
        masses: Tensor,
        start: Tensor | None,
    ) -> tuple[Tensor, _Side]:
        """The outcome of ``arm`` with the units' values of ``other``."""
        shares = other.shares(counts, masses)
        means = others.wide @ shares
        squares = others.squares @ (shares @ masses) if self.square else None
        base = counts[arm.rows]
        if start is None:
            start = means.new_zeros(len(means), self.count + 1)
        dual, found, report, status = ops.balance_strata(
            own.values,
            arm.starts,
            base,
            masses,
            means,
            squares,
            arm.outcome[:, None],
            start,
            interact=self.interact,
            tolerance=self.tolerance,
            steps=STEPS,
        )
        size = base[masses[arm.strata] > 0].sum()
        return found[:, 0], _Side(report[:, 1] / size, report[:, 0], status, dual)


class BalancedColumns:
    r"""Entropy balancing with any confounders X ``[N, s]`` and units of p numbers.

    The moments of w10 are [X, n, n², n x X]; of a unit with several numbers, each one's.

    Args:
        treatment: bool ``[N]``.
        outcome: float64 ``[N]``.
        columns: float64 ``[N, s]``, standardised.
        interact, square, tolerance: as :class:`BalancedStrata`.
        numbers: p.
    """

    def __init__(
        self,
        treatment: Tensor,
        outcome: Tensor,
        columns: Tensor,
        *,
        interact: bool,
        square: bool,
        tolerance: float,
        numbers: int = 1,
    ) -> None:
        self.arms = [treatment.nonzero()[:, 0], (~treatment).nonzero()[:, 0]]
        self.outcome, self.columns = outcome, columns
        self.interact, self.square, self.tolerance = interact, square, tolerance
        self.numbers = numbers

    def unit_bytes(self) -> int:
        each = self.numbers * (1 + self.square + self.interact * self.columns.shape[1]) + self.columns.shape[1]
        return 24 * len(self.columns) * each

    def weights(self, counts: Tensor) -> list[Tensor]:
        """Weights ``[n]`` of both arms, under which X has its mean over all prompts; equal without X.

        Raises:
            Unbalanced: there are none.
        """
        if not self.columns.shape[1]:
            return [counts[rows] / counts[rows].sum() for rows in self.arms]
        target = counts @ self.columns / counts.sum()
        return [
            balance(self.columns[rows], target, counts[rows], tolerance=self.tolerance).weights for rows in self.arms
        ]

    def total(self, counts: Tensor) -> tuple[float, float]:
        treated, control = self.weights(counts)
        return float(treated @ self.outcome[self.arms[0]]), float(control @ self.outcome[self.arms[1]])

    def prepare(self, values: Tensor) -> list[Tensor]:
        values = values.double()
        values = values[..., None] if values.dim() == 2 else values
        moved = values - values.mean(1, keepdim=True)
        moved /= moved.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        return [self._moments(moved[:, rows], self.columns[rows]) for rows in self.arms]

    def _moments(self, values: Tensor, columns: Tensor) -> Tensor:
        """``[U, n, K]``: X, n, n², n x X."""
        parts = [columns.expand(len(values), -1, -1), values]
        if self.square:
            parts.append(values.square())
        if self.interact:
            parts.append((values[..., None] * columns[None, :, None, :]).flatten(2))
        return torch.cat(parts, -1)

    def estimate(self, prepared: list[Tensor], counts: Tensor, warm: Any = None) -> Estimate:
        try:
            weights = self.weights(counts)
        except ValueError:  # a resample in which an arm is empty, or X out of reach
            return missing(prepared[0])
        mu11, mu00 = (float(w @ self.outcome[rows]) for w, rows in zip(weights, self.arms, strict=True))
        sides, means = [], []
        for here, there in ((0, 1), (1, 0)):
            rows = self.arms[here]
            targets = torch.einsum("unk,n->uk", prepared[there], weights[there])
            start = torch.zeros_like(targets) if warm is None else warm[here]
            dual, found, report, status = ops.balance_batch(
                prepared[here],
                counts[rows],
                targets,
                self.outcome[rows, None],
                start,
                tolerance=self.tolerance,
                steps=STEPS,
            )
            means.append(found[:, 0])
            sides.append(_Side(report[:, 1] / counts[rows].sum(), report[:, 0], status, dual))
        return _joined(mu11 - means[0], means[1] - mu00, *sides)


class DichotomisedMediator(_Stratified):
    r"""The unit cut at its median, m in {0, 1}, in the place of the unit; free of weights.

    The effect through m: what n carries within the halves counts as direct. Where NIE is 0.5 by a unit of normal noise,
    this is near 0.29.

    .. math:: \mu_{10} = \sum_x P(x) \sum_m E[Y \mid q=1, m, x]\, P(m \mid q=0, x)

    Where arm 1 never shows a value of m that arm 0 has in the same topic there is no overlap: that part of the mass is
    left out and the rest scaled up, and beyond a tenth of it there is no estimate. ``ess`` is the mass that is left.
    """

    def unit_bytes(self) -> int:
        return 24 * len(self.strata) + 128 * self.count

    def prepare(self, values: Tensor) -> tuple[Tensor, Tensor]:
        high = (values > values.median(1, keepdim=True).values).double()
        return high[:, self.treated.rows], high[:, self.control.rows]

    def estimate(self, prepared: tuple[Tensor, Tensor], counts: Tensor, warm: Any = None) -> Estimate:
        masses = self.masses(counts)
        mu11, mu00 = self.total(counts)
        if math.isnan(mu11):
            return missing(prepared[0])
        cells = [
            self._cells(high, arm, counts) for high, arm in zip(prepared, (self.treated, self.control), strict=True)
        ]
        mu10, left1 = _crossed(cells[0], cells[1], masses)
        mu01, left0 = _crossed(cells[1], cells[0], masses)
        none = torch.zeros_like(left1)
        sides = [
            _Side(left, none, torch.where(left < 0.9, INFEASIBLE, CONVERGED).int(), None) for left in (left1, left0)
        ]
        return _joined(mu11 - mu10, mu01 - mu00, *sides)

    def _cells(self, high: Tensor, arm: _Arm, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes and sums of outcomes of the cells, ``[2, U, S]`` for n = 0 and n = 1."""
        own = counts[arm.rows]
        marks = own.new_zeros(len(own), self.count).scatter_(1, arm.strata[:, None], own[:, None])
        sums = marks * arm.outcome[:, None]
        size, total = high @ marks, high @ sums
        return torch.stack([marks.sum(0) - size, size]), torch.stack([sums.sum(0) - total, total])


@dataclass(frozen=True, eq=False)
class _Side:
    """How the weights of one arm came out."""

    ess: Tensor
    worst: Tensor
    status: Tensor
    dual: Tensor | None


def _joined(nie1: Tensor, nie0: Tensor, one: _Side, two: _Side) -> Estimate:
    nie1 = torch.where(one.status == CONVERGED, nie1, torch.nan)
    nie0 = torch.where(two.status == CONVERGED, nie0, torch.nan)
    warm = None if one.dual is None or two.dual is None else (one.dual.nan_to_num(), two.dual.nan_to_num())
    return Estimate(
        nie1,
        nie0,
        (nie1 + nie0) / 2,
        torch.minimum(one.ess, two.ess),
        torch.maximum(one.worst, two.worst),
        torch.maximum(one.status, two.status),
        warm,
    )


def missing(values: Tensor) -> Estimate:
    """Of units ``[U, ...]``, for a resample without an estimate: an arm is empty, or all topics lack one."""
    nan = values.new_full((len(values),), torch.nan, dtype=torch.float64)
    return Estimate(nan, nan, nan, nan, nan, torch.full_like(nan, INFEASIBLE, dtype=torch.int32))


def _crossed(here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor], masses: Tensor) -> tuple[Tensor, Tensor]:
    """Mean outcome of the arm ``here`` with n as ``there``, and the mass for which it is known, ``[U]`` each."""
    size, total = here
    chance = there[0] / there[0].sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    mass = masses * chance
    known = size > 0
    left = (mass * known).sum((0, 2))
    mean = torch.where(known, total / size.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return (mass * mean).sum((0, 2)) / left, left
