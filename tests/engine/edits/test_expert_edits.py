"""Edits of routed experts: applied, folded, saved, and as a function of their gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny_mixtures import EXPERTS, batch, gated_experts, mixture
from helpers.tiny_models import tiny_tokenizer
from spurge.engine.cascade.cascade import Cascade, predicted_logit
from spurge.engine.edits.gates import gates_on, is_gated, suspended
from spurge.engine.edits.neuron_edits import EditMismatch, NeuronEdit
from spurge.engine.models.fingerprint import model_print
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites
from spurge.engine.recordings.prompt_pass import PromptPass
from spurge.engine.recordings.recording import record
from spurge.methods.macu.gated_model import gated_pass
from spurge.methods.macu.objectives import Job

FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss")


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def chosen(model: nn.Module) -> tuple[NeuronSet, Tensor]:
    """Some neurons of every site, with gates on both sides of 0 and 1."""
    neurons = NeuronSet({site.name: [1, site.width // 2, site.width - 1] for site in find_sites(model)})
    return neurons, torch.rand(len(neurons), generator=torch.Generator().manual_seed(3)) * 3 - 1


@pytest.fixture(params=FAMILIES)
def case(request: Any) -> tuple[Any, NeuronEdit]:
    model = mixture(request.param)
    return model, NeuronEdit.build(model, *chosen(model), {"method": "test"})


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_applied_is_folded_is_the_plain_patch(case: Any, implementation: str) -> None:
    model, edit = case
    model.config._experts_implementation = implementation
    inputs, before = batch(), bits(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        with edit.applied(model):
            assert is_gated(model)
            applied = model(**inputs).logits
            with suspended(model):
                assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model(**inputs).logits, plain)
        assert same(model, before)
        folded = edit.fold(model)
        merged = model(**inputs).logits
        folded.undo()
    assert same(model, before)
    assert not torch.allclose(applied, plain, atol=1e-2)
    torch.testing.assert_close(merged, applied, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_multiply_the_activations_of_their_expert(family: str) -> None:
    model, inputs = mixture(family), batch()
    site = next(site for site in find_sites(model) if site.name.endswith("experts"))
    gates = torch.ones(site.width)
    width = EXPERTS[family][1]
    gates[2 * width + 3], gates[width] = 0.0, -0.5
    edit = NeuronEdit.build(model, NeuronSet({site.name: [width, 2 * width + 3]}), [-0.5, 0.0])
    with torch.no_grad():
        with gated_experts(site.down, gates.expand(3, -1)):
            want = model(**inputs).logits
        with edit.applied(model):
            torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)
        before = site.weight().clone()
        with torch.no_grad():
            edit.fold(model)
        before[:, 2 * width + 3], before[:, width] = 0.0, before[:, width] * -0.5
        assert torch.equal(site.weight(), before)


def test_stacked_edits_multiply(case: Any) -> None:
    model, edit = case
    inputs = batch()
    other = NeuronEdit.build(model, edit.neurons, 0.5)
    with torch.no_grad(), edit.combine(other).applied(model):
        want = model(**inputs).logits
    with torch.no_grad(), edit.applied(model), other.applied(model):
        got = model(**inputs).logits
        product, infos = gates_on(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(infos) == 2
    for name, gates in product.items():
        torch.testing.assert_close(gates, edit.full()[name] * other.full()[name])


def test_attribution_under_an_edit_is_that_of_the_folded_model(case: Any) -> None:
    model, edit = case
    folded = copy.deepcopy(model)
    edit.fold(folded)
    want = Cascade(folded, path="layer").attribute(batch(), predicted_logit).values
    with edit.applied(model):
        got = Cascade(model, path="layer").attribute(batch(), predicted_logit).values
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=2e-5)


def test_files_and_fingerprints(case: Any, tmp_path: Any) -> None:
    model, edit = case
    edit.save(tmp_path / "edit.safetensors")
    loaded = NeuronEdit.load(tmp_path / "edit.safetensors")
    loaded.check(model)
    assert torch.equal(loaded.vector(), edit.vector())
    assert (loaded.model, loaded.info) == (edit.model, edit.info)
    handle = loaded.fold(model)
    with pytest.raises(EditMismatch, match="with an edit folded in"):
        edit.check(model)
    handle.undo()
    edit.check(model)


def test_undo_notices_other_changes() -> None:
    model = mixture("mixtral")
    name = "model.layers.1.mlp.experts"
    handle = NeuronEdit.build(model, NeuronSet({name: [30]}), 0.5).fold(model)
    with torch.no_grad():
        model.get_submodule(name).down_proj[1, 0, 6] += 1
    with pytest.raises(ValueError, match=f"undo: the folded columns of '{name}' have changed"):
        handle.undo()


def test_refuses_neurons_and_models_that_are_not_there() -> None:
    model, name = mixture("mixtral"), "model.layers.1.mlp.experts"
    with pytest.raises(ValueError, match="96"):
        NeuronEdit.build(model, NeuronSet({name: [96]}), 0.0)
    with pytest.raises(ValueError, match=r"no module 'model\.layers\.3\.mlp\.experts'"):
        NeuronEdit.build(model, NeuronSet({"model.layers.3.mlp.experts": [0]}), 0.0)
    edit = NeuronEdit.build(model, NeuronSet({name: [0]}), 0.0)
    with pytest.raises(EditMismatch, match="the edit needs"):
        edit.check(mixture("mixtral", num_local_experts=3))
    with edit.applied(model), pytest.raises(ValueError, match="fold: gates are attached"):
        edit.fold(model)
    model.register_buffer("window", model.get_submodule(name).down_proj.detach()[2])
    with pytest.raises(ValueError, match=f"fold: the weight of '{name}' is shared with 'window'"):
        edit.fold(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gated_pass_is_the_edited_model(family: str) -> None:
    model, inputs = mixture(family, classify=True).requires_grad_(False), batch()
    neurons, gates = chosen(model)
    job = Job(inputs, lambda rows: rows.logits.softmax(1)[:, 0], torch.zeros(3, dtype=torch.long), torch.ones(3))
    with NeuronEdit.build(model, neurons, gates).applied(model), torch.no_grad():
        want = model(**inputs).logits.softmax(1)[:, 0]
    with gated_pass(Handle(model), neurons) as run:
        leaf = gates.clone().requires_grad_()
        value = run.value(job, leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(value.detach(), want, rtol=1e-5, atol=1e-6)
        step = torch.zeros_like(gates)
        for j in range(len(gates)):
            step[j] = 1e-3
            with torch.no_grad():
                difference = (run.value(job, gates + step) - run.value(job, gates - step)).sum() / 2e-3
            step[j] = 0.0
            assert abs(float(gradient[j] - difference)) < 2e-3
    assert not is_gated(model)


def test_recorded_neurons_and_prints(tmp_path: Any) -> None:
    model, tokenizer = mixture("qwen2_moe", vocab_size=400), tiny_tokenizer(decoder=True)
    texts = ["the film was great", "a dull story", "we love music and food"]
    recording = record(model, tokenizer, texts, tmp_path / "plain", storage=torch.float32, progress=False)
    plain = model_print(model)
    for site in find_sites(model):
        u = recording.neurons(site.name) @ site.weight().detach().t()
        torch.testing.assert_close(recording.outputs(site.name), u, rtol=1e-4, atol=1e-5)
    made = {"neurons": True, "position": "mean", "storage": "float32", "max_length": None, "generate": 0}
    with torch.no_grad():
        means = PromptPass(Handle(model, tokenizer), find_sites(model), made)(texts, [0, 1, 2])
    assert means["neurons/model.layers.0.mlp.experts"].shape == (3, 64)
    name = "model.layers.0.mlp.experts"
    edit = NeuronEdit.build(model, NeuronSet({name: range(64)}), 0.0)
    with edit.applied(model):
        assert model_print(model) not in (plain, None)
        gated = record(model, tokenizer, texts, tmp_path / "gated", storage=torch.float32, progress=False)
        with NeuronEdit.build(model, NeuronSet({name: range(64)}), 0.5).applied(model):
            other = model_print(model)
        assert other != model_print(model)
    assert model_print(model) == plain
    assert not gated.neurons(name).any()
    assert float(gated.outputs(name).abs().max()) < 1e-6
