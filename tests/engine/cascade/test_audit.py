"""An audit's intervals on made-up effects, all of which are known: they hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spurge.engine.cascade.audit import Agreement, Range, Sample, _loss, agreements, draw, likely_crossing

VALUES, DRAWN = 4000, 256


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks of all elements from 1 on; ties have their mean."""
    flat = values.flatten()
    ordered, places = flat.sort()[0], torch.tensor(0.5)
    left, right = torch.searchsorted(ordered, flat), torch.searchsorted(ordered, flat, right=True)
    return (left + right) / 2 + places


def spearman(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(mean_ranks(a), mean_ranks(b))[0, 1])


def effects(kind: str) -> tuple[Tensor, Tensor]:
    """Estimates and effects, ``[n]``."""
    generator = torch.Generator().manual_seed(0)
    estimates, noise = torch.randn(2, VALUES, generator=generator, dtype=torch.float64)
    if kind == "scaled":  # almost the right order, another distribution
        return estimates, 5 * (estimates + 0.3 * noise) ** 3
    if kind == "shifted":
        return estimates, estimates + 3 + 0.3 * noise
    if kind == "tied":  # an effect is a step, most of them none
        return estimates, (estimates + noise).mul(0.7).trunc()
    both = torch.rand(VALUES, generator=generator) < 0.3  # of units nothing depends on
    return estimates.masked_fill(both, 0), (estimates + 0.2 * noise).masked_fill(both, 0)


@pytest.mark.parametrize("kind", ["scaled", "shifted", "tied", "zeros"])
def test_intervals_of_rank_correlation_hold_whatever_the_effects_distribution(kind: str):
    values, exact = effects(kind)
    truth, stakes = spearman(values, exact), (exact - values).abs() + 0.1
    crossing = likely_crossing(values[None], stakes[None])
    held = []
    for seed in range(40):
        drawn, weights, typical = draw(stakes, crossing, torch.arange(VALUES), DRAWN, seed)
        sample = Sample(weights, values[None, drawn], exact[None, drawn], typical)
        found = agreements(values[None], [sample])[0].spearman
        assert found.value == pytest.approx(truth, abs=0.15)
        held.append(found.low - 1e-3 <= truth <= found.high + 1e-3)
    assert np.mean(held) >= 0.85


def test_effects_that_are_all_alike_have_no_rank_correlation():
    values = effects("scaled")[0]
    exact = torch.zeros_like(values)
    exact[0] = 1.0
    drawn = torch.arange(DRAWN) + 1
    weights = torch.full((DRAWN,), VALUES / DRAWN, dtype=torch.float64)
    sample = Sample(weights, values[None, drawn], exact[None, drawn], VALUES / DRAWN)
    assert np.isnan(agreements(values[None], [sample])[0].spearman.value)


@pytest.mark.parametrize("rest", [0.0, 1e-24, 1e-12])
def test_an_error_of_rounding_is_bounded_though_one_draw_holds_it(rest: float):
    added = np.zeros(DRAWN)
    added[:2] = 1e-9, rest
    found = _loss(added)
    assert found.low <= found.value <= found.high < 1e-5
    assert found.value <= found.bound < 1e-5


def test_the_error_of_estimates_that_are_all_alike():
    exact = effects("scaled")[0]
    values = torch.zeros_like(exact)
    drawn = torch.arange(DRAWN)
    weights = torch.full((DRAWN,), VALUES / DRAWN, dtype=torch.float64)
    found = agreements(values[None], [Sample(weights, values[None, drawn], exact[None, drawn], VALUES / DRAWN)])[0]
    assert np.isnan([found.spearman.value, found.pearson.value]).all()
    assert found.error == 1.0


def test_a_bound_that_says_nothing_is_not_printed() -> None:
    known = {"spearman": Range(0.9, 0.8, 1.0), "pearson": Range(0.9, 0.8, 1.0), "missed": 0.1, "missed_bound": 0.2}
    assert "relative error 0.14 (below 0.3)," in str(Agreement(error=0.14, error_bound=0.3, drawn=8, **known))
    assert "relative error 0.14 (8 draws bound it by nothing of use)," in str(
        Agreement(error=0.14, error_bound=9.8e9, drawn=8, **known)
    )
