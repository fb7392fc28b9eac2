from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spurge.engine.base.statistics import benjamini_hochberg, bootstrap_counts, interval, spread, two_sided


def test_counts_are_draws_with_replacement():
    counts = bootstrap_counts(50, 400, seed=3)
    assert counts.shape == (400, 50)
    assert counts.sum(1).eq(50).all()
    assert torch.equal(counts, bootstrap_counts(50, 400, seed=3))
    assert not torch.equal(counts, bootstrap_counts(50, 400, seed=4))
    assert float((counts == 0).double().mean()) == pytest.approx((1 - 1 / 50) ** 50, abs=0.01)
    assert bootstrap_counts(5, 0, seed=0).shape == (0, 5)


def test_intervals_and_spread_leave_failed_draws_out():
    draws = torch.arange(101, dtype=torch.float64)[:, None].repeat(1, 2)
    draws[::2, 1] = math.nan
    low, high = interval(draws, 0.9)
    assert low.tolist() == pytest.approx([5.0, 5.9])
    assert high.tolist() == pytest.approx([95.0, 94.1])
    assert spread(draws).tolist() == pytest.approx([float(draws[:, 0].std()), float(draws[1::2, 1].std())])
    none = torch.full((4, 1), math.nan).double()
    assert interval(none[:0])[1].isnan().all()
    assert spread(none).isnan().all()
    assert interval(none)[0].isnan().all()
    assert spread(none[:0]).isnan().all()


def test_p_of_a_normal_effect():
    found = two_sided(torch.tensor([1.959964, 0.0, 0.0, 1.0, math.nan]), torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]))
    assert found[:4].tolist() == pytest.approx([0.05, 1, 1, 0], abs=1e-6)
    assert found[4].isnan()


def test_benjamini_hochberg_on_known_numbers():
    p = torch.tensor([0.01, 0.04, math.nan, 0.03, 0.5]).double()
    assert benjamini_hochberg(p)[[0, 1, 3, 4]].tolist() == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert benjamini_hochberg(p)[2].isnan()
    assert benjamini_hochberg(torch.full((3,), math.nan)).isnan().all()
    assert benjamini_hochberg(torch.zeros(0)).shape == (0,)


@settings(deadline=None)
@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=40), st.floats(0.0101, 0.499))
def test_q_rejects_what_the_step_up_procedure_rejects(values, alpha):
    p = torch.tensor(values, dtype=torch.float64)
    ordered = p.sort().values
    passing = [k for k in range(len(p)) if float(ordered[k]) <= alpha * (k + 1) / len(p) * (1 + 1e-12)]
    limit = float(ordered[passing[-1]]) if passing else -1.0
    assume(not (((p * len(p)) / alpha % 1 - 0.5).abs() > 0.5 - 1e-9).any())  # on the border, rounding decides
    assert torch.equal(benjamini_hochberg(p) <= alpha, p <= limit)
