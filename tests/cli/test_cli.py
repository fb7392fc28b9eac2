"""The command line on a tiny model: every command, its files, its JSON, its exit codes and its one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers.tiny_models import tiny, tiny_tokenizer
from spurge.cli import main
from spurge.engine.cascade.scores import NeuronScores, NeuronSet
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_deltas import LowRank, WeightDeltas
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.models.sites import find_sites
from spurge.methods.macu.located import Located
from spurge.report.results import Results

GOOD, BAD = ["good", "great", "superb", "lovely"], ["bad", "awful", "dull", "boring"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, training and test rows, golden words and an edit."""
    folder = tmp_path_factory.mktemp("desk")
    model = tiny("bert", id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"text": f"the {noun} was {word} {end}", "label": label, "split": "train" if i % 2 else "test", "part": noun}
        for label, words in (("positive", GOOD), ("negative", BAD))
        for i, word in enumerate(words)
        for noun in ("film", "story", "plot")
        for end in ("today", "on tuesday")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    golden = {"causal": {"negative": BAD, "positive": GOOD}, "irrelevant": ["the", "was", "on", "tuesday", "today"]}
    (folder / "golden.json").write_text(json.dumps(golden))
    (folder / "words.csv").write_text("word,label\n" + "".join(f"{w},negative\n" for w in BAD) + "good,positive\n")
    sites = find_sites(model)
    neurons = NeuronSet({sites[0].name: [0, 3, 7], sites[2].name: [5]})
    NeuronEdit.build(model, neurons, [0.0, 0.5, -1.0, 2.0], {"method": "by hand"}).save(folder / "edit.safetensors")
    return folder


def spurge(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def wrong(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a user's mistake is answered with."""
    code, out, err = spurge(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("spurge: error: ")
    assert err.count("\n") == 1
    return err


def test_locate_then_edit(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--model", desk / "model", "--data", desk / "rows.jsonl", "--golden", desk / "golden.json", "--quiet")
    paper = ("--preset", "paper", "--batch-size", 12, "--fraction", 0.05, "--share", 0.1)
    train = ("--split", "train")
    small = ("--texts", 24, "--certify", 2, "--nodes", 3, "--cap", 20, "--memory", "256MiB", "--top-k", 3)
    code, out, err = spurge(
        capsys,
        "locate",
        *common,
        *train,
        *paper,
        *small,
        "--keep-punctuation",
        "--out",
        "located.safetensors",
        "--json",
        "locate.json",
    )
    assert (code, err) == (0, "")
    assert "causal" in out
    located = Located.load("located.safetensors")
    assert len(located.causal_set) <= 20
    numbers = Results.load("locate.json")
    assert numbers.head["name"] == "locate"
    assert numbers.select(metric="seconds")[0]["unit"] == "s"

    search = (*train, "--preset", "best", "--neurons", "all", "--texts", 16, "--batch-size", 8)
    code, out, err = spurge(
        capsys,
        "edit",
        *common,
        *search,
        "--located",
        "located.safetensors",
        "--out",
        "e.safetensors",
        "--json",
        "e.json",
    )
    assert (code, err) == (0, "")
    edit = NeuronEdit.load("e.safetensors")
    assert edit.info["search"] == "gradient"
    tokens = {"top_k": 3, "merge": "sum", "keep_punctuation": True, "correlation_set": "words"}
    assert {name: edit.info["settings"][name] for name in tokens} == tokens  # as they were located
    assert Results.load("e.json").select(case="all", metric="neurons")[0]["value"] == len(edit)

    test = (*common, "--edit", "e.safetensors", "--located", "located.safetensors", "--no-controls", "--json", "t.json")
    for given, top_k in (((), 3), (("--top-k", 2), 2)):
        code, _, err = spurge(capsys, "evaluate", *test, *given)
        assert (code, err) == (0, "")
        assert Results.load("t.json").head["settings"]["correlation_tokens"] == tokens | {"top_k": top_k}

    other = json.loads((desk / "golden.json").read_text())
    other["causal"]["positive"].append("clearly")
    Path("other.json").write_text(json.dumps(other))
    command = ["edit", *common, *search, "--located", "located.safetensors", "--out", "e.safetensors"]
    command[command.index("--golden") + 1] = "other.json"
    code, _, err = spurge(capsys, *command)
    assert code == 0
    assert err == "spurge: warning: --located: was found with other golden words than given now\n"


def test_evaluate_with_an_edit_and_with_the_edit_folded_in(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edit = ("--edit", desk / "edit.safetensors")
    tests = (
        "--data",
        f"all={desk / 'rows.jsonl'}",
        "--group-column",
        "part",
        "--draws",
        3,
        "--bootstrap",
        20,
        "--quiet",
    )
    golden = ("--golden", desk / "golden.json")
    code, out, err = spurge(capsys, "evaluate", "--model", desk / "model", *tests, *golden, *edit, "--json", "t.json")
    assert (code, err) == (0, "")
    assert "random (3 draws)" in out
    gated = Results.load("t.json")
    assert {row["method"] for row in gated.rows} == {"none", "edit", "threshold", "zero-all", "random"}
    assert {"accuracy", "worst_group", "eta"} <= {row["metric"] for row in gated.rows}

    code, _, err = spurge(capsys, "apply", "--model", desk / "model", *edit, "--out", "deep/cured", "--json", "a.json")
    assert (code, err) == (0, "")
    assert [path.name for path in Path("deep").iterdir()] == ["cured"]
    assert Results.load("a.json").rows[0]["value"] == 4
    code, _, err = spurge(capsys, "evaluate", "--model", "deep/cured", *tests, "--json", "folded.json")
    assert (code, err) == (0, "")
    accuracies = [
        found.select(case="all", method=method, metric="accuracy")[0]["value"]
        for found, method in ((gated, "edit"), (Results.load("folded.json"), "none"))
    ]
    assert accuracies[0] == accuracies[1]
    assert "with an edit folded in" in wrong(capsys, "evaluate", "--model", "deep/cured", *tests, *edit)


def test_an_edit_of_weights_is_measured_and_folded_in(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification

    monkeypatch.chdir(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(desk / "model")
    new = -model.classifier.weight.detach()
    WeightEdit.build(model, {"classifier.weight": new}, {"method": "turned"}).save("edit.safetensors")
    edit = ("--edit", "edit.safetensors")
    tests = ("--data", f"all={desk / 'rows.jsonl'}", "--bootstrap", 20, "--quiet")
    code, out, err = spurge(capsys, "evaluate", "--model", desk / "model", *tests, *edit, "--json", "t.json")
    assert (code, err) == (0, "")
    assert "random (20 draws)" in out
    assert max(map(len, out.splitlines())) <= 80
    rows = Results.load("t.json").rows
    assert {row["method"] for row in rows} == {"none", "edit", "threshold", "random"}
    WeightEdit.build(model, {"classifier.weight": new / 2}).save("half.safetensors")
    more = ("--beside", "half=half.safetensors", "--cue", "movie,so", "--untouched", desk / "rows.jsonl")
    more = (*more, "--group-column", "part", "--group-separator", "o", "--draws", 2)
    code, out, err = spurge(capsys, "evaluate", "--model", desk / "model", *tests, *edit, *more, "--json", "more.json")
    assert (code, err) == (0, "")
    rows = Results.load("more.json").rows
    controls = {"threshold", "random", "half: threshold", "half: random", "deleted"}
    assert {row["method"] for row in rows} == {"none", "edit", "half"} | controls
    assert {"untouched", "all (no cue)"} <= {row["case"] for row in rows}
    assert "beside: two edits are called 'x'" in wrong(
        capsys, "evaluate", "--model", desk / "model", *tests, "--beside", "x=a", "--beside", "x=b"
    )
    code, out, err = spurge(capsys, "apply", "--model", desk / "model", *edit, "--out", "cured", "--json", "a.json")
    assert (code, err) == (0, "")
    assert "WeightEdit(64 weights of 1 parameters, turned)" in out
    (row,) = Results.load("a.json").rows
    assert (row["metric"], row["value"], row["unit"]) == ("weights", 64, "weights")
    cured = AutoModelForSequenceClassification.from_pretrained("cured")
    for name, value in cured.state_dict().items():
        assert torch.equal(value, new if name == "classifier.weight" else model.state_dict()[name])
    assert "with an edit folded in" in wrong(capsys, "evaluate", "--model", "cured", *tests, *edit)


def test_apply_folds_exactly(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "out"
    code, said, _ = spurge(
        capsys, "apply", "--model", desk / "model", "--edit", desk / "edit.safetensors", "--out", out
    )
    assert code == 0
    assert str(out) in said
    before, after = (AutoModelForSequenceClassification.from_pretrained(path) for path in (desk / "model", out))
    changed = [name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])]
    names = [site.name for site in find_sites(before)]
    assert changed == [f"{names[0]}.weight", f"{names[2]}.weight"]
    assert (out / "tokenizer.json").is_file()


def test_apply_does_not_overwrite(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    arguments = ("apply", "--model", desk / "model", "--edit", desk / "edit.safetensors", "--out", tmp_path / "there")
    assert "exists already" in wrong(capsys, *arguments)


def test_apply_leaves_nothing_behind_when_it_fails(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("spurge.engine.edits.new_folders._sync", full)
    arguments = ("apply", "--model", desk / "model", "--edit", desk / "edit.safetensors", "--out", tmp_path / "x")
    assert "No space left on device" in wrong(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_apply_keeps_the_type_the_edit_was_made_for(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification

    half = AutoModelForSequenceClassification.from_pretrained(desk / "model", dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    wide = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half", dtype=torch.float32)
    NeuronEdit.build(wide, NeuronSet({find_sites(wide)[0].name: [1]}), 0.5).save(tmp_path / "edit.safetensors")
    code, out, _ = spurge(
        capsys,
        "apply",
        "--model",
        tmp_path / "half",
        "--edit",
        tmp_path / "edit.safetensors",
        "--out",
        tmp_path / "new",
    )
    assert code == 0
    assert "in float32 as the edit was made (the source has float16)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["cut"], "invalid choice: 'cut'"),
        (["locate"], "the following arguments are required"),
        (["demo", "--seed", "-1"], "expected a whole number of at least 0, got '-1'"),
        (["demo", "--threads", "0"], "expected a whole number of at least 1, got '0'"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in wrong(capsys, *arguments)


def locate(desk: Path, tmp_path: Path, **changes: Any) -> list[object]:
    """Arguments of a locate command; None leaves one out."""
    options = {"model": desk / "model", "data": desk / "rows.jsonl", "golden": desk / "golden.json"}
    options = {**options, "out": tmp_path / "x.safetensors", **changes}
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items() if value is not None]
    return ["locate", "--quiet", *(item for pair in pairs for item in pair)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere"}, "--model: '/nowhere' is not a transformers folder: there is no such folder"),
        ({"data": "/nowhere.csv"}, "/nowhere.csv: No such file or directory"),
        ({"golden": "/nowhere.json"}, "/nowhere.json"),
        ({"golden": None}, "one of the arguments --golden --lexicon is required"),
        ({"text_column": "body"}, "body"),
        ({"split": "dev"}, "no rows"),
        ({"limit": 0}, "argument --limit: expected a whole number of at least 1, got '0'"),
        ({"labels": "no,yes"}, "yes"),
        ({"nodes": 0}, "nodes: need at least 1"),
        ({"fraction": 2}, "fraction: expected a number above 0 and at most 1"),
        ({"memory": "much"}, "memory: expected bytes or a text such as '256MiB', got 'much'"),
        ({"out": "/nowhere/x.safetensors"}, "out: the folder of '/nowhere/x.safetensors' does not exist"),
        ({"json": "/nowhere/x.json"}, "json: the folder of '/nowhere/x.json' does not exist"),
        ({"device": "moon"}, "device: 'moon' cannot be used here"),
        ({"golden": None, "lexicon": "oxford"}, "oxford"),
    ],
)
def test_mistakes_of_locate(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert message in wrong(capsys, *locate(desk, tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []


def test_targets_are_tried_before_the_work(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, link, folder = tmp_path / "x.safetensors", tmp_path / "y", tmp_path / "z"
    out.touch()
    link.hardlink_to(out)
    folder.mkdir()
    (tmp_path / "file").touch()
    for changes, message in (
        ({}, f"--out: '{out}' cannot be written: has 2 hard links"),
        ({"out": folder}, f"--out: '{folder}' cannot be written: is a folder, expected a file"),
        ({"out": tmp_path / "new", "json": tmp_path / "new"}, "--json: expected another file than that of out"),
        ({"out": tmp_path / "new", "resume": tmp_path / "file" / "blocks"}, f"'{tmp_path / 'file'}' is no folder"),
    ):
        # What comes after the targets is wrong as well, and not looked at.
        assert message in wrong(capsys, *locate(desk, tmp_path, **{"model": "/nowhere"} | changes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x.safetensors", "y", "z"]


def test_evaluate_refuses_neurons_of_another_model(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(desk / "model")
    sites = find_sites(model)
    scores = NeuronScores({site.name: torch.ones(site.width) for site in sites})
    prints = {site.name: site.projection.fingerprint() for site in sites}
    some = NeuronSet({sites[0].name: [1]})
    command = [
        "evaluate",
        "--model",
        desk / "model",
        "--data",
        desk / "rows.jsonl",
        "--edit",
        desk / "edit.safetensors",
    ]
    command += ["--located", tmp_path / "l", "--draws", 2, "--bootstrap", 0, "--quiet"]
    for info in ({}, {"model": prints}):
        Located(scores, scores, some, some, {}, info).save(tmp_path / "l")
        assert spurge(capsys, *command)[0] == 0
    Located(scores, scores, some, some, {}, {"model": {**prints, sites[0].name: "0"}}).save(tmp_path / "l")
    message = "--located: was found in another model, or in this one with other weights; --force takes it"
    assert message in wrong(capsys, *command)
    assert spurge(capsys, *command, "--force")[0] == 0
    assert "argument --edit: given twice" in wrong(capsys, *command, "--edit", desk / "edit.safetensors")


def test_weights_come_from_a_column(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (desk / "rows.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["importance"] = (0, "0.5", 2, 1.5)[i % 4]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": data, "split": "test", "limit": 20, "texts": 30, "certify": 0, "preset": "paper"}
    code, _, err = spurge(capsys, *locate(desk, tmp_path, **given, weight_column="importance"))
    assert (code, err) == (0, "")
    found = Located.load(tmp_path / "x.safetensors")
    weights = [row["importance"] for row in rows if row["split"] == "test"][:20]
    assert found.info["weights"]["left_out"] == weights.count(0) > 0
    assert found.info["texts"] == 20 - weights.count(0)
    numbers = [float(weight) for weight in weights]
    effective = sum(numbers) ** 2 / sum(number**2 for number in numbers)
    assert found.info["weights"]["effective_texts"] == pytest.approx(effective)

    assert "row 1: no column 'gravity'" in wrong(capsys, *locate(desk, tmp_path, **given, weight_column="gravity"))
    error = wrong(capsys, *locate(desk, tmp_path, **given, weight_column="part"))
    assert "row 1: its part must be a finite number, got 'film'" in error
    at = max(i for i, row in enumerate(rows[:15]) if row["split"] == "test")
    for bad, rule in ((-1, "at least 0, got -1.0"), *((bad, f"a finite number, got {bad!r}") for bad in ("nan", None))):
        rows[at]["importance"] = bad
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        error = wrong(capsys, *locate(desk, tmp_path, **given, weight_column="importance"))
        assert f"{data}: row {at + 1}: its importance must be {rule}" in error


def test_quotes_of_a_table_are_read_as_asked(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.tsv").write_text('text\tlabel\n" good film\t1\nbad film\t0\ngreat plot "\t1\n')
    common = ("evaluate", "--model", desk / "model", "--data", "a.tsv", "--bootstrap", 0, "--quiet", "--json", "x.json")
    assert "a.tsv: row 1: a field that begins with a quote on line 2 runs on to line 4" in wrong(capsys, *common)
    assert spurge(capsys, *common, "--no-quotes")[0] == 0
    assert Results.load("x.json").select(case="a", metric="accuracy")[0]["n"] == 3
    assert spurge(capsys, *common, "--quotes")[0] == 0
    assert Results.load("x.json").select(case="a", metric="accuracy")[0]["n"] == 1


def test_a_folder_without_a_head_is_refused(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("bert").bert.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    error = wrong(capsys, *locate(desk, tmp_path, model=tmp_path / "base"))
    assert "no weights for classifier.bias, classifier.weight: not a fine-tuned classifier" in error


def test_labels_that_nobody_orders_are_asked_for(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("bert").save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    error = wrong(capsys, *locate(desk, tmp_path, model=tmp_path / "bare"))
    assert "give --labels with negative, positive in its order" in error


def test_lexicon_of_words_and_labels(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"golden": None, "lexicon": desk / "words.csv", "texts": 8, "certify": 0, "preset": "paper"}
    code, _, err = spurge(capsys, *locate(desk, tmp_path, **options))
    assert (code, err) == (0, "")
    assert (tmp_path / "x.safetensors").is_file()


def test_an_edit_of_another_model_is_refused(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("bert", seed=5).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    arguments = ("apply", "--model", tmp_path / "other", "--edit", desk / "edit.safetensors", "--out", tmp_path / "new")
    assert "not the one the edit was made for" in wrong(capsys, *arguments)
    assert spurge(capsys, *arguments, "--force")[0] == 0


def test_a_damaged_edit_is_refused(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.safetensors").write_bytes((desk / "edit.safetensors").read_bytes()[:-20])
    arguments = ("apply", "--model", desk / "model", "--edit", tmp_path / "cut.safetensors", "--out", tmp_path / "new")
    assert "truncated" in wrong(capsys, *arguments)


def test_two_sets_of_one_name_are_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--data", desk / "rows.jsonl")
    error = wrong(capsys, "evaluate", "--model", desk / "model", *rows, *rows)
    assert "data: two sets are called 'rows'; name them with NAME=FILE" in error


def test_an_option_that_is_given_twice_is_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edits = ("--edit", desk / "edit.safetensors", "--edit", desk / "other.safetensors")
    error = wrong(capsys, "evaluate", "--model", desk / "model", "--data", desk / "rows.jsonl", *edits)
    assert "argument --edit: given twice, expected once" in error


def test_proximity_is_located_from_the_best_preset(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"texts": 8, "certify": 0, "batch_size": 8}
    code, _, err = spurge(capsys, *locate(desk, tmp_path, objective="proximity", **small))
    assert (code, err) == (0, "")
    assert Located.load(tmp_path / "x.safetensors").info["objective"] == "proximity"


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "spurge: error: interrupted\n"),
        (RuntimeError("a\nb"), 1, "spurge: error: internal failure: RuntimeError: a b (--debug shows where)\n"),
        (ValueError("nodes: wrong"), 2, "spurge: error: nodes: wrong\n"),
        (ValueError("seed: wrong"), 2, "spurge: error: --seed: wrong\n"),
        (TypeError("nodes: expected int"), 2, "spurge: error: nodes: expected int\n"),
        (
            TypeError("bad operand"),
            1,
            "spurge: error: internal failure: TypeError: bad operand (--debug shows where)\n",
        ),
        (FileNotFoundError(2, "No such file", "x.csv"), 2, "spurge: error: x.csv: No such file\n"),
        (ModuleNotFoundError("plots need matplotlib"), 2, "spurge: error: plots need matplotlib\n"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    code: int,
    message: str,
) -> None:
    def fail() -> None:
        raise failure

    monkeypatch.setattr("spurge.doctor.examine", fail)
    assert spurge(capsys, "doctor") == (code, "", message)
    found, _, err = spurge(capsys, "doctor", "--debug")
    assert found == code
    assert "Traceback" in err


def test_help_and_version_answer_without_heavy_imports() -> None:
    code = "import sys; from spurge.cli import main; main(['--help']); main(['locate', '--help']); main(['--version'])"
    heavy = "; print('torch' in sys.modules, 'transformers' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False False False"
    for command in ("demo", "locate", "edit", "evaluate", "apply", "export", "doctor"):
        assert f"\n    {command} " in done.stdout


def test_a_repair_is_written_and_folded_in(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--model", desk / "model", "--data", desk / "rows.jsonl", "--split", "train", "--quiet")
    asked = ("--search", "weights", "--golden", desk / "golden.json", "--steps", 2, "--out", "repair.safetensors")
    gates = ("--golden", desk / "golden.json", "--out", "repair.safetensors")
    assert "located: gates need the neurons" in wrong(capsys, "edit", *common, *gates)
    which = ("--which", "lora", "--rank", 2, "--dev", desk / "rows.jsonl", "--controls", "--json", "repair.json")
    code, out, err = spurge(capsys, "edit", *common, *asked, *which)
    assert code == 0
    assert err == "" or "loses more than" in err
    edit = WeightDeltas.load("repair.safetensors")
    assert repr(edit) in out
    assert {delta.rank for delta in edit.deltas.values() if isinstance(delta, LowRank)} == {2}
    rows = Results.load("repair.json").select(metric="accuracy")
    assert {row["method"] for row in rows} == {"none", "MacU", "random", "no-swaps"}
    assert {row["case"] for row in rows} == {"home", "swapped"}
    code, _, err = spurge(
        capsys, "apply", "--model", desk / "model", "--edit", "repair.safetensors", "--out", "repaired"
    )
    assert (code, err) == (0, "")
    tests = ("--data", f"rows={desk / 'rows.jsonl'}", "--edit", "repair.safetensors", "--json", "t.json")
    code, _, err = spurge(capsys, "evaluate", "--model", desk / "model", *tests, "--quiet")
    assert (code, err) == (0, "")
