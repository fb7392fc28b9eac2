"""What commands print keeps to the terminal's width, in every test of a command."""

from __future__ import annotations

import builtins
import os
from typing import Any

import pytest

from spurge.engine.base.tables import width_of


@pytest.fixture(autouse=True)
def _printed_within_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line but those that name a file: a path is not broken, so that it can be copied."""
    plain = builtins.print

    def checked(*texts: Any, **how: Any) -> None:
        for line in how.get("sep", " ").join(map(str, texts)).split("\n"):
            names_a_file = os.sep in line or ".safetensors" in line
            assert width_of(line) <= 80 or names_a_file or how.get("file") is not None, f"wider than 80: {line}"
        plain(*texts, **how)

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(builtins, "print", checked)
