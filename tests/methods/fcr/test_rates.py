"""The label-free criterion: exact for every rate, and its choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.last_layer.rate_sweep import predicted
from spurge.methods.fcr.rates import Dependence, dependence


def terms_at(logits, moves, rows, features, rate):
    """Both terms of the definition, at one rate."""
    shares, before = (shares_at(logits, moves, rows, features, r) for r in (rate, 0.0))
    drift = float((shares.mean(0) - before.mean(0)).abs().max())
    return float((shares.amax(0) - shares.amin(0)).max()), drift / max(1 - float(before.mean(0).max()), 1 / len(logits))


def shares_at(logits, moves, rows, features, rate):
    """Share of each prediction where each feature is."""
    moved = logits.double().clone()
    moved[:, rows] += rate * moves.double()
    found = moved.argmax(1)
    return torch.stack(
        [
            torch.stack([(found[features == f] == k).double().mean() for k in range(logits.shape[1])])
            for f in features.unique()
        ]
    )


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
    found = dependence(predicted(logits, moves, rows, low=0.0, high=1.0), features, logits.argmax(1), 1.0)
    assert float(found.rates[0]) == 0
    ends = [*found.rates.tolist()[1:], 1.0]
    for start, end, gap, drift in zip(
        found.rates.tolist(), ends, found.gaps.tolist(), found.drifts.tolist(), strict=True
    ):
        if end - start > 1e-9:  # a middle that rounding cannot move across a crossing
            wanted = terms_at(logits, moves, rows, features, (start + end) / 2)
            assert (gap, drift) == pytest.approx(wanted, abs=1e-12)
    rate, value = found.best()
    grid = [sum(terms_at(logits, moves, rows, features, r)) for r in torch.linspace(0, 1, 50).tolist()]
    assert value <= min(grid) + 1e-12
    assert 0 <= rate <= 1


def test_the_first_of_equal_plateaus_counts():
    rates, none = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.6], dtype=torch.float64), torch.zeros(5)

    def best(*gaps):
        return Dependence(rates, torch.tensor(gaps, dtype=torch.float64), none, 1.0).best()

    assert best(0.5, 0.2, 0.2, 0.3, 0.2) == pytest.approx((0.25, 0.2))
    assert best(0.1, 0.1, 0.2, 0.3, 0.2)[0] == 0
    assert best(0.5, 0.4, 0.3, 0.2, 0.1)[0] == pytest.approx(0.8)


def test_what_people_see():
    found = Dependence(torch.tensor([0.0, 0.5]), torch.tensor([0.4, 0.1]), torch.tensor([0.0, 0.05]), 1.0)
    assert repr(found) == "Dependence(2 plateaus in [0, 1]; gap 0.400, with drift at best 0.150 at 0.75)"
