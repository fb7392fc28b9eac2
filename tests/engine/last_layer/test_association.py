"""Scores of edges: against per-sample gradients of autograd, in blocks of any size, and at the edges of definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from spurge.engine.features.features import Features
from spurge.engine.last_layer.association import Association, association
from spurge.engine.last_layer.association_stream import class_blocks, residuals_
from spurge.engine.last_layer.capture import captured
from spurge.engine.models.heads import Head

F64 = torch.float64


def case(samples=60, units=7, classes=4, seed=0, dtype=F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, labels (every class at least once), weight and bias."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, units, generator=draw, dtype=F64)
    labels = torch.randint(classes, (samples,), generator=draw)
    labels[:classes] = torch.arange(classes)
    weight = torch.randn(classes, units, generator=draw, dtype=F64)
    bias = torch.randn(classes, generator=draw, dtype=F64)
    return x.to(dtype), labels, weight.to(dtype), bias.to(dtype)


def entropy(parts: Tensor) -> Tensor:
    """Of [C, ...] over C."""
    share = parts / parts.sum(0)
    return torch.special.entr(share.nan_to_num(0.0)).sum(0)


def expected(
    edges: Tensor,
    size: Tensor,
    labels: Tensor,
    target: int | None = None,
    classes: int | None = None,
    mean: bool = True,
) -> dict[str, Tensor]:
    """All scores from per-sample gradients [N, O, M] and activations [N, M], with the tensor [C, O, M]."""
    classes = int(labels.max()) + 1
    reduce = (lambda x: x.mean(0)) if mean else (lambda x: x.sum(0))
    zero = torch.zeros_like(edges[:0].sum(0))
    g = torch.stack([reduce(edges[labels == c].abs()) if (labels == c).any() else zero for c in range(classes)])
    a = torch.stack([reduce(size[labels == c]) if (labels == c).any() else zero[0] for c in range(classes)])
    outputs = range(edges.shape[1])
    picked = g[target] if target is not None else torch.stack([g[o, o] for o in outputs])
    own = a[[target if target is not None else o for o in outputs]]
    ca = (entropy(g) / entropy(a)).where(a.sum(0) > 0, 0.0)
    return {"activations": a, "picked": picked, "ca": ca, "product": picked * own, "sca": ca * picked * own}


def agree(found: Association, want: dict[str, Tensor], near: float = 2e-6) -> None:
    """``near``: picked is float32, as is each product with it."""
    for name, wanted in want.items():
        values = wanted.detach()
        torch.testing.assert_close(getattr(found, name).double(), values, rtol=near, atol=near * values.max().item())


def per_sample(layer: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """Gradients of cross-entropy by the weight, [N, O, M], by torch.func."""
    parameters = dict(layer.named_parameters())

    def loss(parameters, row, label):
        return nn.functional.cross_entropy(functional_call(layer, parameters, (row[None],)), label[None])

    return vmap(grad(loss), (None, 0, 0))(parameters, x, labels)["weight"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("activation", ["magnitude", "relu"])
@pytest.mark.parametrize("target", [None, 2])
def test_scores_are_those_of_per_sample_gradients(reduction, activation, target):
    x, labels, weight, bias = case()
    layer = nn.Linear(7, 4, dtype=F64)
    layer.load_state_dict({"weight": weight, "bias": bias})
    size = x.abs() if activation == "magnitude" else x.relu()
    want = expected(per_sample(layer, x, labels), size, labels, target, mean=reduction == "mean")
    found = association(x, labels, (weight, bias), target=target, reduction=reduction, activation=activation)
    agree(found, want)
    torch.testing.assert_close(found.activations, want["activations"], rtol=1e-13, atol=0)
    torch.testing.assert_close(found.ca, want["ca"], rtol=1e-10, atol=1e-12)
    assert int(found.sca[2].argmax()) == int(want["sca"][2].argmax())
    assert found.counts.tolist() == labels.bincount().tolist()


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(2, 40),
    units=st.sampled_from([1, 2, 17]),
    classes=st.integers(2, 6),
    seed=st.integers(0, 99),
    budget=st.sampled_from([None, 3, 16]),
    data=st.data(),
)
def test_any_blocks_give_the_same(samples, units, classes, seed, budget, data):
    x, labels, weight, _ = case(max(samples, classes), units, classes, seed)
    labels = labels.sort().values if data.draw(st.booleans()) else labels
    target = data.draw(st.none() | st.integers(0, classes - 1))
    rows = data.draw(st.none() | st.permutations(range(classes)).map(lambda p: list(p)[:2]))
    edges = residuals_(x @ weight.T, labels)[:, :, None] * x[:, None, :]
    want = expected(edges, x.abs(), labels, target)
    if rows is not None:
        want = {name: values if name == "activations" else values[rows] for name, values in want.items()}
    kept = classes if rows is None else len(rows)
    fixed = (24 + 24) * kept * units + 8 * classes * (units + kept)
    each = 8 * (2 * units + 3 * classes)
    memory = None if budget is None else fixed + max(budget, 16) * each
    found = association(x, labels, (weight, None), target=target, rows=rows, memory=memory)
    agree(found, want)


def test_classes_stay_whole_where_they_fit():
    found = list(class_blocks([3, 0, 2, 9, 1, 1], 5))
    assert [(b.start, b.stop, b.starts, b.classes) for b in found] == [
        (0, 5, [0, 3, 5], [0, 2]),
        (5, 10, [0, 5], [3]),
        (10, 14, [0, 4], [3]),
        (14, 16, [0, 1, 2], [4, 5]),
    ]
    assert [(b.resumed, b.unfinished) for b in found] == [(False, False), (False, True), (True, False), (False, False)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 9))
def test_blocks_cover_every_sample_once(counts, rows):
    seen = [0] * len(counts)
    end = 0
    for block in class_blocks(counts, rows):
        assert block.start == end
        end = block.stop
        assert 0 < block.stop - block.start <= rows
        assert block.starts[-1] == block.stop - block.start
        for label, low, high in zip(block.classes, block.starts, block.starts[1:], strict=False):
            seen[label] += high - low
    assert seen == counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_features(dtype):
    x, labels, weight, bias = case(200, 12, 5, dtype=dtype)
    wide, head = x.double(), (weight.float(), bias.float())
    residual = residuals_(wide @ head[0].double().T + head[1], labels)
    want = expected(residual[:, :, None] * wide[:, None], wide.abs(), labels)
    agree(association(x, labels, head), want, 1e-4)  # float32 logits of size 10: probabilities to 1e-5


@pytest.mark.parametrize("rows", [None, [3, 1]])
@pytest.mark.parametrize("target", [None, 2])
def test_on_any_device(device, rows, target):
    x, labels, weight, bias = case(200, 9, 5, dtype=torch.float32)
    here = association(x, labels, (weight, bias), rows=rows, target=target)
    there = association(x.to(device), labels.to(device), (weight, bias), rows=rows, target=target)
    assert there.sca.device.type == device.type
    torch.testing.assert_close(there.sca.cpu(), here.sca, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(there.ca.cpu(), here.ca, rtol=1e-4, atol=1e-5)


def test_features_bring_labels_and_head():
    x, labels, weight, bias = case()
    given_apart = association(x, labels, (weight, bias))
    given_as_one = association(Features(x, labels, Head(weight, bias)))
    torch.testing.assert_close(given_as_one.sca, given_apart.sca, rtol=0, atol=0)


def test_known_logits_spare_the_head():
    x, labels, weight, bias = case()
    found = association(x, labels, (weight, bias), logits=x @ weight.T + bias)
    torch.testing.assert_close(found.sca, association(x, labels, (weight, bias)).sca)


def test_confident_predictions_keep_their_residual():
    logits = torch.tensor([[40.0, 0.0, 0.0]])  # 1 - p is 0 in float32
    found = residuals_(logits.clone(), torch.tensor([0]))
    assert found[0].tolist() == pytest.approx([2 * math.exp(-40), math.exp(-40), math.exp(-40)], rel=1e-5)
    x, labels = torch.tensor([[40.0, 1.0], [1.0, 40.0]]), torch.tensor([0, 1])
    assert float(association(x, labels, (torch.eye(2), None)).picked.min()) > 0


# ---- captured gradients ----------------------------------------------------------------------------------------


def autograd(layer: nn.Linear, model, batch: Tensor, labels: Tensor, loss) -> Tensor:
    """Gradients of single samples by the layer's weight, one backward pass each."""
    out = []
    for row, label in zip(batch, labels, strict=True):
        layer.weight.grad = None
        loss(model(row[None]), label[None]).backward()
        out.append(layer.weight.grad.clone())
    layer.weight.grad = None
    return torch.stack(out)


@pytest.mark.parametrize("target", [None, 1])
def test_captured_gradients_of_an_inner_layer(target):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, dtype=F64)
    model = nn.Sequential(nn.Linear(3, 5, dtype=F64), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3, dtype=F64))
    batch, labels = torch.randn(30, 3, dtype=F64), torch.randint(4, (30,))
    labels[:4] = torch.arange(4)
    loss = nn.functional.mse_loss

    def targets(label):
        return nn.functional.one_hot(label, 4)[:, :3].double()

    with captured(layer) as found:
        for part, of in ((batch[:20], labels[:20]), (batch[20:], labels[20:])):
            loss(model(part), targets(of), reduction="sum").backward()
    edges = autograd(layer, model, batch, labels, lambda out, label: loss(out, targets(label), reduction="sum"))
    want = expected(edges, found.inputs().abs(), labels, target)
    agree(association(found.inputs(), labels, gradients=found.gradients(), target=target), want)
    assert not layer._forward_hooks
    assert not layer._backward_hooks


@pytest.mark.parametrize("memory", [None, 16000])
@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_captured_gradients_at_several_positions(memory, rows):
    torch.manual_seed(1)
    layer, last = nn.Linear(5, 3, dtype=F64), nn.Linear(3, 3, dtype=F64)
    model = nn.Sequential(layer, nn.Tanh(), last)
    batch, labels = torch.randn(50, 4, 5, dtype=F64), torch.randint(3, (50,))
    labels[:3] = torch.arange(3)

    def loss(out, label):
        return nn.functional.cross_entropy(out.square().sum(1), label, reduction="sum")

    with captured(layer) as found:
        loss(model(batch), labels).backward()
    want = expected(autograd(layer, model, batch, labels, loss), batch.abs().sum(1), labels)
    if rows is not None:
        want = {name: values if name == "activations" else values[rows] for name, values in want.items()}
    agree(association(batch, labels, gradients=found.gradients(), rows=rows, memory=memory), want)


def test_capture_leaves_no_hooks_behind_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(KeyError), captured(layer):
        raise KeyError
    assert not layer._forward_hooks


def test_capture_says_what_is_missing():
    layer = nn.Linear(2, 2)
    with captured(layer) as found:
        pass
    with pytest.raises(ValueError, match="no pass"):
        found.inputs()
    with captured(layer) as found, torch.no_grad():
        layer(torch.ones(1, 2))
    with pytest.raises(ValueError, match="no backward pass"):
        found.gradients()
    with pytest.raises(TypeError, match=r"expected an nn\.Linear"), captured(nn.ReLU()):
        pass


# ---- edges of the definition -----------------------------------------------------------------------------------


def test_a_dead_unit_scores_zero():
    x, labels, weight, bias = case()
    x[:, 3] = 0
    found = association(x, labels, (weight, bias))
    for scores in (found.ca, found.sca, found.product, found.gradient_entropy, found.activation_entropy[None]):
        assert bool((scores[:, 3] == 0).all())
        assert bool(scores.isfinite().all())
    relu = association(-x.abs(), labels, (weight, bias), activation="relu")
    assert float(relu.sca.abs().max()) == 0


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_unit_of_one_class_scores_whatever_its_size(size):
    """Rounding is no entropy, and no entropy is no score of 0."""
    x, labels, weight, bias = (tensor.float() if tensor.is_floating_point() else tensor for tensor in case())
    x = x.abs()
    x[:, 0] *= labels == 1
    want = association(x.double(), labels, (weight.double(), bias.double()))
    found = association(x * size, labels, (weight / size, bias))
    assert float(found.gradient_entropy[:, 0].max()) == 0
    assert float(want.activation_entropy[0]) < 1e-12
    assert float(found.ca.min()) > 0
    torch.testing.assert_close(found.ca.double(), want.ca, rtol=1e-3, atol=0)


def test_entropies_count_only_classes_with_samples():
    x, labels, weight, bias = case(classes=4)
    few = labels < 2
    found = association(x[few], labels[few], (weight, bias))
    assert found.activations[2:].abs().max() == 0
    assert found.counts.tolist()[2:] == [0, 0]
    assert float(found.activation_entropy.max()) <= math.log(2) + 1e-12
    assert float(found.sca[2:].abs().max()) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_entropies_stay_in_their_range(seed, classes):
    x, labels, weight, bias = case(30, 5, classes, seed)
    found = association(x, labels, (weight, bias))
    for h in (found.gradient_entropy, found.activation_entropy):
        assert float(h.min()) >= 0
        assert float(h.max()) <= math.log(classes) * (1 + 1e-12)


def test_means_do_not_depend_on_class_sizes_and_sums_do():
    x, labels, weight, bias = case()
    more = torch.cat([torch.arange(60), *[(labels == 2).nonzero()[:, 0]] * 30])
    means, sums = (
        [
            association(x[rows], labels[rows], (weight, bias), reduction=reduction).ca
            for rows in (torch.arange(60), more)
        ]
        for reduction in ("mean", "sum")
    )
    torch.testing.assert_close(means[0], means[1], rtol=1e-10, atol=1e-12)
    assert float((sums[0] - sums[1]).abs().max()) > 0.01


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": torch.zeros(60, dtype=torch.int64)}, "samples of at least 2"),
        ({"labels": torch.full((60,), 4)}, "expected values below 4, got 4 at row 0"),
        ({"labels": torch.full((60,), -1)}, "expected values from 0, got -1"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: expected shape \(60,\)"),
        ({"features": torch.zeros(60, 3)}, r"features: expected shape \[N, 7\]"),
        ({"features": torch.full((60, 7), torch.nan)}, "finite"),
        ({"features": torch.zeros(0, 7)}, "expected samples"),
        ({"head": None}, "head: expected the linear layer, or gradients"),
        ({"head": (torch.ones(1, 7), None)}, "at least 2 outputs"),
        ({"gradients": torch.zeros(60, 4)}, "either these or a head"),
        ({"head": None, "gradients": torch.zeros(59, 4)}, r"gradients: expected \[N, O\]"),
        ({"logits": torch.zeros(60, 3)}, "logits: expected shape"),
        ({"target": 4}, "target: expected a class below 4"),
        ({"rows": [4]}, "rows: expected different outputs below 4"),
        ({"rows": [1, 1]}, "rows: expected different"),
        ({"rows": []}, "rows: expected different"),
        ({"classes": 3}, "classes: expected at least 4"),
        ({"floor": 0.0}, "floor: expected"),
        ({"activation": "abs"}, "activation: expected one of magnitude, relu, got 'abs'"),
        ({"reduction": "max"}, "reduction: expected"),
        ({"memory": 100}, "memory: expected at least"),
    ],
)
def test_what_is_refused(change, words):
    x, labels, weight, bias = case()
    arguments = {"features": x, "labels": labels, "head": (weight, bias), **change}
    if "labels" in change and len(change["labels"]) == len(x):
        arguments["features"] = x
    if "features" in change and len(change["features"]) != 60:
        arguments["labels"] = labels[:0]
    with pytest.raises(ValueError, match=words):
        association(**arguments)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"features": torch.zeros(60, 7, dtype=torch.int64)}, "features: expected a floating tensor"),
        ({"labels": torch.zeros(60)}, "labels: expected a tensor of whole numbers"),
        ({"head": "fc"}, "head: expected a Head"),
    ],
)
def test_wrong_types(change, words):
    x, labels, weight, bias = case()
    with pytest.raises(TypeError, match=words):
        association(**{"features": x, "labels": labels, "head": (weight, bias), **change})
