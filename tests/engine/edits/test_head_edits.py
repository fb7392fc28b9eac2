"""Edits of attention heads: applied, folded, undone, saved, stacked and measured as those of neurons."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny_models import HEADS, HIDDEN, tiny, tiny_inputs, tiny_tokenizer
from helpers.tolerance import assert_near
from spurge.engine.data.examples import Example, Examples
from spurge.engine.edits.gates import gates_on
from spurge.engine.edits.neuron_edits import EditMismatch, NeuronEdit
from spurge.engine.edits.weight_edits import load_edit
from spurge.engine.evaluation.evaluation import evaluate
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites

D = HIDDEN // HEADS
TERMS = 4096  # products and sums on the way through a tiny model; as many roundings
SITE = "bert.encoder.layer.1.attention.output.dense"


def logits(model, family):
    with torch.no_grad():
        return model(**tiny_inputs(family)).logits


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def edit_of(model):
    """Heads 1 and 2 of the second layer, and two neurons behind them."""
    heads, neurons = find_sites(model, units="both")[2:4]
    chosen = NeuronSet({heads.name: [1, 2], neurons.name: [0, 7]})
    values = {heads.name: [0.0, -1.5], neurons.name: [0.5, 3.0]}
    gates = [gate for site in chosen.sites for gate in values[site]]
    return NeuronEdit.build(model, chosen, gates, units="both"), heads, neurons


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_heads_are_scaled_by_gates_and_by_folding_alike_and_come_back(family, tmp_path):
    model = tiny(family)
    before, plain = bits(model), logits(model, family)
    edit, heads, neurons = edit_of(model)

    def by_hand(factors):
        return lambda module, args: (args[0] * factors, *args[1:])

    head_gates = torch.tensor([1.0, 0.0, -1.5, 1.0]).repeat_interleave(D)
    neuron_gates = torch.ones(neurons.width)
    neuron_gates[[0, 7]] = torch.tensor([0.5, 3.0])
    hooks = [
        site.down.register_forward_pre_hook(by_hand(gates))
        for site, gates in ((heads, head_gates), (neurons, neuron_gates))
    ]
    want = logits(model, family)
    [hook.remove() for hook in hooks]
    assert not torch.allclose(want, plain, atol=1e-3)
    with edit.applied(model):
        assert torch.equal(logits(model, family), want)
    handle = edit.apply(model)
    assert torch.equal(logits(model, family), want)
    handle.undo()
    folded = edit.fold(model)
    assert_near(logits(model, family), want, terms=TERMS, size=want.abs().max())
    folded.undo()
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    edit.save(tmp_path / "edit.safetensors")
    loaded = load_edit(tmp_path / "edit.safetensors")
    assert loaded.model[heads.name]["shape"] == [HIDDEN, HEADS]
    with loaded.applied(model):
        assert torch.equal(logits(model, family), want)


def test_single_coordinates_of_an_output_projection_stay_what_they_were(tmp_path):
    model = tiny("bert")
    edit = NeuronEdit.build(model, NeuronSet({SITE: [2]}), 0.0, units="neurons")
    edit.save(tmp_path / "edit.safetensors")
    edit = load_edit(tmp_path / "edit.safetensors")
    assert edit.model[SITE]["shape"] == [HIDDEN, HIDDEN]
    handle = edit.fold(model)
    changed = model.get_submodule(SITE).weight == 0
    assert changed.all(0).nonzero()[:, 0].tolist() == [2]
    handle.undo()
    heads = NeuronEdit.build(model, NeuronSet({SITE: [2]}), 0.0, units="heads")
    with pytest.raises(EditMismatch, match="combine: the edits were made for different"):
        edit.combine(heads)
    with edit.applied(model), heads.applied(model):
        vectors, _ = gates_on(model)
    assert (vectors[SITE] == 0).nonzero()[:, 0].tolist() == [2, *range(2 * D, 3 * D)]


def test_an_output_projection_needs_its_units_said():
    model = tiny("bert")
    with pytest.raises(ValueError, match=r"neurons: .*output.dense' is the output projection of an attention; say"):
        NeuronEdit.build(model, NeuronSet({SITE: [2]}), 0.0)
    with pytest.raises(ValueError, match=r"has 4 neurons, got index 4"):
        NeuronEdit.build(model, NeuronSet({SITE: [4]}), 0.0, units="heads")
    with pytest.raises(ValueError, match="units: expected one of"):
        NeuronEdit.build(model, NeuronSet({SITE: [2]}), 0.0, units="layers")
    edit = NeuronEdit.build(model, NeuronSet({SITE: [2]}), 0.0, units="heads")
    wider = tiny("bert", num_attention_heads=2)
    with pytest.raises(EditMismatch, match=r"is \[32, 2\], the edit needs \[32, 4\]"):
        edit.check(wider)


def test_an_edit_of_heads_is_measured_beside_its_controls():
    model, tokenizer = tiny("bert"), tiny_tokenizer()
    texts = ["a good film", "the bad plot", "it was great", "so dull and sad", "we love it", "never happy"]
    tests = Examples([Example(text, number % 2) for number, text in enumerate(texts)], ["good", "bad"])
    edit, heads, _ = edit_of(model)
    how = {"draws": 2, "bootstrap": 0, "progress": False}
    report = evaluate(model, tokenizer, tests, edit=edit, located=NeuronSet({heads.name: [0, 1]}), **how)
    assert {row["method"] for row in report.rows()} >= {"none", "zero-all", "random"}
    with edit.applied(model):
        applied = evaluate(model, tokenizer, tests, **how)
        want = logits(model, "bert")
    again = evaluate(model, tokenizer, tests, edit=edit, **how)
    assert [row["value"] for row in applied.rows()] == [row["value"] for row in again.rows()]
    assert not torch.equal(want, logits(model, "bert"))
    with pytest.raises(ValueError, match=r"located: .*neurons|neurons: .* has 4 neurons"):
        evaluate(model, tokenizer, tests, edit=edit, located=NeuronSet({heads.name: [HEADS]}), **how)
