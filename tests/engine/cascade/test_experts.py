"""Routed experts as sites: what the projection answers, and the cascade against experts written out plainly."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from helpers.tiny_mixtures import (
    CLASSIFIERS,
    EXPERTS,
    HIDDEN,
    MIXTURES,
    batch,
    gated_experts,
    mixture,
    patched,
    plain_experts,
)
from spurge.engine.cascade.cascade import Cascade, Rows, predicted_logit
from spurge.engine.cascade.memory_model import AGAIN_CPU, measure_footprint
from spurge.engine.cascade.quadrature import gauss_legendre, gauss_radau
from spurge.engine.models.experts import Experts
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.projections import Linear, RowGates
from spurge.engine.models.sites import Site, find_sites
from spurge.engine.passes.partial_forward import PartialForward

TASKS = [(family, False) for family in MIXTURES] + [(family, True) for family in CLASSIFIERS]


def routed(model: nn.Module) -> list[Site]:
    return [site for site in find_sites(model) if isinstance(site.projection, Experts)]


def two_targets(rows: Rows) -> Tensor:
    return torch.stack([predicted_logit(rows), rows.logits.softmax(1)[:, 5 % rows.logits.shape[1]]], 1)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def last_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """``[R, Y]``: a language model's at each row's last real token."""
    logits = model(**inputs).logits
    if logits.dim() == 2:
        return logits
    last = (inputs["attention_mask"] * torch.arange(1, logits.shape[1] + 1)).argmax(1)
    return logits[torch.arange(len(logits)), last]


def repeated(inputs: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    return {key: value.repeat(times, 1) for key, value in inputs.items()}


def gated_site(site: Site, gates: Tensor) -> Any:
    """A context in which each row's activations at ``site`` are multiplied by its own gates ``[R, F]``."""
    if isinstance(site.projection, Experts):
        return gated_experts(site.down, gates)
    return site.down.register_forward_pre_hook(
        lambda m, a: ((a[0] * gates.repeat_interleave(a[0].shape[:-1].numel() // len(gates), 0).view_as(a[0])),)
    )


def plain_value(model: Any, inputs: dict[str, Tensor], gates: dict[str, Tensor]) -> Tensor:
    """`two_targets` ``[P, B, Q]`` of the model under gates ``[P, F]`` by site, a setting at a time."""
    with torch.no_grad():
        predicted, found = last_logits(model, inputs).argmax(1), []
        count, rows = len(next(iter(gates.values()))), len(predicted)
        by_name = {site.name: site for site in find_sites(model)}
        for p in range(count):
            with ExitStack() as stack:
                for name, values in gates.items():
                    stack.enter_context(gated_site(by_name[name], values[p].expand(rows, -1)))
                found.append(two_targets(Rows(last_logits(model, inputs), None, torch.arange(rows), predicted)))
    return torch.stack(found)


def plain_loop(model: Any, inputs: dict[str, Tensor], rule: Any, *, joint: bool = False) -> dict[str, Tensor]:
    """Gradients by per-row gates, integrated one layer at a time (all together), with a whole pass each."""
    alphas, weights = (x.float() for x in rule)
    nodes, rows = len(alphas), len(inputs["input_ids"])
    with torch.no_grad():
        predicted = last_logits(model, inputs).argmax(1)
    sites, result = find_sites(model), {}
    for group in [sites] if joint else [[site] for site in sites]:
        gates = [alphas.repeat_interleave(rows)[:, None].repeat(1, site.width).requires_grad_() for site in group]
        with ExitStack() as stack:
            for site, gate in zip(group, gates, strict=True):
                stack.enter_context(gated_site(site, gate))
            logits = last_logits(model, repeated(inputs, nodes))
        value = two_targets(Rows(logits, None, torch.arange(rows).repeat(nodes), predicted.repeat(nodes)))
        for site, gate in zip(group, gates, strict=True):
            grads = [torch.autograd.grad(value[:, q].sum(), gate, retain_graph=True)[0] for q in range(2)]
            result[site.name] = torch.stack([(weights @ grad.view(nodes, -1)).view(rows, -1) for grad in grads])
    return result


# ---- the projection ------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Experts in every form that transformers' implementations take, on every token."""

    def __init__(self, gate: bool, bias: bool, transposed: bool):
        super().__init__()
        self.is_transposed, self.has_gate, self.has_bias, self.act_fn = transposed, gate, bias, ACT2FN["gelu"]
        up, key = (4, 6 * (1 + gate), 5), "gate_up_proj" if gate else "up_proj"
        shapes = {key: up, "down_proj": (4, 5, 6)}
        for name, (experts, outputs, inputs) in shapes.items():
            shape = (experts, inputs, outputs) if transposed else (experts, outputs, inputs)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(experts, outputs)))

    def _apply_gate(self, made: Tensor) -> Tensor:
        gate, linear = made.chunk(2, -1)
        return self.act_fn(gate) * linear

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for n in range(len(hidden)):
            total = torch.zeros(5)
            for e, share in zip(index[n].tolist(), weights[n], strict=True):
                parts = {name: value[e] for name, value in self.named_parameters()}
                up, down = parts["gate_up_proj" if self.has_gate else "up_proj"], parts["down_proj"]
                z = hidden[n] @ (up if self.is_transposed else up.t())
                z = z + (parts["gate_up_proj_bias" if self.has_gate else "up_proj_bias"] if self.has_bias else 0)
                z = self._apply_gate(z) if self.has_gate else self.act_fn(z)
                out = z @ (down if self.is_transposed else down.t())
                total = total + share * (out + (parts["down_proj_bias"] if self.has_bias else 0))
            rows.append(total)
        return torch.stack(rows)


FORMS = [(gate, bias, transposed) for gate in (True, False) for bias in (True, False) for transposed in (True, False)]


@pytest.fixture(params=FORMS, ids=["-".join(map(str, form)) for form in FORMS])
def own(request: Any) -> tuple[Own, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    module = Own(*request.param)
    hidden = torch.randn(6, 5)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(6)])  # the last expert has no token
    return module.requires_grad_(False), (hidden, index, torch.rand(6, 2))


def test_activations_times_weight_are_the_output(own: Any) -> None:
    module, call = own
    seen: list[Any] = []
    with Experts(module).watch(lambda *parts: seen.extend(parts)):
        module(*call)
    z, output, rest = seen
    assert z.shape == (6, 24)
    assert not z[:, 18:].any()
    assert (rest is None) == (not module.has_bias)
    weight = Experts(module).weight()
    assert weight.shape == Experts(module).shape == (5, 24)
    torch.testing.assert_close(z @ weight.t() + (0 if rest is None else rest), output)
    Experts(module).verify("own", z, output, rest)


def test_weight_columns_and_pull_agree(own: Any) -> None:
    module, _ = own
    projection = Experts(module)
    weight, chosen = projection.weight().clone(), torch.tensor([3, 23, 0, 11])
    assert torch.equal(projection.columns(chosen), weight[:, chosen])
    gradient = torch.randn(2, 3, 5)
    torch.testing.assert_close(projection.pull(gradient), gradient @ weight)
    projection.write(chosen, torch.full((5, 4), 7.0))
    weight[:, chosen] = 7.0
    assert torch.equal(projection.weight(), weight)
    assert module.down_proj[0, :, 3].eq(7).all() or module.down_proj[0, 3].eq(7).all()


def test_gates_act_inside_and_stack(own: Any) -> None:
    module, call = own
    projection, weight, seen = Experts(module), Experts(module).weight(), []
    torch.manual_seed(1)
    three = RowGates(torch.tensor([2, 7, 9, 20]), torch.randn(3, 4))  # of 2 tokens each
    one = RowGates(torch.tensor([0, 7]), torch.tensor([[0.0, 0.5]]))
    with projection.watch(lambda z, o, rest: seen.append((z, o))):
        module(*call)
    with ExitStack() as stack:
        for gates in (three, None, one):
            stack.enter_context(projection.gate(partial(lambda found: found, gates)))
        stack.enter_context(projection.watch(lambda z, o, rest: seen.append((z, o))))
        got = module(*call)
    (z, before), (gated, after) = seen
    want = z * three.full(24, z.device).repeat_interleave(2, 0) * one.full(24, z.device)
    torch.testing.assert_close(gated, want)
    torch.testing.assert_close(got, before + (want - z) @ weight.t())
    assert torch.equal(after, got)
    assert torch.equal(module(*call), before)


# ---- sites ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_one_site_for_the_experts_of_a_layer(family: str) -> None:
    model, (experts, width) = mixture(family), EXPERTS[family]
    modules = dict(model.named_modules())
    sites = routed(model)
    first = 1 if family == "deepseek_v3" else 0
    assert [site.name for site in sites] == [f"model.layers.{layer}.mlp.experts" for layer in range(first, 3)]
    for site in sites:
        assert (site.width, site.hidden) == (experts * width, HIDDEN)
        assert site.down is modules[site.name]
        assert site.ffn is site.block.mlp
        assert site.parameter is site.down.down_proj
        part = site.parameter[2, 5] if site.down.is_transposed else site.parameter[2, :, 5]
        assert torch.equal(site.weight()[:, 2 * width + 5], part)
    named = find_sites(model, [sites[0].name])[0]
    assert (named.down, named.layer, named.ffn) == (sites[0].down, first, sites[0].ffn)


def test_a_shared_expert_is_a_site_beside_them() -> None:
    model = mixture("qwen2_moe")
    sites = find_sites(model)
    assert [site.name.removeprefix("model.layers.") for site in sites[:2]] == [
        "0.mlp.experts",
        "0.mlp.shared_expert.down_proj",
    ]
    assert [type(site.projection) for site in sites[:2]] == [Experts, Linear]
    assert sites[0].ffn is sites[1].ffn
    cascade = Cascade(model, path="layer")
    placements = cascade.forward._anatomy_for(batch()).placements
    assert [placement.kind for placement in placements] == [
        "residual",
        "replay",
    ] * 3


def as_list(experts: Any) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in experts.down_proj)


def unlike(experts: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (as_list, "a ModuleList"),
        (
            lambda old: unlike(old, _is_expert_parallel=True),
            r"a MixtralExperts spread over ranks \(expert parallelism\)",
        ),
        (lambda old: unlike(old, has_post_expert_norm=True), "a MixtralExperts with a norm behind each expert"),
        (lambda old: old.to(torch.float8_e4m3fn), r"weights that are a Parameter of torch\.float8_e4m3fn"),
    ],
)
def test_refuses_other_forms(change: Any, text: str) -> None:
    model = mixture("mixtral")
    model.model.layers[1].mlp.experts = change(model.model.layers[1].mlp.experts)
    name = "model.layers.1.mlp.experts"
    for names, subject in ((None, "model"), ([name], "names")):
        with pytest.raises(ValueError, match=rf"{subject}: the experts '{name}' are .*{text}; expected a transformers"):
            find_sites(model, names)


def test_refuses_experts_that_compute_something_else() -> None:
    model = mixture("mixtral")
    module = model.model.layers[1].mlp.experts
    text = r"model: the output of the experts 'model\.layers\.1\.mlp\.experts' is not the weighted sum"
    with patched(module, lambda *call: plain_experts(module, *call)[0].tanh()), pytest.raises(ValueError, match=text):
        Cascade(model, path="layer").attribute(batch(), predicted_logit)


def test_refuses_another_call() -> None:
    module = mixture("mixtral").model.layers[0].mlp.experts
    hidden, index, weights = torch.randn(4, HIDDEN), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1)
    text = "MixtralExperts was called with 1 positional .*expected a transformers"
    with Experts(module).watch(lambda z, o, rest: None), pytest.raises(ValueError, match=text):
        module(hidden, top_k_index=index, top_k_weights=weights)


# ---- the cascade ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "classify"), TASKS)
def test_layer_path_equals_the_plain_loop(family: str, classify: bool) -> None:
    model, inputs = mixture(family, classify=classify), batch()
    got = Cascade(model, nodes=3, path="layer").attribute(inputs, two_targets).values
    want = plain_loop(model, inputs, gauss_legendre(3))
    assert list(got) == list(want)
    for name, value in want.items():
        assert relative(got[name], value) < 1e-5, name


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_radau_and_joint_paths_equal_the_plain_loop(family: str) -> None:
    model, inputs = mixture(family), batch()
    alphas, weights, end = gauss_radau(2)
    ends = torch.cat([alphas, torch.ones(1)]), torch.cat([weights, torch.tensor([end])])
    for settings, rule in (({"rule": "radau"}, ends), ({"path": "joint"}, gauss_legendre(2))):
        got = Cascade(model, nodes=2, **({"path": "layer"} | settings)).attribute(inputs, two_targets).values
        for name, value in plain_loop(model, inputs, rule, joint="path" in settings).items():
            assert relative(got[name], value) < 1e-5, (name, settings)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_implementations_give_the_same(family: str, implementation: str) -> None:
    model, inputs = mixture(family), batch()
    want = plain_loop(model, inputs, gauss_legendre(2))
    model.config._experts_implementation = implementation
    got = Cascade(model, nodes=2, path="layer").attribute(inputs, two_targets).values
    for name, value in want.items():
        assert relative(got[name], value) < 1e-5, name


@pytest.mark.parametrize("family", MIXTURES)
def test_ablated_units_equal_the_plain_patch(family: str) -> None:
    model, inputs = mixture(family), batch()
    neurons = NeuronSet({site.name: [1, site.width // 2, site.width - 1] for site in find_sites(model)})
    got = Cascade(model, path="layer").ablate(inputs, two_targets, neurons)
    for j, ref in enumerate(neurons):
        width = next(site.width for site in find_sites(model) if site.name == ref.site)
        gates = torch.ones(2, width)
        gates[1, ref.index] = 0
        full, off = plain_value(model, inputs, {ref.site: gates})
        torch.testing.assert_close(got[:, :, j], (full - off).t(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("family", MIXTURES)
def test_gating_one_expert_drops_what_it_adds(family: str) -> None:
    """All neurons of expert 1 at 0, in the first mixture and in one above it: with biases, those stay."""
    model, inputs, (_, width) = mixture(family), batch(), EXPERTS[family]
    for site in routed(model)[:2]:
        neurons = NeuronSet({site.name: range(width, 2 * width)})
        got = Cascade(model, path="layer").gated(inputs, two_targets, neurons, torch.zeros(1, width))[0]
        module = site.down

        def without(hidden: Tensor, index: Tensor, weights: Tensor, module: Any = module) -> Tensor:
            whole, _ = plain_experts(module, hidden, index, weights)
            only = weights * (index == 1)
            expert, _ = plain_experts(module, hidden, index, only)
            bias = only.sum(1, keepdim=True) * module.down_proj_bias[1] if module.has_bias else 0
            return whole - expert + bias

        with torch.no_grad():
            predicted = last_logits(model, inputs).argmax(1)
            with patched(module, without):
                logits = last_logits(model, inputs)
        want = two_targets(Rows(logits, None, torch.arange(3), predicted))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_settings_of_gates_everywhere_equal_the_plain_patch(family: str) -> None:
    """Several settings at once, on all sites: a shared expert and the experts beside it open the rows together."""
    model, inputs = mixture(family), batch()
    neurons = NeuronSet({site.name: [0, 7, site.width - 2] for site in find_sites(model)})
    settings = torch.rand(4, len(neurons), generator=torch.Generator().manual_seed(2)) * 3 - 1
    got = Cascade(model, path="layer").gated(inputs, two_targets, neurons, settings)
    full: dict[str, Tensor] = {}
    sites = {site.name: site for site in find_sites(model)}
    for name, part in zip(neurons.sites, settings.split(3, 1), strict=True):
        full[name] = torch.ones(4, sites[name].width).index_copy(1, neurons.indices(name), part)
    torch.testing.assert_close(got, plain_value(model, inputs, full), rtol=1e-4, atol=1e-5)


def test_completeness_where_routing_does_not_jump() -> None:
    """With every token at every expert, routing weights move smoothly and the sums are complete."""
    model = mixture("mixtral", num_experts_per_tok=4)
    found = Cascade(model, tolerance=1e-3, path="layer").attribute(batch(), predicted_logit)
    assert found.relative_residual() <= 1e-3
    for name, value in found.values.items():
        torch.testing.assert_close(found.full - found.erased[name] - value.sum(2), found.residual[name])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_last_mixture_is_complete(family: str) -> None:
    model = mixture(family)
    found = Cascade(model, nodes=8, path="layer").attribute(batch(), predicted_logit)
    name = routed(model)[-1].name
    assert float(found.residual[name].abs().max()) < 1e-5 * float(found.full.abs().max())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    model, inputs = mixture(family), batch(1)
    alone = Cascade(model, path="layer").attribute(inputs, predicted_logit).values
    pad = (2, 0) if side == "left" else (0, 2)
    padded = {key: nn.functional.pad(value, pad) for key, value in inputs.items()}
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    got = Cascade(model, path="layer").attribute(padded, predicted_logit).values
    for name, value in alone.items():
        assert relative(got[name], value) < 1e-5, name


def test_experts_without_a_token_score_zero() -> None:
    model, inputs = mixture("mixtral", num_experts_per_tok=1), batch()
    used = {site.name: torch.zeros(3, 4, dtype=torch.bool) for site in routed(model)}
    handles = []
    for site in routed(model):

        def note(module: Any, args: Any, output: Any, name: str = site.name) -> None:
            for row, (index, mask) in enumerate(zip(args[1].view(3, -1), inputs["attention_mask"], strict=True)):
                used[name][row, index[mask.bool()]] = True

        handles.append(site.down.register_forward_hook(note))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert not all(bool(goes.all()) for goes in used.values())
    found = Cascade(model, path="layer").attribute(inputs, predicted_logit).values
    for name, goes in used.items():
        value = found[name][0].unflatten(1, (4, -1))
        assert not value[~goes].any()
        assert value.any()


def test_a_small_budget_gives_the_same() -> None:
    model, inputs = mixture("qwen2_moe"), batch()
    forward = PartialForward(Handle(model))
    footprint = measure_footprint(forward, inputs)
    kept = sum(site.width for site in find_sites(model)) * inputs["input_ids"].shape[1] * 4
    assert footprint.trace > kept  # the activations of all experts, and what else a trace holds
    want = Cascade(model, path="layer").attribute(inputs, predicted_logit).values
    least = footprint.backward([0], 1, 1)
    budget = int(AGAIN_CPU * (least + 2))
    got = Cascade(model, memory=budget, path="layer").attribute(inputs, predicted_logit).values
    for name, value in want.items():
        assert relative(got[name], value) < 1e-5, name


def test_half_precision() -> None:
    model, inputs = mixture("mixtral"), batch()
    want = Cascade(model, path="layer").attribute(inputs, predicted_logit).values
    got = Cascade(model.bfloat16(), path="layer").attribute(inputs, predicted_logit).values
    name = routed(model)[-1].name  # below it, a rounded router may choose other experts
    assert relative(got[name], want[name]) < 0.1
