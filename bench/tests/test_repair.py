"""Parts of the repair experiment that need no model."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments import data, repair
from experiments.outcomes import Part, Record
from spurge.report.results import Results


def test_repairs_come_first_then_one_seed_of_each_control() -> None:
    pairs = repair.schedule(repair.METHODS, [5, 6, 7, 8, 9])
    assert pairs[:3] == [("none", 5), ("repair", 5), ("repair", 6)]
    assert {method for method, seed in pairs[3:8] if seed == 5} == {*repair.METHODS} - {"none", "repair"}
    assert pairs[8:11] == [("repair", 7), ("repair", 8), ("repair", 9)]
    assert sorted(pairs) == sorted({*pairs})
    assert [seed for method, seed in pairs if method == "wise-ft"] == [5]


def test_a_repair_on_two_threads_stands_beside_that_on_others(tmp_path: Path) -> None:
    record = Record(tmp_path, "repair outcomes", data.SENTIMENT_OUTSIDE)
    right = {"sst2": torch.tensor([1, 0, 1, 1], dtype=torch.uint8)}
    record.parts["", "repair"] = {0: Part(right, {"cpu_seconds": 3.0})}
    again = Part({"sst2": torch.ones(4, dtype=torch.uint8)}, {"cpu_seconds": 3.0, "seconds": 2.0})
    record.parts["", repair.AGAIN] = {0: again}
    head = Results("repair", {})
    record.write(head, "none", lambda method: "class", base_once=True)
    repair.add_agreement(head, record)
    rows = {row["metric"]: row for row in head.rows if row["method"] == repair.AGAIN}
    assert rows["agreement"]["value"] == 75
    assert (rows["seconds"]["value"], rows["seconds"]["unit"]) == (2.0, "s")
