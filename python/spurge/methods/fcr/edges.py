"""Edges of a last layer: which may be edited, which one is chosen, and the tilt of their hyperplanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from spurge.engine.models.heads import Head
from spurge.methods.fcr.orthogonal import angle_of_rate, checked_rate, pull, rate_of_angle, tilted_weight

Sign = Literal["positive", "any"]


@dataclass(frozen=True)
class Edge:
    """One weight and what was done to it.

    Attributes:
        row, column: the output and the unit it connects.
        target: the class or the fictitious class that it was chosen for.
        weight, new: before and after.
        score: what it was chosen by.
        rate, angle: how far its hyperplane was tilted (Eq. 8), and the same in degrees.
    """

    row: int
    column: int
    target: int
    weight: float
    score: float
    new: float = math.nan
    rate: float = math.nan
    angle: float = math.nan

    @property
    def raises(self) -> bool:
        """Whether the edit raises the output where the unit is active, as it does for a negative weight."""
        return self.weight < 0

    def to_dict(self) -> dict[str, Any]:
        """Its fields as JSON-able numbers."""
        return {name: getattr(self, name) for name in _FIELDS}


_FIELDS = ("row", "column", "target", "weight", "score", "new", "rate", "angle")

Choice = Callable[[Head, Sequence[Edge]], list[tuple[Edge, float]]]
"""From a head and the edges of a round to the edges that are edited, in the same rows, and their rates."""


def usable(row: Tensor, least: float, sign: Sign) -> Tensor:
    """Which weights ``[M]`` of an output can carry the edit: not tiny beside the greatest, and positive where asked.

    Eq. 7 divides by the weight: a tiny one would become huge and upset every input. A negative one has the opposite
    effect of a removal: the edit raises the output.
    """
    sizes = row.abs()
    chosen = (sizes > 0) & (sizes >= least * sizes.max())
    return chosen & (row > 0) if sign == "positive" else chosen


def best_columns(scores: Tensor, allowed: Tensor, taken: Sequence[int] = (), count: int = 1) -> list[int]:
    """Up to ``count`` allowed units with the highest scores above 0, highest first, equal ones by index."""
    scores = torch.where(allowed, scores, 0.0)
    scores[list(taken)] = 0.0
    order = scores.sort(descending=True, stable=True).indices[:count].tolist()
    return [column for column in order if float(scores[column]) > 0]


def rounds(edges: Sequence[Edge]) -> list[list[Edge]]:
    """Edges in rounds with at most one in each row, in the order given: two edits of one row do not commute."""
    out: list[list[Edge]] = []
    seen: dict[int, int] = {}
    for edge in edges:
        number = seen[edge.row] = seen.get(edge.row, -1) + 1
        if number == len(out):
            out.append([])
        out[number].append(edge)
    return out


def pulls(head: Head, edges: Sequence[Edge]) -> list[float]:
    """What rate 1 adds to each edge's weight in this head: its row's N is taken as it is now."""
    return [pull(head.weight[edge.row], edge.column) for edge in edges]


def shifts(head: Head, edges: Sequence[Edge], values: Tensor) -> Tensor:
    """What rate 1 adds to the logits of the edges' rows, float64 ``[N, E]``, for features ``[N, M]``."""
    columns = torch.tensor([edge.column for edge in edges], device=values.device)
    factors = torch.tensor(pulls(head, edges), dtype=torch.float64, device=values.device)
    return values.index_select(1, columns).double() * factors


def tilt(
    head: Head, edges: Sequence[Edge], *, rate: float | None, angle: float | None, choice: Choice | None, most: float
) -> tuple[list[Edge], Head]:
    """Edits the edges round by round; each round sees the weights that those before it left.

    Exactly one of ``rate``, ``angle`` and ``choice`` (called with the head and the edges of a round) is given.

    Raises:
        ValueError: a rate above ``most``, also one that an angle stands for.
    """
    done = []
    for group in rounds(edges):
        if choice is not None:
            pairs = choice(head, group)
        elif angle is not None:
            pairs = [(edge, rate_of_angle(head.weight[edge.row], edge.column, angle)) for edge in group]
        else:
            pairs = [(edge, checked_rate(rate)) for edge in group]
        weight = head.weight.clone()
        for edge, own in pairs:
            row = head.weight[edge.row]
            if own > most:
                given = f"rate: {own:g}" if angle is None else f"angle: {angle}"
                raise ValueError(f"{given} needs a rate of {own:.6g}, above {most:g}; FCR(most=...) allows it")
            new = tilted_weight(row, edge.column, own)
            if not math.isfinite(float(torch.tensor(new, dtype=weight.dtype))):
                raise ValueError(f"edge: the new weight {new:.3g} of row {edge.row} does not fit {weight.dtype}")
            weight[edge.row, edge.column] = new
            tilted = angle_of_rate(row, edge.column, own)
            before = float(row[edge.column])
            done.append(replace(edge, weight=before, new=new, rate=own, angle=tilted))
        head = head.with_(weight=weight)
    return done, head
