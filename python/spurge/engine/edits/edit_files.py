"""What edits of neurons and edits of weights have in common: fingerprints that must fit, and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from spurge.engine.base.files import PathLike, canonical_json
from spurge.engine.base.tensor_files import reading, write_tensors

Parts = Mapping[str, tuple[Tensor, Tensor]]
_Edit = TypeVar("_Edit")


class EditMismatch(ValueError):
    """An edit that does not fit the model it was to be applied to."""


def check_print(what: str, name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises EditMismatch unless a parameter, ``what`` in errors, has the type and the bits an edit was made for."""
    if found["dtype"] != expected["dtype"]:
        raise EditMismatch(
            f"edit: made for {expected['dtype']} weights, {name!r} has {found['dtype']}; force=True applies it "
            "nevertheless"
        )
    if found != expected:
        raise EditMismatch(
            f"edit: {what} is not the one the edit was made for: another model, fine-tuned since, or with an edit "
            "folded in; force=True applies it nevertheless"
        )


def write_edit(
    path: PathLike, kind: str, label: str, parts: Parts, model: Mapping[str, Any], info: Mapping[str, Any]
) -> None:
    """Writes (indices, values) by name as tensors ``name:indices`` and ``name:label``, all or nothing.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {}
    for name, (indices, values) in parts.items():
        tensors[f"{name}:indices"], tensors[f"{name}:{label}"] = indices, values
    write_tensors(path, tensors, {"kind": kind, "model": canonical_json(model), "info": canonical_json(info)})


def read_edit(
    path: PathLike,
    kind: str,
    label: str,
    build: Callable[[dict[str, tuple[Tensor, Tensor]], dict[str, Any], dict[str, Any]], _Edit],
    what: str,
) -> _Edit:
    """What ``build`` makes of a file of :func:`write_edit`; ``what`` the file should hold, for errors.

    Raises:
        FileError: not such a file, truncated, changed, from a newer Spurge, or nothing that ``build`` takes.
        OSError: the file cannot be read.
    """
    with reading(path, kind, what) as file:
        model, tensors = file.value("model"), dict(file.tensors)
        parts = {name: (tensors.pop(f"{name}:indices"), tensors.pop(f"{name}:{label}")) for name in model}
        if tensors:
            raise ValueError(f"unexpected tensors {sorted(tensors)}")
        return build(parts, model, file.value("info"))
