"""Files that earlier versions wrote still load, still fit their models, and interrupted jobs still go on from them."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import spurge
from helpers import earlier
from helpers.earlier import TEXTS, V1
from helpers.tiny_models import WIDTH, tiny_tokenizer
from helpers.tolerance import assert_near
from spurge.engine.base import tensor_files
from spurge.engine.base.saved_results import Saved
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.edits.weight_deltas import Dense, LowRank, Slices, WeightDeltas
from spurge.report.results import Results

KNOWN = json.loads((V1 / "known.json").read_text(encoding="utf-8"))
SITES = ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense")
CHECKS: dict[str, Callable[[Path], None]] = {}


def of(*names: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Marks the check of files or folders of V1."""

    def mark(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return mark


def near(actual: Tensor, want: Any) -> None:
    assert_near(actual, torch.tensor(want), terms=WIDTH)


def given(edit: Any, model: Any, name: str) -> None:
    """The edit is taken by the model it was made for, gives what it gave then, and is taken by no other model."""
    outputs = len(KNOWN["logits"][name][0])
    plain = earlier.logits(model)
    with edit.applied(model):
        near(earlier.logits(model)[:, :outputs], KNOWN["logits"][name])
    assert torch.equal(earlier.logits(model), plain)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(spurge.EditMismatch, match="is not the one the edit was made for"):
        edit.check(model)


@pytest.mark.parametrize("name", sorted(path.name for path in V1.iterdir()))
def test_a_file_loads(name: str) -> None:
    CHECKS[name](V1 / name)


SAVED: dict[str, type[Saved]] = {
    "scores": NeuronScores,
    "located": spurge.Located,
    "edit": spurge.NeuronEdit,
    "weight-edit": spurge.WeightEdit,
    "weight-deltas": WeightDeltas,
    "features": spurge.Features,
    "removal": spurge.Removal,
    "neurontune": spurge.Tuned,
    "effects": spurge.Effects,
}


@pytest.mark.parametrize(
    "path", [p for p in sorted(V1.glob("*.safetensors")) if "swarm" not in p.name], ids=lambda p: p.stem
)
def test_what_was_loaded_is_saved_byte_by_byte(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "spurge_version", lambda: "0.1.0")
    SAVED[tensor_files.kind_of(path)].load(path).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


# ---- edits -----------------------------------------------------------------------------------------------------------


@of("known.json")
def _known(path: Path) -> None:
    near(earlier.logits(earlier.classifier()), KNOWN["logits"]["classifier"])


@of("neuron-edit.safetensors")
def _neuron_edit(path: Path) -> None:
    edit = spurge.load_edit(path)
    assert isinstance(edit, spurge.NeuronEdit)
    assert edit.neurons == spurge.NeuronSet({SITES[0]: [1, 7, 40], SITES[1]: [1, 8, 40]})
    assert edit.vector().tolist() == [0.0, 2.5, -1.0, 0.0, 0.5, 3.0]
    assert edit.info == {
        "spurge": "0.1.0",
        "method": "by hand",
        "seed": 3,
        "labels": "none",
        "settings": {"share": 0.5, "text": "naïve – 非"},
    }
    given(edit, earlier.classifier(), "neuron-edit")


@of("neuron-edit-bfloat16.safetensors")
def _half_neuron_edit(path: Path) -> None:
    edit = spurge.NeuronEdit.load(path)
    assert edit.vector().tolist() == [-2.0] * 6
    edit.check(earlier.classifier(dtype=torch.bfloat16))
    with pytest.raises(spurge.EditMismatch, match="made for bfloat16 weights"):
        edit.check(earlier.classifier())


@of("neuron-edit-experts.safetensors")
def _expert_edit(path: Path) -> None:
    edit = spurge.load_edit(path)
    assert isinstance(edit, spurge.NeuronEdit)
    parts = {"experts": 63, "shared_expert.down_proj": 39}
    layers = [f"model.layers.{layer}.mlp" for layer in (0, 1)]
    ends = [(f"{layer}.{part}", [0, last]) for layer in layers for part, last in parts.items()]
    assert edit.neurons == spurge.NeuronSet(dict(ends))
    if transformers.__version__ >= "5":  # before, every expert has parameters of its own
        given(edit, earlier.experts(), "neuron-edit-experts")


@of("weight-edit.safetensors")
def _weight_edit(path: Path) -> None:
    edit = spurge.load_edit(path)
    assert isinstance(edit, spurge.WeightEdit)
    changes = {name: [part.tolist() for part in pair] for name, pair in edit.changes.items()}
    assert changes == {"classifier.weight": [[0, 33], [1.5, -0.75]], "classifier.bias": [[1], [0.25]]}
    given(edit, earlier.classifier(), "weight-edit")


@of("weight-deltas.safetensors")
def _weight_deltas(path: Path) -> None:
    edit = spurge.load_edit(path)
    assert isinstance(edit, WeightDeltas)
    kinds = {name.removeprefix("bert.encoder.layer.0."): type(delta) for name, delta in edit.deltas.items()}
    assert kinds == {
        "classifier.weight": Dense,
        "intermediate.dense.bias": Slices,
        "intermediate.dense.weight": LowRank,
        "output.dense.weight": Slices,
    }
    assert edit.info == {"spurge": "0.1.0", "method": "by hand", "seed": 3}
    given(edit, earlier.classifier(), "weight-deltas")


@of("macu-edit.safetensors")
def _macu_edit(path: Path) -> None:
    edit = spurge.NeuronEdit.load(path)
    assert (len(edit), edit.info["erased"], edit.info["searched"], edit.info["evaluations"]) == (8, 5, 3, 12)
    assert edit.info["settings"]["swarm"]["particles"] == 4
    given(edit, earlier.classifier(), "macu-edit")


# ---- neurons ---------------------------------------------------------------------------------------------------------


@of("scores.safetensors")
def _scores(path: Path) -> None:
    scores = NeuronScores.load(path)
    assert list(scores.values) == list(SITES)
    assert all(torch.equal(found, earlier.pattern(site, 48)) for site, found in scores.values.items())
    assert scores.info == {"method": "by hand", "seed": 1}


@of("located.safetensors")
def _located(path: Path) -> None:
    located = spurge.Located.load(path)
    assert located.causal.widths == dict.fromkeys(SITES, 48)
    assert located.causal_set.indices(SITES[0]).tolist() == [12, 19, 23, 29, 31, 38, 40, 47]
    assert located.spurious_set.indices(SITES[0]).tolist() == [4, 12, 13, 16, 28, 29, 38, 43]
    assert len(located.overlap) == 3
    assert located.causal.top(1) <= located.causal_set
    assert located.info["settings"]["nodes"] == 2
    assert located.info["data"] == TEXTS.fingerprint()
    assert located.info["golden"] == earlier.golden().fingerprint()
    assert set(located.certificate["agreement"]) == {"causal soft", "spurious soft", "causal hard", "spurious hard"}
    assert [row["causal"] for row in located.summary()] == [8, 0]


# ---- last layers -----------------------------------------------------------------------------------------------------


def features() -> spurge.Features:
    return spurge.Features.load(V1 / "features.safetensors")


@of("features.safetensors")
def _features(path: Path) -> None:
    found = spurge.Features.load(path)
    assert torch.equal(found.labels, TEXTS.targets)
    assert found.names == earlier.LABELS
    assert found.groups is not None
    assert [found.group_names[group] for group in found.groups] == [row.group for row in TEXTS]
    assert found.head.fingerprint() == spurge.Head.of(earlier.classifier()).fingerprint()
    near(found.logits(), KNOWN["features"])
    assert found.info["method"] == "extract"


@of("removal-class.safetensors")
def _class_removal(path: Path) -> None:
    removal = spurge.Removal.load(path)
    assert [(edge.row, edge.column, edge.target, edge.rate) for edge in removal.edges] == [(1, 4, 1, 0.5)]
    assert (removal.labels, removal.fictitious, removal.curve) == ("class", None, None)
    assert removal.original.fingerprint() == features().head.fingerprint()
    given(removal.edit(), earlier.classifier(), "removal-class")


@of("removal-gap.safetensors", "removal-independence.safetensors")
def _feature_removal(path: Path) -> None:
    removal = spurge.Removal.load(path)
    labels, name = ("group", "Sweep") if "gap" in path.name else ("class", "Dependence")
    assert [(edge.row, edge.column) for edge in removal.edges] == [(0, 27), (1, 19)]
    assert removal.labels == labels
    assert type(removal.curve).__name__ == name
    assert removal.curve is not None
    assert removal.curve.high == 1.0
    assert removal.fictitious is not None
    assert removal.fictitious.outputs == 2
    if labels == "group":
        removal.edit().check(earlier.classifier())
        assert removal.sweep(features()).high == 1.0


@of("tuned.safetensors")
def _tuned(path: Path) -> None:
    tuned = spurge.Tuned.load(path)
    assert (tuned.labels, tuned.signs, tuned.mask.shape) == ("class", "magnitude", (2, 32))
    assert int(tuned.mask.sum()) == 28
    near(tuned(features()), KNOWN["tuned"])
    tuned.edit().check(earlier.classifier())


# ---- mediation -------------------------------------------------------------------------------------------------------


@of("effects.safetensors")
def _effects(path: Path) -> None:
    effects = spurge.Effects.load(path)
    assert (len(effects), effects.level, effects.widths) == (6, "unit", {str(unit): 1 for unit in range(6)})
    assert effects.adjusted.aie.isnan().tolist() == [False] * 4 + [True, False]
    assert effects.adjusted.constant.tolist() == [False] * 3 + [True, False, False]
    assert float(effects.adjusted.total_effect) == pytest.approx(0.48297236119, abs=1e-9)
    assert float(effects.adjusted.aie[0]) == pytest.approx(-0.10542015625, abs=1e-9)
    assert effects.adjusted.draws.shape == (3, 6)
    assert effects.ranking() == [0, 2, 5, 1, 3]
    assert effects.adjusted.flags(effects.least_ess)[4] == ("overlap",)
    assert effects.info["topics"][0] == {"topic": "a", "prompts": 20, "treated": 10}
    assert "flagged units: resamples 2, constant 1, overlap 1" in str(effects)


@of("recording")
def _recording(path: Path) -> None:
    recording = spurge.Recording.open(path)
    sites = ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert list(recording.prompts) == earlier.PROMPTS
    assert recording.continuations == ("was was", "n or", "perhaps perhaps", "it p", "bad bad")
    assert (recording.widths, recording.hidden) == (dict.fromkeys(sites, 48), dict.fromkeys(sites, 32))
    model = earlier.language()
    for site in spurge.find_sites(model):
        outputs = recording.neurons(site.name) @ site.weight().t() + site.bias()
        half = 2.0**-11 * (recording.neurons(site.name).abs() @ site.weight().abs().t() + outputs.abs())  # of float16
        assert bool(((recording.outputs(site.name) - outputs).abs() <= half + 1e-5).all())
    assert recording.fingerprint() == KNOWN["recording"]
    treated = [True, False, True, False, True]
    assert len(spurge.mlp_units(recording, treated, folds=2)) == 2
    assert len(spurge.neuron_units(recording)) == 96


# ---- texts -----------------------------------------------------------------------------------------------------------


@of("golden.json")
def _golden(path: Path) -> None:
    golden = spurge.GoldenTokens.load(path)
    assert golden == earlier.golden()
    assert golden.info == {"source": "by hand"}
    assert golden.fingerprint() == KNOWN["golden"]
    assert golden.phrases() == {("not", "good")}


@of("review.tsv")
def _review(path: Path) -> None:
    golden = spurge.GoldenTokens.load(path)
    assert golden.labels == earlier.LABELS
    assert golden.causal["negative"] == ("awful", "bad", "boring", "dull", "terrible")
    assert golden.causal["positive"] == ("good", "great", "happy", "lovely", "perhaps", "superb", "tuesday")
    assert len(golden.irrelevant) == 20


@of("verbalizer.json")
def _verbalizer(path: Path) -> None:
    verbalizer = spurge.Verbalizer.load(path)
    tokenizer = tiny_tokenizer(decoder=True)
    assert verbalizer == spurge.Verbalizer(
        {"negative": ["bad", "awful"], "positive": ["good"]}, "{text} it was", "mean"
    )
    assert verbalizer.tokens(tokenizer) == KNOWN["verbalizer"]["tokens"]
    model, prompted = verbalizer.wrap(earlier.language(), tokenizer)
    with torch.no_grad():
        logits = model(**prompted(earlier.PROMPTS, padding=True, return_tensors="pt")).logits
    near(logits, KNOWN["verbalizer"]["logits"])


@of("results.json")
def _results(path: Path) -> None:
    results = Results.load(path)
    assert (results.head["name"], results.head["spurge"]) == ("locate", "0.1.0")
    assert results.select(case="all", metric="overlap neurons")[0]["value"] == 3
    (row,) = results.select(case="broken")
    assert row == {
        "case": "broken",
        "method": "MacU",
        "metric": "accuracy",
        "value": 61.5,
        "spread": 1.5,
        "n": 200,
        "unit": "percent",
        "labels": "none",
        "seed": 3,
        "note": "ä",
    }


# ---- jobs that were interrupted --------------------------------------------------------------------------------------


class Rest:
    """A copy of what an interrupted job left; afterwards, what of it is as it was, and what is new or newly written."""

    def __init__(self, name: str, folder: Path) -> None:
        self.path = folder / name
        (shutil.copytree if (V1 / name).is_dir() else shutil.copy)(V1 / name, self.path)
        for file in self.files():
            os.utime(file, (1, 1))

    def files(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]

    def new(self) -> list[str]:
        return [file.name for file in self.files() if file.stat().st_mtime != 1]


@of("locate", "mediation", "swarm.safetensors", "edit-swarm.safetensors", "cache")
def _interrupted(path: Path) -> None:
    """Goes on in a test of its own, below."""


@pytest.fixture
def rest(request: Any, tmp_path: Path) -> Rest:
    return Rest(request.param, tmp_path)


def continued(name: str) -> Any:
    return pytest.mark.parametrize("rest", [name], indirect=True)


@continued("locate")
def test_localisation_goes_on(rest: Rest) -> None:
    want = spurge.Located.load(V1 / "located.safetensors")
    found = earlier.macu().locate(earlier.classifier(), tiny_tokenizer(), TEXTS, earlier.golden(), resume=rest.path)
    assert rest.new() == ["block-00002.safetensors"]
    for side in ("causal", "spurious"):
        for site, values in getattr(want, side).values.items():
            assert_near(getattr(found, side).values[site], values, terms=WIDTH)
    assert (found.causal_set, found.spurious_set) == (want.causal_set, want.spurious_set)


@continued("locate")
def test_blocks_of_another_job_are_refused(rest: Rest) -> None:
    model = earlier.classifier()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(ValueError, match="was made with other settings, data or model"):
        earlier.macu().locate(model, tiny_tokenizer(), TEXTS, earlier.golden(), resume=rest.path)


@continued("edit-swarm.safetensors")
def test_the_search_for_an_edit_goes_on(rest: Rest) -> None:
    located, want = (
        spurge.Located.load(V1 / "located.safetensors"),
        spurge.NeuronEdit.load(V1 / "macu-edit.safetensors"),
    )
    edit = earlier.macu().edit(
        earlier.classifier(), tiny_tokenizer(), TEXTS, located, earlier.golden(), resume=rest.path
    )
    for name, history in want.info["history"].items():
        assert edit.info["history"][name][:2] == history[:2]
    assert edit.neurons == want.neurons
    assert_near(edit.vector(), want.vector())


@continued("swarm.safetensors")
def test_a_swarm_goes_on(rest: Rest) -> None:
    calls = []

    def hill(position: Tensor) -> Tensor:
        calls.append(len(position))
        return earlier.hill(position)

    found, want = earlier.SWARM.maximise(hill, dimensions=2, checkpoint=rest.path), KNOWN["swarm"]
    assert len(calls) == 2
    for name, history in want["history"].items():
        assert found.history[name][:2] == history[:2]
    near(found.position, want["position"])
    assert found.fitness == pytest.approx(want["fitness"], abs=1e-6)


@continued("mediation")
def test_mediation_goes_on(rest: Rest) -> None:
    want = spurge.Effects.load(V1 / "effects.safetensors")
    units, treated, outcome, topics = earlier.mediated()
    found = earlier.MEDIATION.effects(units, treated, outcome, topics, resume=rest.path)
    assert rest.new() == ["units-00000004-00000006.safetensors"]
    for side in ("adjusted", "unadjusted"):
        for name in ("nie1", "nie0", "aie", "ess", "status", "draws"):
            mine, theirs = (getattr(getattr(effects, side), name) for effects in (found, want))
            assert torch.equal(mine[..., :4].nan_to_num(9), theirs[..., :4].nan_to_num(9))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, equal_nan=True)
    assert {**found.info, "spurge": ""} == {**want.info, "spurge": ""}


here = pytest.mark.skipif(
    earlier.environment() != KNOWN["environment"],
    reason="stored outputs are bound to versions of Python and torch",
)


@here
@continued("recording")
def test_a_recording_goes_on(rest: Rest) -> None:
    last = rest.path / "block-00001.safetensors"
    last.unlink()
    found = spurge.record(
        earlier.language(),
        tiny_tokenizer(decoder=True),
        earlier.PROMPTS,
        rest.path,
        **earlier.RECORDED,
    )
    want = spurge.Recording.open(V1 / "recording")
    assert rest.new() == [last.name]
    assert found.continuations == want.continuations
    for site in want.widths:
        assert torch.equal(found.neurons(site), want.neurons(site))
        assert torch.equal(found.outputs(site), want.outputs(site))


@here
@continued("cache")
def test_extraction_finds_what_was_kept(rest: Rest) -> None:
    missing = rest.files()[0]
    missing.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = spurge.extract(
            earlier.classifier(), TEXTS, tokenizer=tiny_tokenizer(), cache=rest.path, **earlier.EXTRACTED
        )
    assert rest.new() == [missing.name]
    assert_near(found.values, features().values, terms=WIDTH)
