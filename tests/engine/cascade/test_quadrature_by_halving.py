"""Halving intervals: sharp turns are found, smooth paths cost little, and a step ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from spurge.engine.cascade.quadrature import MOST_PATH_NODES, Goal, Piece, Point, Values, gauss_legendre, integrate


class Paths:
    """Derivatives by alpha with their integrals from 0, scalar functions both, and a count of what was asked."""

    def __init__(self, **functions: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]):
        self.functions, self.calls, self.pieces, self.points = functions, 0, 0, 0

    def measure(self, pieces: Sequence[Piece]) -> list[Values]:
        self.calls += 1
        self.pieces += len(pieces)
        x, w = gauss_legendre(2)
        out = []
        for piece in pieces:
            width = piece.high - piece.low
            value = (width * w * self.functions[piece.key][0](piece.low + width * x)).sum()
            out.append({piece.key: value.reshape(1, 1, 1)})
        return out

    def at(self, points: Sequence[Point]) -> list[Tensor]:
        self.points += len(points)
        return [self.functions[key][1](torch.tensor(alpha).double()).reshape(1, 1) for key, alpha in points]

    def integrate(self, tolerance: float | None) -> dict:
        goal = None if tolerance is None else Goal(tolerance, torch.ones(1, 1).double(), self.at)
        return integrate(list(self.functions), self.measure, 2, goal)


def turn(x: Tensor) -> Tensor:
    """Rises from all but 0 to all but 1 within 0.002 around 0.013."""
    return torch.sigmoid((x - 0.013) / 5e-4)


def turning(x: Tensor) -> Tensor:
    return turn(x) * (1 - turn(x)) / 5e-4


SMOOTH = (lambda x: 3 * x**2, lambda x: x**3)
SHARP = (lambda x: turning(x) + 1, lambda x: turn(x) + x)
HIDDEN = (turning, turn)


def total(found: dict, key: str) -> float:
    return float(found[key].total()[key])


def test_without_a_goal_each_path_is_one_piece() -> None:
    paths = Paths(a=SMOOTH, b=SHARP)
    found = paths.integrate(None)
    assert (paths.calls, paths.pieces, paths.points) == (1, 2, 0)
    assert [integral.change for integral in found.values()] == [None, None]
    torch.testing.assert_close(total(found, "a"), 1.0)


def test_a_sharp_turn_gets_the_nodes_and_a_smooth_path_few() -> None:
    found = Paths(smooth=SMOOTH, sharp=SHARP).integrate(1e-3)
    for key, want in (("smooth", 1.0), ("sharp", 2.0)):
        assert abs(total(found, key) - want) <= 1e-3
        assert found[key].reached
        assert found[key].change is not None
        assert found[key].change <= 1e-3
    assert found["smooth"].nodes == 4
    assert found["sharp"].nodes < 60


def test_pieces_cover_the_path_once() -> None:
    found = Paths(a=SHARP).integrate(1e-3)
    ends = sorted((part.piece.low, part.piece.high) for part in found["a"].parts)
    assert ends[0][0] == 0
    assert ends[-1][1] == 1
    assert all(left[1] == right[0] for left, right in pairwise(ends))
    assert found["a"].nodes == 2 * len(ends)


def test_a_turn_between_the_nodes_is_found_where_values_do_not_add_up() -> None:
    found = Paths(a=HIDDEN).integrate(0.01)
    assert abs(total(found, "a") - 1) < 0.01
    assert found["a"].nodes < 60


def test_a_step_ends_and_says_that_it_was_not_reached() -> None:
    found = Paths(a=(torch.zeros_like, lambda x: (x > 0.3).double())).integrate(1e-3)
    assert not found["a"].reached
    assert found["a"].nodes < 60
    noisy = Paths(a=(lambda x: torch.sin(1e7 * x), torch.zeros_like)).integrate(1e-6)
    assert not noisy["a"].reached
    assert noisy["a"].nodes <= 2 * MOST_PATH_NODES
