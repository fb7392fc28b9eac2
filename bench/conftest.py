"""Benchmarks as pytest cases: ``pytest bench`` runs the small ones; ``--bench-size memory`` larger arrays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spurge benchmarks")
    group.addoption("--bench-size", choices=["cache", "middle", "memory"], default="cache", help="size of the arrays")
    group.addoption("--bench-compile", action="store_true", help="torch.compile too: half a minute of compiling")


@pytest.fixture
def bench_size(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--bench-size")
