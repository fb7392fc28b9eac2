"""MacU's experiment: its order and labels; and all of it on made sentences."""

from __future__ import annotations

import importlib.util
import json
import lzma
from pathlib import Path

import pytest
import torch

from experiments import macu, subjects, sweep, tasks
from experiments.outcomes import Part, Record
from spurge.demo import grammar
from spurge.demo.grammar import Grammar
from spurge.demo.train import PACKAGE
from spurge.engine.data.examples import Example, Examples
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.methods.golden.golden import GoldenTokens
from spurge.report.results import Results

needs_model = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="extra demo not installed")
COMMON = ["--quick", "--threads", "1", "--seeds", "0"]


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sentences of the demo's grammar in the form of the real files."""
    rows = Grammar(train=240, share=0.0).training_rows(0)
    split = [{**row, "split": ("train", "dev", "test")[i % 3]} for i, row in enumerate(rows)]
    for name in ("sst2_sentences", "imdb_cad_original", "imdb_cad_revised"):
        _write(tmp_path / "sentiment" / f"{name}.jsonl.xz", split)
    for name in ("yelp_small", "cr_customer_reviews"):
        _write(tmp_path / "sentiment" / f"{name}.jsonl.xz", [{**row, "split": "test"} for row in rows * 5])
    words = [{"word": word, "label": label} for label, own in grammar.CAUSAL.items() for word in own]
    _write(tmp_path / "lexicons" / "opinion_lexicon_hu_liu.jsonl.xz", words)
    pairs = [
        {"premise": "They said so.", "hypothesis": row["text"], "label": tasks.data.INFERENCE[i % 3], "split": part}
        for i, row in enumerate(rows)
        for part in ("train", "validation", "test")
    ]
    for name in ("snli_subset", "mnli_subset", "breaking_nli"):
        _write(tmp_path / "nli" / f"{name}.jsonl.xz", pairs)
    _write(tmp_path / "nli" / "snli_cad.jsonl.xz", [{**row, "part": "revised_premise"} for row in pairs])
    labels = ("entailment", "neutral", "contradiction")
    cues = [{"word": word, "label": labels[i % 3]} for i, word in enumerate(row["word"] for row in words)]
    _write(tmp_path / "lexicons" / "snli_hypothesis_cues_pmi.jsonl.xz", cues)
    return tmp_path


def test_macu_and_its_controls_come_first_at_all_seeds() -> None:
    pairs = macu.schedule(macu.METHODS, [4, 5])
    first = 2 * len(macu.CORE)
    assert pairs[0] == ("fine-tuning", 4)
    assert {method for method, _ in pairs[:first]} == {*macu.CORE}
    assert [seed for _, seed in pairs[:first]] == [4] * len(macu.CORE) + [5] * len(macu.CORE)
    assert len(pairs) == len({*pairs}) == 2 * len(macu.METHODS)


def test_the_labels_that_a_method_used() -> None:
    free = ("fine-tuning", "poe", "macu-paper", "macu-paper:zero", "poe+macu-paper", "macu-paper@exact")
    asked = ("macu-best", "macu-best:zero", "nfl-co", "repair", "poe+macu-best", "macu-paper@counterfactual")
    assert [macu.labels_used(method) for method in free] == ["none"] * len(free)
    assert [macu.labels_used(method) for method in asked] == ["class"] * len(asked)


def test_a_moved_threshold_answers_each_label_as_often_as_the_edit(tmp_path: Path) -> None:
    rows = Examples([Example(f"text {i}", i % 2) for i in range(8)], ("no", "yes"))
    golden = GoldenTokens.from_words(no=["bad"], yes=["good"])
    task = tasks.Task("made", rows, rows, {"here": rows}, "here", (), golden, rows=8, epochs=1, max_length=16)
    plain, edited = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 2)
    edited[:3, 1] = 1
    bench = macu.Bench(task, Record(tmp_path, "outcomes", ()), [0], True)
    found = bench._moved(Part({}, {}, {"here": plain}), Part({}, {}, {"here": edited})).right["here"]
    margins = plain[:, 1] - plain[:, 0]
    wanted = (margins >= margins.sort(descending=True).values[2]).long()
    assert found.tolist() == (wanted == rows.targets).int().tolist()


def test_those_misled_by_the_hypothesis_alone_are_told_apart(tmp_path: Path) -> None:
    record, results = Record(tmp_path, "outcomes", ()), Results("macu")
    for method, right in (("fine-tuning", [1, 1, 0, 0]), (macu.HYPOTHESIS, [1, 0, 0, 1])):
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
    ("task", "methods"),
    [
        ("sa", ["macu-best", "macu-best:random", "macu-best:threshold", "nfl-cp", "last-layer", "deleted"]),
        ("nli", ["macu-paper", "macu-paper:zero", "poe", "poe+macu-paper", macu.HYPOTHESIS, "macu-paper@weights"]),
    ],
)
def test_methods_run_on_made_texts(folder: Path, tmp_path: Path, task: str, methods: list[str]) -> None:
    path, methods = tmp_path / "results.json", ["fine-tuning", *methods]
    asked = [task, str(folder), *COMMON, "--json", str(path), "--cache", str(tmp_path / "cache")]
    asked += ["--methods", ",".join(methods)]
    assert macu.main(asked) == 0
    results = Results.load(path)
    assert results.head["settings"]["rows"] == 64
    home = tasks.TASKS[task](folder).home
    assert {row["method"] for row in results.select(case=home, metric="accuracy")} == {*methods}
    assert {row["method"] for row in results.select(case="mean-ood", metric="gain_low")} == {*methods[1:]}
    assert bool(results.select(case="mean-ood", method="poe+macu-paper", metric="gain_over_poe")) == (task == "nli")
    assert 0 <= results.select(method=methods[1], metric="eta")[0]["value"] <= 2
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
