"""The planted circuit holds what it promises, and the areas are those of the formulas."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import circuits, localisers, planted_circuit
from experiments.command import Clock
from experiments.curves import FRACTIONS, Faithfulness, areas, mean_activations
from experiments.localisers import LOCALISERS, Question
from experiments.planted_circuit import PLANTED_LAYERS, SITE, Plan, Planted
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import widths
from spurge.report.results import Results

PLAN = Plan(rows=400, epochs=2, planted=2, width=24, lead=2.0)


@pytest.fixture(scope="module")
def built() -> Planted:
    return planted_circuit.build(PLAN, 3)


@pytest.fixture(scope="module")
def asked(built: Planted) -> dict[str, Question]:
    return circuits.questions(built, 4, 3)


@pytest.fixture(scope="module")
def exact(asked: dict[str, Question]) -> dict[str, torch.Tensor]:
    return LOCALISERS["exact"].scores(asked["pairs"], 0)


def test_planted_neurons_hold_the_effect_and_decoys_none_of_it(built, asked, exact):
    effects, single = circuits.construction(built, asked["pairs"], exact, 3)
    assert effects["unedited"] > 3
    for name in ("planted off", *(f"planted of layer {layer + 1} off" for layer in PLANTED_LAYERS)):
        assert abs(effects[name]) < 0.05 * effects["unedited"]
    assert effects["decoys off"] == pytest.approx(effects["unedited"], rel=1e-3)
    assert single["smallest planted"] > 2 * max(single["largest decoy"], single["largest other"])


def test_decoys_are_as_active_as_the_planted_and_write_as_much(built, asked):
    active = LOCALISERS["activation"].scores(asked["pairs"], 0)
    norms = LOCALISERS["weight norm"].scores(asked["pairs"], 0)
    assert len(built.decoys) == 2 * len(built.planted)
    for values in (active, norms):
        for site in built.planted.sites:
            planted, decoys = (values[site][own.indices(site)] for own in (built.planted, built.decoys))
            assert decoys.sort().values == pytest.approx(planted.repeat(2).sort().values, rel=1e-5)


def test_the_phrase_adds_as_much_to_either_opinion(built, asked):
    question = asked["pairs"]
    with frozen(built.handle.model, gradients=False):
        logits = localisers.answers(built.handle, question.inputs)
    lead = logits.gather(1, question.leader[:, None]) - logits.gather(1, question.other[:, None])
    added = (lead[:4] - lead[4:])[:, 0]
    assert (added > 2).all()
    assert float((question.weight * lead[:, 0]).sum()) == pytest.approx(float(added.mean()), rel=1e-5)


def test_the_engine_and_exact_ablation_find_what_is_planted(built, asked, exact):
    for values in (exact, LOCALISERS["default"].scores(asked["pairs"], 0)):
        assert circuits.recalls(values, built.planted, built.decoys)["recall"] == 100
    norms = LOCALISERS["weight norm"].scores(asked["pairs"], 0)
    assert circuits.recalls(norms, built.planted, built.decoys)["recall"] < 50


@pytest.mark.slow
@pytest.mark.parametrize(("name", "error"), [("captum zero", 0.01), ("knowledge neurons", 0.25)])
def test_peers_answer_the_same_question_as_the_layer_path(asked, name, error):
    if name == "captum zero":
        pytest.importorskip("captum")
    question = replace(asked["texts"], nodes=20)
    ours, theirs = (LOCALISERS[own].scores(question, 0) for own in ("layer", name))
    for site, value in ours.items():
        assert float((theirs[site] - value).norm()) <= error * float(value.norm())


def test_recalls_of_scores_by_hand():
    planted, decoys = NeuronSet({"a": [0, 1]}), NeuronSet({"a": [2]})
    found = circuits.recalls({"a": torch.tensor([9.0, 1.0, 8.0, 7.0, 0.0])}, planted, decoys)
    assert found == {"recall": 50, "recall_at_twice": 100, "decoys": 50}


def test_ties_go_by_layer_and_neuron():
    planted = NeuronSet({"layer.2": [0], "layer.10": [0]})
    values = {"layer.10": torch.ones(2), "layer.2": torch.ones(2)}
    assert circuits.recalls(values, planted, NeuronSet())["recall"] == 50
    assert NeuronScores(values).top(2) == NeuronSet({"layer.2": [0, 1]})


def test_areas_by_hand():
    assert areas([1.0] * 10, [1.0] * 10).cpr == pytest.approx(0.999)
    assert areas([1.0] * 10, [1.0] * 10).cmd == 0
    half = [0.0] * 8 + [0.5, 1.0]  # 0 up to 0.2, 0.5 at 0.5, 1 at 1
    assert areas(half, half).cpr == pytest.approx(0.3 * 0.25 + 0.5 * 0.75)
    assert areas(half, half).cmd == pytest.approx((0.2 - 0.001) * 1 + 0.3 * 0.75 + 0.5 * 0.25)
    above = [2.0] * 10
    assert areas(half, above).cpr == pytest.approx(0.45)
    assert areas(half, above).cmd == pytest.approx(0.999)


def test_what_is_not_kept_is_zero_or_the_mean(built, asked):
    handle, batch = built.handle, {name: value[:4] for name, value in asked["pairs"].inputs.items()}
    measure = Faithfulness(handle, [batch])
    every = NeuronSet.all(widths(handle.sites))
    assert measure.of(every) == 1
    assert measure.of(NeuronSet()) == 0
    kept = NeuronSet({SITE.format(0): [0, 5], SITE.format(3): [1]})
    edit = NeuronEdit.build(handle.model, every - kept, 0.0)
    with edit.applied(handle.model), frozen(handle.model, gradients=False):
        lead, other = localisers.answers(handle, batch).gather(1, measure.pairs[0]).double().unbind(1)
    assert measure.lead(kept) == pytest.approx(float((lead - other).mean()), rel=1e-5)
    one = {name: value[:1, :1] for name, value in batch.items()}  # a single token is its own mean
    means = mean_activations(handle, [one])
    same = Faithfulness(handle, [one], means)
    assert same.empty == pytest.approx(same.whole, rel=1e-4)
    assert measure.lead(NeuronSet()) != pytest.approx(Faithfulness(handle, [batch], means).empty)


def test_a_curve_keeps_more_and_more_of_the_highest_scores(built, asked, exact, monkeypatch: pytest.MonkeyPatch):
    batch = {name: value[:4] for name, value in asked["pairs"].inputs.items()}
    measure = Faithfulness(built.handle, [batch])
    counts: list[int] = []
    lead = measure.lead

    def counted(kept: NeuronSet) -> float:
        counts.append(len(kept))
        return lead(kept)

    monkeypatch.setattr(measure, "lead", counted)
    measure.areas(exact)
    assert counts == 2 * [int(share * 96) for share in FRACTIONS[:-1]]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few = {name: LOCALISERS[name] for name in ("gradient", "exact", "random")}
    monkeypatch.setattr(circuits, "LOCALISERS", few)
    args = argparse.Namespace(seeds=[0], quick=True, cache=tmp_path)
    first, second = Results("circuits", {}), Results("circuits", {})
    circuits.planted(args, first)
    monkeypatch.setattr(planted_circuit, "_train", None)
    monkeypatch.setattr(circuits, "LOCALISERS", {name: replace(own, scores=None) for name, own in few.items()})
    circuits.planted(args, second)
    numbers = [
        [(row["case"], row["method"], row["metric"], row["value"]) for row in own.rows] for own in (first, second)
    ]
    assert numbers[0] == numbers[1]
    assert {row["case"] for row in first.rows} >= {"planted: construction", "planted: pairs", "planted: texts"}


def test_areas_of_a_model_have_every_draw_and_are_kept(built, asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = built.handle.tokenizer.batch_decode(asked["pairs"].inputs["input_ids"], skip_special_tokens=True)
    subject = circuits.Subject(built.handle, texts, [built.handle.encode(texts[:3])], 2)
    monkeypatch.setattr(circuits, "SUBJECTS", {"tiny": lambda args: subject})
    monkeypatch.setattr(circuits, "LOCALISERS", {name: LOCALISERS[name] for name in ("gradient", "random", "exact")})
    args = argparse.Namespace(seeds=[0, 1], quick=True, cache=tmp_path)
    first, second = Results("circuits", {}), Results("circuits", {})
    circuits.mib(args, first, "tiny", Clock())
    monkeypatch.setattr(Faithfulness, "areas", None)
    circuits.mib(args, second, "tiny", Clock())
    assert first.rows == second.rows
    assert {row["method"] for row in first.rows} == {
        "the model",
        "gradient",
        "random",
    }  # the others are too slow for it
    for case in ("tiny: zero", "tiny: mean"):
        (cpr,) = first.select(case=case, method="random", metric="cpr")
        assert cpr["n"] == 2 * circuits.RANDOM
        (whole,) = first.select(case=case, method="gradient", metric="faithfulness at 100 %")
        assert whole["value"] == 1
