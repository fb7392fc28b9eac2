"""How the files in `v1` were made: by Spurge 0.1.0 (a2daa6d) with torch 2.13 and transformers 5.24 on a CPU.

A record, not a tool: it uses the names that modules had then. Files of a later version go to a folder of their own, and
these stay as they are.

    python tests/files/write_v1.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import earlier
from models import tiny_tokenizer
from spurge.engine.edits import NeuronEdit
from spurge.engine.extraction import extract
from spurge.engine.neurons import NeuronSet
from spurge.engine.recording import record
from spurge.engine.scores import NeuronScores
from spurge.engine.sites import find_sites, widths
from spurge.engine.swarm import _Search
from spurge.engine.verbalizers import Verbalizer
from spurge.engine.weight_edits import WeightEdit
from spurge.methods.corpus_words import statistics, write_review
from spurge.methods.golden import GoldenTokens
from spurge.report.results import Results


def cut(folder: Path) -> None:
    """The folder as a run leaves it that is stopped in its last block."""
    max(folder.glob("*.safetensors")).unlink()


class Stop(Exception):
    pass


def stopped(after: int, run: Any) -> None:
    """Runs a swarm that is stopped once it has kept ``after`` iterations."""
    save = _Search.save

    def counted(self: _Search, path: Path, fingerprint: str) -> None:
        save(self, path, fingerprint)
        if len(self.history) == after:
            raise Stop

    _Search.save = counted  # type: ignore[method-assign]
    try:
        run()
    except Stop:
        pass
    finally:
        _Search.save = save  # type: ignore[method-assign]


def write(out: Path) -> None:
    out.mkdir(parents=True)
    known: dict[str, Any] = {"environment": earlier.environment()}
    model, tokenizer, golden = earlier.classifier(), tiny_tokenizer(), earlier.golden()
    wide = widths(find_sites(model))

    # Edits
    chosen = NeuronSet({site: [1, 7 + place, 40] for place, site in enumerate(wide)})
    info = {"method": "by hand", "seed": 3, "labels": "none", "settings": {"share": 0.5, "text": "naïve – 非"}}
    NeuronEdit.build(model, chosen, [0.0, 2.5, -1.0, 0.0, 0.5, 3.0], info).save(out / "neuron-edit.safetensors")
    half = earlier.classifier(dtype=torch.bfloat16)
    NeuronEdit.build(half, chosen, -2.0, info).save(out / "neuron-edit-bfloat16.safetensors")
    mixed = earlier.experts()
    routed = NeuronSet({site.name: [0, site.width - 1] for site in find_sites(mixed)})
    NeuronEdit.build(mixed, routed, -3.0, info).save(out / "neuron-edit-experts.safetensors")
    changes = {"classifier.weight": ([0, 33], [1.5, -0.75]), "classifier.bias": ([1], [0.25])}
    weights = WeightEdit.build(model, changes, {"method": "by hand"})
    weights.save(out / "weight-edit.safetensors")

    # What the methods of neurons keep
    scores = {site: earlier.pattern(site, width) for site, width in wide.items()}
    NeuronScores(scores, {"method": "by hand", "seed": 1}).save(out / "scores.safetensors")
    macu = earlier.macu()
    located = macu.locate(model, tokenizer, earlier.TEXTS, golden, resume=out / "locate")
    located.save(out / "located.safetensors")
    cut(out / "locate")
    stopped(
        2,
        lambda: macu.edit(model, tokenizer, earlier.TEXTS, located, golden, resume=out / "edit-swarm.safetensors"),
    )
    edit = macu.edit(model, tokenizer, earlier.TEXTS, located, golden)
    edit.save(out / "macu-edit.safetensors")
    swarm = earlier.SWARM
    stopped(2, lambda: swarm.maximise(earlier.hill, dimensions=2, checkpoint=out / "swarm.safetensors"))
    found = swarm.maximise(earlier.hill, dimensions=2)
    known["swarm"] = {"position": found.position, "fitness": found.fitness, "history": found.history}

    # What the methods of the last layer keep
    features = extract(model, earlier.TEXTS, tokenizer=tokenizer, cache=out / "cache", **earlier.EXTRACTED)
    features.save(out / "features.safetensors")
    removal = earlier.FCR_SETTINGS.remove_class(features, 1, rate=0.5)
    removal.save(out / "removal-class.safetensors")
    assert features.groups is not None
    for criterion in ("gap", "independence"):
        tilted = earlier.FCR_SETTINGS.remove_feature(features, features.groups, select=features, criterion=criterion)
        tilted.save(out / f"removal-{criterion}.safetensors")
    tuned = earlier.TUNING.tune(features, features.subset(range(10)))
    tuned.save(out / "tuned.safetensors")

    # Mediation
    speaker, words = earlier.language(), tiny_tokenizer(decoder=True)
    recording = record(speaker, words, earlier.PROMPTS, out / "recording", **earlier.RECORDED)
    known["recording"] = recording.fingerprint()
    units, treated, outcome, topics = earlier.mediated()
    effects = earlier.MEDIATION.effects(units, treated, outcome, topics, resume=out / "mediation")
    effects.save(out / "effects.safetensors")
    cut(out / "mediation")

    # Texts that people may change
    golden.save(out / "golden.json")
    write_review(out / "review.tsv", statistics(earlier.TEXTS, least_count=1, least_z=1.0))
    verbalizer = Verbalizer({"negative": ["bad", "awful"], "positive": ["good"]}, "{text} it was", "mean")
    verbalizer.save(out / "verbalizer.json")
    results = Results("locate", {"model": "tiny", "texts": 12})
    results.head |= {"created": "2025-01-01T00:00:00+00:00", "commit": None}
    results.head["device"] = {"cpu": "x86_64", "cores": 2, "threads": 1, "gpu": None}
    results.extend(located.rows())
    results.add("broken", "MacU", "accuracy", 61.5, spread=1.5, n=200, unit="percent", labels="none", seed=3, note="ä")
    results.write(out / "results.json")

    # What they gave then
    known["logits"] = {"classifier": earlier.logits(model), "experts": earlier.logits(mixed)[:, :8]}
    with NeuronEdit.load(out / "neuron-edit.safetensors").applied(model):
        known["logits"]["neuron-edit"] = earlier.logits(model)
    with NeuronEdit.load(out / "neuron-edit-experts.safetensors").applied(mixed):
        known["logits"]["neuron-edit-experts"] = earlier.logits(mixed)[:, :8]
    for name, one in (("weight-edit", weights), ("macu-edit", edit), ("removal-class", removal.edit())):
        with one.applied(model):
            known["logits"][name] = earlier.logits(model)
    known["features"] = features.logits()
    known["tuned"] = tuned.logits(features.values)
    known["verbalizer"] = {"tokens": verbalizer.tokens(words)}
    spoken, prompted = verbalizer.wrap(speaker, words)
    with torch.no_grad():
        known["verbalizer"]["logits"] = spoken(**prompted(earlier.PROMPTS, padding=True, return_tensors="pt")).logits
    known["golden"] = GoldenTokens.load(out / "golden.json").fingerprint()
    plain = json.loads(json.dumps(known, default=lambda tensor: tensor.double().tolist()))
    (out / "known.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
