"""Plans are held against runs, and their rows are those of results files."""

from __future__ import annotations

from pathlib import Path

import run
from spurge.report.results import Results


def test_predicted_and_measured(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert run.main(["plan", "--quick", "--shapes", "tiny-8x2", "--json", str(file)]) == 0
    results = Results.load(file)
    for metric in ("flops", "peak_bytes", "seconds"):
        values = [results.select(method=method, metric=metric)[0]["value"] for method in ("predicted", "measured")]
        assert min(values) >= 0
    assert results.select(metric="flops_ratio")[0]["value"] == 1.0
