"""The coverage benchmark on a few repetitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import run
from causal import coverage


def test_a_repetition_gives_estimates_and_intervals():
    found = coverage.repetition("balancing", seed=0, rows=1500, resamples=10)
    assert set(found) == {(side, name) for side in coverage.SIDES for name in coverage.TRUTH}
    value, low, high = found["adjusted", "mediator"]
    assert low < value < high
    assert value == pytest.approx(0.5, abs=0.2)
    assert found["unadjusted", "mediator"][0] > 1


def test_the_command_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(coverage, "ESTIMATORS", ("balancing",))
    assert run.main(["coverage", "--quick", "--rows", "400", "--json", str(tmp_path / "x.json")]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    held = [row["value"] for row in rows if row["metric"] == "interval coverage"]
    assert len(held) == 6
    assert all(0 <= value <= 100 for value in held)
