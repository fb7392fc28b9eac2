"""Finished parts of a long job in a folder, so that the job goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from spurge.engine.base.files import PathLike, remove_drafts, structured
from spurge.engine.base.tensor_files import Contents, read_tensors, write_tensors

_Block = TypeVar("_Block")


class Blocks:
    """A folder with one tensor file for each finished block of a job; without a folder nothing is kept or found.

    What killed runs were writing is removed from it.

    Every block carries the job's fingerprint, so that blocks of two jobs cannot mix.

    Args:
        folder: made if need be.
        kind: of the files.
        what: a block is, for errors: "a block of a mediation".
        fingerprint: of all that decides the blocks.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: PathLike | None, kind: str, what: str, fingerprint: str) -> None:
        self._folder = None if folder is None else Path(folder)
        self._kind, self._what, self._fingerprint = kind, what, fingerprint
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_drafts(self._folder)

    def find(self, name: str, build: Callable[[Contents], _Block]) -> _Block | None:
        """What ``build`` makes of a block's file; None where there is none.

        Raises:
            ValueError: the block is of another job.
            FileError: it is damaged, or nothing that ``build`` takes.
            OSError: it cannot be read.
        """
        if self._folder is None:
            return None
        path = self._path(self._folder, name)
        try:
            contents = read_tensors(path, self._kind)
        except FileNotFoundError:
            return None
        if contents.texts.get("fingerprint") != self._fingerprint:
            raise ValueError(f"resume: {path} was made with other settings, data or model; choose another folder")
        with structured(path, self._what):
            return build(contents)

    def keep(self, name: str, tensors: Mapping[str, Tensor], **texts: str) -> None:
        """Writes a block, all or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        if self._folder is not None:
            metadata = {"kind": self._kind, "fingerprint": self._fingerprint, **texts}
            write_tensors(self._path(self._folder, name), tensors, metadata)

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / f"{name}.safetensors"
