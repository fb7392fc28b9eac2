"""H(G) over H(A) of units that fire for one class, or hardly for others: beside the definition, and as leaks vanish."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spurge import reference
from spurge.engine.last_layer.association import association
from spurge.engine.last_layer.association_stream import residuals_
from spurge.engine.last_layer.class_association import even_leak

F64 = torch.float64
CLASSES, OWN = 4, 1


def leaking(leak: float, dtype: torch.dtype = F64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features whose unit 0 fires for one class, and by ``leak`` in all for the others; labels and weight."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(80) % CLASSES
    x = torch.rand(80, 6, generator=draw, dtype=F64)
    own = labels == OWN
    x[:, 0] = torch.where(own, x[:, 0] + 0.5, 0.0)
    x[~own, 0] = leak / (CLASSES - 1) * x[own, 0].mean()
    return x.to(dtype), labels, torch.randn(CLASSES, 6, generator=draw, dtype=F64).to(dtype)


def by_definition(x: Tensor, labels: Tensor, weight: Tensor, floor: float = 1e-6) -> Tensor:
    """CA ``[C, M]`` from the whole tensor of gradients."""
    x, residuals = x.double(), residuals_(x.double() @ weight.double().T, labels)
    edges = residuals[:, :, None] * x[:, None].abs()
    g, a, r = (torch.stack([y[labels == c].mean(0) for c in range(CLASSES)]) for y in (edges, x.abs(), residuals))
    return reference.class_association(g, a, r, floor)


@pytest.mark.parametrize("leak", [0.0, 1e-15, 1e-12, 1e-9, 1e-8, 1e-7, 3e-7, 1e-6, 1e-5, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("dtype, near", [(F64, 1e-6), (torch.float32, 2e-2)], ids=["float64", "float32"])
def test_is_its_definition(leak, dtype, near):
    x, labels, weight = leaking(leak, dtype)
    want = by_definition(x, labels, weight)
    found = association(x, labels, (weight, None))
    if dtype == torch.float32:  # H(G) below 1e-5 is half rounding, or taken for what an even leak gives
        near = max(near, 1e-6 / float(found.activation_entropy.clamp_min(1e-6 * math.log(CLASSES)).min()))
    torch.testing.assert_close(found.ca.double(), want, rtol=near, atol=0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("smaller", [0.0, 1e-300, 1e-12, 1e-9, 1e-7])
def test_a_smaller_leak_ranks_with_a_small_one(smaller, dtype):
    one, none = (association(*leaking(leak, dtype)[:2], (leaking(leak, dtype)[2], None)) for leak in (1e-6, smaller))
    assert float(one.ca[:, 0].min()) > 0
    torch.testing.assert_close(none.ca[:, 0], one.ca[:, 0], rtol=0.3, atol=0)
    assert torch.equal(none.sca[:, 0].argsort(), one.sca[:, 0].argsort())
    assert torch.equal(none.sca[OWN].argsort(), one.sca[OWN].argsort())


@pytest.mark.parametrize("floor", [1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_has_no_step_at_the_floor(floor, reduction):
    border = float(even_leak(torch.tensor(floor * math.log(CLASSES), dtype=F64), CLASSES))
    sides = []
    for leak in (border * (1 - 1e-7), border * (1 + 1e-7)):
        x, labels, weight = leaking(leak)
        found = association(x, labels, (weight * 0.0, None), floor=floor, reduction=reduction)
        assert (float(found.activation_entropy[0]) < floor * math.log(CLASSES)) == (leak < border)
        sides.append(found.ca[:, 0])
    torch.testing.assert_close(*sides, rtol=2e-6, atol=0)


def test_gradients_that_leak_more_score_higher():
    """Of two units of one class, the one whose own class is predicted surely: its gradients are the others' errors."""
    x, labels, _ = leaking(0.0)
    x[:, 1] = x[:, 0]
    gradients = torch.full((80, 1), 0.1, dtype=F64)
    gradients[labels != OWN] = 0.4  # d_G / d_A = 4
    found = association(x, labels, gradients=gradients, target=OWN)
    leak = float(even_leak(torch.tensor(1e-6 * math.log(CLASSES), dtype=F64), CLASSES))
    want = _entropy(4 * leak) / _entropy(leak)
    assert found.ca[0, 0].item() == pytest.approx(want, rel=1e-6)


def _entropy(leak: float) -> float:
    shares = torch.tensor([1.0, *[leak / (CLASSES - 1)] * (CLASSES - 1)], dtype=F64)
    return float(torch.special.entr(shares / shares.sum()).sum())


def test_samples_at_positions_leak_like_others():
    x, labels, weight = leaking(0.0)
    gradients = residuals_(x @ weight.T, labels)
    flat = association(x, labels, gradients=gradients)
    deep = association(x[:, None].expand(-1, 3, -1), labels, gradients=gradients[:, None].expand(-1, 3, -1))
    torch.testing.assert_close(deep.ca, flat.ca, rtol=1e-6, atol=0)
    assert float(flat.ca[:, 0].min()) > 0


@settings(max_examples=50, deadline=None)
@given(st.floats(-300, -0.1), st.integers(2, 2000))
def test_a_leak_has_its_entropy(power, classes):
    wanted = torch.tensor([10.0**power * math.log(classes)], dtype=F64)
    leak = even_leak(wanted, classes)
    assert 0 < float(leak) <= classes - 1
    got = leak.log1p() - torch.special.xlogy(leak, leak / (classes - 1)) / (1 + leak)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)
