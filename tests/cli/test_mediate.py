"""``spurge mediate`` on a tiny language model: its files, its numbers, its resuming and its one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.pretended_devices import stand_in
from helpers.tiny_models import tiny, tiny_tokenizer
from spurge import Effects, NeuronEdit, Recording
from spurge.cli import main
from spurge.engine.base import budgets
from spurge.report.results import Results


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, a classifier, an encoder, and prompts with scores and topics."""
    folder = tmp_path_factory.mktemp("desk")
    for name, model, decoder in (
        ("model", tiny("llama", language=True), True),
        ("scorer", tiny("bert"), False),
    ):
        model.save_pretrained(folder / name)
        tiny_tokenizer(decoder=decoder).save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    nouns = ("film", "story", "plot", "music", "room", "food")
    words = ("great", "bad", "dull", "superb", "sad", "good", "ugly", "charming")
    rows = []
    for number in range(120):
        topic = number % 2
        noun = nouns[topic * 3 + number % 3]
        toxic = float(torch.rand(1, generator=generator))
        word = words[int(torch.randint(8, (1,), generator=generator))]
        rows.append(
            {
                "prompt": f"the {noun} was {word} and {'never' if toxic > 0.5 else 'always'} {word}",
                "toxicity": toxic,
                "answer": toxic / 2 + 0.1 * topic + 0.1 * float(torch.rand(1, generator=generator)),
                "topic": ("screen", "house")[topic],
                "length": float(torch.rand(1, generator=generator)),
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(desk: Path, folder: Path, **changes: Any) -> list[str]:
    """Arguments of a mediate command; None leaves one out, True is a flag."""
    options = {
        "model": desk / "model",
        "data": desk / "rows.jsonl",
        "treatment_column": "toxicity",
        "outcome_column": "answer",
        "topic_column": "topic",
        "recording": folder / "recording",
        "out": folder / "effects.safetensors",
        "resamples": 5,
        "quiet": True,
        **changes,
    }
    arguments = ["mediate"]
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return arguments


def test_effects_of_the_mlps(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, plot = tmp_path / "x.json", tmp_path / "x.png"
    assert main(command(desk, tmp_path, json=numbers, plot=plot, columns="length")) == 0
    said = capsys.readouterr()
    assert said.err == ""
    found = Effects.load(tmp_path / "effects.safetensors")
    assert found.level == "mlp"
    assert len(found) == 3
    assert found.info["columns"] == ["length"]
    assert [row["topic"] for row in found.info["topics"]] == ["house", "screen"]
    assert "participation" in said.out
    assert "total effect, adjusted" in said.out
    rows = Results.load(numbers).select(metric="total effect")
    assert {row["method"] for row in rows} == {"adjusted", "unadjusted"}
    assert plot.read_bytes()[:4] == b"\x89PNG"
    recording = Recording.open(tmp_path / "recording")
    assert recording.continuations is None
    assert len(recording) == 120


def test_neurons_and_their_mask(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "outcome_column": None,
        "scorer": desk / "scorer",
        "generate": 3,
        "leading": 2,
        "mask": 4,
        "draws": 2,
        "neurons_out": tmp_path / "neurons.safetensors",
        "edit": tmp_path / "edit.safetensors",
        "limit": 100,
    }
    assert main(command(desk, tmp_path, **options)) == 0
    said = capsys.readouterr().out
    inner = Effects.load(tmp_path / "neurons.safetensors")
    assert inner.level == "neuron"
    assert len(inner.widths) == 2
    edit = NeuronEdit.load(tmp_path / "edit.safetensors")
    assert len(edit) == 4
    assert (edit.vector() == 0).all()
    assert edit.neurons == inner.neurons(4, sign="positive")
    assert "4 neurons masked" in said
    assert "2 random" in said
    folded = ["apply", "--model", str(desk / "model"), "--edit", str(tmp_path / "edit.safetensors")]
    assert main([*folded, "--out", str(tmp_path / "folded")]) == 0
    assert "LlamaForCausalLM" in (tmp_path / "folded" / "config.json").read_text()


def test_a_second_run_reads_the_recording(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(desk, tmp_path)) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "recording").iterdir()}
    first = (tmp_path / "effects.safetensors").read_bytes()
    assert main(command(desk, tmp_path)) == 0
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "recording").iterdir()}
    assert (tmp_path / "effects.safetensors").read_bytes() == first


def test_topics_are_found(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    options = {"topic_column": None, "embedder": desk / "scorer", "clusters": "2,3", "least_arm": 2}
    assert main(command(desk, tmp_path, **options)) == 0
    found = Effects.load(tmp_path / "effects.safetensors")
    assert 1 <= len(found.info["topics"]) <= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topic_column": None}, "confounders: give --topic-column, --embedder or --columns"),
        ({"embedder": "x"}, "--topic-column, --embedder: give one of them, not both"),
        ({"mask": 3}, "mask: needs --leading and --scorer"),
        ({"edit": "e.safetensors"}, "edit: needs --mask"),
        ({"neurons_out": "n.safetensors"}, "neurons-out: needs --leading"),
        ({"clusters": "2,many"}, "clusters: expected whole numbers with commas between, got '2,many'"),
        ({"treatment_column": "prompt"}, "row 1: its prompt must be a finite number, got"),
        ({"treatment_column": "nothing"}, "row 1: no column 'nothing'"),
        ({"split": "dev"}, "row 1: no column 'split'"),
        ({"model": "scorer"}, "model: 'scorer' is not a transformers folder"),
        ({"threshold": 2.0}, "--treatment-column: an arm has 0 prompts, too few for 5 folds"),
        ({"out": "nowhere/x"}, "out: the folder of 'nowhere/x' does not exist"),
    ],
)
def test_mistakes_are_one_line(
    desk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(desk, tmp_path, **changes)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("spurge: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": {"text": "the film", "toxicity": 0.1}}, "its prompt must be text, got dict {'text': 'the film'"),
        ({"prompt": None}, "its prompt is missing"),
        ({"prompt": 3}, "its prompt must be text, got int 3"),
        ({"prompt": "a\ud800"}, "its prompt is not valid Unicode"),
        ({"topic": None}, "its topic is missing"),
        ({"topic": ["screen"]}, "its topic must be text, got list ['screen']"),
        ({"toxicity": None}, "its toxicity must be a finite number, got None"),
        ({"toxicity": {"score": 1}}, "its toxicity must be a finite number, got {'score': 1}"),
        ({"answer": float("nan")}, "its answer must be a finite number, got nan"),
    ],
)
def test_what_is_no_text_or_number_is_refused_by_row(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    rows = [json.loads(line) for line in (desk / "rows.jsonl").read_text().splitlines()]
    rows[6] |= change
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command(desk, tmp_path, data=data)) == 2
    assert f"{data}: row 7: {message}" in capsys.readouterr().err


def test_works_on_the_device_that_is_named(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda device: 2**30)
    assert main(command(desk, tmp_path)) == 0  # the recording of the host is not taken for one of the device
    changes = {"recording": tmp_path / "other", "out": tmp_path / "there", "device": "cuda:0", "leading": 1}
    with stand_in(gpu := torch.device("cuda", 0)) as ran:
        assert main(command(desk, tmp_path, **changes)) == 0
    assert ran == {"balance_strata": {gpu}}
    here, there = (Effects.load(tmp_path / name) for name in ("effects.safetensors", "there"))
    torch.testing.assert_close(there.adjusted.aie, here.adjusted.aie, rtol=1e-4, atol=1e-6)
