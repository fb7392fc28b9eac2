"""Path integrals of integrated gradients: nodes and weights, and integrals to a stated accuracy.

Intervals are halved where their values change or do not add up. A path whose integrand turns sharply, as that of a
layer with massive activations does near 0, needs its nodes where it turns; more nodes everywhere converge slowly or not
at all. What the values of an interval have to add up to is known from one forward row at each of its ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.checks import warn

MOST_NODES = 64


@dataclass(frozen=True, eq=False)
class Nodes:
    """A rule on part of [0, 1]: nodes and weights float64 ``[S]``, and the weight of f(1), 0 where it is no node."""

    alphas: Tensor
    weights: Tensor
    end: float


def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    r"""Nodes and weights of the Gauss-Legendre rule on [0, 1].

    .. math:: \int_0^1 f(\alpha)\,d\alpha \approx \sum_{s=1}^{S} w_s f(\alpha_s)

    Exact for polynomials of degree up to ``2 S - 1``. On neuron paths four nodes are an order of magnitude more
    accurate than the twenty-step Riemann sums usual for integrated gradients.

    Args:
        nodes: S, from 1 to 64.

    Returns:
        Nodes in (0, 1), ascending, and their weights, which sum to 1: float64, ``[S]`` each.

    Raises:
        ValueError: when ``nodes`` is out of range.

    >>> gauss_legendre(1)
    (tensor([0.5000], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    x, w = np.polynomial.legendre.leggauss(_checked(nodes))
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


def gauss_radau(nodes: int) -> tuple[Tensor, Tensor, float]:
    r"""Nodes and weights of the Gauss-Radau rule on [0, 1] with its fixed point at 1.

    .. math:: \int_0^1 f(\alpha)\,d\alpha \approx w f(1) + \sum_{s=1}^{S} w_s f(\alpha_s)

    Exact for polynomials of degree up to ``2 S``: one more than Gauss-Legendre with the same S free nodes. On neuron
    paths f(1) belongs to the unedited model, so one backward pass gives it for all layers.

    Args:
        nodes: S, the free nodes, from 1 to 64.

    Returns:
        Free nodes, ascending, and their weights, float64 ``[S]`` each; the weight of f(1).

    Raises:
        ValueError: when ``nodes`` is out of range.

    >>> gauss_radau(1)
    (tensor([0.3333], dtype=torch.float64), tensor([0.7500], dtype=torch.float64), 0.25)
    """
    n = _checked(nodes) + 1
    difference = np.zeros(n + 1)
    difference[n - 1 :] = 1, -1  # P_{n-1} - P_n vanishes at 1 and at the free nodes
    x = np.sort(np.polynomial.legendre.legroots(difference).real)[:-1]
    last = np.zeros(n)
    last[-1] = 1
    w = (1 + x) / (n * np.polynomial.legendre.legval(x, last)) ** 2
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2), 1 / n**2


def _checked(nodes: int) -> int:
    if isinstance(nodes, bool) or not isinstance(nodes, int) or not 1 <= nodes <= MOST_NODES:
        raise ValueError(f"nodes: need a whole number from 1 to {MOST_NODES}, got {nodes!r}")
    return nodes


Values = dict[str, Tensor]  # site -> [Q, B, F]
Point = tuple[str, float]  # key of a path, and where on it
NARROWEST = 2.0**-14
MOST_PATH_NODES = 256  # of one path, so that a path of steps ends
SHARE = 0.25  # of the tolerance, that the values of one interval may miss


@dataclass(frozen=True)
class Piece:
    """Part of a path, ``low`` to ``high``; ``key`` says whose: a site's, or that of all sites together."""

    key: str
    low: float = 0.0
    high: float = 1.0

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    def halves(self) -> tuple[Piece, Piece]:
        return Piece(self.key, self.low, self.middle), Piece(self.key, self.middle, self.high)


Measure = Callable[[Sequence[Piece]], list[Values]]


@dataclass(frozen=True, eq=False)
class Part:
    """An interval with its values, and by how much these miss the change of the target over it, ``[Q, B]``."""

    piece: Piece
    values: Values
    gap: Tensor | None = None


@dataclass
class Integral:
    """Values of one path.

    Attributes:
        parts: the intervals; their sum is the integral.
        nodes: quadrature nodes of these.
        change: largest relative change (2-norm, against the whole path's values) that the last halving of an interval
            made; None where none was halved.
        reached: whether the tolerance was.
    """

    parts: list[Part]
    nodes: int
    change: float | None = None
    reached: bool = True

    def total(self) -> Values:
        first, *rest = (part.values for part in self.parts)
        total = {site: value.clone() for site, value in first.items()} if rest else first
        for values in rest:
            for site, value in values.items():
                total[site] += value
        return total


@dataclass(frozen=True, eq=False)
class Goal:
    """What a path integral has to satisfy.

    Attributes:
        tolerance: of the change by halving, relative to the path's values, and of the gap, relative to ``effect``.
        effect: what a gap is compared with, ``[Q, B]``.
        at: the target at some points, ``[Q, B]`` each.
    """

    tolerance: float
    effect: Tensor
    at: Callable[[Sequence[Point]], list[Tensor]]

    def missed(self, gap: Tensor, share: float) -> bool:
        return bool((gap.abs() > share * self.tolerance * self.effect).any())


def integrate(keys: Sequence[str], measure: Measure, nodes: int, goal: Goal | None = None) -> dict[str, Integral]:
    """Integrals of several paths, measured together.

    Args:
        keys: of the paths.
        measure: values of some pieces, in their order; ``nodes`` are spent on each.
        goal: None: one interval for each path.
    """
    pieces = [Piece(key) for key in keys]
    whole = [Part(piece, values) for piece, values in zip(pieces, measure(pieces), strict=True)]
    found = {part.piece.key: Integral([part], nodes) for part in whole}
    if goal is None:
        return found
    known = _ends(goal, [(key, alpha) for key in keys for alpha in (0.0, 1.0)])
    open_parts = {part.piece.key: [part] for part in whole}
    final: dict[str, list[Part]] = {key: [] for key in keys}
    while parents := [part for parts in open_parts.values() for part in parts]:
        known |= _ends(goal, [(part.piece.key, part.piece.middle) for part in parents])
        halves = [half for part in parents for half in part.piece.halves()]
        made = [
            Part(half, values, _gap(half, values, known)) for half, values in zip(halves, measure(halves), strict=True)
        ]
        pairs: dict[str, list[tuple[float, list[Part]]]] = {key: [] for key in keys}
        for n, parent in enumerate(parents):
            pair = made[2 * n : 2 * n + 2]
            pairs[parent.piece.key].append((_moved(parent.values, pair), pair))
        for key, own in pairs.items():
            if own:
                found[key], final[key], open_parts[key] = _judged(final[key], own, nodes, goal)
    return found


def warn_of_missed(goal: Goal, found: Mapping[str, Integral], residual: Mapping[str, Tensor]) -> None:
    """Say of which paths a goal was not reached, by the residuals of their values."""
    late = [key for key, integral in found.items() if not integral.reached]
    if not late:
        return
    worst = max(float((residual[key].abs() / goal.effect).nan_to_num().max()) for key in late)
    warn(
        f"tolerance {goal.tolerance:g} not reached on {len(late)} of {len(found)} paths with up to "
        f"{max(found[key].nodes for key in late)} nodes: relative residual {worst:.2g}"
    )


def _judged(
    final: list[Part], pairs: Sequence[tuple[float, list[Part]]], nodes: int, goal: Goal
) -> tuple[Integral, list[Part], list[Part]]:
    """A path after a round: what it is now, the parts that stay, and those to halve again."""
    parts = final + [part for _, pair in pairs for part in pair]
    integral = Integral(parts, nodes * len(parts))
    size = _size(integral.total())
    integral.change = max(moved for moved, _ in pairs) / size if size else 0.0
    again = [
        part
        for moved, pair in pairs
        for part in pair
        if moved > goal.tolerance * size or (part.gap is not None and goal.missed(part.gap, SHARE))
    ]
    gaps = [part.gap for part in parts if part.gap is not None]
    if not again and goal.missed(sum(gaps[1:], gaps[0]), 1.0):
        again = [part for part in parts if part.gap is not None and goal.missed(part.gap, 1 / len(parts))]
    integral.reached = not again
    if integral.nodes >= MOST_PATH_NODES:
        again = []
    again = [part for part in again if part.piece.high - part.piece.low > NARROWEST]
    return integral, [part for part in parts if part not in again], again


def _ends(goal: Goal, points: Sequence[Point]) -> dict[Point, Tensor]:
    return dict(zip(points, goal.at(points), strict=True))


def _gap(piece: Piece, values: Values, known: dict[Point, Tensor]) -> Tensor:
    gap = known[piece.key, piece.high] - known[piece.key, piece.low]
    return gap - sum(value.sum(2).to(gap.device) for value in values.values())


def _moved(before: Values, halves: Sequence[Part]) -> float:
    """2-norm of what an interval's values change by when its halves take its place."""
    first, second = (half.values for half in halves)
    return sum(float((first[site] + second[site] - value).norm()) ** 2 for site, value in before.items()) ** 0.5


def _size(values: Values) -> float:
    return sum(float(value.norm()) ** 2 for value in values.values()) ** 0.5
