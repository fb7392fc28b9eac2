"""Commands on a causal language model that classifies by label words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.tiny_models import tiny_language, tiny_tokenizer
from spurge.cli import main
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.models.verbalizers import Verbalizer
from spurge.report.results import Results

GOOD, BAD = ["good", "great", "superb", "lovely"], ["bad", "awful", "dull", "boring"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, label words, rows and golden words."""
    folder = tmp_path_factory.mktemp("desk")
    tiny_language("llama").save_pretrained(folder / "model")
    tiny_tokenizer(decoder=True, padding_side="left").save_pretrained(folder / "model")
    Verbalizer({"negative": ["sad"], "positive": ["happy"]}, "the film; {text}. it was").save(folder / "words.json")
    rows = [
        {"text": f"the {noun} was {word} {end}", "label": label}
        for label, words in (("positive", GOOD), ("negative", BAD))
        for word in words
        for noun in ("film", "story")
        for end in ("today", "on tuesday")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    golden = {"causal": {"negative": BAD, "positive": GOOD}, "irrelevant": ["the", "was", "on", "tuesday", "today"]}
    (folder / "golden.json").write_text(json.dumps(golden))
    return folder


def test_from_locate_to_a_folded_language_model(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def spurge(*arguments: object) -> None:
        assert main([str(argument) for argument in arguments]) == 0
        assert capsys.readouterr().err == ""

    words = ("--verbalizer", desk / "words.json")
    common = ("--model", desk / "model", *words, "--golden", desk / "golden.json", "--quiet")
    data = ("--data", desk / "rows.jsonl")
    few = ("--texts", 16, "--certify", 2, "--fraction", 0.05, "--share", 0.1, "--cap", 20)
    spurge("locate", *common, *data, "--preset", "paper", *few, "--out", "l.safetensors")
    search = ("--preset", "best", "--neurons", "all", "--texts", 16, "--batch-size", 8)
    spurge("edit", *common, *data, *search, "--located", "l.safetensors", "--out", "e.safetensors")
    edit = NeuronEdit.load("e.safetensors")
    assert len(edit)
    tests = ("--data", f"all={desk / 'rows.jsonl'}", "--draws", 3, "--bootstrap", 20)
    spurge("evaluate", *common, *tests, "--edit", "e.safetensors", "--json", "gated.json")
    spurge("apply", "--model", desk / "model", "--edit", "e.safetensors", "--out", "cured", "--quiet")
    spurge("evaluate", "--model", "cured", *words, *tests, "--quiet", "--json", "folded.json")
    accuracies = [
        Results.load(f"{file}.json").select(case="all", method=method, metric="accuracy")[0]["value"]
        for file, method in (("gated", "edit"), ("folded", "none"))
    ]
    assert accuracies[0] == accuracies[1]
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (desk / "model", "cured"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        f"{site}.weight" for site in edit.neurons.sites
    ]


def test_mistakes(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*arguments: object) -> str:
        given = ("--model", desk / "model", "--data", desk / "rows.jsonl", "--quiet", *arguments)
        assert main(["evaluate", *map(str, given)]) == 2
        return capsys.readouterr().err

    assert "(a language model classifies by label words: --verbalizer)" in wrong()
    assert "nowhere.json: No such file or directory" in wrong("--verbalizer", tmp_path / "nowhere.json")
    assert "golden.json: not a verbalizer: 'causal' is not known" in wrong("--verbalizer", desk / "golden.json")
    Verbalizer({"negative": ["walks"], "positive": ["walking"]}).save(tmp_path / "same.json")
    assert "words: expected first tokens that tell labels apart" in wrong("--verbalizer", tmp_path / "same.json")
    Verbalizer({"bad": ["bad"], "good": ["good"]}).save(tmp_path / "other.json")
    assert "positive" in wrong("--verbalizer", tmp_path / "other.json")
