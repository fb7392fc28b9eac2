"""Repairs in the forms in which they are trained, exported and loaded by plain `peft`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_models import tiny, tiny_inputs, tokenizer_for
from spurge.engine.edits.weight_deltas import Dense, WeightDeltas
from spurge.engine.models.handle import Handle
from spurge.engine.models.heads import Head
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites
from spurge.methods.macu.trained import Student, free_weights

peft = pytest.importorskip("peft")


def repair(model: Any, family: str, which: Any) -> WeightDeltas:
    """What a student of the model holds after steps of a random size."""
    handle = Handle(model, tokenizer_for(family))
    neurons = NeuronSet({site.name: [1, 4, 9] for site in find_sites(model)}) if which == "neurons" else None
    student = Student(handle, free_weights(handle, which, **({"neurons": neurons} if neurons else {})), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05 if which == "all" else 0.3)
    return WeightDeltas.build(model, student.deltas(), {"method": "MacU"})


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "distilbert"])
@pytest.mark.parametrize("which", ["neurons", "lora", "all"])
@pytest.mark.parametrize("last_layer", [False, True])
def test_the_adapter_does_what_the_folded_repair_does(
    family: str, which: str, last_layer: bool, tmp_path: Path
) -> None:
    model, inputs = tiny(family), tiny_inputs(family)
    edit = repair(model, family, which)
    if last_layer and which != "all":
        head = Head.of(model)
        edit = WeightDeltas.build(model, {**edit.deltas, f"{head.name}.weight": Dense(-2 * head.weight)}, edit.info)
    edit.export(tmp_path / "adapter", model)
    folded = copy.deepcopy(model)
    edit.fold(folded)
    with torch.no_grad():
        before, want = model(**inputs).logits, folded(**inputs).logits
        got = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(**inputs).logits
    assert (got - want).abs().max() < 1e-5 < 1e-2 < (want - before).abs().max()
