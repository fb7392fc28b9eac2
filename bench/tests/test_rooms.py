"""Imports between the rooms run one way, and every room says what it holds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1]
ALLOWED = {  # of each room: the others that it may import
    "common": set(),
    "peers": {"common"},
    "localisation": {"common", "peers"},
    "kernel_rates": {"common", "peers"},
    "last_layers": {"common", "peers"},
    "causal": {"common", "peers"},
    "experiments": {"common", "peers"},
}
MODULES = [path for room in ALLOWED for path in sorted((BENCH / room).glob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(BENCH)))
def test_imports_run_one_way(path: Path):
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    room = path.parent.name
    assert found & {*ALLOWED, "run"} <= ALLOWED[room] | {room}


def test_every_room_has_a_caption():
    captions = {
        path.parent.name: ast.get_docstring(ast.parse(path.read_text())) for path in BENCH.glob("*/__init__.py")
    }
    assert captions.keys() == ALLOWED.keys()
    assert all(captions.values())
