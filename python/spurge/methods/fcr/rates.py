"""Which neutralisation rate: by labelled accuracies, exact for all rates at once, or by independence without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spurge.engine.features.features import Features
from spurge.engine.last_layer.rate_sweep import Sweep, predicted, sweep
from spurge.engine.models.heads import Head
from spurge.methods.fcr.edges import Edge, shifts

Criterion = Literal["gap", "worst_group", "worst_class", "independence"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
LABELS = {"gap": "group", "worst_group": "group", "worst_class": "class", "independence": "none"}
"""Which labels of the selection data a criterion uses."""

_SAME = 1e-12  # shares that differ by less are equal but for rounding
_BETTER = 1e-9  # of a value in percent or a share: less is no gain
_PASSES = 20  # over all edges; a few are enough


@dataclass(frozen=True, eq=False, repr=False)
class Dependence:
    r"""How much predictions depend on a feature, and how far their frequencies have moved, for every rate.

    .. math:: D = \max_k \max_{f, f'} \;\bigl| P(\hat y = k \mid \hat f = f) - P(\hat y = k \mid \hat f = f') \bigr|
        \;+\; \frac{\max_k | P(\hat y = k) - P_0(\hat y = k) |}{1 - \max_k P_0(\hat y = k)}

    The first term alone is 0 for a classifier that predicts one class for all; the second is then at least 1, more than
    any gap that could be closed that way. P is the mean over the values of the feature, :math:`P_0` that before the
    edit.

    Attributes:
        rates: where it changes, ascending float64 ``[B]``; plateau b reaches to ``rates[b + 1]``, the last to ``high``.
        gaps, drifts: the two terms there, float64 ``[B]``.
        high: the greatest rate.
    """

    rates: Tensor
    gaps: Tensor
    drifts: Tensor
    high: float

    def best(self) -> tuple[float, float]:
        """Middle of the first plateau with the least D (its start where that is the first rate), and D there."""
        value = self.gaps + self.drifts
        least = float(value.min())
        first = int((value <= least + _SAME).nonzero()[0])
        if first == 0:
            return float(self.rates[0]), float(value[0])
        after = (value[first:] > least + _SAME).nonzero()[:, 0]
        end = float(self.rates[first + int(after[0])]) if len(after) else self.high
        return (float(self.rates[first]) + end) / 2, float(value[first])

    def __repr__(self) -> str:
        rate, value = self.best()
        return (
            f"Dependence({len(self.rates)} plateaus in [0, {self.high:g}]; gap {float(self.gaps[0]):.3f}, with "
            f"drift at best {value:.3f} at {rate:.4g})"
        )


@dataclass(frozen=True, eq=False)
class Chosen:
    """Edges of one round with their rates, what the criterion is there, and its curve for one rate shared by all."""

    edges: list[Edge]
    rates: list[float]
    value: float
    curve: Sweep | Dependence


class Chooser:
    """Chooses the rates, and among candidates the edges, of one round after the other on the same selection data.

    Args:
        select: selection data; the criterion's labels have to be there.
        criterion: one of `CRITERIA`.
        features: for ``"independence"``, the predicted fictitious class of each row, int64 ``[N]``.
        high: greatest rate.
        each: every edge has its own rate.

    Raises:
        ValueError: no groups where the criterion needs them, or fewer than two predicted fictitious classes.
    """

    def __init__(
        self, select: Features, criterion: Criterion, features: Tensor | None, *, high: float, each: bool
    ) -> None:
        if criterion in ("gap", "worst_group") and select.groups is None:
            raise ValueError(f"select: criterion {criterion!r} needs groups; give them, or choose by 'worst_class'")
        if features is not None and len(features.unique()) < 2:
            raise ValueError("select: independence needs rows of at least 2 predicted fictitious classes, got 1")
        self.select, self.criterion, self.features, self.high, self.each = select, criterion, features, high, each
        self.groups = select.groups if criterion in ("gap", "worst_group") else None

    def choose(self, head: Head, slots: Sequence[Sequence[Edge]]) -> Chosen:
        """The best rates for one edge of each slot, each slot in a row of its own.

        One rate for the first edges of all slots is exact. With a rate for each, one slot after the other takes the
        candidate and the rate (exact, the others held) that better the criterion, until none does. It begins with no
        edit, with the shared rate, and with the best rates at which all edges lower their outputs by the same on
        average; the best end counts.
        """
        logits = head.logits(self.select.values).double()
        start = logits.argmax(1)
        edges = [slot[0] for slot in slots]
        curve = self._curve(logits, shifts(head, edges, self.select.values), edges, start)
        rate, value = self._best(curve)
        shared = Chosen(edges, [rate] * len(edges), value, curve)
        if not self.each:
            return shared
        moves = [shifts(head, slot, self.select.values) for slot in slots]
        firsts = torch.stack([move[:, 0] for move in moves], 1)
        sizes = firsts.mean(0).abs().clamp_min(torch.finfo(torch.float64).tiny)
        scales = sizes.min() / sizes
        level, value = self._best(self._curve(logits, firsts * scales, edges, start))
        even = Chosen(edges, (level * scales).tolist(), value, curve)
        ends = [self._ascend(logits, slots, moves, begin, start, curve) for begin in (None, shared, even)]
        return max(ends, key=lambda chosen: self._worth(chosen.value))

    def _ascend(
        self,
        logits: Tensor,
        slots: Sequence[Sequence[Edge]],
        moves: Sequence[Tensor],
        begin: Chosen | None,
        start: Tensor,
        curve: Sweep | Dependence,
    ) -> Chosen:
        """Slot by slot the best candidate and rate, the other slots held, until no slot betters the criterion."""
        picks = [0] * len(slots)
        rates = [0.0] * len(slots) if begin is None else list(begin.rates)
        value = None if begin is None else begin.value
        for _ in range(_PASSES):
            moved = False
            for at, slot in enumerate(slots):
                base = logits.clone()
                for other in range(len(slots)):
                    if other != at:
                        base[:, slots[other][0].row] += rates[other] * moves[other][:, picks[other]]
                for candidate, edge in enumerate(slot):
                    line = self._curve(base, moves[at][:, candidate : candidate + 1], [edge], start)
                    rate, found = self._best(line)
                    if value is None or self._worth(found) > self._worth(value) + _BETTER:
                        value, picks[at], rates[at], moved = found, candidate, rate, True
            if not moved:
                break
        assert value is not None  # the first line has set it
        return Chosen([slot[pick] for slot, pick in zip(slots, picks, strict=True)], rates, value, curve)

    def _curve(self, logits: Tensor, moves: Tensor, edges: Sequence[Edge], start: Tensor) -> Sweep | Dependence:
        rows = torch.tensor([edge.row for edge in edges], device=logits.device)
        if self.features is not None:
            intervals = predicted(logits, moves, rows, low=0.0, high=self.high)
            return dependence(intervals, self.features, start, self.high)
        return sweep(logits, moves, rows, self.select.labels, self.groups, low=0.0, high=self.high)

    def _best(self, found: Sweep | Dependence) -> tuple[float, float]:
        """The rate of the best plateau, and the criterion's value there (percent; for independence D)."""
        if isinstance(found, Dependence):
            return found.best()
        return found.best("gap" if self.criterion == "gap" else "worst_group")  # without groups those are the classes

    def _worth(self, value: float) -> float:
        return -value if self.criterion in ("gap", "independence") else value


def describe_choice(criterion: str, samples: int, each: bool, candidates: int) -> str:
    """What a criterion chose and which labels of so many samples it used, for people."""
    what = "the rates" if each else "the rate"
    if candidates > 1 and criterion != "independence":
        what += f" and which of {candidates} edges"
    labels = LABELS[criterion]
    data = f"{samples} samples without labels" if labels == "none" else f"{labels} labels of {samples} samples"
    return f"{what} by {criterion}, which uses {data}"


def dependence(intervals: Tensor, features: Tensor, start: Tensor, high: float) -> Dependence:
    """Both terms for every rate.

    Args:
        intervals: the rates at which each class is predicted, ``[O, N, 2]``.
        features: of each row, int64 ``[N]``.
        start: predicted classes before the edit, int64 ``[N]``.
        high: the greatest rate.
    """
    kinds, where = features.unique(return_inverse=True)
    sizes = where.bincount().double()
    real = intervals[..., 0] <= intervals[..., 1]
    rates = intervals[..., 0][real].unique()  # where one prediction ends, another begins
    gaps, drifts, most = torch.zeros_like(rates), torch.zeros_like(rates), 0.0
    for label, (reach, kept) in enumerate(zip(intervals, real, strict=True)):
        shares, before = [], 0.0
        for kind in range(len(kinds)):
            part = reach[kept & (where == kind)]
            begun = torch.searchsorted(part[:, 0].sort().values, rates, right=True)
            ended = torch.searchsorted(part[:, 1].sort().values, rates)
            shares.append((begun - ended).double() / sizes[kind])
            before += float((start[where == kind] == label).double().mean()) / len(kinds)
        stack, most = torch.stack(shares), max(most, before)
        gaps = torch.maximum(gaps, stack.amax(0) - stack.amin(0))
        drifts = torch.maximum(drifts, (stack.mean(0) - before).abs())
    drifts /= max(1 - most, 1 / len(features))  # one sample, where all predictions were the same before
    return Dependence(rates.cpu(), gaps.cpu(), drifts.cpu(), high)
