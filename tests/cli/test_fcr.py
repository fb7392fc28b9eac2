"""``spurge fcr`` on planted features: the edit fits the model, and mistakes are answered in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.planted_features import layer_of, unit_features
from helpers.pretended_devices import stand_in
from spurge.cli import main
from spurge.engine.base import budgets
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.features.features import Features
from spurge.methods.fcr.removal import Removal
from spurge.report.results import Results


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features whose groups are the shortcut, and sets whose groups are class and shortcut."""
    folder = tmp_path_factory.mktemp("desk")
    train, shortcut = unit_features(600, 0.95, 0)
    train.with_groups(shortcut, ("land", "water")).save(folder / "train.safetensors")
    train.with_groups(None).save(folder / "plain.safetensors")
    for seed, name in ((1, "select"), (2, "test")):
        unit_features(400, 0.5, seed, train.head)[0].save(folder / f"{name}.safetensors")
    return folder


def spurge(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("preset", [(), ("--preset", "paper")])
def test_a_feature_is_removed(
    desk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    preset: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ("--features", desk / "train.safetensors", "--select", desk / "select.safetensors")
    choice = ("--remove-feature", "all", "--criterion", "worst_group", "--bootstrap", 20)
    test = ("--test", f"birds={desk / 'test.safetensors'}")
    outputs = ("--out", "edit.safetensors", "--removal", "removal.safetensors", "--json", "fcr.json")
    code, out, err = spurge(capsys, "fcr", *files, *choice, *test, *outputs, *preset, "--quiet")
    assert (code, err) == (0, "")
    assert "group labels of 400 samples" in out
    numbers = Results.load("fcr.json")
    before, after = (numbers.select(case="birds", metric="worst_group", method=m)[0]["value"] for m in ("none", "FCR"))
    assert after > before + 10
    assert numbers.select(case="birds", metric="worst_group", method="FCR")[0]["labels"] == "group"
    (random,) = numbers.select(case="birds", metric="worst_group", method="random")
    assert random["n"] == 20
    assert numbers.select(case="birds", metric="worst_group", method="FCR: threshold")
    edit, removal = WeightEdit.load("edit.safetensors"), Removal.load("removal.safetensors")
    assert len(edit) == len(removal.edges) == 2
    assert (removal.edges[0].rate == removal.edges[1].rate) == bool(preset)
    layer = layer_of(Features.load(desk / "train.safetensors").head)
    with edit.applied(layer):
        assert torch.equal(layer.weight, removal.head.weight)


def test_one_file_finds_weights_in_one_half_and_chooses_by_classes_in_groups_in_the_other(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    balanced, shortcut = unit_features(800, 0.5, 5, Features.load(desk / "train.safetensors").head)
    both = balanced.with_groups(shortcut, ("land", "water"))
    both.save(tmp_path / "both.safetensors")
    first, second = both.split(by="group", seed=3)
    first.save(tmp_path / "first.safetensors")
    second.with_groups(2 * second.labels + second.groups, "abcd").save(tmp_path / "second.safetensors")
    choice = ("--remove-feature", "all", "--criterion", "worst_group", "--quiet", "--seed", 3)
    code, out, err = spurge(
        capsys, "fcr", "--features", tmp_path / "both.safetensors", *choice, "--out", tmp_path / "a.safetensors"
    )
    assert (code, err) == (0, "")
    assert "group labels of 400 samples" in out
    files = ("--features", tmp_path / "first.safetensors", "--select", tmp_path / "second.safetensors")
    spurge(capsys, "fcr", *files, *choice, "--out", tmp_path / "b.safetensors")
    one, two = (WeightEdit.load(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.info["edges"] == two.info["edges"]


@pytest.mark.parametrize("how", [("--rate", 0.05), ("--angle", 20)])
def test_one_group_by_name_and_given_tilts(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: tuple[str, float]
) -> None:
    out = tmp_path / "edit.safetensors"
    train = ("--features", desk / "train.safetensors")
    code, _, err = spurge(capsys, "fcr", *train, "--remove-feature", "water", *how, "--out", out, "--quiet")
    assert (code, err) == (0, "")
    (edge,) = WeightEdit.load(out).info["edges"]
    assert (edge["row"], edge["target"]) == (1, 1)
    assert edge[how[0].removeprefix("--")] == pytest.approx(how[1])


def test_a_class_is_removed(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "edit.safetensors"
    features = ("--features", desk / "plain.safetensors")
    code, said, err = spurge(
        capsys, "fcr", *features, "--remove-class", "1", "--score", "product", "--out", out, "--quiet"
    )
    assert (code, err) == (0, "")
    assert "90.0°" in said
    assert WeightEdit.load(out).info["settings"]["score"] == "product"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--remove-class", "fish"), "remove-class: expected one of 0, 1, got 'fish'"),
        (("--remove-class", "1", "--criterion", "gap"), "criterion: a class is removed at a given --rate"),
        (("--remove-feature", "sky", "--rate", "0.1"), "remove-feature: expected one of land, water, got 'sky'"),
        (("--remove-feature", "all"), "rate or angle or criterion: expected exactly one of them, got none"),
        (("--remove-feature", "all", "--rate", "2"), "above 1; FCR(most=...) allows it"),
        (("--remove-class", "1", "--weights", "0"), "weights: need at least 1"),
        ((), "one of the arguments --remove-class --remove-feature is required"),
    ],
)
def test_mistakes(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    files = ("--features", desk / "train.safetensors", "--out", tmp_path / "edit.safetensors", "--quiet")
    code, out, err = spurge(capsys, "fcr", *files, *arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "edit.safetensors").exists()


def test_features_without_groups_or_model(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ("--remove-feature", "all", "--rate", "0.1", "--out", tmp_path / "edit.safetensors", "--quiet")
    _, _, err = spurge(capsys, "fcr", "--features", desk / "plain.safetensors", *rest)
    assert "has no groups that tell the feature" in err
    features, _ = unit_features(50, 0.5, 3)
    bare = features.with_head(type(features.head)(features.head.weight, features.head.bias))
    bare.save(tmp_path / "bare.safetensors")
    _, _, err = spurge(capsys, "fcr", "--features", tmp_path / "bare.safetensors", *rest)
    assert "belongs to no model that could be edited" in err


def test_works_on_the_device_that_is_named(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda device: 2**30)
    files = ("--features", desk / "train.safetensors", "--select", desk / "select.safetensors")
    asked = (*files, "--remove-feature", "all", "--criterion", "worst_group", "--test", desk / "test.safetensors")
    outputs = ("--out", tmp_path / "edit", "--removal", tmp_path / "removal", "--bootstrap", 5, "--quiet")
    with stand_in(gpu := torch.device("cuda", 0)) as ran:
        code, _, err = spurge(capsys, "fcr", *asked, *outputs, "--device", "cuda:0")
    assert (code, err) == (0, "")
    assert ran == {"associate_": {gpu}, "correct_interval": {gpu}}
    assert len(Removal.load(tmp_path / "removal").edges) == len(WeightEdit.load(tmp_path / "edit")) == 2
    code, _, err = spurge(capsys, "fcr", *asked, *outputs, "--device", "moon")
    assert code != 0
    assert "device: 'moon' cannot be used here" in err
