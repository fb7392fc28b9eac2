"""The shape of a results file, its checks, and what it says about the machine."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.base.files import FileError
from spurge.report import results as module
from spurge.report.results import Results

ROW = {"case": "broken", "method": "none", "metric": "accuracy", "value": 61.5, "unit": "percent"}


def one() -> Results:
    results = Results("demo", {"seed": 0, "box": (-1.0, 1.0)})
    results.add("broken", "none", "accuracy", 61.5, n=200, unit="percent", labels="class", seed=3)
    results.add("job", "spurge", "seconds", torch.tensor(0.5), spread=np.float32(0.25), unit="s", note="2 nodes")
    results.add("job", "spurge", "error", math.nan)
    return results


def test_the_file_has_exactly_the_shape(tmp_path: Path) -> None:
    one().write(tmp_path / "r.json")
    value = json.loads((tmp_path / "r.json").read_text())
    assert list(value) == ["name", "created", "spurge", "commit", "device", "versions", "settings", "rows"]
    age = datetime.now(timezone.utc) - datetime.fromisoformat(value["created"])
    assert timedelta(0) <= age < timedelta(minutes=5)
    assert value["settings"] == {"seed": 0, "box": [-1.0, 1.0]}
    assert value["versions"]["python"] == platform.python_version()
    assert set(value["versions"]) == {"python", "torch", "transformers", "numpy"}
    assert set(value["device"]) == {"cpu", "cores", "threads", "gpu"}
    assert value["device"]["threads"] == torch.get_num_threads()
    assert value["rows"] == [
        {
            "case": "broken",
            "method": "none",
            "metric": "accuracy",
            "value": 61.5,
            "spread": None,
            "n": 200,
            "unit": "percent",
            "labels": "class",
            "seed": 3,
        },
        {
            "case": "job",
            "method": "spurge",
            "metric": "seconds",
            "value": 0.5,
            "spread": 0.25,
            "n": None,
            "unit": "s",
            "note": "2 nodes",
        },
        {"case": "job", "method": "spurge", "metric": "error", "value": None, "spread": None, "n": None, "unit": ""},
    ]


def test_results_come_back_and_rows_are_found(tmp_path: Path) -> None:
    results = one()
    results.write(tmp_path / "r.json")
    again = Results.load(tmp_path / "r.json")
    assert again.to_json() == results.to_json()
    assert again.select(case="job", metric="seconds") == [results.rows[1]]
    assert again.select(seed=3) == [results.rows[0]]
    assert len(again) == 3
    assert repr(again) == "Results('demo', 3 rows)"


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(
    case=texts,
    method=texts,
    value=st.floats() | st.integers(-(10**20), 10**20) | st.none(),
    spread=st.none() | st.floats(min_value=0),
    n=st.none() | st.integers(0),
    seed=st.none() | st.integers(0),
)
def test_any_row_comes_back(
    tmp_path_factory: pytest.TempPathFactory, case: str, method: str, value: Any, spread: Any, n: Any, seed: Any
) -> None:
    results = Results("x")
    results.add(case, method, "size", value, spread=spread, n=n, seed=seed)
    path = tmp_path_factory.mktemp("r") / "r.json"
    results.write(path)
    (row,) = Results.load(path).rows
    finite = isinstance(value, int) or (value is not None and math.isfinite(value))
    assert row["value"] == (value if finite else None)
    assert (row["case"], row["method"], row["n"], row.get("seed")) == (case, method, n, seed)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unit": ""}, ValueError, "unit: 'accuracy' is in 'percent', got ''"),
        ({"unit": "%"}, ValueError, "unit: write 'percent', got '%'"),
        ({"value": 101.0}, ValueError, "an accuracy is in 0 to 100 percent, got 101.0"),
        ({"value": -1}, ValueError, "an accuracy is in 0 to 100 percent"),
        ({"metric": "worst_group_accuracy", "unit": "ratio"}, ValueError, "is in 'percent'"),
        ({"metric": "seconds"}, ValueError, "'seconds' is in 's', got 'percent'"),
        ({"metric": "peak_bytes", "unit": "MB"}, ValueError, "write 'bytes', got 'MB'"),
        ({"metric": "bandwidth", "unit": "GiB/s"}, ValueError, "write 'GB/s'"),
        ({"metric": "rate", "unit": "TFLOPS"}, ValueError, "write 'GFLOP/s'"),
        ({"case": " "}, ValueError, "case: is empty"),
        ({"method": None}, TypeError, "method: expected a text, got NoneType"),
        ({"value": "61"}, TypeError, "value: expected a number, got str"),
        ({"value": True}, TypeError, "value: expected a number, got bool"),
        ({"spread": -0.1}, ValueError, "spread: need at least 0, got -0.1"),
        ({"n": 1.5}, TypeError, "n: expected a whole number, got 1.5"),
        ({"n": -1}, ValueError, "n: need at least 0, got -1"),
        ({"labels": "all"}, ValueError, "labels: expected one of .* got 'all'"),
        ({"seed": -1}, ValueError, "seed: need at least 0"),
        ({"note": ""}, ValueError, "note: is empty"),
        ({"unit": None}, TypeError, "unit: expected a text"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    results = Results("x")
    with pytest.raises(error, match=message):
        results.add(**{**ROW, **change})
    with pytest.raises(error, match=f"row 2: .*{message}"):
        results.extend([ROW, {**ROW, **change}])
    assert len(results) == 1


def test_strange_rows_and_settings_are_refused() -> None:
    results = Results("x")
    with pytest.raises(ValueError, match="row 1: 'valeu' is not known, expected case"):
        results.extend([{**ROW, "valeu": 1}])
    with pytest.raises(ValueError, match="row 1: no 'value'"):
        results.extend([{"case": "a", "method": "b", "metric": "c"}])
    with pytest.raises(TypeError, match="row 1: expected a mapping, got list"):
        results.extend([[1]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="name: is empty"):
        Results("")
    with pytest.raises(TypeError, match="settings: expected a mapping, got list"):
        Results("x", [1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        Results("x", {"path": Path("a")})
    with pytest.raises(ValueError, match="JSON has no nan"):
        Results("x", {"rate": math.nan})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {}}, "rows: expected list, got dict"),
        ({"device": "cpu"}, "device: expected dict, got str"),
        ({"commit": 3}, "commit: expected str or NoneType, got int"),
        ({"created": "yesterday"}, "yesterday"),
        ({"rows": [3]}, "row 1: expected a mapping"),
        ({"rows": [{**ROW, "value": 200}]}, "row 1: value: an accuracy"),
        ({"more": 1}, "'more' is not known, expected commit"),
    ],
)
def test_files_of_another_shape_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**one().to_json(), **change}))
    with pytest.raises(FileError, match=rf"r\.json: .*{message}"):
        Results.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text, message in (
        ("[]", "not results: expected an object, got list"),
        ("{}", "not results: 'name' is missing"),
        ("{", "not a JSON file"),
    ):
        path.write_text(text)
        with pytest.raises(FileError, match=message):
            Results.load(path)
    with pytest.raises(FileNotFoundError):
        Results.load(tmp_path / "absent.json")


def test_the_commit_is_that_of_the_project_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.commit() is None or len(module.commit().removesuffix("-dirty")) == 40  # type: ignore[union-attr]
    root, installed, elsewhere = tmp_path / "clone", tmp_path / "site-packages" / "spurge", tmp_path / "other"
    for package in (root / "python" / "spurge", installed):
        (package / "report").mkdir(parents=True)
        (package / "report" / "results.py").write_text("1")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(module, "__file__", str(root / "python" / "spurge" / "report" / "results.py"))
    assert module.commit() is None  # no checkout yet
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        for command in (["init", "-q"], ["add", "python"], ["commit", "-q", "-m", "One"]):
            subprocess.run([*git, *command], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    clean = module.commit()
    assert clean is not None
    assert len(clean) == 40

    monkeypatch.setattr(module, "__file__", str(installed / "report" / "results.py"))
    assert module.commit() is None  # installed, and run elsewhere
    monkeypatch.chdir(root / "python")
    assert module.commit() == clean
    (root / "python" / "spurge" / "report" / "results.py").write_text("2")
    assert module.commit() is None  # the installed copy has other sources
    (installed / "report" / "results.py").write_text("2")
    assert module.commit() == f"{clean}-dirty"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert module.commit() is None  # no git
