"""``spurge plan`` on tiny models, and what ``spurge locate`` says before a long run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import tiny, tiny_language, tiny_tokenizer
from spurge.cli import locate, main
from spurge.engine.models.verbalizers import Verbalizer
from spurge.report.results import Results


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a classifier and of a language model, label words, rows and golden words."""
    folder = tmp_path_factory.mktemp("desk")
    names = {0: "negative", 1: "positive"}
    tiny("bert", id2label=names, label2id={name: i for i, name in names.items()}).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_language("llama").save_pretrained(folder / "language")
    tiny_tokenizer(decoder=True).save_pretrained(folder / "language")
    Verbalizer({"negative": ["sad"], "positive": ["happy"]}, "the film; {text}. it was").save(folder / "words.json")
    rows = [
        {"text": f"the {noun} was {word} {'today ' * more}", "label": label}
        for label, words in (("positive", ["good", "great"]), ("negative", ["bad", "awful"]))
        for word in words
        for noun in ("film", "story", "plot")
        for more in (0, 3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    golden = {"causal": {"negative": ["bad"], "positive": ["good"]}, "irrelevant": ["the", "was", "today"]}
    (folder / "golden.json").write_text(json.dumps(golden))
    return folder


def planned(capsys: pytest.CaptureFixture[str], file: Path, *arguments: object) -> tuple[str, dict[str, Any]]:
    """What the command prints, and its numbers by metric."""
    assert main(["plan", *map(str, arguments), "--json", str(file)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out, {row["metric"]: row["value"] for row in Results.load(file).rows}


def test_without_data(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    out, numbers = planned(
        capsys, file, "--model", desk / "model", "--tokens", 12, "--examples", 40, "--path", "layer", "--nodes", 3
    )
    for part in ("40 of 12 tokens", "3 layers, 144 neurons", "layer, legendre, 3 nodes", "in 2 blocks"):
        assert part in out
    assert numbers["rows"] == 40 * (1 + 3 + 3 * 3)
    assert numbers["seconds"] > 0
    radau = ("--path", "layer", "--rule", "radau", "--memory", "600kB", "--tolerance", 0.1)
    out, numbers = planned(capsys, file, "--model", desk / "model", *radau)
    assert "1 of 32 tokens" in out
    assert "at least" in out
    assert numbers["budget_bytes"] == 600_000


def test_with_data(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", desk / "rows.jsonl", "--batch-size", 4)
    out, numbers = planned(capsys, tmp_path / "a.json", "--model", desk / "model", *data, "--path", "joint")
    assert "24 of" in out
    assert "joint" in out
    assert numbers["rows"] == 24 * (1 + 1 + 2)
    words = ("--verbalizer", desk / "words.json")
    out, _ = planned(capsys, tmp_path / "b.json", "--model", desk / "language", *words, *data, "--examples", 10)
    assert "10 of" in out


def test_long_runs_are_announced(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--model", desk / "model", "--data", desk / "rows.jsonl", "--golden", desk / "golden.json")
    few = ("--preset", "paper", "--certify", 0, "--out", tmp_path / "located.safetensors")
    arguments = ["locate", *map(str, (*files, *few))]
    assert main(arguments) == 0
    assert "plan: " not in capsys.readouterr().out
    monkeypatch.setattr(locate, "LONG_RUN", 0.0)
    assert main(arguments) == 0
    assert "plan: about" in capsys.readouterr().out
    assert main([*arguments, "--quiet"]) == 0
    assert "plan: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", 0), "--tokens: "),
        (("--examples", 0), "--examples: "),
        (("--batch-size", 0), "--batch-size: "),
        (("--nodes", 65), "--nodes: "),
        (("--rule", "radau", "--path", "joint"), "--rule: radau belongs to the layer path"),
        (("--memory", "100"), "--memory: "),
        (("--tokens", 100), "--tokens: "),
    ],
)
def test_mistakes(desk: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str) -> None:
    assert main(["plan", "--model", str(desk / "model"), *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"spurge: error: {message}")
    assert said.err.count("\n") == 1
