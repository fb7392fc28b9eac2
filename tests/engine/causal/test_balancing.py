from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.causal import balancing
from spurge.engine.causal.balancing import Unbalanced, balance, balance_batch


def problem(rows, width, shift=0.5, seed=0, dtype=torch.float64):
    """Normal covariates whose target lies ``shift`` standard deviations off, in all directions together."""
    generator = torch.Generator().manual_seed(seed)
    covariates = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    return covariates, covariates.double().mean(0) + shift / width**0.5


def gap(found, covariates, target):
    spread = covariates.double().std(0, unbiased=False)
    return float(((found.weights @ covariates.double() - target) / spread).abs().max())


@pytest.fixture(params=["newton", "l-bfgs"])
def method(request, monkeypatch):
    """Both solvers on the same problems."""
    if request.param == "l-bfgs":
        monkeypatch.setattr(balancing, "NEWTON_WIDTH", 0)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(50, 1), (333, 7), (1000, 31)])
def test_balances_to_the_tolerance(rows, width, dtype, method):
    covariates, target = problem(rows, width, dtype=dtype)
    found = balance(covariates, target)
    assert found.method == method
    assert gap(found, covariates, target) <= 1.1e-8
    assert found.worst <= 1e-8
    assert float(found.weights.sum()) == pytest.approx(1)
    assert (found.weights > 0).all()
    assert found.ess == pytest.approx(1 / float((found.weights**2).sum()))


def test_weights_are_an_exponential_tilt_of_the_base(method):
    covariates, target = problem(400, 5)
    base = torch.rand(400).double() + 0.1
    found = balance(covariates, target, base)
    tilt = base * (covariates @ found.dual).exp()
    torch.testing.assert_close(found.weights, tilt / tilt.sum())


def test_both_solvers_agree(monkeypatch):
    covariates, target = problem(500, 20, shift=1.0)
    newton = balance(covariates, target, tolerance=1e-11)
    monkeypatch.setattr(balancing, "NEWTON_WIDTH", 0)
    descent = balance(covariates, target, tolerance=1e-11)
    assert (newton.method, descent.method) == ("newton", "l-bfgs")
    torch.testing.assert_close(newton.weights, descent.weights, rtol=1e-8, atol=0)


def test_scipy_finds_the_same_weights():
    optimize = pytest.importorskip("scipy.optimize")
    covariates, target = problem(300, 6)
    centred = (covariates - target).numpy()

    def dual(at):
        scores = centred @ at
        weights = np.exp(scores - scores.max())
        return scores.max() + np.log(weights.sum()), weights @ centred / weights.sum()

    best = optimize.minimize(dual, np.zeros(6), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-12})
    torch.testing.assert_close(balance(covariates, target).dual, torch.from_numpy(best.x), rtol=1e-5, atol=1e-6)


def test_scales_do_not_matter(method):
    covariates, target = problem(600, 20)
    scales = torch.logspace(3, -8, 20, dtype=torch.float64)
    plain, scaled = balance(covariates, target), balance(covariates * scales + 2 * scales, target * scales + 2 * scales)
    assert scaled.worst <= 1e-8
    torch.testing.assert_close(plain.weights, scaled.weights, rtol=1e-5, atol=0)


def test_strongly_correlated_covariates(method):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(30, 30, generator=generator).double()
    covariates = torch.randn(3000, 30, generator=generator).double() @ mix
    found = balance(covariates, covariates[:1000].mean(0))
    assert gap(found, covariates, covariates[:1000].mean(0)) <= 1.1e-8


def test_collinear_covariates_are_fine_where_they_agree(method):
    covariates, target = problem(300, 4)
    twice, wanted = torch.cat([covariates, covariates], 1), torch.cat([target, target])
    torch.testing.assert_close(
        balance(twice, wanted).weights, balance(covariates, target).weights, rtol=1e-5, atol=1e-9
    )
    wanted[0] += 0.01
    with pytest.raises(Unbalanced, match="no weights give these means") as caught:
        balance(twice, wanted)
    assert caught.value.proved


def test_constant_covariates_are_fine_where_they_agree(method):
    covariates, target = problem(300, 4)
    covariates[:, 2], target[2] = 0.1, 0.1
    assert balance(covariates, target).worst <= 1e-8
    target[2] = 0.2
    with pytest.raises(Unbalanced, match=r"target: covariate 2 is 0\.1 in every row, 0\.2 is asked for") as caught:
        balance(covariates, target)
    assert caught.value.proved


def test_an_infeasible_target_is_proved_and_named(method):
    covariates, target = problem(200, 3)
    target[1] = covariates[:, 1].max() + 0.1
    with pytest.raises(Unbalanced, match="in the direction led by length") as caught:
        balance(covariates, target, names=["age", "length", "topic"])
    assert caught.value.proved


def test_fewer_rows_than_covariates(method):
    covariates, target = problem(5, 9)
    with pytest.raises(Unbalanced) as caught:
        balance(covariates, target)
    assert caught.value.proved
    assert balance(covariates, covariates.mean(0)).ess == pytest.approx(5)


def test_the_edge_of_the_hull_is_approached_but_not_proved_out_of_reach(monkeypatch):
    covariates = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]).double()
    found = balance(covariates, [0.5, 1.0], tolerance=1e-9)
    torch.testing.assert_close(found.weights, torch.tensor([0, 0, 0.5, 0.5]).double(), atol=1e-8, rtol=0)
    monkeypatch.setattr(balancing, "NEWTON_WIDTH", 0)
    with pytest.raises(Unbalanced, match="on the edge of what the rows can reach") as caught:
        balance(covariates, [0.5, 1.0], tolerance=1e-9, evaluations=4)
    assert not caught.value.proved
    assert caught.value.worst > 1e-9


def test_a_hard_but_feasible_target(method):
    covariates, target = problem(3000, 10, shift=2.5)
    found = balance(covariates, target)
    assert gap(found, covariates, target) <= 1.1e-8
    assert found.ess < 100


def test_counts_are_rows():
    covariates, target = problem(100, 3, shift=0.2)
    counts = torch.randint(0, 3, (100,), generator=torch.Generator().manual_seed(1))
    rows = torch.repeat_interleave(torch.arange(100), counts)
    counted, repeated = balance(covariates, target, counts.double()), balance(covariates[rows], target)
    sums = torch.zeros(100).double().index_add_(0, rows, repeated.weights)
    torch.testing.assert_close(counted.weights, sums, rtol=1e-6, atol=1e-12)
    assert (counted.weights[counts == 0] == 0).all()


def test_nothing_to_do_and_a_single_row():
    covariates, _ = problem(40, 3)
    found = balance(covariates, covariates.mean(0))
    torch.testing.assert_close(found.weights, torch.full((40,), 1 / 40).double())
    assert balance(covariates[:1], covariates[0]).weights.tolist() == [1.0]


def test_reads_any_strides(method):
    covariates, target = problem(60, 4)
    strided = covariates.t().contiguous().t().repeat_interleave(2, 0)[::2]
    torch.testing.assert_close(balance(strided, target).weights, balance(covariates, target).weights)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 40), st.integers(0, 2**31))
def test_any_mixture_of_the_rows_can_be_reached(rows, width, seed):
    """A target inside the hull; the weights found are at least as even as those that made it."""
    generator = torch.Generator().manual_seed(seed)
    covariates = torch.randn(rows, width, generator=generator).double()
    made = torch.rand(rows, generator=generator).double() + 0.2
    made /= made.sum()
    found = balance(covariates, made @ covariates, tolerance=1e-7)
    entropy = [-float(torch.special.xlogy(w, w).sum()) for w in (made, found.weights)]
    assert entropy[1] >= entropy[0] - 1e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"covariates": torch.zeros(3, 2).long()}, TypeError, "covariates: expected a floating tensor"),
        ({"covariates": torch.zeros(0, 2)}, ValueError, r"covariates: expected shape \[N, K\]"),
        ({"covariates": torch.tensor([[1.0, torch.nan]] * 3)}, ValueError, "covariates: expected finite numbers"),
        ({"target": [0.0]}, ValueError, r"target: expected shape \(2,\), got \(1,\)"),
        ({"target": [0.0, torch.inf]}, ValueError, "target: expected finite numbers, got inf"),
        ({"target": "far"}, TypeError, "target: expected 2 numbers"),
        ({"base": torch.ones(2)}, ValueError, r"base: expected shape \(3,\)"),
        ({"base": torch.tensor([1.0, -1, 1])}, ValueError, r"base: expected weights of at least 0, got -1\.0 at row 1"),
        ({"base": torch.zeros(3)}, ValueError, "base: all weights are 0"),
        ({"tolerance": -1.0}, ValueError, "tolerance: must be at least 0"),
        ({"evaluations": 0}, ValueError, "evaluations: need at least 1"),
        ({"names": ["a"]}, ValueError, "names: expected 2, got 1"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    good = {"covariates": torch.randn(3, 2), "target": [0.0, 0.0]}
    with pytest.raises(error, match=message):
        balance(**good | change)


def test_many_problems_at_once():
    parts = [problem(80, 4, shift=0.3 * k, seed=k) for k in range(5)]
    covariates, targets = (torch.stack(column) for column in zip(*parts, strict=True))
    outcomes = torch.randn(80, 2).double()
    found = balance_batch(covariates, targets, outcomes=outcomes)
    assert (found.status == 0).all()
    for k in range(5):
        single = balance(covariates[k], targets[k])
        torch.testing.assert_close(found.dual[k], single.dual, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.means[k], single.weights @ outcomes, rtol=1e-6, atol=1e-8)
        assert float(found.ess[k]) == pytest.approx(single.ess, rel=1e-6)
    warm = balance_batch(covariates, targets, outcomes=outcomes, start=found.dual)
    assert (warm.steps <= 1).all()
    assert repr(found).startswith("Balances(5 problems: 5 converged")


def test_a_problem_without_solution_does_not_stop_the_others():
    covariates, target = problem(50, 2)
    targets = torch.stack([target, target + 100, target])
    bad = covariates.clone()
    bad[0, 0] = torch.nan
    found = balance_batch(torch.stack([covariates, covariates, bad]), targets)
    assert found.status.tolist() == [0, 1, 3]
    assert found.ess.isnan().tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"covariates: expected a floating tensor \[P, N, K\]"):
        balance_batch(covariates, targets)


def test_differences_before_and_after():
    covariates, target = problem(200, 3, shift=1.0)
    found = balance(covariates, target)
    want = (covariates.mean(0) - target) / covariates.std(0, unbiased=False)
    torch.testing.assert_close(found.before, want)
    assert float(found.after.abs().max()) == found.worst
    assert "worst standardised difference 0.609" in repr(found)
