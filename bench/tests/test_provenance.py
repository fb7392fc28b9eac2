"""A run whose results cannot be kept says so in one line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import run
from common import provenance


def test_a_clean_commit_needs_no_warning():
    assert provenance.warning("f940ac153950") is None


def test_a_missing_commit_is_named():
    assert "no commit" in provenance.warning(None)


def test_changed_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    (tmp_path / "old.py").write_text("1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "Start"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "old.py").write_text("2\n")
    (tmp_path / "untracked.py").write_text("3\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.warning("f940ac153950-dirty") == "not to be kept: changed since commit f940ac1539: old.py"


@pytest.mark.parametrize("asked", [True, False])
def test_the_warning_comes_before_the_run_and_only_with_results(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(provenance, "warning", lambda commit: "not to be kept")
    options = ["--json", str(tmp_path / "x.json")] if asked else []
    assert run.main(["last-layer", "--only", "none", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == (["run.py last-layer: not to be kept"] if asked else [])
