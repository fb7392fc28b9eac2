"""What edits of neurons and edits of weights have in common: fingerprints that must fit, and their files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from spurge.engine.base.tensor_files import Contents

Parts = Mapping[str, tuple[Tensor, Tensor]]


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


def checked_print(name: str, found: Any, types: Collection[str] | None = None) -> dict[str, Any]:
    """A parameter's ``{"shape", "dtype", "sha256"}``, once it has them and one of ``types``; ValueError otherwise."""
    fields = dict(found) if isinstance(found, Mapping) else {}
    shape = fields.get("shape")
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**63 for size in shape)
    texts = all(isinstance(fields.get(text), str) for text in ("dtype", "sha256"))
    if not sizes or not texts or (types is not None and fields["dtype"] not in types):
        kinds = "" if types is None else f", a type of {sorted(types)}"
        raise ValueError(f"model: expected {{'shape', 'dtype', 'sha256'}} of {name!r}{kinds}, got {found!r:.200}")
    return fields


def check_names(parts: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raises ValueError unless there is a fingerprint of everything that an edit changes, and of nothing else."""
    if parts.keys() != model.keys():
        raise ValueError(f"model: expected a fingerprint of each of {sorted(parts)}, got {sorted(model)}")


def tensors_of(parts: Parts, label: str) -> dict[str, Tensor]:
    """(Indices, values) by name, as tensors ``name:indices`` and ``name:label``."""
    tensors = {}
    for name, (indices, values) in parts.items():
        tensors[f"{name}:indices"], tensors[f"{name}:{label}"] = indices, values
    return tensors


def parts_of(file: Contents, label: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The parts of :func:`tensors_of`, of all names of the ``model`` in a file.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the file has others too.
    """
    tensors = dict(file.tensors)
    names = file.value("model", dict)
    parts = {name: (tensors.pop(f"{name}:indices"), tensors.pop(f"{name}:{label}")) for name in names}
    if tensors:
        raise ValueError(f"unexpected tensors {sorted(tensors)}")
    return parts
