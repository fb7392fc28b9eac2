"""A layer fitted to the minimum: against scikit-learn, torch's own SGD, and what the minimum must satisfy."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spurge.engine.last_layer import softmax
from spurge.engine.last_layer.fitting import Sgd, balanced, fit_head
from spurge.engine.models.heads import Head


def rows(n: int = 200, m: int = 12, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features behind a ReLU with columns of very different size, and noisy labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    labels[:classes] = torch.arange(classes)
    x = torch.randn(n, m, generator=g) + 3
    x[:, :classes] += 1.2 * nn.functional.one_hot(labels, classes)
    return x.relu() * torch.logspace(-2, 2, m), labels


def slope(head: Head, x: Tensor, y: Tensor, s: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Gradient of the objective by weight and bias, by autograd in float64."""
    weight = head.weight.double().clone().requires_grad_()
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias
    bias = bias.double().clone().requires_grad_()
    loss = nn.functional.cross_entropy(x.double() @ weight.T + bias, y, reduction="none")
    ((s * loss).sum() + l2 / 2 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    return weight.grad, bias.grad


def value(head: Head, x: Tensor, y: Tensor, s: Tensor, l2: float, l1: float = 0.0) -> float:
    loss = nn.functional.cross_entropy(head.logits(x.double()).double(), y, reduction="none")
    return float(
        (s * loss).sum() + l2 / 2 * head.weight.double().square().sum() + l1 * head.weight.double().abs().sum()
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", ["class", None, "own"])
def test_the_gradient_is_zero_at_the_minimum(classes: int, bias: bool, weights: str | None) -> None:
    x, y = rows(classes=classes)
    s = {"class": balanced(y), None: torch.full((len(y),), 1 / len(y)), "own": torch.rand(len(y))}[weights].double()
    head = fit_head(
        x.double(), y, classes, weights=s if weights == "own" else weights, l2=1e-3, bias=bias, tolerance=1e-8
    )
    assert (head.bias is None) == (not bias)
    by_weight, by_bias = slope(head, x, y, s / s.sum(), 1e-3)
    size = (x.double().square().mean(0) + 1e-3).sqrt()
    assert float((by_weight.abs() / size).max()) < 1e-7
    assert not bias or float(by_bias.abs().max()) < 1e-7


def test_blocks_and_the_held_copy_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "_BLOCK", 8 * 12 * 30)  # 30 rows
    x, y = rows(classes=2)
    for standardise in (False, True):
        held = fit_head(x, y, 2, l2=1e-2, standardise=standardise, tolerance=1e-8)
        blocks = fit_head(x, y, 2, l2=1e-2, standardise=standardise, tolerance=1e-8, memory="1 KiB")
        torch.testing.assert_close(held.weight, blocks.weight, rtol=1e-4, atol=1e-6)
    sparse = fit_head(x, y, 2, l1=1e-2, standardise=True)
    again = fit_head(x, y, 2, l1=1e-2, standardise=True, memory=100)
    torch.testing.assert_close(sparse.weight, again.weight, rtol=1e-3, atol=1e-5)
    assert torch.equal(held.weight, fit_head(x, y, 2, l2=1e-2, standardise=True, tolerance=1e-8).weight)


@pytest.mark.parametrize("classes", [2, 4])
def test_scikit_learn_finds_the_same(classes: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = rows(classes=classes, m=20)
    x = x / x.std(0)
    l2 = 0.01
    c = (2 if classes == 2 else 1) / (l2 * len(y))
    want = linear_model.LogisticRegression(C=c, class_weight="balanced", tol=1e-10, max_iter=10_000)
    want.fit(x.double().numpy(), y.numpy())
    head = fit_head(x.double(), y, classes, l2=l2, tolerance=1e-9)
    shown = torch.as_tensor(want.decision_function(x.double().numpy()))
    logits = head.logits(x.double())
    got = logits[:, 1] - logits[:, 0] if classes == 2 else logits - logits.mean(1, keepdim=True)
    if classes > 2:
        shown = shown - shown.mean(1, keepdim=True)
    torch.testing.assert_close(got, shown, rtol=0, atol=1e-4)  # 1e-5 seen, theirs is the less exact


@pytest.mark.parametrize("strength", [1.0, 0.1, 0.03])
def test_scikit_learn_finds_the_same_with_l1(strength: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = rows(classes=2, m=60)
    x = x[:, torch.arange(60) % 12] + torch.randn(200, 60)
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    l1 = 1 / (strength * len(y))
    head = fit_head(x.double(), y, 2, weights=None, l2=0.0, l1=l1, standardise=True, tolerance=1e-7)
    # a long intercept column is hardly penalised, as ours is not at all
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = linear_model.LogisticRegression(
            C=strength, penalty="l1", solver="liblinear", intercept_scaling=1e3, tol=1e-8, max_iter=10_000
        ).fit(scaled.numpy(), y.numpy())
    coefficients, intercept = torch.as_tensor(want.coef_[0]), torch.as_tensor(want.intercept_)
    theirs = Head(torch.stack([-coefficients, coefficients]) / 2, torch.cat([-intercept, intercept]) / 2)
    on_scaled = head.with_(weight=head.weight * x.double().std(0, correction=0))
    on_scaled = on_scaled.with_(bias=head.bias + head.weight @ x.double().mean(0))
    s = torch.full((len(y),), 1 / len(y)).double()
    assert value(on_scaled, scaled, y, s, 0.0, l1) <= value(theirs, scaled, y, s, 0.0, l1) + 1e-7
    ours = on_scaled.weight[1] - on_scaled.weight[0]
    torch.testing.assert_close(ours, coefficients, rtol=0, atol=2e-3)
    assert int((ours != 0).sum()) < 60


def test_l1_with_l2_and_many_columns_is_where_no_subgradient_is_left() -> None:
    x, y = rows(n=150, m=300, classes=3)
    head = fit_head(x.double(), y, 3, l2=1e-2, l1=0.02, tolerance=1e-7, standardise=True)
    deviation = x.double().std(0, correction=0)
    on_scaled = head.with_(weight=head.weight * deviation, bias=head.bias + head.weight @ x.double().mean(0))
    scaled = (x.double() - x.double().mean(0)) / deviation
    by_weight, by_bias = slope(on_scaled, scaled, y, balanced(y), 1e-2)
    v = on_scaled.weight
    off = torch.where(v == 0, (by_weight.abs() - 0.02).clamp_min(0), (by_weight + 0.02 * v.sign()).abs())
    assert float(off.max()) < 1e-6
    assert float(by_bias.abs().max()) < 1e-6
    assert 0 < int((v != 0).any(0).sum()) < 300


def test_gates_close_weights_and_make_them_dearer() -> None:
    x, y = rows()
    gates = torch.ones(12)
    gates[[1, 7]] = 0
    head = fit_head(x, y, 3, gates=gates)
    assert bool((head.weight[:, [1, 7]] == 0).all())
    rest = [i for i in range(12) if i not in (1, 7)]
    torch.testing.assert_close(head.weight[:, rest], fit_head(x[:, rest], y, 3).weight, rtol=1e-3, atol=1e-4)
    each = torch.ones(3, 12)
    each[0, 1] = each[2, 4] = 0
    head = fit_head(x, y, 3, gates=each)
    assert bool((head.weight[each == 0] == 0).all())
    assert bool((head.weight[each == 1] != 0).all())
    # a gate of 1/2 is the same as a column of half the size
    half = fit_head(x.double(), y, 3, gates=torch.full((12,), 0.5), tolerance=1e-9)
    smaller = fit_head(x.double() / 2, y, 3, tolerance=1e-9)
    torch.testing.assert_close(half.weight, smaller.weight / 2, rtol=1e-4, atol=1e-6)


def test_start_gives_the_place_and_not_the_answer() -> None:
    x, y = rows()
    x = x / x.std(0)
    prints: dict[str, Any] = {"fc.weight": {"shape": [3, 12], "dtype": "float32", "sha256": "0"}}
    start = Head(torch.randn(3, 12), torch.randn(3), "fc", prints)
    head = fit_head(x, y, 3, start=start, tolerance=1e-8)
    assert (head.name, head.prints) == ("fc", prints)
    plain = fit_head(x, y, 3, tolerance=1e-8)
    shift = plain.logits(x)
    torch.testing.assert_close(head.logits(x).softmax(1), shift.softmax(1), rtol=0, atol=1e-4)
    bare = fit_head(x, y, 3, start=Head(torch.zeros(3, 12)))
    assert bare.bias is None


def test_a_constant_column_and_float16_are_no_trouble() -> None:
    x, y = rows()
    x = x.clamp_max(100)
    x[:, 5], x[:, 6] = 0.0, 7.3
    for standardise in (False, True):
        head = fit_head(x.half(), y, 3, standardise=standardise)
        assert head.weight.dtype == torch.float32
        assert float(head.weight[:, 5:7].abs().max()) < 1e-6
    assert fit_head(x.double(), y, 3).weight.dtype == torch.float64


def test_separable_rows_without_a_penalty_are_warned_of() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    with pytest.warns(UserWarning, match="not at the minimum after 3 steps"):
        fit_head(x, torch.tensor([0, 0, 1, 1]), 2, l2=0.0, steps=3)
    fit_head(x, torch.tensor([0, 0, 1, 1]), 2)


def test_balanced_weights() -> None:
    groups = torch.tensor([0, 0, 0, 3, 5, 5])
    s = balanced(groups)
    torch.testing.assert_close(
        torch.zeros(6).double().index_add(0, groups, s)[[0, 3, 5]], torch.full((3,), 1 / 3).double()
    )
    x, y = rows()
    # a copied row counts as one of twice the weight
    twice = torch.cat([torch.arange(200), torch.arange(50)])
    weights = torch.ones(200)
    weights[:50] = 2
    one = fit_head(x, y, 3, weights=weights, tolerance=1e-8)
    torch.testing.assert_close(one.weight, fit_head(x[twice], y[twice], 3, weights=None, tolerance=1e-8).weight)


def test_sgd_is_torch_sgd_on_the_same_batches() -> None:
    x, y = rows(m=6)
    x = x / x.std(0)
    sgd = Sgd(epochs=2, batches=7, batch=16, rate=0.05)
    seen: list[tuple[int, Head]] = []
    head = fit_head(x, y, 3, solver="sgd", sgd=sgd, l2=1e-2, seed=3, watch=lambda e, h: seen.append((e, h)))
    g = torch.Generator().manual_seed(3)
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.empty(3, 6).uniform_(-(6**-0.5), 6**-0.5, generator=g))
        layer.bias.copy_(torch.empty(3).uniform_(-(6**-0.5), 6**-0.5, generator=g))
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(2):
        for index in torch.multinomial(balanced(y), 7 * 16, replacement=True, generator=g).split(16):
            optimiser.zero_grad()
            nn.functional.cross_entropy(layer(x[index]), y[index]).backward()
            optimiser.step()
    torch.testing.assert_close(head.weight, layer.weight.detach(), rtol=1e-4, atol=1e-5)
    assert head.bias is not None
    torch.testing.assert_close(head.bias, layer.bias.detach(), rtol=1e-4, atol=1e-5)
    assert [epoch for epoch, _ in seen] == [1, 2]
    assert torch.equal(seen[-1][1].weight, head.weight)
    assert not torch.equal(seen[0][1].weight, head.weight)
    again = fit_head(x, y, 3, solver="sgd", sgd=sgd, l2=1e-2, seed=3)
    assert torch.equal(again.weight, head.weight)
    assert not torch.equal(fit_head(x, y, 3, solver="sgd", sgd=sgd, seed=4).weight, head.weight)


def test_sgd_comes_near_the_minimum_and_keeps_closed_weights() -> None:
    x, y = rows()
    gates = torch.ones(3, 12)
    gates[:, 2] = gates[1, 0] = 0
    sgd = Sgd(epochs=30, batches=50, rate=0.02)
    near = fit_head(x, y, 3, solver="sgd", sgd=sgd, standardise=True, gates=gates)
    exact = fit_head(x, y, 3, standardise=True, gates=gates)
    assert bool((near.weight[gates == 0] == 0).all())
    s = balanced(y)
    assert value(exact, x, y, s, 0.0) - 1e-3 < value(near, x, y, s, 0.0) < value(exact, x, y, s, 0.0) + 0.02


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(2, 30),
    m=st.integers(1, 40),
    classes=st.integers(2, 4),
    l2=st.floats(1e-3, 1.0),
    seed=st.integers(0, 2**16),
)
def test_any_rows_end_at_the_minimum(n: int, m: int, classes: int, l2: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, m, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=g)
    y[:2] = torch.tensor([0, 1])
    head = fit_head(x, y, classes, l2=l2, weights="class")
    by_weight, by_bias = slope(head, x, y, balanced(y), l2)
    assert max(float(by_weight.abs().max()), float(by_bias[y.unique()].abs().max())) < 1e-4
    again = fit_head(x, y, classes, l2=l2, start=head)
    torch.testing.assert_close(again.weight, head.weight, rtol=0, atol=1e-4)


X, Y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"features": X.long()}, TypeError, "features: expected a floating tensor, got torch.int64"),
        ({"features": X[0]}, ValueError, r"features: expected shape \[N, M\], got \(3,\)"),
        ({"features": X[:0]}, ValueError, "features: expected shape"),
        ({"features": X.log()}, ValueError, "features: expected finite numbers, got nan at row"),
        ({"labels": Y.float()}, TypeError, "labels: expected a tensor of whole numbers, got torch.float32"),
        ({"labels": Y[:4]}, ValueError, r"labels: expected shape \(6,\), got \(4,\)"),
        ({"labels": Y + 1}, ValueError, "labels: expected values below 2, got 2 at row 1"),
        ({"labels": Y - 1}, ValueError, "labels: expected values from 0, got -1 at row 0"),
        ({"labels": Y * 0}, ValueError, r"labels: need rows of at least 2 classes with a weight above 0, got \[0\]"),
        ({"classes": 1}, ValueError, "classes: need at least 2, got 1"),
        ({"weights": "group"}, TypeError, "weights: expected a tensor"),
        ({"weights": torch.ones(5)}, ValueError, r"weights: expected shape \(6,\), got \(5,\)"),
        ({"weights": -torch.ones(6)}, ValueError, "weights: expected finite numbers of at least 0, got -1.0 at row 0"),
        ({"weights": 1.0 - Y}, ValueError, "labels: need rows of at least 2 classes"),
        ({"gates": torch.zeros(3)}, ValueError, "gates: all weights are closed"),
        ({"gates": torch.ones(4)}, ValueError, r"gates: expected shape \(3,\) or \(2, 3\), got \(4,\)"),
        ({"gates": torch.ones(3).log() * torch.inf}, ValueError, "gates: must be finite"),
        ({"l2": -1}, ValueError, "l2: must be at least 0, got -1"),
        ({"l1": "a"}, TypeError, "l1: expected a number, got str"),
        ({"solver": "adam"}, ValueError, "solver: expected one of lbfgs, sgd, got 'adam'"),
        ({"solver": "sgd", "l1": 1.0}, ValueError, "l1: only solver='lbfgs' has it"),
        ({"sgd": Sgd()}, ValueError, "sgd, watch: solver='lbfgs' has no epochs"),
        ({"start": Head(torch.ones(2, 4))}, ValueError, "start: expected 3 features to 2 outputs"),
        ({"start": X}, TypeError, "start: expected a Head, got Tensor"),
        ({"bias": False, "standardise": True}, ValueError, "standardise: centred columns need a bias"),
        ({"standardise": torch.ones(4, 2)}, ValueError, r"standardise: expected shape \[N, 3\]"),
        ({"memory": "much"}, ValueError, "memory: expected bytes"),
        ({"steps": 0}, ValueError, "steps: need at least 1, got 0"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"features": X, "labels": Y, "classes": 2, **change}
    with pytest.raises(error, match=text):
        fit_head(**arguments)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"rate": 0.0}, {"momentum": 1.0}, {"batch": 1.5}])
def test_bad_settings_of_sgd(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        Sgd(**change)
