"""``spurge apply``: a plain checkpoint with the edit folded in."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from spurge.cli.inputs import check_folder, edit_dtype, prepare, write_results
from spurge.cli.model_folders import load_model
from spurge.engine.base.files import read_json, write_json
from spurge.engine.edits.checkpoints import write_model, write_weights
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.new_folders import check_new, new_folder
from spurge.engine.edits.weight_edits import load_edit
from spurge.report.results import Results

#: Files of a model's folder that hold its weights, in any format. Those of its sub-folders are other models' or states.
_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "consolidated*", "*.gguf", "*.onnx"),
    *("tf_model*", "*.h5", "flax_model*", "*.msgpack", "rust_model*"),
)


def run(arguments: argparse.Namespace) -> int:
    """Copies the folder without its weights, writes the folded ones, and renames it once it is whole.

    A GGUF file becomes a plain folder.
    """
    prepare(arguments)
    source, target = Path(arguments.model), Path(arguments.out)
    check_new("out", target)
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"out: {str(target)!r} lies inside the model's own folder; give one beside it")
    check_folder("out", target.parent)
    edit = load_edit(arguments.edit)
    dtype = arguments.dtype or edit_dtype(edit)
    model, tokenizer = load_model("model", arguments.model, arguments.device, dtype, "any")
    edit.fold(model, force=arguments.force)
    with new_folder("out", target) as draft:
        source_dtype = dtype
        if source.is_file():
            write_model(draft, model)
            tokenizer.save_pretrained(draft)
        else:
            _copy_without_weights(source, draft)
            write_weights(draft, model)
            source_dtype = _tell_dtype(draft, dtype)
    what = "a plain folder of" if source.is_file() else "a copy of"
    note = "" if source_dtype == dtype else f", in {dtype} as the edit was made (the source has {source_dtype})"
    print(f"{edit}\nfolded into {what} {source}: {target}{note}")
    others = sorted({file.relative_to(target).parts[0] for name in _WEIGHTS for file in target.glob(f"*/**/{name}")})
    if others:
        print(f"copied without the edit: weights in {', '.join(others)}")
    results = Results("apply", {"model": str(source), "edit": edit.info, "out": str(target), "dtype": dtype})
    unit = "neurons" if isinstance(edit, NeuronEdit) else "weights"
    results.add("all", str(edit.info.get("method", "edit")), unit, len(edit), unit=unit)
    write_results(arguments, results)
    return 0


def _copy_without_weights(source: Path, draft: Path) -> None:
    try:
        shutil.copytree(source, draft, ignore=_weights_of(source), dirs_exist_ok=True)
    except shutil.Error as error:
        raise ValueError(f"model: {str(source)!r} cannot be copied: {error.args[0][0][2]}") from error


def _weights_of(source: Path) -> Callable[[str, list[str]], set[str]]:
    """For `shutil.copytree`: the weights in the folder itself are left out."""
    named = shutil.ignore_patterns(*_WEIGHTS)
    return lambda folder, names: named(folder, names) if Path(folder) == source else set()


def _tell_dtype(folder: Path, dtype: str) -> str:
    """Puts the type of the weights into the configuration where this says another; returns what it said."""
    path = folder / "config.json"
    config = read_json(path)
    names = [name for name in ("dtype", "torch_dtype") if config.get(name) is not None]
    said = config[names[0]] if names else dtype
    if said != dtype:
        write_json(path, config | dict.fromkeys(names, dtype))
    return said
