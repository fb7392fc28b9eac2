"""`spurge apply`: a copy that differs from the model's folder in its weights alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers.tiny_models import tiny, tiny_tokenizer
from spurge.cli import main
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites

OTHERS = {
    "generation_config.json": '{"top_k": 7}',
    "chat_template.jinja": "{{ messages }}",
    "own.py": "raise SystemExit",
    "LICENSE": "yours",
    "training_args.bin": "arguments",
    "2_Dense/model.safetensors": "of another module",
    "checkpoint-5/pytorch_model.bin": "an earlier state",
}
WEIGHTS = ("pytorch_model.bin", "tf_model.h5", "model.onnx")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A decoder's folder without a padding token, with all that people keep beside weights, and an edit for it."""
    model = tiny("llama", pad_token_id=None)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(decoder=True)
    tokenizer.save_pretrained(folder)
    for name, content in (OTHERS | dict.fromkeys(WEIGHTS, "the same weights")).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None, "eos_token": "[SEP]"}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "of_mine": [1], "auto_map": {"AutoModel": "own.Model"}}))
    site = find_sites(model)[0]
    NeuronEdit.build(model, NeuronSet({site.name: [1]}), 0.0).save(tmp_path / "edit.safetensors")
    return folder


def apply(source: Path, out: Path, *more: str) -> int:
    edit = source.parent / "edit.safetensors"
    return main(["apply", "--model", str(source), "--edit", str(edit), "--out", str(out), *more])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_but_the_weights_is_copied_as_it_is(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(source)
    assert apply(source, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "copied without the edit: weights in 2_Dense, checkpoint-5" in said.out
    copied = files(tmp_path / "out")
    assert files(source) == before
    assert copied.keys() == before.keys() - set(WEIGHTS)
    assert [name for name in copied if copied[name] != before[name]] == ["model.safetensors"]
    plain, edited = (
        dict(AutoModelForSequenceClassification.from_pretrained(f).named_parameters())
        for f in (source, tmp_path / "out")
    )
    changed = [name for name in plain if not torch.equal(plain[name], edited[name])]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_type_of_the_weights_is_told_by_the_configuration(source: Path, tmp_path: Path) -> None:
    assert apply(source, tmp_path / "out", "--dtype", "bfloat16", "--force") == 0
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert {name for name in before if before[name] != after[name]} == {"dtype" if "dtype" in before else "torch_dtype"}
    assert "bfloat16" in (after.get("dtype"), after.get("torch_dtype"))
    assert before.keys() == after.keys()


def test_files_that_are_links_are_copied(source: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "LICENSE"):
        shutil.move(source / name, tmp_path / f"blob-{name}")
        (source / name).symlink_to(tmp_path / f"blob-{name}")
    assert apply(source, tmp_path / "out") == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_link_to_nothing_and_a_folder_inside_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(source, source / "deep" / "out") == 2
    assert "--out: " in (said := capsys.readouterr().err)
    assert "lies inside the model's own folder" in said
    (source / "notes.txt").symlink_to(tmp_path / "gone")
    assert apply(source, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("spurge: error: --model: ")
    assert said.count("\n") == 1
    assert "cannot be copied: " in said
    assert "gone" in said or "notes.txt" in said
    assert not (tmp_path / "out").exists()
