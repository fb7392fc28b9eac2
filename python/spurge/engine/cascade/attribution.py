"""What a cascade returns, and how parts of it are measured and joined."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from spurge.engine.base.checks import integer
from spurge.engine.base.device_checks import require
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.tables import Table, page, wrapped
from spurge.engine.cascade.audit import Agreement, Sample, agreements
from spurge.engine.models.sites import NeuronRef
from spurge.engine.passes.trace import Rows, Target

ALL = "all"  # the key of what belongs to no single site: the joint path's F(0) and residual


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Attributions of every neuron for Q targets and B examples; tensors are float32.

    Values are on the device of their site (the neuron path's beside the targets), all else on that of the logits.

    Attributes:
        values: site -> ``[Q, B, F]``.
        full: F(1), the targets of the unedited model, ``[Q, B]``.
        erased: site -> F(0), with the whole site erased, ``[Q, B]``. Joint path: under ``"all"``, every site erased.
            Empty on the neuron path, where each value is itself an exact difference, and without ``completeness``.
        residual: ``F(1) - F(0) - sum of values`` under the same keys, ``[Q, B]``: zero for an exact integral.
        nodes: site -> quadrature nodes used.
        change: site -> largest relative change of its values by halving an interval; None where nodes were fixed.
        exact: of the gradient path, how many values (an example's unit each) are exact differences.
        samples: of the gradient path, what its audit measured, for each block of examples.
    """

    values: dict[str, Tensor]
    full: Tensor
    erased: dict[str, Tensor]
    residual: dict[str, Tensor]
    nodes: dict[str, int]
    change: dict[str, float | None]
    exact: int = 0
    samples: tuple[Sample, ...] = ()

    @cached_property
    def agreement(self) -> list[Agreement]:
        """Of each target, how well its values agree with the effects of switching each unit off (MacU Eq. 5).

        Empty without an audit.
        """
        if not self.samples:
            return []
        every = torch.cat([value.double().cpu() for value in self.values.values()], 2)
        return agreements(every.flatten(1), self.samples)

    def top(self, n: int = 10, *, target: int = 0, example: int | None = None) -> list[tuple[NeuronRef, float]]:
        """The ``n`` neurons with the highest values of a target, and these, highest first.

        Args:
            n: how many; all, where there are fewer.
            target: q.
            example: of one example; None: the mean over all of them.

        Raises:
            ValueError: ``n`` below 1.
            IndexError: a target or an example that there is not.
        """
        rows = [value[target].to(self.full.device) for value in self.values.values()]
        flat = torch.cat([row.mean(0) if example is None else row[example] for row in rows])
        best = flat.topk(min(integer("n", n, 1), len(flat)))
        starts = list(accumulate((row.shape[1] for row in rows), initial=0))
        places = [(i, bisect_right(starts, i) - 1) for i in best.indices.tolist()]
        sites = list(self.values)
        refs = [NeuronRef(sites[site], i - starts[site]) for i, site in places]
        return list(zip(refs, best.values.tolist(), strict=True))

    def __repr__(self) -> str:
        units = sum(value.shape[2] for value in self.values.values())
        targets, examples = self.full.shape
        measured = f", {self.exact} of them measured" if self.exact else ""
        return f"Attribution({targets} x {examples} values for {units:,} neurons of {len(self.values)} sites{measured})"

    def __str__(self) -> str:
        """The neurons with the highest values, and how well all values agree with Eq. 5."""
        values = [f"{ref}  {value:.4g}" for ref, value in self.top()]
        return wrapped("\n".join([repr(self), *values, *self._notes()]))

    def _repr_html_(self) -> str:
        lines = [["neuron", "value"], *([str(ref), f"{value:.4g}"] for ref, value in self.top())]
        return page([Table(repr(self), lines)], self._notes())

    def _notes(self) -> list[str]:
        return [f"target {q}, by {own.drawn} values drawn: {own}" for q, own in enumerate(self.agreement)]

    def relative_residual(self) -> float:
        """Largest ``|residual|`` over its example's largest ``|F(1) - F(0)|``; NaN where F(0) was not measured."""
        if not self.erased:
            return math.nan
        effect = torch.stack([(self.full - value).abs() for value in self.erased.values()]).amax(0)
        residual = torch.stack([value.abs() for value in self.residual.values()]).amax(0)
        return float((residual / effect.clamp_min(torch.finfo(effect.dtype).tiny)).max())


def target_values(target: Target, rows: Rows) -> Tensor:
    """The target as ``[R, Q]`` float32, checked."""
    value = target(rows)
    if not torch.is_tensor(value) or value.dim() not in (1, 2) or value.shape[0] != len(rows.logits):
        came = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"target: expected [{len(rows.logits)}] or [{len(rows.logits)}, targets], got {came}")
    finite = torch.isfinite(value.detach()).all()
    require(finite, lambda: "target: is NaN or infinite on some row; check the model's logits and the target itself")
    return value.float().reshape(len(rows.logits), -1)


def check_differentiable(target: Target, rows: Rows) -> None:
    """Refuse a target through which no gradient flows.

    Raises:
        ValueError: neither the rows' logits nor their attention reach the value differentiably.
    """
    with grad_mode(True):
        logits = rows.logits.detach().requires_grad_()
        attention = None if rows.attention is None else rows.attention.detach().requires_grad_()
        if not target(replace(rows, logits=logits, attention=attention)).requires_grad:
            raise ValueError("target: is not differentiable in the rows; it can be ablated, not integrated")


def gradients(
    value: Tensor, leaves: Sequence[Tensor], *, keep: bool = False
) -> Iterator[tuple[int, tuple[Tensor | None, ...]]]:
    """For each target q of ``value`` ``[R, Q]``, its gradients in ``leaves``; None where it reads nothing of one.

    Args:
        keep: leave the graph as it was.
    """
    for q in range(value.shape[1]):
        if not value.requires_grad:  # rows that open behind everything this target reads
            yield q, (None,) * len(leaves)
            continue
        more = keep or q + 1 < value.shape[1]
        yield q, torch.autograd.grad(value[:, q].sum(), leaves, retain_graph=more, allow_unused=True)


def residuals(full: Tensor, erased: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the values leave over of each path's effect, ``[Q, B]``, where the targets are."""
    sums = {name: value.sum(2).to(full.device) for name, value in values.items()}
    if ALL in erased:
        return {ALL: full - erased[ALL] - torch.stack(list(sums.values())).sum(0)}
    return {name: full - erased[name] - sums[name] for name in erased}


def join(parts: list[Attribution]) -> Attribution:
    def joined(pick: str) -> dict[str, Tensor]:
        return {key: torch.cat([getattr(part, pick)[key] for part in parts], 1) for key in getattr(parts[0], pick)}

    change: dict[str, float | None] = {}
    for name in parts[0].change:
        seen = [moved for part in parts if (moved := part.change[name]) is not None]
        change[name] = max(seen, default=None)
    return Attribution(
        joined("values"),
        torch.cat([part.full for part in parts], 1),
        joined("erased"),
        joined("residual"),
        {name: max(part.nodes[name] for part in parts) for name in parts[0].nodes},
        change,
        sum(part.exact for part in parts),
        tuple(sample for part in parts for sample in part.samples),
    )
