"""Parts of the repair experiment that need no model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments import repair
from spurge.report.results import Results


def test_repairs_come_first_then_one_seed_of_each_control() -> None:
    pairs = repair.schedule(repair.METHODS, [5, 6, 7, 8, 9])
    assert pairs[:3] == [("none", 5), ("repair", 5), ("repair", 6)]
    assert {method for method, seed in pairs[3:8] if seed == 5} == {*repair.METHODS} - {"none", "repair"}
    assert pairs[8:11] == [("repair", 7), ("repair", 8), ("repair", 9)]
    assert sorted(pairs) == sorted({*pairs})
    assert [seed for method, seed in pairs if method == "wise-ft"] == [5]


def test_gains_are_means_over_seeds_with_intervals_around_them() -> None:
    before = {case: torch.tensor([1, 0, 1, 0], dtype=torch.uint8) for case in ("sst2", *repair.OUTSIDE)}
    better = before | {"cad": torch.tensor([1, 1, 1, 0], dtype=torch.uint8)}
    best = before | {"cad": torch.tensor([1, 1, 1, 1], dtype=torch.uint8)}
    found = repair._gains({0: better, 1: best}, before)
    assert found["sst2"] == (0.0, 0.0, 0.0, 4)
    gain, low, high, texts = found["cad"]
    assert (gain, texts) == (37.5, 4)
    assert 0 <= low < gain < high <= 100
    assert found["mean-ood"][0] == pytest.approx(37.5 / 4)
    assert found["mean-ood"][3] == 16


def test_the_mean_is_of_the_four_sets_outside() -> None:
    right = {"sst2": torch.ones(2), "imdb": torch.ones(2), "cad": torch.zeros(2), "yelp": torch.ones(2)}
    assert "mean-ood" not in repair._accuracies(right)
    assert repair._accuracies(right | {"cr": torch.zeros(2)})["mean-ood"] == 50


def test_a_repair_on_two_threads_stands_beside_that_on_others(tmp_path: Path) -> None:
    record = repair.Record(tmp_path)
    right = {"sst2": torch.tensor([1, 0, 1, 1], dtype=torch.uint8)}
    for method, own, facts in (
        ("repair", right, {"cpu_seconds": 3.0}),
        (repair.AGAIN, {"sst2": torch.ones(4, dtype=torch.uint8)}, {"cpu_seconds": 3.0, "seconds": 2.0}),
    ):
        record.found["", method], record.facts["", method, 0] = {0: own}, facts
    head = Results("repair", {})
    record.write(head, None)
    rows = {row["metric"]: row for row in head.rows if row["method"] == repair.AGAIN}
    assert rows["agreement"]["value"] == 75
    assert (rows["seconds"]["value"], rows["seconds"]["unit"]) == (2.0, "s")
