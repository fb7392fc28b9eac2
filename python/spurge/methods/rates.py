"""Which neutralisation rate: by labelled accuracies, exact for all rates at once, or by independence without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spurge.engine.features import Features
from spurge.engine.heads import Head
from spurge.engine.sweep import Sweep, predicted, sweep
from spurge.methods.edges import Edge, shifts

Criterion = Literal["gap", "worst_group", "worst_class", "independence"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
LABELS = {"gap": "group", "worst_group": "group", "worst_class": "class", "independence": "none"}
"""Which labels of the selection data a criterion uses."""

_SAME = 1e-12  # shares that differ by less are equal but for rounding


@dataclass(frozen=True, eq=False, repr=False)
class Dependence:
    r"""How much predictions depend on a feature, for every rate.

    .. math:: \max_k \max_{f, f'} \;\bigl| P(\hat y = k \mid \hat f = f) - P(\hat y = k \mid \hat f = f') \bigr|

    Attributes:
        rates: where it changes, ascending float64 ``[B]``; plateau b reaches to ``rates[b + 1]``, the last to ``high``.
        gaps: its value there, 0 to 1, float64 ``[B]``.
        high: the greatest rate.
    """

    rates: Tensor
    gaps: Tensor
    high: float

    def best(self) -> tuple[float, float]:
        """Middle of the first plateau with the least gap (its start where that is the first rate), and the gap."""
        least = float(self.gaps.min())
        first = int((self.gaps <= least + _SAME).nonzero()[0])
        if first == 0:
            return float(self.rates[0]), float(self.gaps[0])
        after = (self.gaps[first:] > least + _SAME).nonzero()[:, 0]
        end = float(self.rates[first + int(after[0])]) if len(after) else self.high
        return (float(self.rates[first]) + end) / 2, float(self.gaps[first])

    def __repr__(self) -> str:
        rate, gap = self.best()
        return (
            f"Dependence({len(self.rates)} plateaus in [0, {self.high:g}]; gap {float(self.gaps[0]):.3f}, at best "
            f"{gap:.3f} at {rate:.4g})"
        )


def curve(
    select: Features, head: Head, edges: Sequence[Edge], criterion: str, features: Tensor | None, high: float
) -> Sweep | Dependence:
    """What the criterion is read from, for all rates from 0 to ``high`` that the edges of one round share.

    Args:
        select: selection data; the criterion's labels have to be there.
        head: as it is before the round.
        edges: one in a row.
        criterion: one of `CRITERIA`.
        features: for ``"independence"``, the predicted fictitious class of each row, int64 ``[N]``.
        high: greatest rate.

    Raises:
        ValueError: unknown criterion, no groups, or fewer than two predicted fictitious classes.
    """
    rows = torch.tensor([edge.row for edge in edges], device=select.values.device)
    logits, moves = head.logits(select.values), shifts(head, edges, select.values)
    if criterion == "independence":
        assert features is not None  # the method predicts them for this criterion
        return dependence(predicted(logits, moves, rows, low=0.0, high=high), features, high)
    groups = None
    if criterion in ("gap", "worst_group"):
        if select.groups is None:
            raise ValueError(f"select: criterion {criterion!r} needs groups; give them, or choose by 'worst_class'")
        groups = select.groups
    return sweep(logits, moves, rows, select.labels, groups, low=0.0, high=high)


def best(found: Sweep | Dependence, criterion: str) -> tuple[float, float]:
    """The rate of the best plateau, and the criterion's value there (percent; a share for independence)."""
    if isinstance(found, Dependence):
        return found.best()
    return found.best("gap" if criterion == "gap" else "worst_group")  # without groups those are the classes


def dependence(intervals: Tensor, features: Tensor, high: float) -> Dependence:
    """Gaps for every rate, from the rates ``[O, N, 2]`` at which each class is predicted and the features ``[N]``.

    Raises:
        ValueError: fewer than two features occur.
    """
    kinds, where = features.unique(return_inverse=True)
    if len(kinds) < 2:
        raise ValueError("select: independence needs rows of at least 2 predicted fictitious classes, got 1")
    sizes = where.bincount().double()
    real = intervals[..., 0] <= intervals[..., 1]
    rates = intervals[..., 0][real].unique()  # where one prediction ends, another begins
    gaps = torch.zeros_like(rates)
    for begin, kept in zip(intervals, real, strict=True):
        if not bool(kept.any()):
            continue
        shares = []
        for kind in range(len(kinds)):
            part = begin[kept & (where == kind)]
            begun = torch.searchsorted(part[:, 0].sort().values, rates, right=True)
            ended = torch.searchsorted(part[:, 1].sort().values, rates)
            shares.append((begun - ended).double() / sizes[kind])
        stack = torch.stack(shares)
        gaps = torch.maximum(gaps, stack.amax(0) - stack.amin(0))
    return Dependence(rates.cpu(), gaps.cpu(), high)
