from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.causal.concentration import MEASURES, localisation


def measures(values):
    return dict(zip(MEASURES, localisation(torch.tensor(values, dtype=torch.float64)).tolist(), strict=True))


def test_all_alike():
    found = measures([2.0] * 8)
    assert found == pytest.approx({"participation": 8, "gini": 0, "entropy": 1, "units_50": 4, "units_90": 8})


def test_one_has_everything():
    found = measures([0.0, -3.0, 0.0, 0.0])
    assert found == pytest.approx({"participation": 1, "gini": 0.75, "entropy": 0, "units_50": 1, "units_90": 1})


def test_known_numbers():
    found = measures([4.0, -3.0, 2.0, 1.0])
    shares = [0.4, 0.3, 0.2, 0.1]
    pairs = sum(abs(a - b) for a in shares for b in shares) / (2 * len(shares))
    assert found["participation"] == pytest.approx(100 / 30)
    assert found["gini"] == pytest.approx(pairs)
    assert found["entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares) / math.log(4))
    assert (found["units_50"], found["units_90"]) == (2, 3)


def test_units_without_an_estimate_do_not_count():
    assert localisation(torch.tensor([math.nan, 1.0, 3.0])).tolist() == localisation(torch.tensor([3.0, 1.0])).tolist()


def test_no_effect_anywhere_has_no_localisation():
    assert localisation(torch.zeros(3)).isnan().all()
    assert localisation(torch.full((3,), math.nan)).isnan().all()


def test_one_unit():
    assert measures([-2.0]) == {"participation": 1, "gini": 0, "entropy": 1, "units_50": 1, "units_90": 1}


def test_many_at_once():
    rows = torch.randn(5, 7)
    assert torch.equal(localisation(rows), torch.stack([localisation(row) for row in rows]))


def test_needs_units():
    with pytest.raises(ValueError, match="effects: need at least 1 unit"):
        localisation(torch.zeros(3, 0))


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.floats(0.01, 100))
def test_scale_sign_and_order_do_not_matter(values, scale):
    effects = torch.tensor(values, dtype=torch.float64)
    if float(effects.abs().max()) < 1e-3:
        return
    same = -effects.flip(0) * scale
    found, other = localisation(effects), localisation(same)
    torch.testing.assert_close(found[:3], other[:3])  # the counts may move where a share ends on a half to rounding
    assert 1 - 1e-9 <= float(found[0]) <= len(values) + 1e-9
    assert -1e-9 <= float(found[1]) < 1
