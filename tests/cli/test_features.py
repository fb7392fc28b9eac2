"""``spurge features`` on a tiny model: its file, its numbers, its cache and its one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_models import tiny, tiny_tokenizer
from spurge import Examples, Features, extract
from spurge.cli import main
from spurge.report.results import Results


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and labelled rows in groups."""
    folder = tmp_path_factory.mktemp("desk")
    model = tiny("bert", id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"text": f"the {noun} was {word} today", "label": label, "part": noun}
        for label, words in (("positive", ("good", "great", "superb")), ("negative", ("bad", "awful")))
        for word in words
        for noun in ("film", "story", "plot")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(desk: Path, out: Path, **changes: Any) -> list[str]:
    """Arguments of a features command; None leaves one out, True is a flag."""
    options = {"model": desk / "model", "data": desk / "rows.jsonl", "out": out, "quiet": True, **changes}
    arguments = ["features"]
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return arguments


def test_the_file_holds_what_extract_gives(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    out, numbers = tmp_path / "x.safetensors", tmp_path / "x.json"
    assert main(command(desk, out, group_column="part", json=numbers)) == 0
    said = capsys.readouterr()
    assert said.err == ""
    found = Features.load(out)
    assert found.names == ("negative", "positive")
    assert found.group_names == ("film", "plot", "story")
    model = AutoModelForSequenceClassification.from_pretrained(desk / "model")
    data = Examples.load(desk / "rows.jsonl", group="part", labels=["negative", "positive"])
    expected = extract(model, data, tokenizer=tiny_tokenizer(), progress=False)
    assert found.fingerprint() == expected.fingerprint()
    accuracy = 100 * float(found.right().double().mean())
    rows = Results.load(numbers).select(metric="accuracy")
    assert [row["case"] for row in rows] == [
        "all", "class negative", "class positive", "group film", "group plot", "group story",
    ]  # fmt: skip
    assert (rows[0]["value"], rows[0]["n"], rows[0]["unit"]) == (accuracy, 15, "percent")
    assert f"{accuracy:.1f}" in said.out
    assert f"15 rows in 0.{said.out.split('15 rows in 0.')[1]}" in said.out


def test_groups_by_class_and_by_name(desk: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    names = "none,story,plot,film"
    assert main(command(desk, out, group_column="part", group_names=names, cross_groups=True)) == 0
    found = Features.load(out)
    assert found.group_names[:5] == (
        "negative/none",
        "negative/story",
        "negative/plot",
        "negative/film",
        "positive/none",
    )
    assert found.group_counts().tolist() == [0, 2, 2, 2, 0, 3, 3, 3]


def test_settings_reach_the_extraction(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.safetensors"
    settings = {"autocast": "bfloat16", "storage": "float16", "head": "classifier", "token": "first"}
    limits = {"batch_size": 4, "max_length": 5, "memory": "1MiB", "cache": tmp_path / "cache"}
    assert main(command(desk, out, **settings, **limits)) == 0
    found = Features.load(out)
    assert found.values.dtype == torch.float16
    assert {key: found.info[key] for key in settings} == settings
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr("spurge.engine.features.reader.Reader.read", None)  # the second run needs no forward pass
    assert main(command(desk, tmp_path / "y.safetensors", **settings, **limits)) == 0
    assert (tmp_path / "y.safetensors").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": None}, "the following arguments are required: --out"),
        ({"model": "/nowhere"}, "model: '/nowhere' is not a transformers folder"),
        ({"head": "nowhere"}, "'nowhere' is no module of the model"),
        ({"head": "bert.pooler.dense"}, "names: the head has 32 outputs"),
        ({"token": "mean"}, "invalid choice: 'mean'"),
        ({"batch_size": 0}, "--batch-size: need at least 1, got 0"),
        ({"group_column": "topic"}, "no column 'topic'"),
        ({"cross_groups": True}, "cross-groups: needs --group-column"),
        ({"group_column": "part", "group_names": "film,plot"}, "--group-names: 'story' of the data is none of"),
        ({"out": "/nowhere/x.safetensors"}, "out: the folder of '/nowhere/x.safetensors' does not exist"),
    ],
)
def test_mistakes(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main(command(desk, **{"out": tmp_path / "x.safetensors", **changes})) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("spurge: error: ")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
