"""Models as folders that plain ``transformers`` loads, also those whose weights were widened from a quantised file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from spurge.engine.base.files import PathLike
from spurge.engine.base.temporary import temporary
from spurge.engine.edits.new_folders import new_folder
from spurge.engine.models.parameters import oddity


def save_checkpoint(folder: PathLike, model: nn.Module, tokenizer: Any = None) -> None:
    """Writes a model, with what is folded into it, as a folder that plain ``transformers`` loads; whole or not at all.

    A model that was loaded from a GGUF file, which ``save_pretrained`` refuses, is written in the float type that its
    weights have in memory.

    Args:
        folder: a new folder.
        model: of ``transformers``.
        tokenizer: written beside it.

    Raises:
        TypeError: ``model`` is none of ``transformers``.
        ValueError: the folder exists, or the weights are quantised in a way that cannot be written.
        OSError: it cannot be written.
    """
    with new_folder("folder", folder) as draft:
        write_model(draft, model)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)


def write_model(folder: Path, model: nn.Module) -> None:
    """Writes configuration and weights into a folder; raises as :func:`save_checkpoint`."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    with _widened(model):
        model.save_pretrained(folder)  # type: ignore[operator]


def write_weights(folder: Path, model: nn.Module) -> None:
    """Writes the weights alone: settings that ``transformers`` would write with them are not the user's own."""
    with tempfile.TemporaryDirectory(prefix=".weights", dir=folder) as scratch:
        write_model(Path(scratch), model)
        for name in ("*.safetensors", "*.safetensors.index.json"):
            for file in Path(scratch).glob(name):
                os.rename(file, folder / file.name)


@temporary
def _widened(model: nn.Module) -> Iterator[None]:
    """Within the block a model of plain float weights does not say that they were read from quantised ones."""
    config: Any = model.config
    kept = [] if any(map(oddity, model.parameters())) else [(vars(model), "hf_quantizer")]
    kept += [(vars(config), "quantization_config")] if kept else []
    values = [(place, name, place.pop(name)) for place, name in kept if name in place]
    yield
    for place, name, value in values:
        place[name] = value
