"""Every recorded result has the one shape and names the clean commit that it comes from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spurge.report.results import Results

FILES = sorted((Path(__file__).resolve().parents[1] / "results").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_result_names_its_clean_commit(path: Path):
    results = Results.load(path)
    commit = str(results.head["commit"])
    assert re.fullmatch("[0-9a-f]{40}", commit), f"commit: expected 40 digits, got {commit}"
    assert len(results) > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_result_names_no_place_on_a_machine(path: Path):
    settings = Results.load(path).head["settings"]
    places = {name: value for name, value in settings.items() if isinstance(value, str) and "/" in value}
    assert not places, f"settings: expected names of files and folders, got {places}"
