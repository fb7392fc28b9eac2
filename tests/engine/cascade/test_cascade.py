"""The cascade against the plain layer-by-layer loop, exact ablation against hooks, and the memory budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.batches import batch_for, two_targets
from helpers.tiny_models import DECODERS, FAMILIES, tiny
from spurge.engine.cascade.cascade import Cascade, Rows, predicted_logit
from spurge.engine.cascade.quadrature import gauss_legendre, gauss_radau
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites

SANDWICH = ("glm4",)  # a norm behind the down projection: invariant to its scale, so the path is a step near zero
SMOOTH = tuple(family for family in FAMILIES if family not in SANDWICH)
KINKED = {"distilbert": 0.03}  # a ReLU in the head: the rule converges like 1 / nodes

# Another number of rows is another order of sums in a float32 product, on some processors more than on others; the
# values are sums over tokens of terms about 1 that cancel.
SPLIT = 1e-6


def plain_loop(model: Any, inputs: dict[str, Tensor], nodes: int, rule: Any = None) -> dict[str, Tensor]:
    """Integrated gradients one layer at a time, each a full forward and backward of the model: ``[Q, B, F]``."""
    alphas, weights = (x.float() for x in rule or gauss_legendre(nodes))
    nodes = len(alphas)
    batch = len(next(iter(inputs.values())))
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(1)
    many = {key: value.repeat(nodes, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    result = {}
    for site in find_sites(model):
        seen: list[Tensor] = []
        with torch.no_grad(), site.down.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0])):
            model(**inputs)
        z = seen[0]
        scaled = (alphas.view(-1, 1, 1, 1) * z).flatten(0, 1).requires_grad_()
        with site.down.register_forward_pre_hook(lambda m, a, scaled=scaled: (scaled,)):
            logits = model(**many).logits
        example = torch.arange(batch).repeat(nodes)
        value = two_targets(Rows(logits, None, example, predicted.repeat(nodes)))
        grads = [torch.autograd.grad(value[:, q].sum(), scaled, retain_graph=True)[0] for q in range(value.shape[1])]
        result[site.name] = torch.stack(
            [(torch.tensordot(weights, grad.unflatten(0, (nodes, batch)), 1) * z).sum(1) for grad in grads]
        )
    return result


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_path_equals_the_plain_loop(family: str) -> None:
    model, inputs = tiny(family, labels=3), batch_for(family)
    got = Cascade(model, nodes=3, path="layer").attribute(inputs, two_targets)
    want = plain_loop(model, inputs, 3)
    assert list(got.values) == list(want)
    for name, value in want.items():
        assert got.values[name].shape == value.shape
        assert relative(got.values[name], value) < 1e-5, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", *DECODERS[:3]])
def test_padding_changes_nothing(family: str, side: str) -> None:
    model = tiny(family, labels=3)
    inputs = batch_for(family, examples=1, tokens=6)
    alone = Cascade(model, nodes=2, path="layer").attribute(inputs, predicted_logit)
    pad = (2, 0) if side == "left" else (0, 2)
    if side == "left" and family == "bert":
        pytest.skip("absolute positions: an encoder is padded on the right")
    padded = {key: torch.nn.functional.pad(value, pad) for key, value in inputs.items()}
    if side == "left":
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    got = Cascade(model, nodes=2, path="layer").attribute(padded, predicted_logit)
    for name, value in alone.values.items():
        assert relative(got.values[name], value) < 1e-5


@pytest.mark.parametrize("family", SMOOTH)
def test_completeness(family: str) -> None:
    """Per-layer sums agree with F(1) - F(0) within the tolerance asked for."""
    model, inputs = tiny(family, labels=3), batch_for(family)
    tolerance = KINKED.get(family, 1e-3)
    found = Cascade(model, tolerance=tolerance, path="layer").attribute(inputs, predicted_logit)
    assert found.relative_residual() <= tolerance
    for name, value in found.values.items():
        torch.testing.assert_close(found.full - found.erased[name] - value.sum(2), found.residual[name])
        assert (found.change[name] or 0.0) <= tolerance
        assert found.nodes[name] >= 4


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta_v2", "vit"])
def test_radau_takes_the_unedited_model_as_a_node(family: str) -> None:
    """With as many free nodes it is at least as near to the integral, and its sums stay complete."""
    model, inputs = tiny(family, labels=3), batch_for(family)
    want = Cascade(model, nodes=32, path="layer").attribute(inputs, two_targets)
    alphas, weights, end = gauss_radau(2)
    loop = plain_loop(
        model, inputs, 2, rule=(torch.cat([alphas, torch.ones(1)]), torch.cat([weights, weights.new_tensor([end])]))
    )
    got = Cascade(model, nodes=2, rule="radau", path="layer").attribute(inputs, two_targets)
    for name, value in got.values.items():
        assert relative(value, loop[name]) < 1e-5
    fine = Cascade(model, nodes=16, rule="radau", path="layer").attribute(inputs, two_targets)
    assert max(relative(fine.values[name], value) for name, value in want.values.items() if value.any()) < 1e-3
    assert not got.full.requires_grad


def test_radau_keeps_to_the_memory_budget() -> None:
    model, inputs = tiny("bert", layers=4), batch_for("bert", examples=5)
    want = Cascade(model, nodes=4, rule="radau", path="layer").attribute(inputs, two_targets)
    got = Cascade(model, nodes=4, rule="radau", memory=200_000, path="layer").attribute(inputs, two_targets)
    for name, value in want.values.items():
        torch.testing.assert_close(got.values[name], value, rtol=1e-5, atol=SPLIT)


def test_completeness_can_be_left_out() -> None:
    model, inputs = tiny("bert", labels=3), batch_for("bert")
    bare = Cascade(model, completeness=False, path="layer").attribute(inputs, predicted_logit)
    full = Cascade(model, path="layer").attribute(inputs, predicted_logit)
    assert not bare.erased
    assert not bare.residual
    assert math.isnan(bare.relative_residual())
    assert all(torch.equal(bare.values[name], value) for name, value in full.values.items())


def test_a_tolerance_out_of_reach_warns() -> None:
    model, inputs = tiny("glm4", labels=3), batch_for("glm4")
    with pytest.warns(UserWarning, match=r"tolerance 1e-07 not reached on \d of 3 paths with up to \d+ nodes"):
        Cascade(model, tolerance=1e-7, path="layer").attribute(inputs, predicted_logit)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_joint_path_sums_to_the_whole_network(family: str) -> None:
    model, inputs = tiny(family, labels=3), batch_for(family)
    found = Cascade(model, path="joint", nodes=16).attribute(inputs, two_targets)
    with torch.no_grad():
        handles = [site.down.register_forward_pre_hook(lambda m, a: (a[0] * 0,)) for site in find_sites(model)]
        rows = Rows(model(**inputs).logits, None, torch.arange(4), found.full.new_zeros(4).long())
        for handle in handles:
            handle.remove()
        rows = Rows(rows.logits, None, rows.example, model(**inputs).logits.argmax(1))
    torch.testing.assert_close(found.erased["all"], two_targets(rows).t(), rtol=1e-4, atol=1e-5)
    assert found.relative_residual() < 1e-3


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "glm4", "deberta_v2", "vit"])
def test_ablation_is_exact(family: str) -> None:
    model, inputs = tiny(family, labels=3), batch_for(family)
    sites = find_sites(model)
    neurons = NeuronSet({site.name: [0, 2 * i + 1, site.width - 1] for i, site in enumerate(sites)})
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(1)

    def value() -> Tensor:
        with torch.no_grad():
            return model(**inputs).logits.gather(1, predicted[:, None])[:, 0]

    got = Cascade(model, path="layer").ablate(inputs, predicted_logit, neurons)
    assert got.shape == (1, len(predicted), len(neurons))
    full, by_name = value(), {site.name: site for site in sites}
    for j, ref in enumerate(neurons):

        def erase(module: Any, args: tuple, k: int = ref.index) -> tuple:
            z = args[0].clone()
            z[..., k] = 0
            return (z,)

        with by_name[ref.site].down.register_forward_pre_hook(erase):
            torch.testing.assert_close(got[0, :, j], full - value(), rtol=1e-4, atol=2e-6)


def test_neuron_path_is_the_ablation_of_every_unit() -> None:
    model, inputs = tiny("bert", layers=2), batch_for("bert", examples=2)
    found = Cascade(model, path="neuron").attribute(inputs, predicted_logit)
    every = NeuronSet({site.name: range(site.width) for site in find_sites(model)})
    torch.testing.assert_close(
        torch.cat(list(found.values.values()), 2), Cascade(model, path="layer").ablate(inputs, predicted_logit, every)
    )
    assert math.isnan(found.relative_residual())


def test_hard_targets_can_be_ablated_but_not_integrated() -> None:
    model, inputs = tiny("bert", labels=3), batch_for("bert")

    def hard(rows: Rows) -> Tensor:
        return (rows.logits.argmax(1) == rows.predicted).float()

    effects = Cascade(model, path="layer").ablate(inputs, hard, NeuronSet({find_sites(model)[0].name: [1]}))
    assert effects.shape == (1, 4, 1)
    with pytest.raises(ValueError, match=r"target: is not differentiable"):
        Cascade(model, path="layer").attribute(inputs, hard)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "glm4"])
def test_gated_equals_hooks(family: str) -> None:
    model, inputs = tiny(family, labels=3), batch_for(family)
    sites = find_sites(model)
    neurons = NeuronSet({sites[1].name: [4, 5], sites[2].name: [0, 7]})
    gates = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.5, -1.0, 1.0], [2.0, 0.0, 0.0, 0.25]])
    got = Cascade(model, path="layer").gated(inputs, two_targets, neurons, gates)
    assert got.shape == (3, 4, 2)
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(1)
    for setting, row in zip(gates, got, strict=True):
        handles = []
        for site, columns, values in ((sites[1], [4, 5], setting[:2]), (sites[2], [0, 7], setting[2:])):

            def scale(module: Any, args: tuple, c: list = columns, v: Tensor = values) -> tuple:
                z = args[0].clone()
                z[..., c] *= v
                return (z,)

            handles.append(site.down.register_forward_pre_hook(scale))
        with torch.no_grad():
            want = two_targets(Rows(model(**inputs).logits, None, torch.arange(4), predicted))
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_attention_targets_see_the_probed_row(family: str) -> None:
    model, inputs = tiny(family, labels=3, attn_implementation="eager"), batch_for(family)

    def peakedness(rows: Rows) -> Tensor:
        assert rows.attention is not None
        return rows.attention.square().sum(1)

    found = Cascade(model, attention=True, nodes=32, path="layer").attribute(inputs, peakedness)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[-1].mean(1)
    position = inputs["attention_mask"].sum(1) - 1 if family == "llama" else torch.zeros(4, dtype=torch.long)
    rows = maps[torch.arange(4), position]
    torch.testing.assert_close(found.full[0], rows.square().sum(1), rtol=1e-4, atol=1e-5)
    assert found.relative_residual() < 1e-3
    last = list(found.values)[-1]
    assert not found.values[last].any()  # the last layer's neurons come after its attention


def test_memory_budget_splits_without_changing_the_result() -> None:
    model, inputs = tiny("bert", layers=4), batch_for("bert", examples=5)
    neurons = NeuronSet({site.name: [0, 3] for site in find_sites(model)})
    gates = torch.rand(7, len(neurons), generator=torch.Generator().manual_seed(0))
    whole = Cascade(model, nodes=4, path="layer")
    want = whole.attribute(inputs, two_targets)
    for budget in (250_000, 400_000, 1_000_000):
        tight = Cascade(model, nodes=4, memory=budget, path="layer")
        got = tight.attribute(inputs, two_targets)
        for name, value in want.values.items():
            torch.testing.assert_close(got.values[name], value, rtol=1e-5, atol=SPLIT)
        torch.testing.assert_close(got.full, want.full)
        torch.testing.assert_close(
            tight.ablate(inputs, two_targets, neurons), whole.ablate(inputs, two_targets, neurons), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            tight.gated(inputs, two_targets, neurons, gates), whole.gated(inputs, two_targets, neurons, gates)
        )
    with pytest.raises(ValueError, match=r"memory: .* needs .* MiB, got"):
        Cascade(model, nodes=4, memory=1000, path="layer").attribute(inputs, two_targets)


def test_targets_index_their_data_by_example_in_every_split() -> None:
    model, inputs = tiny("bert", labels=3), batch_for("bert", examples=5)
    scale = torch.arange(1.0, 6.0)
    got = Cascade(model, memory=300_000, path="layer").attribute(
        inputs, lambda rows: predicted_logit(rows) * scale[rows.example]
    )
    plain = Cascade(model, path="layer").attribute(inputs, predicted_logit)
    for name, value in plain.values.items():
        torch.testing.assert_close(got.values[name], value * scale[None, :, None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("broken", ["target", "interrupt"])
def test_nothing_stays_behind(broken: str) -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = {name: "forward" in module.__dict__ for name, module in model.named_modules()}

    def fail(rows: Rows) -> Tensor:
        if len(rows.logits) > 4:
            raise KeyboardInterrupt if broken == "interrupt" else RuntimeError("target failed")
        return predicted_logit(rows)

    with pytest.raises(KeyboardInterrupt if broken == "interrupt" else RuntimeError):
        Cascade(model, path="layer").attribute(inputs, fail)
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert ("forward" in module.__dict__) == forwards[name]
        assert module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calls_repeat_bit_for_bit() -> None:
    model, inputs = tiny("llama"), batch_for("llama")
    first, second = (Cascade(model, path="layer").attribute(inputs, two_targets) for _ in range(2))
    assert all(torch.equal(first.values[name], second.values[name]) for name in first.values)


def test_bfloat16_follows_float32() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    want = Cascade(model, path="layer").attribute(inputs, predicted_logit)
    got = Cascade(model.bfloat16(), path="layer").attribute(inputs, predicted_logit)
    for name, value in want.values.items():
        assert got.values[name].dtype == torch.float32
        assert relative(got.values[name], value) < 0.1


def test_sites_can_be_named() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    every = Cascade(model, path="layer").attribute(inputs, predicted_logit)
    one = find_sites(model)[1]
    got = Cascade(model, sites=[one], path="layer").attribute(inputs, predicted_logit)
    assert list(got.values) == [one.name]
    torch.testing.assert_close(got.values[one.name], every.values[one.name])


@settings(max_examples=15, deadline=None)
@given(examples=st.integers(1, 4), tokens=st.integers(5, 11), nodes=st.integers(1, 4))
def test_any_shape_equals_the_plain_loop(examples: int, tokens: int, nodes: int) -> None:
    model, inputs = tiny("gpt2", layers=2), batch_for("gpt2", examples, tokens)
    got = Cascade(model, nodes=nodes, path="layer").attribute(inputs, two_targets)
    for name, value in plain_loop(model, inputs, nodes).items():
        assert relative(got.values[name], value) < 1e-5


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"path": "diagonal"}, "path: expected one of gradient, layer, joint, neuron, got 'diagonal'"),
        ({"nodes": 0}, "nodes: need a whole number from 1 to 64, got 0"),
        ({"nodes": 65}, "nodes: need a whole number"),
        ({"nodes": 2.5}, "nodes: need a whole number"),
        ({"tolerance": 0.0}, "tolerance: expected a number between 0 and 1, got 0.0"),
        ({"tolerance": 1e-3, "path": "neuron"}, "tolerance: the neuron path is exact"),
        ({"rule": "simpson"}, "rule: expected one of legendre, radau, got 'simpson'"),
        ({"rule": "radau", "path": "joint"}, "rule: radau belongs to the layer path"),
        ({"tolerance": 1e-3, "completeness": False}, "completeness: a tolerance needs it"),
        ({"memory": "much"}, "memory: expected bytes or a text such as '256MiB', got 'much'"),
        ({"memory": 0}, "memory: need at least one byte"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cascade(tiny("bert"), **({"path": "layer"} | setting))


def test_bad_calls_are_refused() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    cascade, name = Cascade(model, path="layer"), find_sites(model)[0].name
    with pytest.raises(ValueError, match="inputs: expected input_ids"):
        cascade.attribute({}, predicted_logit)
    with pytest.raises(ValueError, match="inputs: input_ids has no example"):
        cascade.attribute({key: value[:0] for key, value in inputs.items()}, predicted_logit)
    with pytest.raises(ValueError, match=r"target: expected \[4\] or \[4, targets\], got \(\)"):
        cascade.attribute(inputs, lambda rows: rows.logits.sum())
    with pytest.raises(ValueError, match="target: is NaN or infinite"):
        cascade.attribute(inputs, lambda rows: rows.logits[:, 0] * math.nan)
    with pytest.raises(ValueError, match=r"neurons: the model has no neuron nowhere\[0\]"):
        cascade.ablate(inputs, predicted_logit, NeuronSet({"nowhere": [0]}))
    with pytest.raises(ValueError, match=r"neurons: the model has no neuron .*9999"):
        cascade.ablate(inputs, predicted_logit, NeuronSet({name: [9999]}))
    with pytest.raises(ValueError, match="neurons: the set is empty"):
        cascade.ablate(inputs, predicted_logit, NeuronSet({}))
    with pytest.raises(ValueError, match=r"gates: expected \[settings, 1\], got \(2, 3\)"):
        cascade.gated(inputs, predicted_logit, NeuronSet({name: [0]}), torch.ones(2, 3))
    with pytest.raises(ValueError, match="gates: must be finite"):
        cascade.gated(inputs, predicted_logit, NeuronSet({name: [0]}), torch.full((1, 1), math.inf))
