"""The doctor finds nothing wrong here, and says what is wrong where something is."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spurge import doctor, ops
from spurge.cli import main
from spurge.report.results import Results


def test_all_is_well_and_every_kernel_is_checked() -> None:
    diagnosis = doctor.examine()
    assert diagnosis.healthy, str(diagnosis)
    assert str(diagnosis).endswith("all is well")
    checked = {name.split()[0] for name in diagnosis.facts["kernel_errors"]}
    others = {"associate_", "balance", "medians", "proximity", "swarm", "sweep"}
    assert checked == {"open_rows", "gate_columns_", "node_sum", "multiply_sum", "first_order"} | others
    assert diagnosis.facts["build"]["isa_selected"] in str(diagnosis)
    results = Results("doctor", diagnosis.facts)
    results.extend(diagnosis.rows())


@pytest.mark.parametrize("name", ["spurge._core", "torch", "spurge.ops"])
def test_what_cannot_be_imported_is_said_not_raised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(wanted: str, *rest: Any) -> Any:
        if wanted == name:
            raise ImportError(f"{name} is broken")
        return real(wanted, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    diagnosis = doctor.examine()
    assert not diagnosis.healthy
    assert f"{name} is broken" in str(diagnosis)
    assert "-> " in str(diagnosis)


def test_a_kernel_that_computes_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.node_sum
    monkeypatch.setattr(ops, "node_sum", lambda *arguments: real(*arguments) + 0.01)
    diagnosis = doctor.examine()
    wrong = [finding.subject for finding in diagnosis.findings if finding.state == "wrong"]
    assert wrong == ["kernel node_sum"]
    assert str(diagnosis).endswith("1 thing wrong")


def test_an_old_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._NEEDED, "numpy", "99.0")
    (finding,) = (found for found in doctor.examine().findings if found.state == "wrong")
    assert finding.subject == "numpy"
    assert "too old" in finding.observation


def test_more_threads_than_cores_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    diagnosis = doctor.examine()
    assert diagnosis.healthy
    assert "4096 on" in str(diagnosis)
    assert "OMP_NUM_THREADS" in str(diagnosis)


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("4.57.0rc1", (4, 57, 0)), ("5", (5,)), ("dev", ())]
)
def test_versions_are_read(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor._version_numbers(version) == numbers


def test_python_m_spurge_is_the_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "spurge"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("all is well")
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"all is well\nnumbers: {path}\n")
    assert all(row["value"] == 1 for row in json.loads(path.read_text())["rows"])
