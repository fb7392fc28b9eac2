"""The literal Eq. 5 of every neuron: estimated by one gradient, exact for a short list, audited on a random sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spurge.engine.base.checks import integer, warn
from spurge.engine.cascade.audit import Sample, agreements, draw, likely_crossing
from spurge.engine.passes.activation_gradients import FirstOrder

Ablate = Callable[[Tensor, Tensor], Tensor]  # units [n, 2] and the example of each -> exact effects, [Q, n]

EXACT, AUDIT, LEAST_AUDIT = 32, 256, 32
MOST = 0.25  # of all units, that a tolerance may have switched off
GROWTH = 1.5, 2.0  # of the short list from one audit to the next: stakes fall more slowly than errors do
SHARED = 0.3  # of a unit's mean square over examples: one example alone overlooks some; found where effects were known


@dataclass(frozen=True)
class Effort:
    """How many values, an example's unit each, are measured: units switched off to see what it does.

    Attributes:
        exact: for each example on average, those of greatest stake; what is measured takes the place of the estimates.
        audit: those drawn from the others of a block; their effects say how good the estimates are.
        tolerance: relative error of the values for which ``exact`` is raised; None: as it is.
        seed: of the draws.
    """

    exact: int
    audit: int
    tolerance: float | None
    seed: int

    @property
    def measures(self) -> bool:
        """Whether anything is measured."""
        return self.exact + self.audit > 0


def settled_effort(path: str, exact: int | None, audit: int | None, tolerance: float | None, seed: int) -> Effort:
    """The effort of a path, with defaults for what is None.

    Raises:
        ValueError, TypeError: a number out of range, or of another path.
    """
    for name, given in (("exact", exact), ("audit", audit)):
        if given is not None and path != "gradient":
            raise ValueError(f"{name}: belongs to the gradient path, got path {path!r}")
    found = Effort(
        EXACT if exact is None else integer("exact", exact, 0),
        AUDIT if audit is None else integer("audit", audit, 0),
        tolerance,
        integer("seed", seed, 0),
    )
    if tolerance is not None and path == "gradient" and found.audit < LEAST_AUDIT:
        raise ValueError(f"audit: a tolerance needs at least {LEAST_AUDIT}, got {found.audit}")
    return found


@dataclass(frozen=True, eq=False)
class UnitEffects:
    """Effects of all units on Q targets of B examples.

    Attributes:
        values: by site, ``[Q, B, F]``.
        exact: how many of the ``B F`` of all sites were measured for them.
        sample: what the audit drew; None without one.
    """

    values: list[Tensor]
    exact: int
    sample: Sample | None


def effects_of_units(found: Sequence[FirstOrder], ablate: Ablate, effort: Effort) -> UnitEffects:
    """Effects from the estimates of Q targets and as many exact ones as ``effort`` says."""
    values = [torch.stack([own.estimate[i] for own in found]) for i in range(len(found[0].estimate))]
    if not effort.measures:
        return UnitEffects(values, 0, None)
    each = [torch.stack([own.stake[i] for own in found]) for i in range(len(values))]
    widths = [value.shape[2] for value in values]
    flat, doubts, batch = _in_a_row(values), _in_a_row(each), values[0].shape[1]
    stakes = pooled_stakes(flat, doubts, batch)
    order, total = stakes.argsort(descending=True, stable=True), len(stakes)
    least = min(effort.exact * batch, total)
    most = max(least, int(MOST * total) // batch * batch)

    def measured(places: Tensor) -> Tensor:
        units = sum(widths)
        return ablate(_by_site(places % units, widths), places // units).double().cpu()

    done, wanted, seed = 0, least, effort.seed
    while True:
        if wanted > done:
            flat[:, order[done:wanted]] = measured(order[done:wanted])
        done, sample = wanted, None
        if effort.audit and done < total:
            drawn, weights, typical = draw(stakes, likely_crossing(flat, doubts), order[done:], effort.audit, seed)
            once, again = drawn.unique(return_inverse=True)
            sample = Sample(weights, flat[:, drawn], measured(once)[:, again], typical)
        if effort.tolerance is None or sample is None:
            break
        bound = float(torch.tensor([one.error_bound for one in agreements(flat, [sample])]).max())  # NaN where one is
        if bound <= effort.tolerance:
            break
        if done >= most:
            warn(
                f"tolerance {effort.tolerance:g} not reached with {done} of {total} values measured: relative error "
                f"up to {bound:.2g}"
            )
            break
        more = _next(stakes[order], done, bound / effort.tolerance)
        wanted, seed = min(most, -(-more // batch) * batch), seed + 1
    parts = flat.unflatten(1, (batch, -1)).split(widths, 2)
    return UnitEffects([own.to(value) for own, value in zip(parts, values, strict=True)], done, sample)


def pooled_stakes(values: Tensor, stakes: Tensor, batch: int) -> Tensor:
    """One stake for each value of an example and a unit, ``[B N]`` on the CPU: every target's at its own scale, and
    some of what the unit has in the other examples.

    Args:
        values, stakes: ``[Q, B N]``, example by example.
        batch: B.
    """
    scale = values.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # [Q, 1]
    largest = torch.finfo(torch.float32).max
    own = (stakes.square() / scale).sum(0).nan_to_num(nan=largest).clamp_max(largest)
    each = own.unflatten(0, (batch, -1))
    return (each + SHARED * each.mean(0)).sqrt().flatten()


def _next(ranked: Tensor, done: int, factor: float) -> int:
    """How long the short list has to be for an error smaller by ``factor``, if errors go as stakes do."""
    left = ranked.double().square().flip(0).cumsum(0).flip(0)  # [n]: of the units from n on
    goal = left[done] / factor**2
    least, most = (int(growth * done) for growth in GROWTH)
    return max(min(int((left > goal).sum()), max(most, EXACT)), least, done + 1)


def _in_a_row(values: Sequence[Tensor]) -> Tensor:
    """Of all examples and units of all sites, example by example, ``[Q, B N]`` float64 on the CPU."""
    return torch.cat([value.double().cpu() for value in values], 2).flatten(1)


def _by_site(units: Tensor, widths: Sequence[int]) -> Tensor:
    """Units ``[n]``, numbered over sites of these widths, as sites and units of these, ``[n, 2]``."""
    starts = torch.tensor([0, *widths]).cumsum(0)
    site = torch.searchsorted(starts, units, right=True) - 1
    return torch.stack([site, units - starts[site]], 1)
