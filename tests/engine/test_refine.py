"""Halving intervals: sharp turns are found, smooth paths cost little, and a step ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from spurge.engine.quadrature import gauss_legendre
from spurge.engine.refine import MOST_NODES, Piece, Values, integrate


class Integrand:
    """Gauss-Legendre on each piece of scalar functions of alpha, and a count of what it was asked."""

    def __init__(self, functions: dict[str, Callable[[Tensor], Tensor]], nodes: int = 2):
        self.functions, self.nodes, self.calls, self.pieces = functions, nodes, 0, 0

    def __call__(self, pieces: Sequence[Piece]) -> list[Values]:
        self.calls += 1
        self.pieces += len(pieces)
        x, w = gauss_legendre(self.nodes)
        out = []
        for piece in pieces:
            width = piece.high - piece.low
            value = (width * w * self.functions[piece.key](piece.low + width * x)).sum()
            out.append({piece.key: value.reshape(1, 1, 1)})
        return out


def value(found: Values, key: str) -> float:
    return float(found[key])


def sharp(x: Tensor) -> Tensor:
    """Derivative of a sigmoid that turns within 0.002 around 0.013: its integral is all but 1."""
    return torch.sigmoid((x - 0.013) / 5e-4) * torch.sigmoid((0.013 - x) / 5e-4) / 5e-4


def test_without_a_tolerance_each_path_is_one_piece() -> None:
    measure = Integrand({"a": torch.ones_like, "b": lambda x: x})
    found = integrate(["a", "b"], measure, 2)
    assert (measure.calls, measure.pieces) == (1, 2)
    assert [integral.change for integral in found.values()] == [None, None]
    torch.testing.assert_close(value(found["b"].total(), "b"), 0.5)


def test_a_sharp_turn_gets_the_nodes_and_a_smooth_path_few() -> None:
    measure = Integrand({"smooth": lambda x: 3 * x**2, "sharp": lambda x: sharp(x) + 1})
    full = {"smooth": 1.0, "sharp": 2.0}

    def complete(key: str, values: Values) -> bool:
        return abs(value(values, key) - full[key]) <= 1e-3

    found = integrate(["smooth", "sharp"], measure, 2, tolerance=1e-3, complete=complete)
    for key, want in full.items():
        assert abs(value(found[key].total(), key) - want) <= 1e-3
        assert found[key].reached
        change = found[key].change
        assert change is not None
        assert change <= 1e-3
    assert found["smooth"].nodes == 4
    assert found["sharp"].nodes < 200


def test_pieces_cover_the_path_once() -> None:
    found = integrate(["a"], Integrand({"a": lambda x: sharp(x) + 1}), 2, tolerance=1e-3)
    ends = sorted((piece.low, piece.high) for piece, _ in found["a"].parts)
    assert ends[0][0] == 0
    assert ends[-1][1] == 1
    assert all(left[1] == right[0] for left, right in pairwise(ends))
    assert found["a"].nodes == 2 * len(ends)


def test_values_that_do_not_add_up_are_halved_on() -> None:
    """The nodes see nothing of the turn at first: only completeness tells."""
    measure = Integrand({"a": sharp})
    found = integrate(["a"], measure, 2, tolerance=0.01, complete=lambda key, v: abs(value(v, key) - 1) < 0.01)
    assert abs(value(found["a"].total(), "a") - 1) < 0.01


def test_a_step_ends_and_says_that_it_was_not_reached() -> None:
    found = integrate(["a"], Integrand({"a": lambda x: (x > 0.3).double() * 1e6 / (x - 0.29999)}), 2, tolerance=1e-12)
    assert not found["a"].reached
    assert found["a"].nodes <= 2 * MOST_NODES
