"""The head is found in every family, copied, and gives the model's own logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.tiny_models import FAMILIES, tiny
from helpers.tolerance import tolerance
from spurge.engine.base.files import fingerprint
from spurge.engine.models.heads import Head, find_head, print_of


class Net(nn.Module):
    """A convolution and a head by a name of its own, with a linear layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.last = nn.Linear(6, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_every_family_is_the_layer_with_its_labels(family):
    model = tiny(family, labels=3)
    name, layer = find_head(model)
    assert layer is model.get_submodule(name)
    assert layer.out_features == 3
    head = Head.of(model)
    assert torch.equal(head.weight, layer.weight)
    assert (head.outputs, head.width, head.name) == (3, layer.in_features, name)
    assert {key.rpartition(".")[2] for key in head.prints} <= {"weight", "bias"}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(3, 2), ""),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(1)), "2"),
        (Net(), "last"),
        (nn.ModuleDict({"fc": nn.Linear(3, 2), "auxiliary": nn.Linear(3, 2)}), "fc"),
        (nn.ModuleDict({"classifier": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "z": Net()}), "classifier.1"),
    ],
)
def test_where_the_head_is(model, expected):
    assert find_head(model)[0] == expected


def test_a_given_path_wins():
    model = Net()
    assert find_head(model, "body") == ("body", model.body)


def test_a_usual_name_with_another_number_of_outputs_is_no_head():
    model = tiny("bert", labels=2)
    model.fc = nn.Linear(4, 7)
    model.classifier = nn.Linear(32, 5)
    model.zz = nn.Linear(32, 2)
    assert find_head(model)[0] == "zz"


def test_a_compiled_model_has_the_head_of_the_original():
    model = Net()
    assert find_head(torch.compile(model)) == find_head(model)
    assert Head.of(torch.compile(model)).name == "last"


def test_prints_tell_the_parameters_of_the_model():
    model = tiny("bert", dtype=torch.bfloat16)
    head = Head.of(model)
    assert head.weight.dtype == torch.float32
    assert head.prints == {
        "classifier.weight": {"shape": [2, 32], "dtype": "bfloat16", "sha256": fingerprint(model.classifier.weight)},
        "classifier.bias": {"shape": [2], "dtype": "bfloat16", "sha256": fingerprint(model.classifier.bias)},
    }
    assert set(Head.of(nn.Linear(2, 2, bias=False)).prints) == {"weight"}


def test_the_copy_is_its_own():
    layer = nn.Linear(3, 2)
    head, before = Head.of(layer), layer.weight.detach().clone()
    layer.weight.data.zero_()
    assert torch.equal(head.weight, before)
    source = torch.ones(2, 3)
    head = Head(source)
    source.zero_()
    assert torch.equal(head.weight, torch.ones(2, 3))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 50),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_logits_in_blocks(rows, width, outputs, block, bias, dtype):
    torch.manual_seed(rows + 41 * width)
    head = Head(torch.randn(outputs, width), torch.randn(outputs) if bias else None)
    features = torch.randn(rows, width).to(dtype)
    found = head.logits(features, rows=block)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = features.double() @ head.weight.double().T + (head.bias.double() if bias else 0)
    scale = features.double().abs() @ head.weight.double().abs().T + 1
    assert bool(((found - expected).abs() <= tolerance(torch.float32, width + 1) * scale).all())
    assert torch.equal(head.predictions(features, rows=block), found.argmax(1))


def test_the_first_of_equal_logits_is_predicted():
    assert Head(torch.ones(3, 2)).predictions(torch.ones(2, 2)).tolist() == [0, 0]


def test_logits_carry_no_gradient():
    assert not Head.of(nn.Linear(3, 2)).logits(torch.ones(1, 3, requires_grad=True)).requires_grad


def test_with_another_weight():
    head = Head.of(nn.Linear(3, 2))
    other = head.with_(weight=torch.zeros(2, 3))
    assert torch.equal(other.weight, torch.zeros(2, 3))
    assert torch.equal(other.bias, head.bias)
    assert (other.name, other.prints) == (head.name, head.prints)
    assert other.fingerprint() != head.fingerprint() == head.with_().fingerprint()
    assert torch.equal(head.with_(bias=torch.ones(2)).bias, torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2),), ValueError, r"weight: expected shape \[O, M\], got \(2,\)"),
        ((torch.zeros(0, 2),), ValueError, r"weight: expected shape \[O, M\], got \(0, 2\)"),
        ((torch.zeros(2, 3), torch.zeros(3)), ValueError, r"bias: expected shape \(2,\), got \(3,\)"),
        ((torch.tensor([[1.0, float("nan")]]),), ValueError, "weight: expected finite numbers, got nan"),
        ((torch.zeros(2, 3), torch.tensor([0.0, float("inf")])), ValueError, "bias: expected finite numbers, got inf"),
        ((torch.zeros(2, 3, dtype=torch.int64),), TypeError, "weight: expected a floating tensor .*torch.int64"),
        (([[1.0]],), TypeError, "weight: expected a floating tensor .*list"),
    ],
)
def test_wrong_heads(arguments, error, message):
    with pytest.raises(error, match=message):
        Head(*arguments)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(2, 4), ValueError, r"features: expected shape \[N, 3\], got \(2, 4\)"),
        (torch.zeros(3), ValueError, r"features: expected shape \[N, 3\], got \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.int32), TypeError, "features: expected a floating tensor, got torch.int32"),
        ([1.0], TypeError, "features: expected a floating tensor, got list"),
    ],
)
def test_wrong_features(features, error, message):
    for method in (Head(torch.zeros(2, 3)).logits, Head(torch.zeros(2, 3)).predictions):
        with pytest.raises(error, match=message):
            method(features)


def test_with_refuses_other_shapes():
    head = Head(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"weight: expected shape \(2, 3\), got \(3, 2\)"):
        head.with_(weight=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="bias: the head has none"):
        head.with_(bias=torch.zeros(2))


def test_what_is_no_head():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        find_head("bert")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no nn.Linear"):
        find_head(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"such as \['body', 'last'\], 'nowhere' is no module of the model"):
        find_head(Net(), "nowhere")
    with pytest.raises(ValueError, match="'1' is a ReLU"):
        find_head(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "1")
    with pytest.raises(TypeError, match="head: expected the path of a layer, got int"):
        find_head(Net(), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'last.weight' is on the meta device"):
        Head.of(Net().to("meta"))


def test_prints_differ_by_type_shape_and_bits():
    tensor = torch.zeros(4)
    prints = [print_of("x", t) for t in (tensor, tensor.half(), tensor.reshape(2, 2), tensor + 1)]
    assert len({str(entry) for entry in prints}) == 4


def test_repr():
    assert repr(Head.of(tiny("roberta"))) == "Head(32 features to 2 outputs at 'classifier.out_proj')"
    assert repr(Head(torch.zeros(2, 3))) == "Head(3 features to 2 outputs)"
