"""Path integrals to a stated accuracy: intervals are halved where halving still changes the values.

A path whose integrand turns sharply, as that of a layer with massive activations does near 0, needs its nodes where it
turns; more nodes everywhere converge slowly or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Values = dict[str, Tensor]  # site -> [Q, B, F]
Measure = Callable[[Sequence["Piece"]], list[Values]]
NARROWEST = 2.0**-14
MOST_NODES = 256  # of one path, so that a path of steps ends


@dataclass(frozen=True)
class Piece:
    """Part of a path, ``low`` to ``high``; ``key`` says whose: a site's, or that of all sites together."""

    key: str
    low: float = 0.0
    high: float = 1.0

    def halves(self) -> tuple[Piece, Piece]:
        middle = (self.low + self.high) / 2
        return Piece(self.key, self.low, middle), Piece(self.key, middle, self.high)


@dataclass
class Integral:
    """Values of one path.

    Attributes:
        parts: intervals with their values; their sum is the integral.
        nodes: quadrature nodes of these intervals.
        change: largest relative change (2-norm, against the whole path's values) that halving an interval made; None
            where none was halved.
        reached: whether the tolerance was.
    """

    parts: list[tuple[Piece, Values]]
    nodes: int
    change: float | None = None
    reached: bool = True

    def total(self) -> Values:
        first, *rest = (values for _, values in self.parts)
        total = {site: value.clone() for site, value in first.items()} if rest else first
        for values in rest:
            for site, value in values.items():
                total[site] += value
        return total


def integrate(
    keys: Sequence[str],
    measure: Measure,
    nodes: int,
    *,
    tolerance: float | None = None,
    complete: Callable[[str, Values], bool] = lambda key, values: True,
) -> dict[str, Integral]:
    """Integrals of several paths, measured together.

    Args:
        keys: of the paths.
        measure: values of some pieces, in their order; ``nodes`` are spent on each.
        tolerance: halve an interval until its values change by at most this much, relative to the whole path's; None:
            one interval.
        complete: whether the values of a path add up to what they have to; those that do not are halved on.
    """
    whole = [Piece(key) for key in keys]
    found = {piece.key: Integral([(piece, values)], nodes) for piece, values in zip(whole, measure(whole), strict=True)}
    if tolerance is None:
        return found
    open_parts = {key: list(integral.parts) for key, integral in found.items()}
    final: dict[str, list[tuple[Piece, Values]]] = {key: [] for key in keys}
    while parents := [part for parts in open_parts.values() for part in parts]:
        halves = [half for piece, _ in parents for half in piece.halves()]
        measured = list(zip(halves, measure(halves), strict=True))
        tried: dict[str, list[tuple[float, list[tuple[Piece, Values]]]]] = {key: [] for key in keys}
        for n, (piece, before) in enumerate(parents):
            pair = measured[2 * n : 2 * n + 2]
            tried[piece.key].append((_moved(before, [values for _, values in pair]), pair))
        for key, pairs in tried.items():
            if not pairs:
                continue
            integral = found[key] = Integral(final[key] + [part for _, pair in pairs for part in pair], 0)
            integral.nodes = nodes * len(integral.parts)
            total = integral.total()
            size = _size(total)
            late = [moved > tolerance * size for moved, _ in pairs]
            integral.change = max(moved for moved, _ in pairs) / size if size else 0.0
            if not any(late) and not complete(key, total):
                late, pairs = [True], [(0.0, integral.parts)]
                final[key] = []
            integral.reached = not any(late)
            open_parts[key] = []
            for again, (_, pair) in zip(late, pairs, strict=True):
                (open_parts[key] if again else final[key]).extend(pair)
            if integral.nodes >= MOST_NODES or any(piece.high - piece.low <= NARROWEST for piece, _ in open_parts[key]):
                final[key] += open_parts[key]
                open_parts[key] = []
    return found


def _moved(before: Values, halves: Sequence[Values]) -> float:
    """2-norm of what an interval's values change by when its halves take its place."""
    first, second = halves
    return sum(float((first[site] + second[site] - value).norm()) ** 2 for site, value in before.items()) ** 0.5


def _size(values: Values) -> float:
    return sum(float(value.norm()) ** 2 for value in values.values()) ** 0.5
