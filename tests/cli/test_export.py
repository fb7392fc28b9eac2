"""`spurge export`: an adapter from the files of a model and an edit, and one line where there can be none."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from helpers.tiny_models import tiny, tiny_inputs, tiny_language, tiny_tokenizer
from spurge.cli import main
from spurge.cli.parser import build_parser
from spurge.engine.edits.exports import MAX_RANK
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.models.heads import Head
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier, gates of its neurons, another head for it, and a language model with gates."""
    folder = tmp_path_factory.mktemp("desk")
    for name, model in (("classifier", tiny("bert")), ("language", tiny_language("llama"))):
        model.save_pretrained(folder / name)
        tiny_tokenizer(decoder=name == "language").save_pretrained(folder / name)
        neurons = NeuronSet({site.name: range(30) for site in find_sites(model)})
        NeuronEdit.build(model, neurons, 0.5, {"method": "by hand"}).save(folder / f"{name}.safetensors")
        if name == "classifier":
            head = Head.of(model)
            WeightEdit.for_head(head, -head.weight).save(folder / "head.safetensors")
    return folder


def export(desk: Path, edit: str, out: Path, *more: object, model: str = "") -> int:
    given = ("--model", desk / (model or edit), "--edit", desk / f"{edit}.safetensors", "--out", out)
    return main(["export", *map(str, (*given, *more))])


@pytest.mark.parametrize(
    ("model", "edit", "format_"),
    [
        ("classifier", "classifier", "lora"),
        ("classifier", "classifier", "ia3"),
        ("classifier", "head", "head"),
        ("language", "language", "lora"),
        ("language", "language", "ia3"),
    ],
)
def test_the_adapter_does_what_apply_does(
    desk: Path, tmp_path: Path, model: str, edit: str, format_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    out, results = tmp_path / "adapter", tmp_path / "numbers.json"
    assert export(desk, edit, out, "--format", format_, "--json", results, model=model) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert f"exported as {format_}, " in said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "numbers.json"]
    given = ["--model", str(desk / model), "--edit", str(desk / f"{edit}.safetensors"), "--out", str(tmp_path / "new")]
    assert main(["apply", *given]) == 0
    kind = "AutoModelForCausalLM" if model == "language" else "AutoModelForSequenceClassification"
    plain, folded = (
        getattr(transformers, kind).from_pretrained(path).eval() for path in (desk / model, tmp_path / "new")
    )
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(plain), out).eval()
    inputs = tiny_inputs("bert" if model == "classifier" else "llama")
    with torch.no_grad():
        got, want, before = (each(**inputs).logits for each in (adapted, folded, plain))
    assert (got - want).abs().max() < 1e-5 < 1e-3 < (want - before).abs().max()
    rows = json.loads(results.read_text())["rows"]
    metric = {"lora": "rank", "ia3": "gates"}
    assert {row["metric"] for row in rows} == ({metric[format_]} if format_ in metric else set())
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(desk / model)


def test_truncation_says_its_error(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(desk, "classifier", tmp_path / "out", "--max-rank", 8) == 2
    said = capsys.readouterr().err
    assert said.startswith("spurge: error: --max-rank: the change of 'bert.encoder.layer.0.output.dense' needs rank 30")
    assert said.endswith("of its size; --truncate writes that; --format ia3 is exact for gates\n")
    assert list(tmp_path.iterdir()) == []
    assert export(desk, "classifier", tmp_path / "out", "--max-rank", 8, "--truncate") == 0
    assert "3 modules truncated, relative error up to 0." in capsys.readouterr().out


def test_mistakes_are_one_line(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*arguments: object, model: str = "") -> str:
        edit, *more = arguments
        assert export(desk, str(edit), tmp_path / "out", *more, model=model) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "--format: gates change no head; expected 'lora' or 'ia3'" in wrong("classifier", "--format", "head")
    assert "--format: changes of single weights multiply no input" in wrong(
        "head", "--format", "ia3", model="classifier"
    )
    assert "argument --format: invalid choice: 'dora'" in wrong("classifier", "--format", "dora")
    assert "argument --max-rank: expected a whole number of at least 1" in wrong("classifier", "--max-rank", 0)
    assert "edit: not made for this model" in wrong("classifier", model="language")
    (tmp_path / "out").mkdir()
    assert "--out: " in (said := wrong("classifier"))
    assert "exists already; give a new folder" in said
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_the_highest_rank_is_that_of_the_package() -> None:
    parsed = build_parser().parse_args(["export", "--model", "m", "--edit", "e", "--out", "o"])
    assert parsed.max_rank == MAX_RANK
