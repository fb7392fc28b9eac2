"""The methods that are compared balance the same problems, and ``run.py balance`` measures them."""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from causal import balancing
from causal.balancing import Problem, agreement, exact, make_batch, make_problem, methods
from common import comparison
from common.comparison import Case, Method, measure
from peers import balancing as peers
from peers.balancing import Answer
from spurge.report.results import Results

POSSIBLE = [kind for kind in balancing.SHAPES if kind not in balancing.IMPOSSIBLE]
PRECISE = [
    "spurge",
    "spurge-float64",
    "scipy-lbfgs",
    "scipy-lbfgs-two-pass",
    "numpy-newton",
    "empirical-calibration",
]
ROUGH = ["spurge-1e-4", "scipy-lbfgs-float32", "ebal", "ebal-solver"]


def small(kind: str) -> Problem:
    rows, width = balancing.QUICK_SHAPES[kind][0]
    return make_problem(kind, rows, width)


def feasible(problem: Problem) -> bool:
    """Whether some weights give the target, by linear programming; the target may be off by rounding."""
    rows = problem.covariates.double()
    spread = rows.std(0)
    scaled = ((rows - problem.target) / spread).numpy().T
    sides = np.concatenate([scaled, -scaled])
    limits = np.full(len(sides), 1e-6)
    found = linprog(np.zeros(sides.shape[1]), sides, limits, np.ones((1, sides.shape[1])), [1.0])
    return found.status == 0


@pytest.mark.parametrize("kind", list(balancing.SHAPES))
def test_problems_are_what_their_names_say(kind):
    problem = small(kind)
    assert problem.rows.dtype == torch.float32
    assert 0.4 < problem.controls / len(problem.rows) < 0.6
    assert len(problem.outcome) == len(problem.rows)
    assert feasible(problem) == (kind not in balancing.IMPOSSIBLE)


def test_problems_are_the_same_every_time():
    first, second = small("att"), small("att")
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.outcome, second.outcome)


def test_scales_and_correlations_are_those_asked_for():
    spread = small("scaled").covariates.std(0)
    assert 3e3 < spread[0] / spread[-1] < 1e4
    assert torch.corrcoef(small("correlated").rows.T).fill_diagonal_(0).abs().max() > 0.5


@pytest.mark.parametrize("kind", POSSIBLE)
def test_the_answer_that_others_are_compared_with_balances(kind):
    problem = small(kind)
    weights = exact(problem)
    rows = problem.covariates.double().numpy()
    assert abs(weights.sum() - 1) < 1e-14
    assert np.abs((weights @ rows - problem.target.numpy()) / rows.std(0)).max() < 1e-12
    logarithms = np.log(weights)
    centred = np.column_stack([np.ones(len(rows)), rows / rows.std(0)])
    left = logarithms - centred @ np.linalg.lstsq(centred, logarithms, rcond=None)[0]
    assert np.abs(left).max() < 1e-8  # the logarithm of a weight is linear in the covariates


def test_there_is_nothing_to_compare_with_where_the_target_cannot_be_had():
    with pytest.raises(RuntimeError, match="no solution"):
        exact(small("beyond"))


@pytest.mark.parametrize("name", [*PRECISE, *ROUGH])
@pytest.mark.parametrize("kind", ["att", "correlated", "hard"])
def test_every_way_finds_the_weights(kind, name):
    problem = small(kind)
    answer = methods(problem)[name].call()
    found = agreement(problem, exact(problem), answer)
    rough = name in ROUGH
    assert answer.balanced or name == "scipy-lbfgs-float32"
    assert abs(answer.weights.sum() - 1) < 1e-12
    assert found["worst_difference"][0] < (1e-3 if rough else 2e-8)
    assert found["difference"][0] < (2e-2 if rough else 2e-6)
    assert found["outcome_difference"][0] < (1e-3 if rough else 1e-7)


def test_ebal_calls_scaled_covariates_balanced_that_are_not():
    problem = small("scaled")
    found = methods(problem)
    best = exact(problem)
    theirs, ours = (agreement(problem, best, found[name].call()) for name in ("ebal", "scipy-lbfgs"))
    assert theirs["says_balanced"][0] == ours["says_balanced"][0] == 1
    assert theirs["worst_difference"][0] > 0.1
    assert ours["worst_difference"][0] < 1e-8


@pytest.mark.parametrize("kind", balancing.IMPOSSIBLE)
def test_what_is_said_of_the_impossible(kind):
    problem = small(kind)
    for name, method in methods(problem, impossible=True).items():
        found = agreement(problem, None, method.call())
        assert found["says_balanced"][0] == 0, name
        assert "difference" not in found
        if name.startswith("spurge"):
            assert found["says_infeasible"][0] == 1, name
        elif name != "empirical-calibration-relaxed":
            assert found["says_infeasible"][0] == 0, name
        assert found["says_infeasible"][2] == found["says_balanced"][2] != ""


def test_a_relaxed_constraint_is_a_word_on_feasibility():
    answer = methods(small("beyond"), impossible=True)["empirical-calibration-relaxed"].call()
    assert answer.infeasible
    assert answer.message.startswith("l2_norm=0.")


def test_differences_are_measured_in_standard_deviations():
    rows = torch.tensor([[0.0], [4.0], [3.0], [3.0]])
    problem = Problem(rows, 2, torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    best = np.array([0.25, 0.75])
    found = agreement(problem, best, Answer(np.array([0.5, 0.5])))
    assert found["worst_difference"] == (0.5, "SD")
    assert found["difference"] == (1.0, "relative")
    assert found["outcome_difference"] == (0.5, "SD")
    assert found["ess"] == (2.0, "rows")
    assert "evaluations" not in found
    assert agreement(problem, best, Answer(None, message="no")) == {"says_balanced": (0, "", "no")}


@pytest.mark.parametrize("name", ["spurge", "torch-batch-newton", "numpy-batch-newton", "scipy-lbfgs", "numpy-newton"])
def test_every_way_of_the_batch_finds_the_same(name, monkeypatch):
    monkeypatch.setattr(peers, "CHUNK", 1 << 12)  # several pieces, the last of them smaller
    problems = make_batch(7, 300, 3)
    covariates, targets, outcome = problems
    found = balancing.batch_methods(*problems)
    few = (covariates.double().numpy(), targets.numpy(), outcome.numpy())
    best = peers.loop(partial(peers.numpy_newton, tolerance=1e-12), *few)
    dual, means = found[name].call()
    assert dual.shape == (7, 3)
    assert means.shape == (7,)
    compared = balancing.batch_agreement(problems, best, (dual, means))
    assert compared["difference"][0] < 1e-6
    assert compared["outcome_difference"][0] < 1e-7
    assert compared["worst_difference"][0] < 2e-8


@pytest.mark.parametrize("form", [peers.numpy_batch_newton, peers.torch_batch_newton])
def test_a_batch_goes_back_where_a_whole_step_is_too_long(form):
    """Two problems whose targets are far out, beside one that is solved at once."""
    generator = torch.Generator().manual_seed(1)
    covariates = torch.randn(3, 400, 2, generator=generator)
    targets = torch.tensor([[2.2, 0.0], [0.0, 0.0], [0.0, -2.2]], dtype=torch.float64)
    outcome = torch.randn(400, generator=generator, dtype=torch.float64)
    given = (covariates, targets, outcome)
    dual, _ = form(*(given if form is peers.torch_batch_newton else (of.numpy() for of in given)))
    best = peers.loop(peers.numpy_newton, *(of.double().numpy() for of in given))
    torch.testing.assert_close(dual, best[0], rtol=1e-6, atol=1e-8)


def test_of_many_problems_the_loops_solve_a_part_and_say_so(monkeypatch):
    monkeypatch.setattr(balancing, "LOOPED", 2)
    problems = make_batch(10, 60, 2)
    found = balancing.batch_methods(*problems)
    assert found["ebal-solver"].scale == 5
    assert found["ebal-solver"].note == "extrapolated from 2 of 10 problems"
    assert found["numpy-batch-newton"].scale == 1
    dual, means = found["ebal-solver"].call()
    assert len(dual) == 2
    best = (dual, means)
    assert balancing.batch_agreement(problems, best, best)["difference"][0] == 0


def test_a_problem_without_an_answer_shows():
    problems = make_batch(3, 60, 2)
    dual, means = balancing.batch_methods(*problems)["numpy-newton"].call()
    spoilt = dual.clone()
    spoilt[1] = torch.nan
    assert np.isnan(balancing.batch_agreement(problems, (dual, means), (spoilt, means))["worst_difference"][0])


def test_parts_can_be_compared_and_metrics_have_notes():
    def compared(answer):
        return {"loss": (answer, "x", "in words"), "gain": (answer, "x")}

    method = Method(lambda: 2.0, scale=3.0, once=True)
    for parts in (False, True):
        results = Results("test")
        case = Case("job", {"a": method}, compared, parts=parts)
        measure(case, results, free=0, threads=1, repeats=1, budget=1.0, device="cpu")
        assert [row.get("note") for row in results.select(metric="loss")] == (["in words"] if parts else [])
        assert [row.get("note") for row in results.select(metric="gain")] == ([None] if parts else [])


def test_a_case_names_the_command_that_measures_its_peak(monkeypatch):
    asked = []
    monkeypatch.setattr(comparison, "peak_of_child", lambda arguments: asked.append(arguments) or {"peak_bytes": 5})
    case = Case("job", {"a": Method(lambda: None)}, child=("att", "9", "2"), peaks=("a",), command="balance")
    results = Results("test")
    measure(case, results, free=0, threads=3, repeats=1, budget=1.0, device="cpu")
    assert asked == [["balance", "3", "att", "9", "2", "a"]]
    assert results.select(metric="peak_bytes")[0]["value"] == 5


def test_the_peak_of_a_way_is_that_of_its_own_arrays():
    rows, width = 200_000, 10
    half = balancing.child(["1", "att", str(rows), str(width), "scipy-lbfgs-two-pass"])["peak_bytes"]
    controls = make_problem("att", rows, width).controls
    assert 8 * controls <= half < 8 * controls * width  # scores and weights, but no copy of the covariates
    batch = balancing.child(["1", "batch", "40", "2000", "6", "numpy-batch-newton"])["peak_bytes"]
    assert batch > 2000 * 27 * 8


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_balance_measures_every_part(monkeypatch, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    tiny = {kind: [(300, 4)] for kind in balancing.SHAPES} | {"hard": [(1_000, 4)], "infeasible": [(100, 40)]}
    monkeypatch.setattr(balancing, "QUICK_SHAPES", tiny)
    monkeypatch.setattr(balancing, "QUICK_BATCH", (20, 100, 3))
    results, saved = Results("test"), []
    args = argparse.Namespace(device=device, threads=1, quick=True, only=["*"])
    balancing.run(args, results, lambda: saved.append(len(results)))
    assert len(saved) == 7
    assert saved == sorted(saved)
    assert len(results.select(method="limit", metric="seconds")) == 5
    assert len(results.select(method="limit x steps", metric="seconds")) == 1
    assert all(row["value"] < 1.1e-8 for row in results.select(method="spurge", metric="worst_difference"))
    assert all(row["value"] < 1e-5 for row in results.select(method="spurge", metric="difference"))
    assert [row["value"] for row in results.select(method="spurge", metric="says_infeasible")] == [1, 1]
    args.only = ["nothing"]
    with pytest.raises(ValueError, match="only"):
        balancing.run(args, results, lambda: None)
