"""MacU's experiment: its order and labels; and all of it on made sentences."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from experiments import macu, methods, subjects, sweep, tasks
from experiments.outcomes import Part, Record
from spurge.demo.train import PACKAGE
from spurge.engine.data.examples import Example, Examples
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.methods.golden.golden import GoldenTokens
from spurge.report.results import Results

needs_model = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="extra demo not installed")
COMMON = ["--quick", "--threads", "1", "--seeds", "0"]


def test_macu_and_its_controls_come_first_at_all_seeds() -> None:
    pairs = macu.schedule(methods.METHODS, [4, 5])
    first = 2 * len(methods.CORE)
    assert pairs[0] == ("fine-tuning", 4)
    assert {method for method, _ in pairs[:first]} == {*methods.CORE}
    assert [seed for _, seed in pairs[:first]] == [4] * len(methods.CORE) + [5] * len(methods.CORE)
    assert len(pairs) == len({*pairs}) == 2 * len(methods.METHODS)


def test_the_labels_that_a_method_used() -> None:
    free = ("fine-tuning", "poe", "macu-paper", "macu-paper:zero", "poe+macu-paper", "macu-paper@exact")
    asked = ("macu-best", "macu-best:zero", "nfl-co", "repair", "poe+macu-best", "macu-paper@counterfactual")
    assert [methods.labels_used(method) for method in free] == ["none"] * len(free)
    assert [methods.labels_used(method) for method in asked] == ["class"] * len(asked)


def test_a_moved_threshold_answers_each_label_as_often_as_the_edit(tmp_path: Path) -> None:
    rows = Examples([Example(f"text {i}", i % 2) for i in range(8)], ("no", "yes"))
    golden = GoldenTokens.from_words(no=["bad"], yes=["good"])
    task = tasks.Task("made", rows, rows, {"here": rows}, "here", (), golden, rows=8, epochs=1, max_length=16)
    plain, edited = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 2)
    edited[:3, 1] = 1
    bench = methods.Bench(task, Record(tmp_path, "outcomes", ()), [0], True)
    found = bench._moved(Part({}, {}, {"here": plain}), Part({}, {}, {"here": edited})).right["here"]
    margins = plain[:, 1] - plain[:, 0]
    wanted = (margins >= margins.sort(descending=True).values[2]).long()
    assert found.tolist() == (wanted == rows.targets).int().tolist()


def test_those_misled_by_the_hypothesis_alone_are_told_apart(tmp_path: Path) -> None:
    record, results = Record(tmp_path, "outcomes", ()), Results("macu")
    for method, right in (("fine-tuning", [1, 1, 0, 0]), (methods.HYPOTHESIS, [1, 0, 0, 1])):
        record.parts["", method] = {0: Part({"cad": torch.tensor(right, dtype=torch.uint8)}, {})}
    macu.add_misled(results, record)
    assert [(row["method"], row["value"], row["n"]) for row in results.rows] == [("fine-tuning", 50.0, 2)]


@needs_model
def test_activations_are_means_over_the_tokens_of_a_text() -> None:
    from spurge.demo.train import load_base

    handle = Handle(*load_base(("no", "yes"), 2))
    sites = [site.name for site in handle.sites]
    rows = Examples([Example("a short one", 0), Example("one that is a good deal longer than it", 1)], ("no", "yes"))
    both = subjects.activations(handle, NeuronSet({sites[0]: [3], sites[1]: [5]}), rows, 32)
    single = [NeuronSet({sites[0]: [3]}), NeuronSet({sites[1]: [5]})]
    each = [subjects.activations(handle, neurons, rows, 32) for neurons in single]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)
    alone = subjects.activations(handle, single[0], rows[:1], 32)
    torch.testing.assert_close(alone, each[0][:1])
    assert subjects.depths(handle, NeuronSet({sites[0]: [3, 4], sites[1]: [5]})) == [1, 1, 2]


def test_an_unknown_method_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert macu.main(["sa", str(folder), *COMMON, "--methods", "fine-tuning,magic"]) == 2
    assert "methods: 'magic' is unknown, expected some of fine-tuning" in capsys.readouterr().err


@needs_model
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(located|dev)")
@pytest.mark.parametrize(
    ("task", "asked"),
    [
        ("sa", ["macu-best", "macu-best:random", "macu-best:threshold", "nfl-cp", "last-layer", "deleted"]),
        ("nli", ["macu-paper", "macu-paper:zero", "poe", "poe+macu-paper", methods.HYPOTHESIS, "macu-paper@weights"]),
    ],
)
def test_methods_run_on_made_texts(folder: Path, tmp_path: Path, task: str, asked: list[str]) -> None:
    path, names = tmp_path / "results.json", ["fine-tuning", *asked]
    asked = [task, str(folder), *COMMON, "--json", str(path), "--cache", str(tmp_path / "cache")]
    asked += ["--methods", ",".join(names)]
    assert macu.main(asked) == 0
    results = Results.load(path)
    assert results.head["settings"]["rows"] == 64
    home = tasks.TASKS[task](folder).home
    assert {row["method"] for row in results.select(case=home, metric="accuracy")} == {*names}
    assert {row["method"] for row in results.select(case="mean-ood", metric="gain_low")} == {*names[1:]}
    assert bool(results.select(case="mean-ood", method="poe+macu-paper", metric="gain_over_poe")) == (task == "nli")
    assert 0 <= results.select(method=names[1], metric="eta")[0]["value"] <= 2
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert macu.main(asked) == 0
    assert {file: file.stat().st_mtime_ns for file in made} == made


@needs_model
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:located")
def test_the_fitness_of_the_swarm_never_falls(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert macu.main(["sweep", str(folder), *COMMON, "--json", str(path)]) == 0
    for name in list(sweep.SETTINGS)[:2]:
        found = [row["value"] for row in Results.load(path).select(method=name, metric="fitness")]
        assert found
        assert found == sorted(found)


@needs_model
@pytest.mark.slow
def test_layers_add_up_to_the_located_neurons(folder: Path, tmp_path: Path) -> None:
    path, plots = tmp_path / "results.json", tmp_path / "plots"
    assert macu.main(["maps", str(folder), *COMMON, "--json", str(path), "--plot", str(plots)]) == 0
    results, names = Results.load(path), ("causal", "spurious", "both", "either")
    causal, spurious, both, either = (
        sum(row["value"] for row in results.select(method=name, metric="neurons")) for name in names
    )
    assert causal + spurious - both == either > 0
    assert {row["case"] for row in results.rows if row["metric"] == "neurons"} == {
        f"map, layer {layer}" for layer in range(1, 7)
    }
    assert (plots / "macu-map-0.png").stat().st_size > 0
