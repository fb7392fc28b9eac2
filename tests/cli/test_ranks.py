"""``torchrun -m spurge``: one voice, one file, one error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers import planted_texts
from helpers.tiny_models import tiny, tiny_tokenizer
from helpers.torchrun import torchrun
from spurge.cli import main
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.methods.macu.located import Located
from spurge.report.results import Results


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, training rows and golden words."""
    folder = tmp_path_factory.mktemp("desk")
    names = {
        "id2label": dict(enumerate(planted_texts.LABELS)),
        "label2id": {name: i for i, name in enumerate(planted_texts.LABELS)},
    }
    tiny("bert", **names).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"text": row.text, "label": planted_texts.LABELS[row.label]} for row in planted_texts.train()[:40]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planted_texts.GOLDEN.save(folder / "golden.json")
    return folder


def common(desk: Path, *options: object) -> list[object]:
    files = ("--model", desk / "model", "--data", desk / "rows.jsonl", "--golden", desk / "golden.json")
    return [*files, "--preset", "paper", "--batch-size", 4, "--threads", 1, *options]


@pytest.mark.slow
def test_two_ranks_locate_and_edit_as_one(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--texts", 12, "--certify", 1, "--fraction", 0.05, "--share", 0.1, "--memory", "256MiB")
    locate = ("locate", *common(desk, *small))
    threads = torch.get_num_threads()
    try:
        assert main([str(word) for word in (*locate, "--out", tmp_path / "one", "--quiet")]) == 0
    finally:
        torch.set_num_threads(threads)
    alone = capsys.readouterr().out
    resume = ("--resume", tmp_path / "blocks")
    done = torchrun(2, "-m", "spurge", *locate, "--out", tmp_path / "two", "--json", tmp_path / "two.json", *resume)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert done.stdout.count("Located(") == 1
    assert done.stdout.splitlines()[0] == alone.splitlines()[0]
    assert done.stderr.count("locate:   0%") == 1  # one bar; a slow one is drawn more than once when it ends
    assert len(list((tmp_path / "blocks").iterdir())) == 3
    assert Results.load(tmp_path / "two.json").head["name"] == "locate"

    found = Located.load(tmp_path / "two")
    Located(found.causal, found.spurious, found.spurious.top(3), found.spurious.top(5), {}, found.info).save(
        tmp_path / "forced"
    )
    edit = (
        "edit",
        *common(desk, "--texts", 4, "--located", tmp_path / "forced", "--quiet", "--out", tmp_path / "edit"),
    )
    done = torchrun(2, "-m", "spurge", *edit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("edited in") == 1
    assert NeuronEdit.load(tmp_path / "edit").info["search"] == "pso"


@pytest.mark.slow
def test_a_mistake_is_told_once(desk: Path, tmp_path: Path) -> None:
    arguments = list(common(desk, "--out", tmp_path / "x"))
    arguments[arguments.index("--model") + 1] = "/nowhere"
    done = torchrun(2, "-m", "spurge", "locate", *arguments)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("spurge: error: ")]
    assert errors == ["spurge: error: --model: '/nowhere' is not a transformers folder: there is no such folder"]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
