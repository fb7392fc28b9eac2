"""Linear layers of several parts: LoRA around another layer, quantised weights, weights that are computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_map

from helpers.tiny_models import tiny, tiny_inputs
from helpers.tolerance import assert_near
from spurge.engine.cascade.cascade import Cascade, Path, predicted_logit
from spurge.engine.edits.neuron_edits import EditMismatch, NeuronEdit
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.models.heads import Head
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.probes import token_scores
from spurge.engine.models.projections import Composite
from spurge.engine.models.sites import find_sites

peft = pytest.importorskip("peft")

TARGETS = {"bert": ["query", "intermediate.dense", "output.dense"], "gpt2": ["c_attn", "c_fc", "c_proj"]}
TARGETS["llama"] = ["q_proj", "o_proj", "gate_proj", "down_proj"]


def adapted(family: str, **settings: Any) -> Any:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=TARGETS[family], **settings)
    model = peft.get_peft_model(tiny(family, labels=3), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


def merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload().eval()


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapted_layer_is_one_projection(family: str, dora: bool) -> None:
    model = adapted(family, use_dora=dora)
    plain = merged(model)
    sites, own = find_sites(model), find_sites(plain)
    assert [site.name.removeprefix("base_model.model.") for site in sites] == [site.name for site in own]
    assert [(site.width, site.hidden, site.layer) for site in sites] == [
        (site.width, site.hidden, site.layer) for site in own
    ]
    for site, want in zip(sites, own, strict=True):
        assert (site.query is None) == (want.query is None)
        assert (site.attention_output is None) == (want.attention_output is None)
        assert_near(site.weight(), want.weight(), terms=site.width)
        some = torch.tensor([7, 2])
        assert_near(site.projection.columns(some), want.weight()[:, some], terms=site.width)
        gradient = torch.randn(2, 3, site.hidden)
        assert_near(site.projection.pull(gradient), gradient @ want.weight(), terms=site.hidden)


@pytest.mark.parametrize("family", TARGETS)
def test_gates_on_an_adapted_model_are_those_on_the_merged_one(family: str) -> None:
    model, inputs = adapted(family), tiny_inputs(family)
    plain = merged(model)
    neurons = {site.name: torch.arange(5) for site in find_sites(model)[1:]}
    stripped = {name.removeprefix("base_model.model."): some for name, some in neurons.items()}
    with torch.no_grad():
        with NeuronEdit.build(model, NeuronSet(neurons), 0.5).applied(model):
            got = model(**inputs).logits
        with NeuronEdit.build(plain, NeuronSet(stripped), 0.5).applied(plain):
            want = plain(**inputs).logits
        assert not torch.allclose(want, plain(**inputs).logits, atol=1e-3)
    assert_near(got, want, terms=1000)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("path", ["layer", "joint", "neuron"])
def test_attributions_of_an_adapted_model_are_those_of_the_merged_one(family: str, path: Path) -> None:
    model, inputs = adapted(family), tiny_inputs(family)
    got = Cascade(model, path=path).attribute(inputs, predicted_logit)
    want = Cascade(merged(model), path=path).attribute(inputs, predicted_logit)
    for value, right in zip(got.values.values(), want.values.values(), strict=True):
        assert_near(value, right, terms=1000, size=right.abs().max())


def test_scores_of_tokens_see_an_adapted_output_projection() -> None:
    model, inputs = adapted("bert"), tiny_inputs("bert")
    got = token_scores(model, inputs, kind="attention_norm")
    assert_near(got, token_scores(merged(model), inputs, kind="attention_norm"), terms=1000)


def test_a_part_of_a_composite_layer_is_no_site() -> None:
    model = adapted("bert")
    name = find_sites(model)[0].name
    with pytest.raises(ValueError, match=rf"'{name}.base_layer' is a part of '{name}'"):
        find_sites(model, [f"{name}.base_layer"])


def test_edits_know_adapters_apart() -> None:
    model = adapted("bert")
    site = find_sites(model)[0]
    edit = NeuronEdit.build(model, NeuronSet({site.name: [1]}), 0.0)
    edit.check(model)
    site.down.set_scale("default", 0.5)  # type: ignore[operator]
    with pytest.raises(EditMismatch, match="is not the one"):
        edit.check(model)
    with pytest.raises(ValueError, match=r"adapted.*use applied\(\) instead, or merge"):
        edit.fold(model, force=True)


def test_the_head_beside_its_trained_copy_is_the_one_that_runs() -> None:
    model = adapted("bert")
    head = Head.of(model)
    assert head.name.endswith("classifier.modules_to_save.default")
    with model.disable_adapter():
        assert Head.of(model).name.endswith("classifier.original_module")


def test_an_adapted_head_is_refused() -> None:
    config = peft.LoraConfig(r=2, target_modules=["classifier"])
    model = peft.get_peft_model(tiny("bert"), config)
    with pytest.raises(ValueError, match=r"'base_model.model.classifier' is a Linear without a plain float weight"):
        Head.of(model)


class Packed(nn.Module):
    """A quantised layer as GPTQ has it: integers, scales, and the product made of them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


def replaced(model: nn.Module, make: Any) -> nn.Module:
    """`model` with other layers in the place of its down projections."""
    for site in find_sites(model):
        model.set_submodule(site.name, make(site.down))
    return model.eval()


def dequantised(linear: nn.Linear) -> nn.Linear:
    packed = Packed(linear)
    linear.weight.data = packed.qweight * packed.scales
    return linear


@pytest.mark.parametrize("path", ["layer", "neuron"])
def test_a_quantised_layer_works_where_hooks_do(path: Path) -> None:
    model, plain = replaced(tiny("bert"), Packed), replaced(tiny("bert"), dequantised)
    inputs, neurons = tiny_inputs("bert"), NeuronSet({find_sites(plain)[1].name: [3, 4]})
    assert [site.name for site in find_sites(model)] == [site.name for site in find_sites(plain)]
    edit = NeuronEdit.build(model, neurons, 0.0)
    with torch.no_grad():
        with edit.applied(model):
            got = model(**inputs).logits
        with NeuronEdit.build(plain, neurons, 0.0).applied(plain):
            assert_near(got, plain(**inputs).logits, terms=1000)
    values = Cascade(model, path=path).attribute(inputs, predicted_logit).values
    wanted = Cascade(plain, path=path).attribute(inputs, predicted_logit).values
    for value, want in zip(values.values(), wanted.values(), strict=True):
        assert_near(value, want, terms=1000, size=want.abs().max())
    with pytest.raises(ValueError, match=r"use applied\(\) instead"):
        edit.fold(model)


def test_a_layer_without_gradients_says_what_works() -> None:
    class Inference(Packed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    model = replaced(tiny("bert", layers=1), Inference)
    with pytest.raises(ValueError, match=r"the Inference gives no gradients .*path='neuron' work"):
        Cascade(model, path="layer").attribute(tiny_inputs("bert"), predicted_logit)


def test_a_layer_that_is_not_linear_is_refused() -> None:
    class Clipped(Packed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clamp(-0.1, 0.1))

    model = replaced(tiny("bert", layers=1), Clipped)
    with pytest.raises(ValueError, match="does not scale with its input"):
        Cascade(model, path="layer").attribute(tiny_inputs("bert"), predicted_logit)


def test_a_weight_that_is_computed_is_read_as_it_acts() -> None:
    model, inputs = replaced(tiny("bert"), weight_norm), tiny_inputs("bert")
    plain = tiny("bert")
    assert all(isinstance(site.projection, Composite) for site in find_sites(model))
    for site, want in zip(find_sites(model), find_sites(plain), strict=True):
        assert_near(site.weight(), want.weight(), terms=site.width)
    got, want = (Cascade(m, path="layer").attribute(inputs, predicted_logit).values for m in (model, plain))
    for value, right in zip(got.values(), want.values(), strict=True):
        assert_near(value, right, terms=1000, size=right.abs().max())


class Int8(Tensor):
    """A weight as torchao quantises it: a tensor of its own kind that products dequantise."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype, device=codes.device)  # type: ignore

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            args = tree_map(lambda value: value.codes * value.scales if isinstance(value, cls) else value, args)
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        raise NotImplementedError(f"{cls.__name__} has no {func}")


class Sealed(Int8):
    __tensor_flatten__ = None  # type: ignore[assignment]


def quantise(model: nn.Module, kind: type[Int8]) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            packed = Packed(layer)
            layer.weight = nn.Parameter(kind(packed.qweight, packed.scales), requires_grad=False)
    return model


def test_quantised_tensors_are_refused_where_their_numbers_are_needed() -> None:
    model, inputs = quantise(tiny("bert"), Int8), tiny_inputs("bert")
    site = find_sites(model)[0]
    with pytest.raises(ValueError, match=r"'classifier' is a Linear without a plain float weight .*quantised"):
        Head.of(model)
    with pytest.raises(ValueError, match=r"quantised or wrapped\); gates of neurons work"):
        WeightEdit.build(model, {f"{site.name}.weight": (torch.tensor([0]), torch.tensor([1.0]))})
    edit = NeuronEdit.build(model, NeuronSet({site.name: [1]}), 0.0)
    edit.check(model)
    with torch.no_grad(), edit.applied(model):
        gated = model(**inputs).logits
    ungated = Cascade(model, path="neuron").attribute(inputs, predicted_logit)
    assert not torch.equal(gated.max(1).values, ungated.full[0])
    with pytest.raises(ValueError, match=r"is a Sealed .quantised. whose bits cannot be read"):
        NeuronEdit.build(quantise(tiny("bert"), Sealed), NeuronSet({site.name: [1]}), 0.0)
