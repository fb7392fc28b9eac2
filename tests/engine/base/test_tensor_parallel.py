"""Tensor parallelism: ranks that hold a model together give what one process with the whole model gives.

Run by torchrun, this file is the work of one rank, which writes what it saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import planted_texts
from helpers.tiny_models import WIDTH, tiny, tiny_inputs, tiny_tokenizer
from helpers.torchrun import torchrun
from spurge.engine.base.distributed import ALONE, Ranks
from spurge.engine.base.ranks import ProcessRank
from spurge.engine.cascade.cascade import Cascade, Rows, predicted_logit
from spurge.engine.cascade.locator import Locator
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.probes import token_scores
from spurge.engine.models.sites import find_sites
from spurge.methods.macu.gated_model import gated_pass
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.objectives import Job
from spurge.methods.macu.search import Climb
from spurge.methods.macu.swarm import Swarm

pytest.importorskip("accelerate")
DistributedConfig = pytest.importorskip("transformers.distributed").DistributedConfig

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"language": True, "mlp_bias": True},
    "qwen2": {"language": True},
    "llama-uneven": {"language": True, "intermediate_size": WIDTH + 1},  # the last rank has one neuron less
    "llama-classes": {},
}
RANKS = 2
SMALL: dict[str, Any] = {
    "texts": 8,
    "edit_texts": 8,
    "batch_size": 4,
    "certify": 2,
    "certify_texts": 4,
    "progress": False,
}
PAPER = MacU.paper(**SMALL, swarm=Swarm(particles=5, iterations=3))
BEST = MacU.best(**SMALL, climb=Climb(steps=3, look=1))
CLOSE = 2e-5  # another order of sums, in float32, over three layers
CLIMBED = 0.05  # Adam's first steps have the size of its rate, whatever rounding leaves of a gradient near 0


def family(name: str) -> str:
    return name.partition("-")[0]


def two_targets(rows: Rows) -> Tensor:
    return torch.stack([predicted_logit(rows), rows.logits.softmax(1)[:, 0]], 1)


def attended(rows: Rows) -> Tensor:
    assert rows.attention is not None
    weights = torch.linspace(-1, 1, rows.attention.shape[1])
    return rows.attention @ weights + rows.logits.softmax(1)[:, 1]


def some(model: Any) -> NeuronSet:
    """Neurons of two layers, on either rank."""
    sites = find_sites(model)
    last = sites[0].width - 1
    return NeuronSet({sites[0].name: torch.tensor([1, 30, last]), sites[-1].name: torch.tensor([0, last])})


def answers(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that is asked of a model, by name."""
    found: dict[str, Tensor] = {}
    settings: dict[str, dict[str, Any]] = {
        "layer": {"nodes": 3},
        "joint": {"path": "joint", "nodes": 2},
        "radau": {"rule": "radau", "nodes": 2},
        "split": {"nodes": 2, "memory": "8 MiB"},
    }
    for name, setting in settings.items():
        asked = Cascade(model, **({"path": "layer"} | setting)).attribute(inputs, two_targets)
        found |= {f"{name} {site}": value for site, value in asked.values.items()}
        found |= {f"{name} rest {site}": value for site, value in asked.erased.items()}
    asked = Cascade(model, attention=True, path="layer").attribute(inputs, attended)
    found |= {f"attention {site}": value for site, value in asked.values.items()}
    site = find_sites(model)[-1]
    found["weight"] = site.weight().detach()
    found["columns"] = site.projection.columns(torch.tensor([site.width - 1, 0, 2])).detach()
    cascade, neurons = Cascade(model, path="layer"), some(model)
    gates = torch.tensor([[0.0, 2.0, 0.5, -1.0, 0.0], [1.0, 1.0, 1.0, 3.0, 1.0], [1.0, 0.0, 1.0, 1.0, 1.0]])
    found["ablate"] = cascade.ablate(inputs, two_targets, neurons)
    found["gated"] = cascade.gated(inputs, two_targets, neurons, gates)
    found["scores"] = token_scores(model, inputs)
    with frozen(model), NeuronEdit.build(model, neurons, gates[0]).applied(model), torch.no_grad():
        found["edited"] = model(**inputs).logits
        found["ablate edited"] = cascade.ablate(inputs, two_targets, neurons)
    return found


def slope(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Gradient by the gates of :func:`some`, ``[n]``."""
    count = len(inputs["input_ids"])
    labels = torch.zeros(count, dtype=torch.int64)
    job = Job(inputs, lambda rows: rows.logits.softmax(1)[:, 0], labels, torch.ones(count))
    gates = torch.full((len(some(model)),), 0.7, requires_grad=True)
    with frozen(model), gated_pass(Handle(model), some(model)) as run:
        (gradient,) = torch.autograd.grad(run.value(job, gates).sum(), gates)
    return gradient


def shortcuts(model: Any) -> dict[str, Tensor]:
    """Scores of both sides by the two presets of MacU, and the gates that they find."""
    found: dict[str, Tensor] = {}
    for name, macu in (("paper", PAPER), ("best", BEST)):
        given = model, tiny_tokenizer(decoder=True), planted_texts.train()
        located = macu.locate(*given, planted_texts.GOLDEN)
        for side in ("causal", "spurious"):
            found |= {f"{name} {side} {site}": value for site, value in getattr(located, side).values.items()}
        fixed = Located(located.causal, located.spurious, some(model), some(model))
        edit = macu.edit(*given, fixed, planted_texts.GOLDEN)
        found |= {f"{name} gates {site}": gates for site, (_, gates) in edit.gates.items()}
    return found


def refusals(model: Any, folder: Path) -> dict[str, str]:
    """What is said of what ranks cannot do together."""
    said = {}
    calls = {
        "fold": lambda: NeuronEdit.build(model, some(model), 0.0).fold(model),
        "norm": lambda: token_scores(model, tiny_inputs("llama"), kind="attention_norm"),
        "dtype": lambda: Locator(model, dtype=torch.bfloat16, path="layer"),
        "resume": lambda: MacU().locate(model, None, None, None, resume=folder / "blocks"),  # type: ignore[arg-type]
    }
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


def load(name: str, folder: Path) -> Any:
    kind = AutoModelForCausalLM if MODELS[name].get("language") else AutoModelForSequenceClassification
    return kind.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_plan="auto"))


def work(folder: Path) -> None:
    rank = ProcessRank.from_environment().rank
    seen: dict[str, Any] = {}
    for name in MODELS:
        model, inputs = load(name, folder), tiny_inputs(family(name))
        found = answers(model, inputs)
        if name == "llama-classes":
            found |= {"slope": slope(model, inputs)} | shortcuts(model)
        save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{name}-{rank}.safetensors")
        neurons = some(model)
        edit = NeuronEdit.build(model, neurons, 0.0)
        with Ranks.current(Handle(model).mesh) as ranks:
            seen[name] = {
                "print": edit.model,
                "alone": ranks is ALONE,
                "room": Handle(model).budget(1000 + rank),
                "width": find_sites(model)[0].width,
                "refusals": refusals(model, folder),
            }
            NeuronEdit.load(folder / f"{name}-edit.safetensors").check(model)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_hold_a_model_together_give_what_one_gives(tmp_path: Path) -> None:
    whole = {name: tiny(family(name), **settings) for name, settings in MODELS.items()}
    for name, model in whole.items():
        model.save_pretrained(tmp_path / name)
        NeuronEdit.build(model, some(model), 0.5).save(tmp_path / f"{name}-edit.safetensors")
    done = torchrun(RANKS, __file__, tmp_path, limit=240)
    assert done.returncode == 0, done.stderr
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for name, model in whole.items():
        wanted = answers(model, tiny_inputs(family(name)))
        if name == "llama-classes":
            wanted |= {"slope": slope(model, tiny_inputs(family(name)))} | shortcuts(model)
        parts = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(RANKS)]
        for key, value in wanted.items():
            assert all(torch.equal(part[key], parts[0][key]) for part in parts), (name, key)
            assert parts[0][key].shape == value.shape, (name, key)
            slack = CLIMBED if key.startswith("best gates") else CLOSE
            assert float((parts[0][key] - value).norm()) <= slack * float(value.norm()), (name, key)
        for rank in range(RANKS):
            seen = facts[rank][name]
            assert seen["print"] == NeuronEdit.build(model, some(model), 0.0).model  # edits fit both
            assert (seen["alone"], seen["room"], seen["width"]) == (True, 1000, find_sites(model)[0].width)
            assert "must be a plain float parameter, got DTensor" in seen["refusals"]["fold"]
            assert seen["refusals"]["norm"].startswith("kind: several ranks hold the attention of this model")
            assert seen["refusals"]["dtype"].startswith("dtype: several ranks hold this model")
            assert seen["refusals"]["resume"].startswith("resume: several ranks hold this model together")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
