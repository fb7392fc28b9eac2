"""The literal Eq. 5 of every neuron: estimated by one gradient, exact for a short list, audited on a random sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spurge.engine.base.checks import integer
from spurge.engine.cascade.ablation import Unit
from spurge.engine.cascade.audit import Sample, agreements, draw, likely_crossing
from spurge.engine.passes.activation_gradients import FirstOrder

Ablate = Callable[[Sequence[Unit]], Tensor]  # units -> exact effects, [Q, B, n]

EXACT, AUDIT, LEAST_AUDIT = 32, 256, 32
MOST = 0.25  # of all units, that a tolerance may have switched off
GROWTH = 1.5  # of the short list, at least, from one audit to the next


@dataclass(frozen=True)
class Effort:
    """How many units are switched off to see what it does.

    Attributes:
        exact: those of greatest stake; their effects take the place of the estimates.
        audit: those drawn from the others; their effects say how good the estimates are.
        tolerance: relative error of the values for which ``exact`` is raised; None: as it is.
        seed: of the draws.
    """

    exact: int
    audit: int
    tolerance: float | None
    seed: int

    @property
    def measures(self) -> bool:
        """Whether any unit is switched off."""
        return self.exact + self.audit > 0


def effort(path: str, exact: int | None, audit: int | None, tolerance: float | None, seed: int) -> Effort:
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
class Literal:
    """Effects of all units on Q targets of B examples.

    Attributes:
        values: by site, ``[Q, B, F]``.
        exact: how many of the units were switched off for them.
        sample: what the audit drew; None without one.
    """

    values: list[Tensor]
    exact: int
    sample: Sample | None


def literal(found: Sequence[FirstOrder], ablate: Ablate, effort: Effort) -> Literal:
    """Effects from the estimates of Q targets and as many exact ones as ``effort`` says."""
    values = [torch.stack([own.estimate[i] for own in found]) for i in range(len(found[0].estimate))]
    if not effort.measures:
        return Literal(values, 0, None)
    each = [torch.stack([own.stake[i] for own in found]) for i in range(len(values))]
    stakes = pooled_stakes(values, each)
    order, total = stakes.argsort(descending=True, stable=True), len(stakes)
    most = max(effort.exact, int(MOST * total))
    units = _Units([value.shape[2] for value in values])
    done, wanted, seed = 0, min(effort.exact, total), effort.seed
    while True:
        units.put(values, order[done:wanted], ablate)
        done, sample = wanted, None
        if effort.audit and done < total:
            crossing = likely_crossing(units.flat(values), units.flat(each))
            drawn, weights, typical = draw(stakes, crossing, order[done:], effort.audit, seed)
            once, again = drawn.unique(return_inverse=True)
            exact = ablate(units.of(once)).double().cpu()[..., again.cpu()]
            sample = Sample(weights, units.take(values, drawn).double(), exact, typical)
        if effort.tolerance is None or sample is None:
            break
        bounds = [one.error_bound for one in agreements(units.flat(values), [sample])]
        bound = float(torch.tensor(bounds).max())  # NaN where one is
        if bound <= effort.tolerance:
            break
        if done >= most:
            warnings.warn(
                f"tolerance {effort.tolerance:g} not reached with {done} of {total} units switched off: relative "
                f"error up to {bound:.2g}",
                stacklevel=5,
            )
            break
        wanted, seed = min(most, _next(stakes[order], done, bound / effort.tolerance)), seed + 1
    return Literal(values, done, sample)


def pooled_stakes(values: Sequence[Tensor], stakes: Sequence[Tensor]) -> Tensor:
    """One stake for each unit of all sites, ``[N]``: over examples as errors add up, every target at its own scale.

    Args:
        values, stakes: by site, ``[Q, B, F]``.
    """
    device = values[0].device
    size = torch.stack([value.square().sum((1, 2)).to(device) for value in values]).sum(0)  # [Q]
    scale = size.clamp_min(torch.finfo(size.dtype).tiny)[:, None, None]
    pooled = torch.cat([(own.to(device).square() / scale).sum((0, 1)) for own in stakes]).sqrt()
    return pooled.nan_to_num(nan=torch.inf, posinf=torch.finfo(pooled.dtype).max)


def _next(ranked: Tensor, done: int, factor: float) -> int:
    """How long the short list has to be for an error smaller by ``factor``, if errors go as stakes do."""
    left = ranked.double().square().flip(0).cumsum(0).flip(0)  # [n]: of the units from n on
    goal = left[done] / factor**2
    return max(int((left > goal).sum()), int(GROWTH * done), done + 1)


class _Units:
    """Units of several sites in one row."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.starts = torch.tensor([0, *widths]).cumsum(0)

    def of(self, flat: Tensor) -> list[Unit]:
        flat = flat.cpu()
        site = torch.searchsorted(self.starts, flat, right=True) - 1
        return list(zip(site.tolist(), (flat - self.starts[site]).tolist(), strict=True))

    def flat(self, values: Sequence[Tensor]) -> Tensor:
        """``[Q, B, N]`` float64 on the CPU."""
        return torch.cat([value.double().cpu() for value in values], 2)

    def take(self, values: Sequence[Tensor], flat: Tensor) -> Tensor:
        return torch.stack([values[i][..., k].cpu() for i, k in self.of(flat)], 2)

    def put(self, values: Sequence[Tensor], flat: Tensor, ablate: Ablate) -> None:
        if not len(flat):
            return
        chosen = self.of(flat)
        for (i, k), effect in zip(chosen, ablate(chosen).unbind(2), strict=True):
            values[i][..., k] = effect.to(values[i])
