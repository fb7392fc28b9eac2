"""Folders of models that are not as they should be: one sentence, before anything is computed."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.tiny_models import tiny, tiny_tokenizer
from spurge.cli import main

LONG = "good film " * 40
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 45\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's folder beside two texts, one of them longer than the model's positions."""
    folder = tmp_path_factory.mktemp("source")
    tiny("bert").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.csv").write_text("text,label\ngood film,1\nbad film,0\n")
    (folder / "long.csv").write_text(f"text,label\n{LONG},1\n")
    return folder


def configured(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def quantised(folder: Path) -> None:
    configured(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def unlimited(folder: Path) -> None:
    configured(folder, "tokenizer_config.json", model_max_length=10**30)


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"classifier.bias": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        (lambda f: (f / "model.safetensors").write_text(POINTER), "rows", "model.safetensors: is a Git LFS pointer"),
        (lambda f: (f / "tokenizer.json").write_text(POINTER), "rows", "tokenizer.json: is a Git LFS pointer"),
        (lambda f: (f / "config.json").write_text(POINTER), "rows", "config.json: is a Git LFS pointer"),
        (cut, "rows", "model.safetensors: truncated: "),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "rows", "model.safetensors: not a safetensors file"),
        (sharded, "rows", "lacks model-00001-of-00002.safetensors, which model.safetensors.index.json names"),
        (lambda f: (f / "model.safetensors").unlink(), "rows", "cannot be loaded: OSError: "),
        (lambda f: configured(f, "config.json", hidden_size=64), "rows", "does not fit its weights: "),
        (lambda f: configured(f, "config.json", model_type="gone"), "rows", "cannot be loaded: "),
        (lambda f: (f / "config.json").write_text("{"), "rows", "config.json: not a JSON file"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "rows", "cannot be loaded: "),
        (quantised, "rows", "has quantised weights (gptq) that cannot be loaded here"),
        (
            unlimited,
            "long",
            "--max-length: a text has 82 tokens, the model 64 positions; cut texts with --max-length 64",
        ),
        (lambda f: tiny("bert", vocab_size=20).save_pretrained(f), "rows", "inputs: input_ids has "),
        (lambda f: tiny("bert", type_vocab_size=1).save_pretrained(f), "rows", None),
        (shutil.rmtree, "rows", "there is no such folder"),
    ],
)
def test_a_folder_is_refused_in_one_sentence(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], object],
    data: str,
    message: str | None,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source / "model", folder)
    change(folder)
    capsys.readouterr()
    command = ["evaluate", "--model", str(folder), "--data", str(source / f"{data}.csv"), "--bootstrap", "0", "--quiet"]
    code, said = main(command), capsys.readouterr().err
    if message is None:
        assert (code, said) == (0, "")
        return
    assert code == 2
    assert said.startswith("spurge: error: ")
    assert said.count("\n") == 1
    assert message in said


def test_texts_beyond_the_positions_are_cut_on_request(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source / "model", tmp_path / "model")
    unlimited(tmp_path / "model")
    command = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(source / "long.csv"), "--quiet"]
    assert main([*command, "--max-length", "64", "--bootstrap", "0"]) == 0


def test_a_name_on_the_hub_is_not_taken_for_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--model", "owner/some-bert", "--data", "x.csv"]) == 2
    assert "--model: 'owner/some-bert' is not a transformers folder: there is no such folder, and nothing is " in (
        said := capsys.readouterr().err
    )
    assert "hf download owner/some-bert --local-dir FOLDER" in said


def test_no_code_of_a_folder_runs(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source / "model", tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
    configured(tmp_path / "model", "config.json", model_type="own", auto_map=own)
    assert main(["evaluate", "--model", str(tmp_path / "model"), "--data", str(source / "rows.csv")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_no_code_of_a_folder_runs_anywhere() -> None:
    root = Path(__file__).parents[2]
    calls = [
        (path.name, node.lineno, {keyword.arg: keyword.value for keyword in node.keywords})
        for folder in ("python", "bench")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and not ast.unparse(node.func.value).startswith("Bert")  # a class of the library itself
    ]
    assert len(calls) > 4
    for name, line, given in calls:
        assert ast.unparse(given.get("trust_remote_code", ast.Constant(None))) == "False", (name, line)
