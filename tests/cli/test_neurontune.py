"""``spurge neurontune`` on a planted shortcut: files, numbers, controls and one-line errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.planted_features import dimension_sets, layer_of
from helpers.pretended_devices import stand_in
from spurge.cli import main
from spurge.engine.base import budgets
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head
from spurge.methods.neurontune.tuned import Tuned
from spurge.report.results import Results


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Feature files of a model's layer, its validation set with and without groups, and one that no model has."""
    folder = tmp_path_factory.mktemp("desk")
    sets = dimension_sets()
    head = Head.of(layer_of(sets.train.head))
    for name in ("train", "validation", "test"):
        getattr(sets, name).with_head(head).save(folder / f"{name}.safetensors")
    sets.validation.with_head(head).with_groups(None).save(folder / "plain.safetensors")
    sets.validation.save(folder / "bare.safetensors")
    signed = sets.validation.with_head(head)
    replace(signed, values=signed.values - 0.5).save(folder / "signed.safetensors")
    torch.save({}, folder / "other.pt")
    return folder


def spurge(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["neurontune", *(str(argument) for argument in arguments), "--quiet"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_validation_set_in_halves_with_all_controls(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    test = ("--test", f"birds={desk / 'test.safetensors'}", "--draws", 2, "--dfr", "--bootstrap", 20)
    outputs = ("--out", "edit.safetensors", "--tuned", "tuned.safetensors", "--json", "numbers.json")
    code, out, err = spurge(capsys, "--features", desk / "validation.safetensors", "--l2", 1e-3, *test, *outputs)
    assert (code, err) == (0, "")
    assert "labels used: class" in out
    numbers = Results.load("numbers.json")
    worst = {row["method"]: row for row in numbers.select(case="birds", metric="worst_group")}
    moved = [f"{name}: threshold" for name in ("NeuronTune", "no mask", "DFR")]
    assert list(worst) == ["none", "NeuronTune", "no mask", "random mask", "DFR", *moved]
    assert worst["NeuronTune"]["value"] > worst["no mask"]["value"] + 10
    assert [row["labels"] for row in worst.values()] == [
        "none",
        "class",
        "class",
        "class",
        "group",
        "none",
        "none",
        "none",
    ]
    assert worst["random mask"]["n"] == 2
    tuned, edit = Tuned.load("tuned.safetensors"), WeightEdit.load("edit.safetensors")
    layer = layer_of(Features.load(desk / "train.safetensors").head)
    with edit.applied(layer):
        assert torch.equal(layer.weight, tuned.head.weight)
    first, second = Features.load(desk / "validation.safetensors").split()
    assert tuned.info["data"] == {"identify": first.fingerprint(), "train": second.fingerprint()}


def test_the_control_without_a_mask_and_dfr_are_edits_as_well(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = Features.load(desk / "validation.safetensors")
    assert plain.groups is not None
    groups = plain.groups % 2  # the shortcut alone
    plain.with_groups(groups, ("land", "water")).save("validation.safetensors")
    outputs = ("--out", "edit.safetensors", "--no-mask-out", "plain.safetensors", "--dfr-out", "dfr.safetensors")
    test = ("--test", f"birds={desk / 'test.safetensors'}", "--draws", 2, "--bootstrap", 0, "--json", "numbers.json")
    code, out, err = spurge(capsys, "--features", "validation.safetensors", "--l2", 1e-3, *outputs, *test)
    assert (code, err) == (0, "")
    numbers = Results.load("numbers.json")
    crossed = plain.with_groups(groups, ("land", "water")).crossed()
    assert crossed.crossed() is crossed
    test_set = Features.load(desk / "test.safetensors")
    for name, method, labels in (("plain", "no mask", "class"), ("dfr", "DFR", "group")):
        edit = WeightEdit.load(f"{name}.safetensors")
        assert edit.info["labels"] == labels
        layer = layer_of(test_set.head)
        with edit.applied(layer):
            right = layer(test_set.values).argmax(1) == test_set.labels
        (row,) = numbers.select(case="birds", metric="accuracy", method=method)
        assert row["value"] == pytest.approx(100 * float(right.double().mean()))
    (worst,) = numbers.select(case="birds", metric="worst_group", method="DFR")
    assert worst["value"] > 60  # of classes in groups, though the file has the groups alone
    assert "dfr.safetensors" in out


def test_two_sets_and_settings(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ("--features", desk / "train.safetensors", "--identify", desk / "plain.safetensors")
    how = ("--threshold", 0, 0.1, "--l2", 0.001, 0.01, "--classes", "each", "--criterion", "worst_class")
    rest = ("--signs", "relu", "--least-wrong", 5, "--keep", 0.1, "--start", "head", "--seed", 3)
    test = ("--test", f"t={desk / 'test.safetensors'}", "--no-controls", "--bootstrap", 0)
    code, out, err = spurge(capsys, *files, *how, *rest, *test, "--out", "edit.safetensors", "--json", "n.json")
    assert (code, err) == (0, "")
    info = WeightEdit.load("edit.safetensors").info
    assert len(info["candidates"]) == 4
    chosen = {name: info["settings"][name] for name in ("classes", "select", "signs", "least_wrong", "keep", "start")}
    assert list(chosen.values()) == ["each", "worst_class", "relu", 5, 0.1, "head"]
    assert info["seed"] == 3
    assert {row["method"] for row in Results.load("n.json").select(case="t")} == {
        "none",
        "NeuronTune",
        "NeuronTune: threshold",
    }
    assert "edit.safetensors" in out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["train"], "--out, --tuned: give at least one"),
        (["bare", "--out", "e"], "belongs to no model that could be edited; use --tuned"),
        (["plain", "--tuned", "t", "--dfr"], "dfr: needs groups"),
        (["validation", "--tuned", "t", "--threshold", "-9"], "all 96 dimensions have a score above -9.0"),
        (["validation", "--tuned", "t", "--least-wrong", "900"], "no class has 900 wrong predictions"),
        (["validation", "--tuned", "t", "--keep", "2"], "keep: must be at least 0 and below 1"),
        (["train", "--tuned", "t", "--identify", "bare"], "train: its head is not that of identify"),
        (["signed", "--out", "e", "--signs", "split"], "signs: with 'split' the new layer reads positive parts"),
        (["absent", "--tuned", "t"], "No such file"),
        (["validation", "--tuned", "no/such/t"], "tuned: the folder of 'no/such/t' does not exist"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    desk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *rest = arguments
    rest = [str(desk / f"{a}.safetensors") if a == "bare" else a for a in rest]
    code, _, err = spurge(capsys, "--features", desk / f"{name}.safetensors", *rest)
    assert code == 2
    assert text in err
    assert len(err.splitlines()) == 1


def test_works_on_the_device_that_is_named(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda device: 2**30)
    test = ("--test", f"birds={desk / 'test.safetensors'}", "--draws", 2, "--dfr", "--bootstrap", 5)
    with stand_in(gpu := torch.device("cuda", 0)) as ran:
        asked = ("--features", desk / "validation.safetensors", *test, "--tuned", tmp_path / "tuned")
        code, _, err = spurge(capsys, *asked, "--device", "cuda:0")
    assert (code, err) == (0, "")
    assert ran == {"segment_medians": {gpu}}
    assert Tuned.load(tmp_path / "tuned").head.width == 96
