"""Entropy balancing: the sweep of one problem, and whole solutions of many, against the float64 twins."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tolerance import assert_near, tolerance
from spurge import _core, ops, reference

F64 = torch.float64
INF, NAN = float("inf"), float("nan")
HERE = Path(__file__).parent


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64).to(dtype)


# ---- one large problem -----------------------------------------------------------------------------------------------


def sweep_case(rows, columns, dtype=F64, seed=0):
    covariates = normal(rows, columns, seed=seed, dtype=dtype)
    base = torch.rand(rows, generator=seeded(seed + 1), dtype=F64)
    return covariates, base * (base > 0.2), normal(columns, seed=seed + 2) / max(columns, 1) ** 0.5


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (8, 8), (257, 31), (1031, 17), (3000, 500), (5, 0)], ids=str)
def test_sweep_matches_its_twin(shape, dtype, device):
    arguments = tuple(x.to(device) for x in sweep_case(*shape, dtype=dtype))
    got, want = ops.balance_sweep(*arguments), reference.balance_sweep(*arguments)
    sizes = arguments[0].double().abs() @ arguments[2].abs() + 1
    assert_near(got[0], want[0], terms=shape[1], size=sizes)
    for have, wish in zip(got[1:], want[1:], strict=True):
        assert_near(have, wish, terms=shape[0] * max(shape[1], 1), size=10.0)


def test_sweep_of_more_columns_than_a_block_keeps_sums_of(device):
    arguments = tuple(x.to(device) for x in sweep_case(70, 8200, torch.float32))
    for have, wish in zip(ops.balance_sweep(*arguments), reference.balance_sweep(*arguments), strict=True):
        assert_near(have, wish, terms=70 * 8200, size=10.0)


def test_sweep_survives_scores_of_any_size(device):
    covariates, base, dual = (x.to(device) for x in sweep_case(500, 4))
    for factor in (300.0, -300.0, 3e4):
        got, want = (f(covariates, base, factor * dual) for f in (ops.balance_sweep, reference.balance_sweep))
        assert_near(got[1], want[1], terms=10_000, size=abs(factor))
        assert_near(got[2], want[2], terms=100, size=abs(factor) * 10)


def test_rows_without_base_do_not_count(device):
    covariates, base, dual = (x.to(device) for x in sweep_case(100, 3))
    base[10:20] = 0
    covariates[10:20] = 1e3
    kept = base > 0
    got, few = ops.balance_sweep(covariates, base, dual), ops.balance_sweep(covariates[kept], base[kept], dual)
    assert_near(got[1], few[1], terms=100)
    assert_near(got[2], few[2], terms=100)
    _, mean, value = ops.balance_sweep(covariates, torch.zeros_like(base), dual)
    assert mean.isnan().all()
    assert value.tolist() == [-INF, -INF]
    assert ops.balance_sweep(covariates[:0], base[:0], dual)[2].tolist() == [-INF, -INF]


@pytest.mark.parametrize("columns", [1, 5, 8, 33])
@pytest.mark.parametrize("rows", [3, 8, 40, 1100])
@pytest.mark.parametrize("far", [INF, -INF])
def test_rows_of_weight_0_do_not_count_whatever_they_hold(rows, columns, far, device):
    covariates, base, dual = sweep_case(rows, columns)
    base[1], base[2::7], dual[0] = 1.0, 0.0, dual[0].abs() + 0.1
    kept = base > 0
    covariates[2::7, 0] = far  # no base
    covariates[0, 0], base[0] = -INF, 1.0  # a score of minus infinity
    kept[0] = False
    arguments = tuple(x.to(device) for x in (covariates, base, dual))
    got, want = ops.balance_sweep(*arguments), reference.balance_sweep(*arguments)
    assert torch.equal(got[0].isinf(), want[0].isinf())
    few = ops.balance_sweep(*(x.to(device) for x in (covariates[kept], base[kept], dual)))
    for have, wish, same in zip(got[1:], want[1:], few[1:], strict=True):
        assert_near(have, wish, terms=rows * columns, size=10.0)
        assert_near(have, same, terms=rows * columns, size=10.0)


@pytest.mark.parametrize("at", [0, 5, 1050])
def test_a_score_of_infinity_is_no_row_without_weight(at, device):
    covariates, base, dual = sweep_case(1100, 4)
    base[at], dual[0], covariates[at, 0] = 1.0, 0.5, INF
    covariates[at, 1:] = 0.0
    arguments = tuple(x.to(device) for x in (covariates, base, dual))
    for found in (ops.balance_sweep(*arguments), reference.balance_sweep(*arguments)):
        assert found[0][at] == INF
        assert found[1].isnan().all()
        assert found[2][0].isnan()
        assert found[2][1] == INF


def test_only_scores_of_minus_infinity_are_no_weight(device):
    infinite, one = torch.full((9, 2), INF), torch.ones(9, dtype=F64)
    arguments = tuple(x.to(device) for x in (infinite, one, -one[:2]))
    for found in (ops.balance_sweep(*arguments), reference.balance_sweep(*arguments)):
        assert found[1].isnan().all()
        assert found[2].tolist() == [-INF, -INF]


@pytest.mark.parametrize("place", ["covariates", "base", "dual"])
def test_sweep_spreads_nan(place, device):
    arguments = dict(zip(("covariates", "base", "dual"), sweep_case(40, 9), strict=True))
    arguments[place].view(-1)[3] = NAN
    _, mean, value = ops.balance_sweep(*(x.to(device) for x in arguments.values()))
    assert mean.isnan().all()
    assert value.isnan().all()


def test_sweep_does_not_depend_on_threads():
    covariates, base, dual = sweep_case(20_000, 40, dtype=torch.float32)
    found = []
    for threads in (1, 2, 5):
        out = torch.empty(20_000, dtype=F64), torch.empty(40, dtype=F64), torch.empty(2, dtype=F64)
        _core.balance_sweep(*out, torch.empty(0, dtype=F64), covariates, base, dual, threads)
        found.append(out)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---- many small problems ---------------------------------------------------------------------------------------------


def batch_case(problems, rows, columns, dtype=F64, seed=0, shift=0.3):
    covariates = normal(problems, rows, columns, seed=seed, dtype=dtype)
    targets = covariates.double().mean(1) + shift / max(columns, 1) ** 0.5
    outcomes = normal(rows, 2, seed=seed + 1)
    return covariates, torch.ones(rows, dtype=F64), targets, outcomes, torch.zeros_like(targets)


def assert_solved(arguments, *, slack=1e-6, **how):
    got, want = ops.balance_batch(*arguments, **how), reference.balance_batch(*arguments, **how)
    compare(got, want, slack)
    return got


def compare(got, want, slack):
    """Solutions to a tolerance: both are near the minimum, so they are as near to each other as that says."""
    assert got[3].tolist() == want[3].tolist()
    for have, wish in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(have, wish, rtol=slack, atol=slack, equal_nan=True)
    torch.testing.assert_close(got[2][:, 1:3], want[2][:, 1:3], rtol=slack, atol=slack, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 8, 1), (2, 9, 2), (4, 57, 6), (3, 257, 7), (2, 300, 13), (2, 1031, 24), (0, 5, 2)], ids=str
)
def test_batch_matches_its_twin(shape, dtype, device):
    shift = 0.3 if shape[1] > 20 else 0.0
    arguments = tuple(x.to(device) for x in batch_case(*shape, dtype=dtype, shift=shift))
    dual, means, report, status = assert_solved(arguments, tolerance=1e-10)
    assert (status == 0).all()
    assert (report[:, 0] <= 1e-10).all()
    covariates, _, targets, outcomes, _ = arguments
    weights = torch.einsum("pnk,pk->pn", covariates.double(), dual).softmax(1)
    reached = torch.einsum("pn,pnk->pk", weights, covariates.double())
    torch.testing.assert_close(reached, targets, rtol=0, atol=1e-8)
    torch.testing.assert_close(means, weights @ outcomes, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(report[:, 1], 1 / weights.square().sum(1), rtol=1e-7, atol=0)


def test_base_of_all_or_of_each(device):
    covariates, _, targets, outcomes, start = (x.to(device) for x in batch_case(3, 80, 4))
    bases = torch.rand(3, 80, generator=seeded(5), dtype=F64).to(device)
    bases[:, ::7] = 0
    each = assert_solved((covariates, bases, targets, outcomes, start))
    one = assert_solved((covariates, bases[1].contiguous(), targets, outcomes, start))
    for a, b in zip(each, one, strict=True):
        assert torch.equal(a[1], b[1])


def test_scales_and_offsets_do_not_matter(device):
    covariates, base, targets, outcomes, start = (x.to(device) for x in batch_case(2, 200, 5))
    scales = torch.tensor([1e6, 1.0, 1e-3, 1e-6, 1e-8], dtype=F64, device=device)
    plain = ops.balance_batch(covariates, base, targets, outcomes, start)
    scaled = ops.balance_batch((covariates + 3) * scales, base, (targets + 3) * scales, outcomes, start)
    assert (scaled[3] == 0).all()
    torch.testing.assert_close(scaled[0] * scales, plain[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scaled[1], plain[1], rtol=1e-6, atol=1e-7)


def test_what_cannot_be_balanced_is_proved_and_the_rest_solved(device):
    covariates, base, targets, outcomes, start = (x.to(device) for x in batch_case(7, 60, 3))
    targets[1, 0] = covariates[1, :, 0].max() + 0.01  # beyond the hull
    covariates[2, 5, 1] = NAN
    covariates[3, :, 2], targets[3, 2] = 0.1, 0.1  # constant, and asked for
    covariates[4, :, 2], targets[4, 2] = 0.1, 0.2  # constant, and something else is asked for
    covariates[5, :, 2] = covariates[5, :, 1]  # collinear
    targets[5, 2] = targets[5, 1]
    targets[6, 0] = INF
    got = assert_solved(
        (covariates, base, targets, outcomes, start), slack=1e-3
    )  # of collinear columns only a sum counts
    assert got[3].tolist() == [0, 1, 3, 0, 1, 0, 3]
    assert got[0][3, 2] == 0
    assert got[1].isnan().any(1).tolist() == [False, True, True, False, True, False, True]
    covariates[5, :, 2] += 1e-3  # collinear, and its target is not
    assert ops.balance_batch(covariates, base, targets, outcomes, start)[3][5] == 1


def test_hard_targets_converge(device):
    arguments = tuple(x.to(device) for x in batch_case(4, 2000, 4, shift=2.4))
    dual, _, report, status = ops.balance_batch(*arguments)
    assert (status == 0).all()
    assert (report[:, 1] < 400).all()
    assert (report[:, 3] <= 15).all()
    again = ops.balance_batch(*arguments[:4], dual)
    assert (again[2][:, 3] <= 1).all()


def test_steps_are_limited(device):
    arguments = tuple(x.to(device) for x in batch_case(2, 100, 4, shift=1.0))
    for steps in (0, 1):
        got = assert_solved(arguments, steps=steps, tolerance=1e-14)
        assert got[3].tolist() == [2, 2]
        assert got[2][:, 3].tolist() == [steps, steps]
    assert ops.balance_batch(*arguments, steps=0)[0].eq(0).all()


def test_numbers_too_large_for_their_squares_are_said_not_solved():
    arguments = batch_case(3, 40, 3)
    arguments[0][0] *= 1e200
    arguments[4][1] = 1e300  # a start whose scores overflow
    status = ops.balance_batch(*arguments)[3]
    assert status.tolist() == [3, 2, 0]
    strata = strata_case(2, (30, 30))
    strata[0][1] *= 1e200
    assert ops.balance_strata(*strata)[3].tolist() == [0, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 2**31))
def test_any_mixture_of_rows_is_reached(rows, columns, seed):
    covariates = torch.randint(-3, 4, (1, rows, columns), generator=seeded(seed)).double()
    mixture = torch.rand(rows, generator=seeded(seed + 1), dtype=F64) + 0.3
    targets = (mixture / mixture.sum()) @ covariates[0]
    none = torch.zeros(rows, 0, dtype=F64)
    dual, _, report, status = ops.balance_batch(
        covariates, torch.ones(rows, dtype=F64), targets[None], none, torch.zeros(1, columns, dtype=F64)
    )
    assert status.item() == 0
    weights = (covariates[0] @ dual[0]).softmax(0)
    torch.testing.assert_close(weights @ covariates[0], targets, rtol=0, atol=1e-6)
    assert 1 - 1e-9 <= report[0, 1].item() <= rows + 1e-6


# ---- one value in strata ---------------------------------------------------------------------------------------------


def strata_case(units, sizes, dtype=F64, seed=0, shift=0.2, square=True):
    rows, strata = sum(sizes), len(sizes)
    values = (normal(units, rows, seed=seed) * 2 + 1).to(dtype)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    base = torch.randint(1, 3, (rows,), generator=seeded(seed + 1)).double()
    masses = torch.rand(strata, generator=seeded(seed + 2), dtype=F64) + 0.1
    masses /= masses.sum()
    parts = [values[:, a:b].double() for a, b in itertools.pairwise(starts)]
    means = torch.stack([part.mean(1) + shift for part in parts], 1)
    squares = torch.stack([part.square().mean(1) for part in parts], 1) @ masses + 2 * shift * (means @ masses)
    outcomes, start = normal(rows, 1, seed=seed + 3), torch.zeros(units, strata + 1, dtype=F64)
    return [values, starts, base, masses, means, squares if square else None, outcomes, start]


def on(device, arguments):
    return [None if x is None else x.to(device) for x in arguments]


@pytest.mark.parametrize("interact", [True, False])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("sizes", [(40,), (60, 41, 80), (100, 64, 35, 57, 128)], ids=str)
def test_strata_match_their_twin(sizes, square, interact, dtype, device):
    arguments = on(device, strata_case(3, sizes, dtype=dtype, square=square))
    how = {"interact": interact, "tolerance": 1e-10}
    got, want = ops.balance_strata(*arguments, **how), reference.balance_strata(*arguments, **how)
    compare(got, want, 1e-6)
    assert (got[3] == 0).all()


def test_strata_reach_what_is_wanted(device):
    values, starts, base, masses, means, squares, outcomes, start = on(device, strata_case(4, (90, 55, 70)))
    dual, averages, report, status = ops.balance_strata(
        values, starts, base, masses, means, squares, outcomes, start, tolerance=1e-10
    )
    assert (status == 0).all()
    for u in range(4):
        weights = torch.cat(
            [
                masses[j]
                * (base[a:b].log() + dual[u, j] * values[u, a:b] + dual[u, -1] * values[u, a:b].square()).softmax(0)
                for j, (a, b) in enumerate(itertools.pairwise(starts))
            ]
        )
        for j, (a, b) in enumerate(itertools.pairwise(starts)):
            assert float(weights[a:b].sum()) == pytest.approx(float(masses[j]))
            mean = weights[a:b] @ values[u, a:b] / masses[j]
            assert float(mean) == pytest.approx(float(means[u, j]), abs=1e-8)
        assert float(weights @ values[u].square()) == pytest.approx(float(squares[u]), abs=1e-7)
        assert float(averages[u]) == pytest.approx(float(weights @ outcomes[:, 0]), abs=1e-8)
        assert float(report[u, 1]) == pytest.approx(float(1 / weights.square().sum()), rel=1e-6)


def test_a_stratum_without_mass_and_rows_without_base_are_left_out(device):
    arguments = on(device, strata_case(2, (50, 30, 40)))
    arguments[3] = torch.tensor([0.6, 0.0, 0.4], dtype=F64, device=device)
    arguments[2][3:9] = 0
    arguments[0][:, 3] = NAN
    arguments[0][:, 60] = NAN
    arguments[4][:, 1] = NAN
    arguments[5] = None
    got, want = ops.balance_strata(*arguments), reference.balance_strata(*arguments)
    compare(got, want, 1e-6)
    assert (got[3] == 0).all()
    assert (got[0][:, 1] == 0).all()


def test_strata_that_cannot_be_balanced(device):
    arguments = on(device, strata_case(6, (40, 30), square=False))
    values, means = arguments[0], arguments[4]
    means[1, 0] = values[1, :40].max() + 0.1
    values[2, 7] = INF
    values[3], means[3] = 2.0, 2.0
    values[4], means[4] = 2.0, 2.5
    values[5, 40:], means[5, 1] = 7.0, 7.0
    got, want = ops.balance_strata(*arguments), reference.balance_strata(*arguments)
    compare(got, want, 1e-6)
    assert got[3].tolist() == [0, 1, 3, 0, 1, 0]
    assert got[0][3].eq(0).all()
    arguments[2][:40] = 0  # a stratum with mass and no row
    assert ops.balance_strata(*arguments)[3].tolist() == [1] * 6


def test_a_warm_start_takes_a_step_or_none(device):
    arguments = on(device, strata_case(5, (80, 90)))
    first = ops.balance_strata(*arguments)
    arguments[7] = first[0]
    again = ops.balance_strata(*arguments)
    assert (again[2][:, 3] <= 1).all()
    torch.testing.assert_close(again[1], first[1], rtol=0, atol=1e-7)


def test_solutions_do_not_depend_on_threads():
    batch, strata = batch_case(64, 300, 5), strata_case(64, (150, 130))
    room = torch.empty(0, dtype=F64)
    found = []
    for threads in (1, 3):
        out = [torch.empty(64, 5, dtype=F64), torch.empty(64, 2, dtype=F64), torch.empty(64, 4, dtype=F64)]
        out += [torch.empty(64, dtype=torch.int32)]
        _core.balance_batch(*out, room, *batch, 1e-8, 50, threads)
        more = [torch.empty(64, 3, dtype=F64), torch.empty(64, 1, dtype=F64), torch.empty(64, 4, dtype=F64)]
        more += [torch.empty(64, dtype=torch.int32)]
        _core.balance_strata(*more, room, *strata, True, 1e-8, 50, threads)
        found.append([*out, *more])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("level", _core.build_config()["isa_compiled"])
def test_every_instruction_set_solves(level):
    """In a process of its own: the level is chosen once."""
    script = (
        f"import sys, torch; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
        "import test_balance as t\n"
        "t.assert_solved(t.batch_case(3, 100, 5, dtype=torch.float16))\n"
        "a = t.strata_case(3, (60, 50), dtype=torch.bfloat16)\n"
        "t.compare(t.ops.balance_strata(*a), t.reference.balance_strata(*a), 1e-6)\n"
        "c = t.sweep_case(100, 20, dtype=torch.float32)\n"
        "t.assert_near(t.ops.balance_sweep(*c)[1], t.reference.balance_sweep(*c)[1], terms=2000)\n"
        "print(t._core.build_config()['isa_selected'])\n"
    )
    environment = os.environ | {"SPURGE_ISA": level}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if "does not support" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == level


def test_reads_any_strides(device):
    covariates, base, targets, outcomes, start = (x.to(device) for x in batch_case(2, 50, 3))
    want = ops.balance_batch(covariates, base, targets, outcomes, start)
    strided = covariates.transpose(1, 2).contiguous().transpose(1, 2), base.repeat_interleave(2)[::2]
    got = ops.balance_batch(*strided, targets.t().contiguous().t(), outcomes, start)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"covariates": torch.zeros(2, 5, 3).int()}, "covariates: dtype must be float32, bfloat16"),
        ({"covariates": torch.zeros(5, 3)}, r"covariates: must have 3 dimensions \[P, N, K\], got shape \(5, 3\)"),
        ({"base": torch.ones(4, dtype=F64)}, r"base: shape must be \(5,\), got \(4,\)"),
        ({"base": torch.ones(5)}, "base: dtype must be float64, got float32"),
        ({"base": -torch.ones(5, dtype=F64)}, "base: must not be negative, got -1 at 0"),
        ({"targets": torch.zeros(2, 4, dtype=F64)}, r"targets: shape must be \(2, 3\), got \(2, 4\)"),
        ({"outcomes": torch.zeros(6, 1, dtype=F64)}, r"outcomes: shape must be \(5, 1\), got \(6, 1\)"),
        ({"start": torch.zeros(3, dtype=F64)}, r"start: shape must be \(2, 3\), got \(3,\)"),
        ({"tolerance": 0.0}, "tolerance: must be positive"),
        ({"steps": -1}, r"steps: must lie in \[0, 2\^31\), got -1"),
    ],
)
def test_batch_says_what_is_wrong(change, message):
    good = dict(
        zip(("covariates", "base", "targets", "outcomes", "start"), batch_case(2, 5, 3), strict=True),
        outcomes=torch.zeros(5, 1, dtype=F64),
    )
    with pytest.raises(ValueError, match=message):
        ops.balance_batch(**(good | change))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(20), r"values: must have 2 dimensions \[U, N\], got shape \(20,\)"),
        (1, torch.tensor([0, 10]), r"starts: shape must be \(3,\), got \(2,\)"),
        (1, torch.tensor([0, 25, 20]), "starts: must ascend from 0 to 20, got 25 at 1"),
        (1, torch.tensor([1, 10, 20]), "starts: must ascend from 0 to 20, got 1 at 0"),
        (1, torch.tensor([0, 10, 19]), "starts: must ascend from 0 to 20, got 19 at 2"),
        (1, torch.tensor([0.0, 10, 20]), "starts: dtype must be int64, got float32"),
        (2, -torch.ones(20, dtype=F64), "base: must not be negative"),
        (3, torch.tensor([-0.5, 1.5], dtype=F64), r"masses: must not be negative, got -0\.5 at 0"),
        (3, torch.zeros(0, dtype=F64), "masses: must have at least 1 element, got 0"),
        (4, torch.zeros(1, 2, dtype=F64), r"means: shape must be \(2, 2\), got \(1, 2\)"),
        (5, torch.zeros(3, dtype=F64), r"squares: shape must be \(2,\), got \(3,\)"),
        (7, torch.zeros(2, 2, dtype=F64), r"start: shape must be \(2, 3\), got \(2, 2\)"),
    ],
)
def test_strata_say_what_is_wrong(place, value, message):
    arguments = strata_case(2, (10, 10))
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        ops.balance_strata(*arguments)


def test_sweep_says_what_is_wrong():
    covariates, base, dual = sweep_case(6, 3)
    for change, message in (
        ((covariates[0], base, dual), r"covariates: must have 2 dimensions \[N, K\]"),
        ((covariates, base[:5], dual), r"base: shape must be \(6,\), got \(5,\)"),
        ((covariates, base, dual.float()), "dual: dtype must be float64"),
        ((covariates, -base - 1, dual), "base: must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.balance_sweep(*change)


def test_the_exponential_is_exact_to_rounding():
    """Seen through the weights of single rows: log base + z is what they are."""
    z = torch.linspace(-700, 0, 4001, dtype=F64)
    scores, mean, value = ops.balance_sweep(z[:, None], torch.ones_like(z), torch.ones(1, dtype=F64))
    want = z.exp()
    assert torch.equal(scores, z)
    assert value[0].exp().item() == pytest.approx(float(want.sum()), rel=1e-14)
    assert mean.item() == pytest.approx(float((want * z).sum() / want.sum()), rel=tolerance(F64, 4001))
