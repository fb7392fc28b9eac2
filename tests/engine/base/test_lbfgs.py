from __future__ import annotations

import pytest
import torch

from spurge.engine.base.lbfgs import InverseHessian, minimise


def quadratic(condition, width=20):
    scale = torch.logspace(0, torch.tensor(condition).log10().item(), width, dtype=torch.float64)
    return lambda x: (float((scale * (x - 1).square()).sum() / 2), scale * (x - 1))


def small(limit):
    return lambda gradient: float(gradient.abs().max()) <= limit


@pytest.mark.parametrize("condition", [1.0, 100.0, 1e3])
def test_finds_the_minimum_of_a_quadratic(condition):
    place, used = minimise(quadratic(condition), torch.zeros(20).double(), finished=small(1e-9), evaluations=400)
    torch.testing.assert_close(place, torch.ones(20).double(), atol=1e-8, rtol=0)
    assert used < 400


def test_a_unit_hessian_takes_two_evaluations():
    _, used = minimise(quadratic(1.0), torch.zeros(20).double(), finished=small(1e-9), evaluations=10)
    assert used == 2


def test_a_logarithm_of_exponentials():
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).double() - 0.7

    def function(x):
        scores = rows @ x
        return float(scores.logsumexp(0)), scores.softmax(0) @ rows

    place, used = minimise(function, torch.full((5,), -8.0).double(), finished=small(1e-10), evaluations=100)
    assert float((rows @ place).softmax(0).matmul(rows).abs().max()) <= 1e-10
    assert used < 60


def test_never_uses_more_evaluations_than_allowed():
    calls = []

    def counted(x):
        calls.append(1)
        return quadratic(1e6)(x)

    _, used = minimise(counted, torch.zeros(20).double(), finished=small(1e-12), evaluations=7)
    assert used == len(calls) == 7


def test_stops_where_it_is_told_to_before_it_begins():
    place, used = minimise(quadratic(1.0), torch.ones(20).double(), finished=small(1e-9), evaluations=10)
    assert used == 1
    assert torch.equal(place, torch.ones(20).double())


def test_the_inverse_hessian_is_exact_along_what_was_learned():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator).double()
    hessian = root @ root.T + torch.eye(6).double()
    inverse = InverseHessian(most=2, diagonal=hessian.diagonal())
    gradient = torch.randn(6, generator=generator).double()
    torch.testing.assert_close(inverse.times(gradient), gradient / hessian.diagonal())
    moves = torch.randn(3, 6, generator=generator).double()
    for move in moves:
        inverse.learn(move, hessian @ move)
    torch.testing.assert_close(inverse.times(hessian @ moves[-1]), moves[-1])  # the secant condition
    inverse.forget()
    torch.testing.assert_close(inverse.times(gradient), gradient / hessian.diagonal())
    inverse.learn(moves[0], -hessian @ moves[0])
    torch.testing.assert_close(inverse.times(gradient), gradient / hessian.diagonal())
