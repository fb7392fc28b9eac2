"""The label-free criterion: exact for every rate, and its choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.sweep import predicted
from spurge.methods.rates import Dependence, dependence


def gap_at(logits, moves, rows, features, rate):
    """The definition, at one rate."""
    moved = logits.double().clone()
    moved[:, rows] += rate * moves.double()
    found = moved.argmax(1)
    shares = torch.stack(
        [
            torch.stack([(found[features == f] == k).double().mean() for k in range(logits.shape[1])])
            for f in features.unique()
        ]
    )
    return float((shares.amax(0) - shares.amin(0)).max())


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(4, 30),
    outputs=st.integers(2, 4),
    kinds=st.integers(2, 3),
    edges=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_gaps_are_exact_on_every_plateau(samples, outputs, kinds, edges, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    moves = 5 * torch.randn(samples, edges, generator=generator, dtype=torch.float64)
    rows = torch.randperm(outputs, generator=generator)[:edges]
    features = 2 * torch.randint(kinds, (samples,), generator=generator)  # numbers between may be missing
    features[0], features[1] = 0, 2
    found = dependence(predicted(logits, moves, rows, low=0.0, high=1.0), features, 1.0)
    assert float(found.rates[0]) == 0
    ends = [*found.rates.tolist()[1:], 1.0]
    for start, end, gap in zip(found.rates.tolist(), ends, found.gaps.tolist(), strict=True):
        if end - start > 1e-9:  # a middle that rounding cannot move across a crossing
            assert gap == pytest.approx(gap_at(logits, moves, rows, features, (start + end) / 2), abs=1e-12)
    rate, gap = found.best()
    grid = [gap_at(logits, moves, rows, features, r) for r in torch.linspace(0, 1, 50).tolist()]
    assert gap <= min(grid) + 1e-12
    assert 0 <= rate <= 1


def test_the_first_of_equal_plateaus_counts():
    rates = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.6], dtype=torch.float64)
    assert Dependence(rates, torch.tensor([0.5, 0.2, 0.2, 0.3, 0.2]), 1.0).best() == pytest.approx((0.25, 0.2))
    assert Dependence(rates, torch.tensor([0.1, 0.1, 0.2, 0.3, 0.2]), 1.0).best()[0] == 0
    assert Dependence(rates, torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1]), 1.0).best()[0] == pytest.approx(0.8)


def test_one_feature_is_refused():
    with pytest.raises(ValueError, match="at least 2 predicted fictitious classes, got 1"):
        dependence(torch.zeros(2, 3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), 1.0)


def test_what_people_see():
    found = Dependence(torch.tensor([0.0, 0.5]), torch.tensor([0.4, 0.1]), 1.0)
    assert repr(found) == "Dependence(2 plateaus in [0, 1]; gap 0.400, at best 0.100 at 0.75)"
