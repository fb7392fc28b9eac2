"""Features kept on disk under what they were made from, so that they are found again or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.checks import warn
from spurge.engine.base.files import FileError, PathLike, canonical_json, fingerprint, remove_drafts
from spurge.engine.base.tensor_files import read_tensors, write_tensors
from spurge.engine.features.sources import Batch
from spurge.engine.models.fingerprint import Opaque, model_print


class FeatureCache:
    """A folder with one file for each block of rows.

    A file's name is the SHA-256 of the model (:func:`model_print`), of the settings and of the block's inputs as the
    model sees them: after a change of any of them nothing is found, and the blocks that did not change still are.
    Files are written whole or not at all and checked when read.

    Args:
        folder: made if need be; several models and sets may share it.
        model: in evaluation mode.
        settings: whatever else decides the features, JSON-able.

    Raises:
        Opaque: the model runs code that cannot be looked into.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: PathLike, model: nn.Module, settings: Any) -> None:
        self.folder = Path(folder)
        self._made = fingerprint(canonical_json([model_print(model), settings]))
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_drafts(self.folder)

    def key(self, batches: Sequence[Batch]) -> str:
        """SHA-256 of the model, the settings and the batches."""
        return fingerprint(canonical_json([self._made, [batch.fingerprint() for batch in batches]]))

    def find(self, key: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """The features kept under ``key``; None, with a warning, where the file is damaged."""
        path = self._path(key)
        try:
            tensors, metadata = read_tensors(path, "feature-block")
            values = tensors["values"]
            if metadata.get("key") != key or values.shape != shape or values.dtype != dtype:
                raise FileError(f"{path}: holds other features than its name says")
            return values
        except FileNotFoundError:
            return None
        except (FileError, KeyError) as error:
            warn(f"cache: made anew: {error}")
            return None

    def keep(self, key: str, values: Tensor) -> None:
        """Writes features ``[n, M]``, all or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        write_tensors(self._path(key), {"values": values}, {"kind": "feature-block", "key": key})

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def open_cache(folder: PathLike, model: nn.Module, settings: Any) -> FeatureCache | None:
    """A cache for ``model``; None, with a warning, where nobody can tell what the model computes.

    Raises:
        OSError: the folder cannot be made.
    """
    try:
        return FeatureCache(folder, model, settings)
    except Opaque as error:
        warn(f"cache: not used: {error}, so stored features could be stale")
        return None
