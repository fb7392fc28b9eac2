"""``spurge apply``: a plain checkpoint with the edit folded in."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
from pathlib import Path

from spurge.cli.inputs import edit_dtype, load_model, prepare, write_results
from spurge.engine.base.temporary import Temporaries
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_edits import load_edit
from spurge.report.results import Results

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "tf_model*", "flax_model*", "*.h5", "*.onnx")


def run(arguments: argparse.Namespace) -> int:
    """Copies the folder without its weights, writes the folded ones, and renames it once it is whole."""
    prepare(arguments)
    source, target = Path(arguments.model), Path(arguments.out)
    if target.exists() or target.is_symlink():
        raise ValueError(f"out: {str(target)!r} exists already; give a new folder")
    edit = load_edit(arguments.edit)
    dtype = arguments.dtype or edit_dtype(edit)
    model, _ = load_model("model", arguments.model, arguments.device, dtype, "any")
    edit.fold(model, force=arguments.force)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    with Temporaries() as changes:
        changes.callback(shutil.rmtree, draft, ignore_errors=True)
        shutil.copytree(source, draft, ignore=shutil.ignore_patterns(*_WEIGHTS))
        model.save_pretrained(draft)
        _sync(draft)
        if target.exists():
            raise ValueError(f"out: {str(target)!r} has appeared meanwhile; give a new folder")
        os.rename(draft, target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    source_dtype = config.get("dtype") or config.get("torch_dtype") or dtype
    note = "" if source_dtype == dtype else f", in {dtype} as the edit was made (the source has {source_dtype})"
    print(f"{edit}\nfolded into a copy of {source}: {target}{note}")
    results = Results("apply", {"model": str(source), "edit": edit.info, "out": str(target), "dtype": dtype})
    unit = "neurons" if isinstance(edit, NeuronEdit) else "weights"
    results.add("all", str(edit.info.get("method", "edit")), unit, len(edit), unit=unit)
    write_results(arguments, results)
    return 0


def _sync(folder: Path) -> None:
    """Makes the files' bytes lasting before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
