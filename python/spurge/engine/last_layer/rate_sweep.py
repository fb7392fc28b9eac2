"""Average and worst-group accuracy for every rate of an edit at once, from cached logits and without a forward pass.

An edit of the last layer moves each sample's logits along straight lines, so each prediction is right for one interval
of rates (:func:`spurge.ops.correct_interval`), and between the ends of these intervals nothing changes: the accuracies
are step functions with at most two steps per sample, known exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.base.checks import choice

Criterion = Literal["worst_group", "gap", "average"]


@dataclass(frozen=True, eq=False)
class Sweep:
    """Accuracies in percent as step functions of the rate: plateau ``k`` is ``rates[k] <= r < rates[k + 1]``.

    Made by :func:`sweep`. The last plateau ends with ``high``, which belongs to it. Groups without samples count
    nowhere; of equally bad groups, ``worst_group`` has the smallest number.
    """

    low: float
    high: float
    rates: Tensor  # float64 [B], ascending, the first is low
    average: Tensor  # float64 [B]
    worst: Tensor  # float64 [B]
    worst_group: Tensor  # int64 [B]
    sizes: Tensor  # int64 [G], samples of each group
    groups: Tensor  # int64 [N]
    intervals: Tensor  # float64 [N, 2], the rates at which a sample is right; (inf, -inf): at none

    @property
    def gap(self) -> Tensor:
        """Average minus worst accuracy, float64 ``[B]``."""
        return self.average - self.worst

    def at(self, rates: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        """Accuracies at some rates: average ``[R]`` and groups ``[R, G]``, percent, NaN for groups without samples.

        Raises:
            ValueError: a rate outside ``[low, high]``.
        """
        wanted = torch.as_tensor(rates, dtype=torch.float64, device=self.rates.device)
        outside = ~((wanted >= self.low) & (wanted <= self.high))
        if wanted.dim() != 1 or outside.any():
            seen = f"shape {tuple(wanted.shape)}" if wanted.dim() != 1 else f"{wanted[outside][0].item()}"
            raise ValueError(f"rates: expected numbers within [{self.low}, {self.high}], got {seen}")
        counts = wanted.new_zeros(len(wanted), len(self.sizes))
        ever = self.intervals[:, 0] <= self.intervals[:, 1]
        group, order = self.groups[ever].sort()
        begins, ends = self.intervals[ever][order].t().contiguous()
        borders = torch.searchsorted(group, torch.arange(len(self.sizes) + 1, device=group.device)).tolist()
        for g, (first, last) in enumerate(itertools.pairwise(borders)):
            begun = torch.searchsorted(begins[first:last].sort().values, wanted, right=True)
            ended = torch.searchsorted(ends[first:last].sort().values, wanted)
            counts[:, g] = begun - ended
        return 100 * counts.sum(1) / len(self.groups), 100 * counts / self.sizes

    def best(self, criterion: Criterion = "worst_group") -> tuple[float, float]:
        """The best rate and the criterion's value there, percent.

        ``"worst_group"`` and ``"average"`` are the larger the better; ``"gap"``, average minus worst, the smaller the
        better (FCR's choice of r), and among equals the one with the better worst group. The rate lies in the middle
        of the best plateau, or is ``low`` where the plateau contains it; of several, the one nearest ``low`` counts.

        Raises:
            ValueError: an unknown criterion.
        """
        choice("criterion", criterion, get_args(Criterion))
        if criterion == "gap":
            gap = self.gap.round(decimals=9)  # equal gaps may differ in their last bits
            value, good = self.gap, gap == gap.min()
            good &= self.worst == self.worst[good].max()
        else:
            value = self.worst if criterion == "worst_group" else self.average
            good = value == value.max()
        first = int(good.nonzero()[0])
        after = (~good[first:]).nonzero()
        begin = self.rates[first].item()
        end = self.rates[first + int(after[0])].item() if len(after) else self.high
        middle = begin + (end - begin) / 2
        inside = middle < end or not len(after)  # two neighbours in float64 have no number between them
        rate = self.low if first == 0 else middle if inside else begin
        return rate, value[first].item()

    def __repr__(self) -> str:
        groups = int((self.sizes > 0).sum())
        start, (rate, worst) = self.worst[0].item(), self.best("worst_group")
        return (
            f"Sweep({len(self.groups)} samples, {groups} groups, {len(self.rates)} plateaus in "
            f"[{self.low:g}, {self.high:g}]; worst group {start:.1f} %, at best {worst:.1f} % at {rate:.4g})"
        )


def sweep(
    logits: Tensor,
    shifts: Tensor,
    rows: Tensor,
    labels: Tensor,
    groups: Tensor | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
) -> Sweep:
    r"""Accuracy of ``argmax(logits + r * shifts)`` for all rates ``r`` in ``[low, high]`` (FCR Eq. 8, Figs. 8 and 9).

    For FCR's edit of weight :math:`w_{ji}` the shift of logit i is :math:`-N x_j / w_{ji}`, with
    :math:`N = \lVert w_i \rVert^2 + 1`. Exact up to the rounding of the crossings to float64; a sample with NaN
    is never right. Takes :math:`O(NO + N \log N \log G)` time and :math:`O(N)` memory, however many groups.

    Args:
        logits: before the edit, ``[N, O]``, float32 or float64.
        shifts: what rate 1 adds to the logits of ``rows``, ``[N, E]``, float32 or float64.
        rows: the edited outputs, int64 ``[E]``, distinct.
        labels: int64 ``[N]``.
        groups: group of each sample, int64 ``[N]``, not negative; None: its label.
        low, high: the rates to look at, both included.

    Raises:
        ValueError: a shape, dtype or range does not fit, or there is no sample.
    """
    groups = labels if groups is None else groups
    if len(logits) == 0:
        raise ValueError("logits: expected at least 1 sample, got 0")
    if groups.dtype != torch.int64 or groups.shape != (len(logits),):
        raise ValueError(f"groups: expected int64 [{len(logits)}], got {groups.dtype} {list(groups.shape)}")
    if groups.min() < 0:
        raise ValueError(f"groups: expected values of at least 0, got {groups.min().item()}")
    intervals = ops.correct_interval(logits, shifts, rows, labels, low, high)
    return _counted(intervals, groups.to(intervals.device), float(low), float(high))


def predicted(logits: Tensor, shifts: Tensor, rows: Tensor, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The rates at which each class is the prediction, float64 ``[O, N, 2]``: for criteria without labels.

    Arguments as :func:`sweep`; ``(inf, -inf)`` where a class never is. Takes O times as long as one sweep, and
    ``16 * O * N`` bytes.
    """
    labels = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    out = torch.empty(logits.shape[1], len(logits), 2, dtype=torch.float64, device=logits.device)
    for c in range(logits.shape[1]):
        out[c] = ops.correct_interval(logits, shifts, rows, labels.fill_(c), low, high)
    return out


def _counted(intervals: Tensor, groups: Tensor, low: float, high: float) -> Sweep:
    sizes = groups.bincount()
    present = sizes.nonzero().flatten()
    dense = (sizes > 0).cumsum(0)[groups] - 1  # groups without those that have no samples

    ever = intervals[:, 0] <= intervals[:, 1]
    begins, ends = intervals[ever].t()
    left = ends < high  # right for all rates up to the end of the range: never stops
    after = ends[left].nextafter(ends.new_tensor(math.inf))
    # One event where a sample begins or stops to be right, and one of each group at low, so that all have begun.
    times = torch.cat([begins.new_full(present.shape, low), begins, after])
    nodes = torch.cat([torch.arange(len(present), device=groups.device), dense[ever], dense[ever][left]])
    changes = torch.cat([torch.zeros_like(present), torch.ones_like(dense[ever]), -torch.ones_like(dense[ever][left])])
    times, order = times.sort(stable=True)
    nodes, changes = nodes[order], changes[order]
    rates, at, repeats = torch.unique_consecutive(times, return_inverse=True, return_counts=True)
    right = changes.cumsum(0)[repeats.cumsum(0) - 1].double()

    worst, group = _worst(nodes, at, changes, sizes[present])
    average = 100 * right / len(groups)
    return Sweep(low, high, rates, average, worst, present[group], sizes, groups, intervals)


def _worst(nodes: Tensor, at: Tensor, changes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest of all groups' accuracies after each instant, and the group that has it.

    Events in the order of their instants ``at``: ``changes`` by which the number of right samples of group ``nodes``
    grows. A tournament: the minimum of two groups' step functions has a step only where one of them has, so each of
    the log2(G) rounds handles each event once.
    """
    nodes, order = nodes.sort(stable=True)
    at, counts = at[order], changes[order].cumsum(0)
    first = torch.searchsorted(nodes, torch.arange(len(sizes), device=nodes.device))
    before = counts[first] - changes[order][first]
    values, groups = 100 * (counts - before[nodes]).double() / sizes[nodes], nodes
    last = _last_of_each(nodes, at)
    nodes, at, values, groups = nodes[last], at[last], values[last], groups[last]

    for _ in range((len(sizes) - 1).bit_length()):
        side, pairs = nodes % 2, nodes // 2
        order = (pairs * (int(at.max()) + 1) + at).sort(stable=True).indices
        side, nodes, at, values, groups = side[order], pairs[order], at[order], values[order], groups[order]
        index = torch.arange(len(nodes), device=nodes.device)
        begin = torch.searchsorted(nodes, nodes)  # where this pair's events begin
        now, then = [], []
        for s in (0, 1):
            recent = index.where(side == s, -1).cummax(0).values
            now.append(values[recent.clamp_min(0)].where(recent >= begin, math.inf))
            then.append(groups[recent.clamp_min(0)])
        values = torch.minimum(*now)
        groups = then[0].where(now[0] <= now[1], then[1])
        last = _last_of_each(nodes, at)
        nodes, at, values, groups = nodes[last], at[last], values[last], groups[last]
    return values, groups


def _last_of_each(nodes: Tensor, at: Tensor) -> Tensor:
    """Bool: no later event of the same node at the same instant follows."""
    last = torch.ones_like(nodes, dtype=torch.bool)
    last[:-1] = (nodes[1:] != nodes[:-1]) | (at[1:] != at[:-1])
    return last
