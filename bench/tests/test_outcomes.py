"""What is kept of a method at a seed, and the accuracies, gains and intervals that follow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments import outcomes
from experiments.outcomes import Part, Record
from spurge.report.results import Results

OUTSIDE = ("imdb", "cad", "yelp", "cr")
BEFORE = {case: torch.tensor([1, 0, 1, 0], dtype=torch.uint8) for case in ("sst2", *OUTSIDE)}
BETTER = BEFORE | {"cad": torch.tensor([1, 1, 1, 0], dtype=torch.uint8)}
BEST = BEFORE | {"cad": torch.tensor([1, 1, 1, 1], dtype=torch.uint8)}


def test_gains_are_means_over_seeds_with_intervals_around_them() -> None:
    found = outcomes.gains([(BETTER, BEFORE), (BEST, BEFORE)], OUTSIDE)
    assert found["sst2"] == (0.0, 0.0, 0.0, 4)
    gain, low, high, texts = found["cad"]
    assert (gain, texts) == (37.5, 4)
    assert 0 <= low < gain < high <= 100
    assert found["mean-ood"][0] == pytest.approx(37.5 / 4)
    assert found["mean-ood"][3] == 16


def test_intervals_do_not_depend_on_the_order_of_the_sets() -> None:
    draw = torch.Generator().manual_seed(0)
    with_it, without = ({case: torch.randint(2, (40,), generator=draw) for case in OUTSIDE} for _ in range(2))
    turned = (dict(reversed(with_it.items())), dict(reversed(without.items())))
    assert outcomes.gains([(with_it, without)], OUTSIDE) == outcomes.gains([turned], OUTSIDE)


def test_the_mean_is_of_the_four_sets_outside() -> None:
    right = {"sst2": torch.ones(2), "imdb": torch.ones(2), "cad": torch.zeros(2), "yelp": torch.ones(2)}
    assert "mean-ood" not in outcomes.accuracies(right, OUTSIDE)
    assert outcomes.accuracies(right | {"cr": torch.zeros(2)}, OUTSIDE)["mean-ood"] == 50


def test_a_part_is_made_once_and_comes_back_whole(tmp_path: Path) -> None:
    made = []

    def make() -> Part:
        made.append(1)
        return Part(BEST, {"cpu_seconds": 2.0, "sets": {"a": [1]}}, {"cad": torch.randn(4, 2)})

    first, again = (Record(tmp_path, "outcomes", OUTSIDE).measure("", "x", 3, "k", make) for _ in range(2))
    assert len(made) == 1
    assert again.facts == first.facts
    assert again.right.keys() == BEST.keys()
    assert torch.equal(again.logits["cad"], first.logits["cad"])
    Record(tmp_path, "outcomes", OUTSIDE).measure("", "x", 3, "another key", make)
    assert len(made) == 2


def test_every_seed_is_compared_with_the_base_of_its_own(tmp_path: Path) -> None:
    record = Record(tmp_path, "outcomes", OUTSIDE)
    for method, seed, right in (("base", 0, BEFORE), ("base", 1, BEST), ("x", 0, BETTER), ("x", 1, BEST)):
        record.measure("", method, seed, "k", lambda right=right: Part(right, {"eta": 0.5}))
    results = Results("outcomes")
    record.write(results, "base", lambda method: "none")
    (gain,) = results.select(case="cad", method="x", metric="gain")
    assert (gain["value"], gain["labels"]) == (12.5, "none")
    assert "seeds 0, 1" in gain["note"]
    assert not results.select(method="base", metric="gain")
    assert [row["value"] for row in results.select(case="all", metric="eta", method="x")] == [0.5, 0.5]
    record.write(results, "base", lambda method: "none", base_once=True)
    (gain,) = results.select(case="cad", method="x", metric="gain")
    assert gain["value"] == 37.5
