"""Edits of whole matrices as data: what is added to a model's parameters, in the smallest form that holds it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.files import canonical_json, spurge_version
from spurge.engine.base.tensor_files import Contents
from spurge.engine.edits.edit_files import check_names, checked_print
from spurge.engine.edits.overwrites import Changes, original
from spurge.engine.edits.parameter_edits import TYPES, ParameterEdit
from spurge.engine.models.heads import print_of
from spurge.engine.models.parameters import Place, cast, check_writable, find_places


@dataclass(frozen=True, eq=False)
class Dense:
    """What is added to every entry of a parameter.

    Attributes:
        values: float32 in the parameter's own shape.
    """

    values: Tensor

    def full(self, shape: Collection[int]) -> Tensor:
        """As float64 in the parameter's shape."""
        return self.values.double()

    def scaled(self, factor: float) -> Dense:
        return Dense(self.values * factor)


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to a matrix ``[O, I]`` (of transformers' Conv1D ``[I, O]``: its own layout): ``up @ down``.

    Attributes:
        up: float32 ``[O, r]``; all scales are in it.
        down: float32 ``[r, I]``.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def full(self, shape: Collection[int]) -> Tensor:
        """As float64 in the parameter's shape."""
        return self.up.double() @ self.down.double()

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.up * factor, self.down)


@dataclass(frozen=True, eq=False)
class Slices:
    """What is added to some rows, columns or entries of a parameter; the others stay.

    Attributes:
        dim: 0 for rows of a matrix and for entries of a vector, 1 for columns.
        indices: which, int64 ``[n]`` ascending.
        values: float32 in the parameter's shape, with n in dimension ``dim``.
    """

    dim: int
    indices: Tensor
    values: Tensor

    def full(self, shape: Collection[int]) -> Tensor:
        """As float64 in the parameter's shape."""
        return torch.zeros(*shape, dtype=torch.float64).index_copy(self.dim, self.indices, self.values.double())

    def scaled(self, factor: float) -> Slices:
        return Slices(self.dim, self.indices, self.values * factor)


Delta = Dense | LowRank | Slices


@dataclass(frozen=True, eq=False, repr=False)
class WeightDeltas(ParameterEdit, kind="weight-deltas", what="an edit by deltas of weights"):
    """Deltas of a model's parameters: W becomes W + D, rounded once to W's type. Made by :meth:`build`.

    Applied and folded models have the same bits: both add in float64, entry by entry.

    Attributes:
        deltas: parameter name, as in ``model.named_parameters()``, to what is added to it; tensors on the CPU.
        model: fingerprint: parameter name to ``{"shape", "dtype", "sha256"}`` of the unedited parameter.
        info: provenance, JSON-able, as :attr:`NeuronEdit.info <spurge.NeuronEdit>`.

    Raises:
        ValueError: deltas that are not finite or do not fit the parameters' shapes, indices that repeat or are out of
            range.
        TypeError: a wrong type, or ``info`` that has no JSON form.
    """

    deltas: dict[str, Delta]
    model: dict[str, dict[str, Any]]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names(self.deltas, self.model)
        names = sorted(self.deltas)
        prints = {name: checked_print(name, self.model[name], TYPES) for name in names}
        checked = {name: _checked(name, self.deltas[name], tuple(prints[name]["shape"])) for name in names}
        object.__setattr__(self, "deltas", checked)
        object.__setattr__(self, "model", prints)
        object.__setattr__(self, "info", json.loads(canonical_json(self.info)))

    @classmethod
    def build(
        cls, model: nn.Module, deltas: Mapping[str, Delta], info: Mapping[str, Any] | None = None
    ) -> WeightDeltas:
        """An edit that fits ``model``; changes nothing.

        Args:
            model: the model the edit is for.
            deltas: parameter name to what is added.
            info: provenance.

        Raises:
            ValueError: a parameter that the model lacks, or one that is tied, quantised or on the meta device, or a
                delta that does not fit.
            TypeError: a wrong type.
        """
        prints = {}
        for name, place in find_places(model, deltas).items():
            check_writable(model, place)
            prints[name] = print_of(name, original(place))
        return cls(dict(deltas), prints, {"spurge": spurge_version(), **(info or {})})

    def scaled(self, factor: float, info: Mapping[str, Any] | None = None) -> WeightDeltas:
        """The same edit with all deltas multiplied by ``factor``; ``info`` adds to its own."""
        deltas = {name: delta.scaled(factor) for name, delta in self.deltas.items()}
        return WeightDeltas(deltas, self.model, {**self.info, **(info or {})})

    def edited(self, name: str, weight: Tensor) -> Tensor:
        """What becomes of a parameter with the values ``weight``, in its type and shape, on the CPU."""
        weight = weight.detach().cpu()
        return (weight.double() + self.deltas[name].full(weight.shape)).to(weight.dtype)

    def _names(self) -> Collection[str]:
        return self.deltas

    def _changes(self, places: dict[str, Place]) -> Changes:
        changes = {}
        for name, place in places.items():
            old = original(place)
            values = self.edited(name, old).reshape(-1)
            indices = _entries(self.deltas[name], tuple(old.shape))
            changes[name] = (indices, cast(name, indices, values[indices], old.dtype))
        return changes

    def _products(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (delta.up, delta.down) for name, delta in self.deltas.items() if isinstance(delta, LowRank)}

    def _to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.to_parts()

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able values that hold the edit, by name."""
        tensors: dict[str, Tensor] = {}
        forms = {}
        for name, delta in self.deltas.items():
            forms[name] = f"{type(delta).__name__}{delta.dim if isinstance(delta, Slices) else ''}"
            parts = {key: part for key, part in vars(delta).items() if isinstance(part, Tensor)}
            tensors |= {f"{name}:{key}": part for key, part in parts.items()}
        return tensors, {"forms": forms, "model": self.model, "info": self.info}

    @classmethod
    def of_parts(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> WeightDeltas:
        """The edit of the tensors and JSON-able values that :meth:`to_parts` gives.

        Raises:
            KeyError: a tensor or value is missing.
            ValueError, TypeError: parts that make no edit.
        """
        rest, deltas = dict(tensors), {}
        for name, form in values["forms"].items():
            if form not in _FORMS:
                raise ValueError(f"forms: {name!r} is {form!r}, expected one of {sorted(_FORMS)}")
            build, parts = _FORMS[form]
            deltas[name] = build(*(rest.pop(f"{name}:{part}") for part in parts))
        if rest:
            raise ValueError(f"unexpected tensors {sorted(rest)}")
        return cls(deltas, values["model"], values["info"])

    @classmethod
    def _of_parts(cls, file: Contents) -> WeightDeltas:
        return cls.of_parts(file.tensors, {name: file.value(name, dict) for name in ("forms", "model", "info")})

    def __len__(self) -> int:
        """Weights that are changed."""
        return sum(
            delta.up.shape[0] * delta.down.shape[1] if isinstance(delta, LowRank) else delta.values.numel()
            for delta in self.deltas.values()
        )

    def __repr__(self) -> str:
        method = f", {self.info['method']}" if "method" in self.info else ""
        return f"WeightDeltas({len(self)} weights of {len(self.deltas)} parameters{method})"


_FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Dense": (Dense, ("values",)),
    "LowRank": (LowRank, ("up", "down")),
    "Slices0": (lambda indices, values: Slices(0, indices, values), ("indices", "values")),
    "Slices1": (lambda indices, values: Slices(1, indices, values), ("indices", "values")),
}


def _entries(delta: Delta, shape: tuple[int, ...]) -> Tensor:
    """Flat indices of the entries that a delta touches, ascending."""
    every = torch.arange(torch.Size(shape).numel())
    if not isinstance(delta, Slices):
        return every
    return every.view(shape).index_select(delta.dim, delta.indices).reshape(-1)


def _checked(name: str, delta: Delta, shape: tuple[int, ...]) -> Delta:
    """A delta that fits a parameter of this shape, owned, float32 on the CPU."""
    if isinstance(delta, Dense):
        return Dense(_own(name, delta.values, shape))
    if isinstance(delta, LowRank):
        rank = delta.down.shape[:1] if isinstance(delta.down, Tensor) else ()
        if len(shape) != 2 or not rank or not rank[0]:
            raise ValueError(f"deltas: {name!r} has the shape {shape}, a low-rank delta needs a matrix and a rank")
        return LowRank(_own(name, delta.up, (shape[0], *rank)), _own(name, delta.down, (*rank, shape[1])))
    if not isinstance(delta, Slices):
        raise TypeError(f"deltas: {name!r} needs Dense, LowRank or Slices, got {type(delta).__name__}")
    if delta.dim not in range(min(2, len(shape))):
        raise ValueError(f"deltas: {name!r} has the shape {shape}, no rows or columns in dimension {delta.dim}")
    indices = delta.indices
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1 or not len(indices):
        raise ValueError(f"deltas: {name!r} needs int64 indices [n], got {indices!r:.100}")
    indices, width = indices.detach().cpu().clone(), shape[delta.dim]
    if indices[0] < 0 or indices[-1] >= width or bool((indices.diff() <= 0).any()):
        raise ValueError(f"deltas: {name!r} needs ascending indices below {width}")
    sliced = (*shape[: delta.dim], len(indices), *shape[delta.dim + 1 :])
    return Slices(delta.dim, indices, _own(name, delta.values, sliced))


def _own(name: str, values: Any, shape: tuple[int, ...]) -> Tensor:
    """A finite float32 copy on the CPU, once it has this shape."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"deltas: {name!r} needs floating tensors, got {found}")
    if tuple(values.shape) != shape:
        raise ValueError(f"deltas: {name!r} needs the shape {shape}, got {tuple(values.shape)}")
    values = values.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not bool(values.isfinite().all()):
        raise ValueError(f"deltas: must be finite, got {values[~values.isfinite()][0]} in {name!r}")
    return values
