"""MacU with attention heads as units, from locating to measuring the edit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import planted_texts
from helpers.tiny_models import tiny_tokenizer
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.evaluation.evaluation import evaluate
from spurge.engine.models.sites import find_sites, widths
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.settings import as_first_written
from spurge.methods.macu.swarm import Swarm

QUICK: dict[str, Any] = {"texts": 24, "batch_size": 12, "certify": 2, "certify_texts": 4, "progress": False, "audit": 4}
QUICK |= {"fraction": 0.05, "share": 0.1, "edit_texts": 12}


@pytest.mark.parametrize("units", ["heads", "both"])
@pytest.mark.parametrize("preset", [MacU.paper, MacU.best])
def test_heads_are_located_edited_and_measured(units, preset, tmp_path) -> None:
    model, tokenizer, train = planted_texts.model(), tiny_tokenizer(), planted_texts.train()
    swarm = {"swarm": Swarm(particles=3, iterations=2)} if preset == MacU.paper else {}
    macu = preset(**QUICK, units=units, **swarm)
    found = macu.locate(model, tokenizer, train, planted_texts.GOLDEN, resume=tmp_path / "blocks")
    assert found.causal.widths == widths(find_sites(model, units=units))
    assert found.info["settings"]["units"] == units
    again = macu.locate(model, tokenizer, train, planted_texts.GOLDEN, resume=tmp_path / "blocks")
    assert all(torch.equal(value, again.spurious.values[name]) for name, value in found.spurious.values.items())
    found.save(tmp_path / "located.safetensors")
    found = Located.load(tmp_path / "located.safetensors")
    edit = macu.edit(model, tokenizer, train, found, planted_texts.GOLDEN)
    edit.save(tmp_path / "edit.safetensors")
    edit = NeuronEdit.load(tmp_path / "edit.safetensors")
    report = evaluate(model, tokenizer, train, edit=edit, located=found, draws=2, bootstrap=0, progress=False)
    assert {row["method"] for row in report.rows()} >= {"none", "zero-all"}
    with pytest.raises(ValueError, match=f"located: was found with units='{units}', expected 'neurons'"):
        preset(**QUICK, **swarm).edit(model, tokenizer, train, found, planted_texts.GOLDEN)


def test_neurons_alone_leave_the_marks_of_earlier_runs_as_they_were() -> None:
    settings = {"path": "layer", "units": "neurons"}
    assert as_first_written(settings) == {"path": "layer"}
    assert as_first_written(settings | {"units": "both"}) == {"path": "layer", "units": "both"}
