"""Folders that are either whole or absent: written as a draft beside their place, synced and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spurge.engine.base.files import PathLike, begin_draft, naming
from spurge.engine.base.temporary import Temporaries


def check_new(name: str, path: PathLike) -> None:
    """Raises ValueError, which calls the argument ``name``, where something is at ``path`` already."""
    if os.path.lexists(path):
        raise ValueError(f"{name}: {os.fspath(path)!r} exists already; give a new folder")


@contextmanager
def new_folder(name: str, path: PathLike) -> Iterator[Path]:
    """A draft to be filled within the block, which becomes the folder ``path`` after it, or vanishes on an error.

    Args:
        name: of the argument, for errors.
        path: of the folder; those above it are made.

    Raises:
        ValueError: something is there already, or appears meanwhile.
        OSError: it cannot be written.
    """
    check_new(name, path)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(target), Temporaries() as changes:
        draft = begin_draft(changes, target, folder=True)
        yield draft
        _sync(draft)
        if os.path.lexists(target):
            raise ValueError(f"{name}: {os.fspath(path)!r} has appeared meanwhile; give a new folder")
        os.rename(draft, target)


def _sync(folder: Path) -> None:
    """Makes the bytes of all files lasting."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
