"""Edits of single weights as data: new values of some entries, where they came from and which model they fit."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spurge.engine.base.checks import choice
from spurge.engine.base.files import FileError, PathLike, canonical_json, fingerprint, spurge_version
from spurge.engine.base.tensor_files import Contents, kind_of
from spurge.engine.edits.beside_adapters import rest
from spurge.engine.edits.edit_files import EditMismatch, check_names, checked_print, parts_of, tensors_of
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.overwrites import Changes, original
from spurge.engine.edits.parameter_edits import TYPES, ParameterEdit
from spurge.engine.edits.weight_deltas import WeightDeltas
from spurge.engine.models.heads import Head, print_of
from spurge.engine.models.parameters import FLOATS, Place, cast, check_writable, find_places

_KIND = "weight-edit"


@dataclass(frozen=True, eq=False, repr=False)
class WeightEdit(ParameterEdit, kind=_KIND, what="an edit of weights"):
    """New values of chosen entries of a model's parameters; all others stay. Made by :meth:`build`, :meth:`for_head`.

    Attributes:
        changes: parameter name to (flat indices int64 ``[n]`` ascending, values ``[n]`` in the parameter's type), on
            the CPU.
        model: fingerprint: parameter name to ``{"shape", "dtype", "sha256"}`` of the unedited parameter.
        info: provenance, JSON-able, as :attr:`NeuronEdit.info <spurge.NeuronEdit>`.

    Raises:
        ValueError: indices repeated or out of range, values that are not finite in the parameter's type, or shapes
            that do not fit together.
        TypeError: a wrong type, or ``info`` that has no JSON form.
    """

    changes: Changes
    model: dict[str, dict[str, Any]]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names(self.changes, self.model)
        names = sorted(self.changes)
        prints = {name: checked_print(name, self.model[name], TYPES) for name in names}
        checked = {name: _checked(name, *self.changes[name], prints[name]) for name in names}
        object.__setattr__(self, "changes", checked)
        object.__setattr__(self, "model", prints)
        object.__setattr__(self, "info", json.loads(canonical_json(self.info)))

    @classmethod
    def build(
        cls,
        model: nn.Module,
        changes: Mapping[str, Tensor | tuple[Any, Any]],
        info: Mapping[str, Any] | None = None,
    ) -> WeightEdit:
        """An edit that fits ``model``; changes nothing.

        Args:
            model: the model the edit is for.
            changes: parameter name to the whole new parameter, of which the entries that differ are kept, or to flat
                indices ``[n]`` and values ``[n]``, which all are. Values are rounded to the parameter's type.
            info: provenance.

        Raises:
            ValueError: a parameter that the model lacks, or one that is tied, quantised or on the meta device; another
                shape, indices out of range or repeated, or values that are not finite in its type.
            TypeError: a wrong type.
        """
        if not isinstance(changes, Mapping):
            raise TypeError(f"changes: expected parameter name to new values, got {type(changes).__name__}")
        found, prints = {}, {}
        for name, place in find_places(model, changes).items():
            check_writable(model, place)
            old, new = original(place), changes[name]
            pair = _difference(name, new, old) if isinstance(new, Tensor) else _pair(name, new)
            if pair[0].numel() or pair[1].numel():
                found[name], prints[name] = pair, print_of(name, old)
        return cls(found, prints, {"spurge": spurge_version(), **(info or {})})

    @classmethod
    def for_head(
        cls,
        head: Head,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> WeightEdit:
        """The edit that gives a model's head the weight ``[O, M]`` and the bias ``[O]``; needs no model.

        Of what is not given, ``head`` has the new values. Only entries that differ from the model's are kept; where
        ``head`` is not as the model has it any more (by :meth:`Head.with_`), all of them.

        Raises:
            ValueError: the head belongs to no model, has no bias, or has other shapes; values that are not finite.
            TypeError: a wrong type.
        """
        if not isinstance(head, Head):
            raise TypeError(f"head: expected a Head, got {type(head).__name__}")
        if not head.prints:
            raise ValueError("head: belongs to no model; take it from one with Head.of(model)")
        if bias is not None and head.bias is None:
            raise ValueError("bias: the head has none")
        found, prints = {}, {}
        for key, own, new in (("weight", head.weight, weight), ("bias", head.bias, bias)):
            if own is None:
                continue
            name = f"{head.name}.{key}" if head.name else key
            expected = checked_print(name, head.prints.get(name), TYPES)
            narrow = own.to(TYPES[expected["dtype"]])
            same = fingerprint(narrow) == expected["sha256"]
            pair = _difference(name, own if new is None else new, narrow, everything=not same)
            if len(pair[0]):
                found[name], prints[name] = pair, expected
        return cls(found, prints, {"spurge": spurge_version(), **(info or {})})

    def _names(self) -> Collection[str]:
        return self.changes

    def _changes(self, places: dict[str, Place]) -> Changes:
        changes = {}
        for name, (indices, values) in self.changes.items():
            changes[name] = (indices, rest(values, indices, places[name].added))
        return changes

    def combine(self, other: WeightEdit, rule: Literal["disjoint", "last"] = "disjoint") -> WeightEdit:
        """Both edits as one. An entry in both is refused, or ``other``'s counts (as if both were applied).

        Raises:
            EditMismatch: a parameter that both touch has another fingerprint in each.
            ValueError: unknown ``rule``, or an entry in both under ``"disjoint"``.
        """
        if not isinstance(other, WeightEdit):
            raise TypeError(f"other: expected a WeightEdit, got {type(other).__name__}")
        choice("rule", rule, ("disjoint", "last"))
        changes = {**self.changes, **other.changes}
        for name in self.changes.keys() & other.changes.keys():
            if self.model[name] != other.model[name]:
                raise EditMismatch(f"combine: the edits were made for different bits of {name!r}")
            (mine, values), (theirs, others) = self.changes[name], other.changes[name]
            both = torch.isin(mine, theirs)
            if rule == "disjoint" and bool(both.any()):
                raise ValueError(
                    f"combine: both edits change {name!r}[{int(mine[both][0])}]; rule='last' takes the other's value"
                )
            changes[name] = (torch.cat([mine[~both], theirs]), torch.cat([values[~both], others]))
        info = {"method": "combine", "rule": rule, "spurge": spurge_version(), "edits": [self.info, other.info]}
        return WeightEdit(changes, {**self.model, **other.model}, info)

    def _to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return tensors_of(self.changes, "values"), {"model": self.model, "info": self.info}

    @classmethod
    def _of_parts(cls, file: Contents) -> WeightEdit:
        return cls(parts_of(file, "values"), file.value("model", dict), file.value("info", dict))

    def __len__(self) -> int:
        return sum(len(indices) for indices, _ in self.changes.values())

    def __repr__(self) -> str:
        method = f", {self.info['method']}" if "method" in self.info else ""
        return f"WeightEdit({len(self)} weights of {len(self.changes)} parameters{method})"


def load_edit(path: PathLike) -> NeuronEdit | WeightEdit | WeightDeltas:
    """Reads an edit of neurons, of weights or by deltas of weights, whichever the file holds.

    Raises:
        FileError: neither, truncated, changed, or from a newer Spurge.
        OSError: the file cannot be read.
    """
    kinds: dict[str, type[NeuronEdit | WeightEdit | WeightDeltas]]
    kinds = {"edit": NeuronEdit, _KIND: WeightEdit, "weight-deltas": WeightDeltas}
    kind = kind_of(path)
    if kind not in kinds:
        raise FileError(f"{path}: holds {kind!r}, expected an edit of neurons or weights")
    return kinds[kind].load(path)


def _difference(name: str, new: Any, old: Tensor, *, everything: bool = False) -> tuple[Tensor, Tensor]:
    """Flat indices and values where ``new``, rounded to the type of ``old``, has other bits (or everywhere)."""
    if not isinstance(new, Tensor) or not new.is_floating_point():
        found = new.dtype if isinstance(new, Tensor) else type(new).__name__
        raise TypeError(f"changes: {name!r} needs a floating tensor, got {found}")
    if new.shape != old.shape:
        raise ValueError(f"changes: {name!r} has shape {tuple(old.shape)}, got {tuple(new.shape)}")
    new, bits = new.detach().cpu().reshape(-1), FLOATS[old.dtype]
    differs = new.to(old.dtype).view(bits) != old.detach().cpu().reshape(-1).view(bits)
    indices = torch.arange(len(new)) if everything else differs.nonzero()[:, 0]
    return indices, cast(name, indices, new[indices], old.dtype)


def _pair(name: str, pair: Any) -> tuple[Tensor, Tensor]:
    try:
        indices, values = pair
        values = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
        return torch.as_tensor(indices), values
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"changes: {name!r} needs a tensor, or flat indices and as many values: {error}") from error


def _checked(name: str, indices: Tensor, values: Tensor, model: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """One parameter's changes, ascending, owned, on the CPU."""
    if indices.dtype != torch.int64 or indices.dim() != 1 or indices.shape != values.shape or not len(indices):
        raise ValueError(
            f"changes: {name!r} needs int64 indices [n] and values [n], got {indices.dtype} {tuple(indices.shape)} and "
            f"{tuple(values.shape)}"
        )
    indices, order = indices.detach().cpu().sort()
    size = int(torch.Size(model["shape"]).numel())
    if indices[0] < 0 or indices[-1] >= size or bool((indices.diff() == 0).any()):
        raise ValueError(f"changes: {name!r} needs indices that differ and lie below {size}")
    if not values.is_floating_point():
        raise TypeError(f"changes: {name!r} needs floating values, got {values.dtype}")
    return indices, cast(name, indices, values.detach().cpu()[order], TYPES[model["dtype"]]).clone()
