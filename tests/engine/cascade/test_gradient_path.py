"""The literal Eq. 5 of every neuron: estimates against autograd, exact ones against ablation, the audit against all."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.batches import batch_for, two_targets
from helpers.tiny_mixtures import batch, mixture
from helpers.tiny_models import FAMILIES, tiny, tiny_language
from spurge.engine.base.statistics import spearman
from spurge.engine.cascade.cascade import Attribution, Cascade, Rows, predicted_logit
from spurge.engine.cascade.gradient_path import Effort, effects_of_units
from spurge.engine.cascade.locator import Locator
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites
from spurge.engine.passes.activation_gradients import FirstOrder

ESTIMATES = {"exact": 0, "audit": 0}


def joined(found: Attribution) -> Tensor:
    return torch.cat([value.double() for value in found.values.values()], 2)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def gradient_times_activation(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """``[Q, B, units]``, from hooks on the down projections and one backward pass a target."""
    kept: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        kept.append(z)
        return (z, *args[1:])

    hooks = [site.down.register_forward_pre_hook(keep) for site in find_sites(model)]
    logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    value = two_targets(Rows(logits, None, torch.arange(len(logits)), logits.argmax(1)))
    found = []
    for q in range(value.shape[1]):
        grads = torch.autograd.grad(value[:, q].sum(), kept, retain_graph=True)
        found.append(torch.cat([(g * z).sum(1) for g, z in zip(grads, kept, strict=True)], 1))
    return torch.stack(found).double()


def test_more_values_than_memory_for_their_estimates_are_refused_at_once() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    asked = Cascade(model, memory="16MiB", **ESTIMATES)

    def many(rows: Rows) -> Tensor:
        return rows.logits[:, :1].expand(-1, 100_000)

    with pytest.raises(
        ValueError, match=r"target: gives 100,000 values for each example, whose estimates take [\d,]+ MiB"
    ):
        asked.attribute(inputs, many)
    assert asked.attribute(inputs, predicted_logit).full.shape[0] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_gradient_times_activation(family: str) -> None:
    model, inputs = tiny(family, labels=3), batch_for(family)
    got = Cascade(model, **ESTIMATES).attribute(inputs, two_targets)
    assert relative(joined(got), gradient_times_activation(model, inputs)) < 1e-5
    assert got.exact == 0
    assert got.agreement == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_list_is_exact(family: str) -> None:
    model, inputs = tiny(family, labels=3), batch_for(family)
    plain = Cascade(model, **ESTIMATES).attribute(inputs, two_targets)
    got = Cascade(model, exact=7, audit=0).attribute(inputs, two_targets)
    every = Cascade(model, path="neuron").attribute(inputs, two_targets)
    moved = (joined(got) != joined(plain)).any(0)  # of an example's unit each
    assert 0 < moved.sum() <= 7 * len(moved) == got.exact
    assert relative(joined(got)[:, moved], joined(every)[:, moved]) < 1e-5
    assert relative(joined(got), joined(every)) < relative(joined(plain), joined(every))


def test_all_units_exact_is_the_neuron_path() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    units = sum(site.width for site in find_sites(model))
    got = Cascade(model, exact=units + 1).attribute(inputs, two_targets)
    assert relative(joined(got), joined(Cascade(model, path="neuron").attribute(inputs, two_targets))) < 1e-5
    assert got.exact == joined(got)[0].numel()
    assert got.agreement == []  # nothing is left to draw from


def test_experts() -> None:
    model, inputs = mixture("mixtral", classify=True), batch()
    every = Cascade(model, path="neuron").attribute(inputs, two_targets)
    got = Cascade(model, **ESTIMATES).attribute(inputs, two_targets)
    assert (spearman(joined(got)[0].flatten(), joined(every)[0].flatten()) or 0) > 0.8
    exact = Cascade(model, exact=40, audit=0).attribute(inputs, two_targets)
    assert relative(joined(exact), joined(every)) < relative(joined(got), joined(every))


def test_padding_says_nothing() -> None:
    model, inputs = tiny("bert"), batch_for("bert", examples=2)
    more = {key: torch.nn.functional.pad(value, (0, 4)) for key, value in inputs.items()}
    cascade = Cascade(model, **ESTIMATES)
    got, want = cascade.attribute(more, predicted_logit), cascade.attribute(inputs, predicted_logit)
    assert relative(joined(got), joined(want)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    inputs, settings = batch_for("llama"), {"exact": 8, "audit": 0}
    want = Cascade(tiny("llama", dtype=torch.float64), **settings).attribute(inputs, predicted_logit)
    got = Cascade(tiny("llama", dtype=dtype), **settings).attribute(inputs, predicted_logit)
    assert relative(joined(got), joined(want)) < (1e-6 if dtype == torch.float64 else 0.2)


def test_the_agreement_holds_what_is_true() -> None:
    model, inputs = tiny("bert", labels=3), batch_for("bert")
    truth = joined(Cascade(model, path="neuron").attribute(inputs, two_targets))
    inside = 0
    for seed in range(10):
        got = Cascade(model, exact=4, audit=128, seed=seed).attribute(inputs, two_targets)
        assert len(got.agreement) == 2
        for q, agreement in enumerate(got.agreement):
            values, wanted = joined(got)[q].flatten(), truth[q].flatten()
            inside += relative(values, wanted) <= agreement.error_bound
            low, high = agreement.spearman.low, agreement.spearman.high
            inside += low <= (spearman(values, wanted) or 0) <= high
            low, high = agreement.pearson.low, agreement.pearson.high
            inside += low <= float(torch.corrcoef(torch.stack([values, wanted]))[0, 1]) <= high
    assert inside >= 51  # of 60: a binomial of 0.95 is that high in 999 of 1,000


def test_a_tolerance_is_reached() -> None:
    model, inputs = tiny("bert", labels=3), batch_for("bert")
    truth = joined(Cascade(model, path="neuron").attribute(inputs, predicted_logit))
    loose = Cascade(model, exact=1, audit=64).attribute(inputs, predicted_logit)
    assert relative(joined(loose), truth) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got = Cascade(model, exact=1, tolerance=0.1, audit=64).attribute(inputs, predicted_logit)
    assert got.exact > 1
    assert relative(joined(got), truth) <= 0.1


def test_a_tolerance_that_is_out_of_reach_is_said() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    with pytest.warns(UserWarning, match=r"tolerance 1e-09 not reached with \d+ of \d+ values measured"):
        Cascade(model, tolerance=1e-9, audit=32).attribute(inputs, predicted_logit)


def test_a_tolerance_is_not_reached_where_a_target_says_nothing_of_its_error() -> None:
    model, inputs = tiny("bert"), batch_for("bert")

    def targets(rows: Rows) -> Tensor:
        return torch.stack([rows.logits[:, 0], 0 * rows.logits[:, 1] + 1], 1)

    with pytest.warns(UserWarning, match=r"not reached .* up to nan") as seen:
        Cascade(model, exact=0, audit=32, tolerance=0.99).attribute(inputs, targets)
    assert seen[0].filename == __file__


def test_each_block_of_examples_has_draws_of_its_own() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    twice = {name: torch.cat([value[:1]] * 2) for name, value in inputs.items()}
    cascade = Cascade(model, exact=0, audit=32)
    cascade.at_once = lambda inputs: 1  # type: ignore[method-assign]
    first, second = cascade.attribute(twice, predicted_logit).samples
    assert not torch.equal(first.estimates, second.estimates)


def test_a_call_may_have_draws_of_its_own() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    cascade = Cascade(model, exact=0, audit=32)
    first, second, again = (cascade.attribute(inputs, predicted_logit, seed=seed).samples[0] for seed in (1, 2, 1))
    assert not torch.equal(first.estimates, second.estimates)
    assert torch.equal(first.estimates, again.estimates)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_whose_inputs_have_gradients(family: str) -> None:
    model, inputs = tiny(family), batch_for(family)
    want = Cascade(model, exact=4, audit=16).attribute(inputs, two_targets)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    got = Cascade(model, exact=4, audit=16).attribute(inputs, two_targets)
    assert torch.equal(joined(got), joined(want))
    assert got.agreement == want.agreement
    assert model.training


def test_stakes_that_are_no_numbers_are_measured_first() -> None:
    estimate, stake = torch.ones(2, 3), torch.tensor([[1.0, float("nan"), 4.0], [float("inf"), 2.0, 3.0]])
    asked = []

    def ablate(units: Tensor, owners: Tensor) -> Tensor:
        asked.append((owners.tolist(), units.tolist()))
        return torch.zeros(1, len(units))

    effects = effects_of_units([FirstOrder([estimate], [stake])], ablate, Effort(1, 32, None, 0))
    assert asked[0] == ([0, 1], [[0, 1], [0, 0]])
    assert effects.values[0].tolist() == [[[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]]


def test_a_target_that_is_no_tensor() -> None:
    with pytest.raises(ValueError, match=r"target: expected .* got list"):
        Cascade(tiny("bert")).attribute(batch_for("bert"), lambda rows: [1.0])  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("path", ["gradient", "layer", "neuron"])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore:.*is run whole")
def test_what_a_hook_makes_of_the_output_of_a_projection(family: str, path: Any) -> None:
    model, inputs = tiny(family, dtype=torch.float64), batch_for(family)
    site = find_sites(model)[0]
    site.down.register_forward_hook(lambda module, args, output: output / 2 + 0.1)

    def without(args: Tensor, units: Any) -> Tensor:
        args = args.clone()
        args[..., units] = 0
        return args

    def answer(units: Any) -> Tensor:
        with site.down.register_forward_pre_hook(lambda module, args: (without(args[0], units),)), torch.no_grad():
            return model(**inputs).logits[:, :2].t()

    def targets(rows: Rows) -> Tensor:
        return rows.logits[:, :2]

    cascade = Cascade(model, path=path, exact=10**6) if path == "gradient" else Cascade(model, path=path)
    found = cascade.attribute(inputs, targets)
    if path == "layer":
        got, want = found.full - found.erased[site.name], found.full - answer(slice(None))
    else:
        got, want = found.values[site.name][..., 2], found.full - answer([2])
    assert relative(got, want) < 1e-4


class Agreement:
    """Minus the divergence from the unedited answers: 0 with no gradient where the model is unedited."""

    def __init__(self, wanted: Tensor) -> None:
        self.wanted = wanted

    def __call__(self, rows: Rows) -> Tensor:
        wanted = self.wanted[rows.example]
        return (wanted * rows.logits.double().log_softmax(1)).sum(1) + torch.special.entr(wanted).sum(1)


def test_at_an_optimum_the_logits_say_what_the_gradient_does_not() -> None:
    model, inputs = tiny("bert", dtype=torch.float64), batch_for("bert")
    with torch.no_grad():
        target = Agreement(model(**inputs).logits.softmax(1))
    truth = joined(Cascade(model, path="neuron").attribute(inputs, target)).flatten()
    cascade = Cascade(model, **ESTIMATES)
    assert abs(spearman(joined(cascade.attribute(inputs, target)).flatten(), truth) or 0) < 0.5
    target.reads = "logits"  # type: ignore[attr-defined]
    assert (spearman(joined(cascade.attribute(inputs, target)).flatten(), truth) or 0) > 0.9


def test_the_logits_of_several_tokens_say_it_too() -> None:
    model, inputs = tiny_language("gpt2").double(), batch_for("gpt2")

    def linear(rows: Rows) -> Tensor:
        return rows.logits.double()[:, :, 3] @ torch.tensor([1.0, -2.0], dtype=torch.float64)

    cascade = Cascade(model, read=2, **ESTIMATES)
    want = joined(cascade.attribute(inputs, linear))
    linear.reads = "logits"  # type: ignore[attr-defined]
    assert relative(joined(cascade.attribute(inputs, linear)), want) < 1e-4


def test_units_can_be_measured_by_a_step_function() -> None:
    model, inputs = tiny("bert"), batch_for("bert")

    def step(rows: Rows) -> Tensor:
        return (rows.logits[:, 0] > rows.logits[:, 1]).float()

    with pytest.raises(ValueError, match="not differentiable"):
        Cascade(model, exact=3).attribute(inputs, step)
    got = Cascade(model, exact=3, audit=0).attribute(inputs, predicted_logit, measured=step)
    assert {0.0, 1.0} >= set(got.full.flatten().tolist())


def test_a_prompt_is_read_once_and_asked_twice() -> None:
    model, inputs = tiny("gpt2"), batch_for("gpt2")
    cascade = Cascade(model, exact=3, audit=16)
    want = [cascade.attribute(inputs, target) for target in (two_targets, predicted_logit)]
    prompt = cascade.read(inputs)
    assert prompt.traces
    for target, one in zip((two_targets, predicted_logit), want, strict=True):
        got = cascade.attribute(prompt, target)
        assert relative(joined(got), joined(one)) < 1e-6
        assert got.agreement == one.agreement


@pytest.mark.parametrize("reader", [{"path": "layer"}, ESTIMATES])
def test_a_prompt_answers_whoever_asks(reader: dict[str, Any]) -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    cascade, own = Cascade(model, exact=3, audit=0), Cascade(model, **reader)
    prompt = own.read(inputs)
    want = joined(cascade.attribute(inputs, predicted_logit))
    assert torch.equal(joined(cascade.attribute(prompt, predicted_logit)), want)
    units = NeuronSet({find_sites(model)[0].name: [0, 2]})
    assert torch.equal(own.ablate(prompt, predicted_logit, units), own.ablate(inputs, predicted_logit, units))


def test_a_small_budget_changes_nothing_but_the_blocks() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    want = Cascade(model, **ESTIMATES).attribute(inputs, two_targets)
    got = Cascade(model, memory=400_000, **ESTIMATES).attribute(inputs, two_targets)
    assert relative(joined(got), joined(want)) < 1e-5
    audited = Cascade(model, memory=400_000, exact=2, audit=16).attribute(inputs, two_targets)
    assert len(audited.samples) > 1
    assert 16 <= audited.agreement[0].drawn < 16 + len(audited.samples)


def test_a_locator_measures_nothing_unless_asked() -> None:
    model, inputs = tiny("llama"), batch_for("llama")
    plain = Cascade(model, **ESTIMATES).attribute(inputs, predicted_logit)
    assert torch.equal(joined(Locator(model)(inputs)), joined(plain))
    assert Locator(model, exact=5)(inputs).exact == 5 * len(inputs["input_ids"])


def test_the_model_comes_back_as_it_was() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    model.train()
    parameter = next(model.parameters())
    Cascade(model).attribute(inputs, predicted_logit)
    assert model.training
    assert parameter.requires_grad
    assert parameter.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_neuron_that_the_target_does_not_read() -> None:
    model, inputs = tiny("bert", layers=2), batch_for("bert")

    def constant(rows: Rows) -> Tensor:
        return rows.logits[:, 0] * 0 + 1

    found = Cascade(model, exact=2, audit=8).attribute(inputs, constant)
    assert joined(found).abs().max() == 0
    assert torch.tensor(found.agreement[0].pearson).isnan().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "layer", "exact": 3}, "exact: belongs to the gradient path, got path 'layer'"),
        ({"path": "neuron", "audit": 3}, "audit: belongs to the gradient path, got path 'neuron'"),
        ({"exact": -1}, "exact: "),
        ({"audit": 1.5}, "audit: "),
        ({"tolerance": 0.1, "audit": 8}, "audit: a tolerance needs at least 32, got 8"),
        ({"seed": -1}, "seed: "),
        ({"path": "gradient", "nodes": 4}, "nodes: belongs to the layer and joint paths, got path 'gradient'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Cascade(tiny("bert"), **settings)


def test_who_asks_for_a_quadrature_gets_the_layer_path() -> None:
    model = tiny("bert")
    assert [Cascade(model, **given).path for given in ({}, {"nodes": 3}, {"rule": "radau"})] == [
        "gradient",
        "layer",
        "layer",
    ]
    assert Locator(model, nodes=1).cascade.path == "layer"


def test_ablation_beside_it_is_the_same() -> None:
    model, inputs = tiny("bert"), batch_for("bert")
    name = find_sites(model)[0].name
    neurons = NeuronSet({name: [0, 3]})
    got = Cascade(model).ablate(inputs, predicted_logit, neurons)
    want = Cascade(model, path="neuron").attribute(inputs, predicted_logit).values[name][..., [0, 3]]
    assert torch.allclose(got, want, atol=1e-6)


def test_the_highest_values_by_name() -> None:
    model, inputs = tiny("bert", labels=3), batch_for("bert")
    found = Cascade(model, exact=2, audit=32).attribute(inputs, two_targets)
    flat = joined(found)
    for target, example, values in ((0, None, flat[0].mean(0)), (1, 2, flat[1, 2])):
        top = found.top(5, target=target, example=example)
        assert [value for _, value in top] == pytest.approx(values.topk(5).values.tolist(), rel=1e-5)
        for ref, value in top:
            column = found.values[ref.site][target, :, ref.index]
            assert value == pytest.approx(float(column.mean() if example is None else column[example]), rel=1e-5)
    assert len(found.top(10_000)) == flat.shape[2]
    with pytest.raises(ValueError, match="n: "):
        found.top(0)
    assert Locator(model).ask(inputs).top(3) == Locator(model)(inputs).top(3)
    lines = str(found).splitlines()
    assert lines[0] == repr(found) == "Attribution(2 x 4 values for 144 neurons of 3 sites, 8 of them measured)"
    assert len(lines) >= 13
    assert all(f"target {q}, by 32 values drawn" in str(found) for q in (0, 1))


def test_a_short_list_grows_by_no_more_than_its_double() -> None:
    """Half of the error is in what the second round measures; stakes alone, all alike, would ask for all."""
    estimate, stake = torch.ones(1, 4000), torch.ones(1, 4000)
    asked = []

    def ablate(units: Tensor, owners: Tensor) -> Tensor:
        asked.append(len(units))
        return torch.where(units[:, 1] < 60, 3.0, 1.0)[None]

    found = effects_of_units([FirstOrder([estimate], [stake])], ablate, Effort(32, 256, 0.1, 0))
    assert found.exact == 64
    assert [asked[0], asked[2]] == [32, 32]
