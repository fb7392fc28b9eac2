from __future__ import annotations

import pytest
import torch

from helpers.tolerance import EPS, assert_near, tolerance


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_the_table_is_torchs(dtype):
    assert EPS[dtype] == torch.finfo(dtype).eps


@pytest.mark.parametrize("terms", [0, 1])
def test_one_rounding_is_the_least(terms):
    assert tolerance(torch.float32, terms) == 4 * 2.0**-23


def test_grows_like_a_random_walk():
    assert tolerance(torch.float32, 400) == pytest.approx(20 * tolerance(torch.float32, 1))


def test_plain_sums_stay_inside():
    x = torch.randn(1000, 200)
    total = x.cumsum(1)[:, -1]
    assert_near(total, x.double().sum(1), terms=200, size=x.double().abs().sum(1))


def test_a_real_error_is_seen():
    x = torch.randn(100)
    with pytest.raises(AssertionError, match="error"):
        assert_near(x * (1 + 1e-5), x)


def test_nan_and_infinity_must_agree():
    nan, one = torch.tensor([torch.nan]), torch.tensor([1.0])
    assert_near(nan, nan)
    assert_near(torch.tensor([torch.inf]), torch.tensor([1e300], dtype=torch.float64))
    for got, want in ((nan, one), (one, nan), (torch.tensor([torch.inf]), -torch.tensor([torch.inf]))):
        with pytest.raises(AssertionError):
            assert_near(got, want)
