"""The last linear layer of a classifier: where it is, and its numbers taken out of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spurge.engine.base.checks import instance, integer
from spurge.engine.base.files import canonical_json, fingerprint
from spurge.engine.models.parameters import copy_in_use, plain_name
from spurge.engine.models.projections import features, linears, plain

# What transformers, torchvision and timm call a classifier's head; the layer itself, or a module it is the end of.
_USUAL = ("classifier", "classification_head", "score", "fc", "heads", "head")


@dataclass(frozen=True, eq=False, repr=False)
class Head:
    r"""A linear layer: logits :math:`z_o = \sum_m w_{om} x_m + b_o`.

    Attributes:
        weight: float32 or float64 ``[O, M]`` on the CPU, an own copy.
        bias: ``[O]`` of the same type, or None.
        name: path of the layer in its model; empty where the layer is the model, or there is none.
        prints: name of each of the layer's parameters in its model to ``{"shape", "dtype", "sha256"}`` of the
            parameter as the model has it; empty for a head that belongs to no model.

    Raises:
        TypeError: weight or bias is no floating tensor.
        ValueError: shapes that do not fit together, no outputs or features, or numbers that are not finite.
    """

    weight: Tensor
    bias: Tensor | None = None
    name: str = ""
    prints: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weight = _own("weight", self.weight, torch.float32)
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"weight: expected shape [O, M], got {tuple(weight.shape)}")
        object.__setattr__(self, "weight", weight)
        if self.bias is not None:
            bias = _own("bias", self.bias, weight.dtype).to(weight.dtype)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"bias: expected shape ({len(weight)},), got {tuple(bias.shape)}")
            object.__setattr__(self, "bias", bias)
        instance("name", self.name, str)
        for name, own in self.prints.items():
            instance(f"prints: {name!r}", own, dict)
        object.__setattr__(self, "prints", json.loads(canonical_json(self.prints)))

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> Head:
        """The head of a model as :func:`find_head` finds it, copied; half-precision weights become float32.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: no such layer, or weights that are quantised, on the meta device or not finite.
        """
        name, layer = find_head(model, name)
        prints = {}
        for own, parameter in layer.named_parameters():
            full = f"{name}.{own}" if name else own
            prints[full] = print_of(full, parameter)
        return cls(layer.weight, layer.bias, name, prints)

    @property
    def outputs(self) -> int:
        """O, the rows of the weight."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """M, the features it reads."""
        return self.weight.shape[1]

    def logits(self, features: Tensor, *, rows: int = 8192) -> Tensor:
        """Logits ``[N, O]`` of features ``[N, M]``, on their device; ``rows`` at once are widened where needed.

        Computed in float32, or in float64 where the features or the head have it.

        Raises:
            TypeError: ``features`` is no floating tensor.
            ValueError: of another shape.
        """
        dtype = self._wide(features)
        out = torch.empty(len(features), self.outputs, dtype=dtype, device=features.device)
        for block, found in self._blocks(features, rows):
            out[block] = found
        return out

    def predictions(self, features: Tensor, *, rows: int = 8192) -> Tensor:
        """The output with the largest logit (the first of equal ones), int64 ``[N]``; errors as :meth:`logits`."""
        self._wide(features)
        found = [logits.argmax(1) for _, logits in self._blocks(features, rows)]
        return torch.cat([torch.empty(0, dtype=torch.int64, device=features.device), *found])

    def with_(self, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Head:
        """The same place in the same model with another weight, bias or both.

        Raises:
            ValueError: another shape than before, or numbers that are not finite.
        """
        if weight is not None and weight.shape != self.weight.shape:
            raise ValueError(f"weight: expected shape {tuple(self.weight.shape)}, got {tuple(weight.shape)}")
        if bias is not None and self.bias is None:
            raise ValueError("bias: the head has none")
        return replace(self, weight=self.weight if weight is None else weight, bias=self.bias if bias is None else bias)

    def to_parts(self, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file holds of it: tensors, ``prefix`` before their names, and its place as JSON-able values."""
        bias = {} if self.bias is None else {f"{prefix}bias": self.bias}
        return {f"{prefix}weight": self.weight, **bias}, {"name": self.name, "prints": self.prints}

    @classmethod
    def of_parts(cls, tensors: Mapping[str, Tensor], place: Mapping[str, Any], prefix: str = "") -> Head:
        """The head of :meth:`to_parts`; ``tensors`` may hold others too.

        Raises:
            KeyError: the weight or a part of the place is missing.
            TypeError, ValueError: parts that make no head.
        """
        return cls(tensors[f"{prefix}weight"], tensors.get(f"{prefix}bias"), place["name"], place["prints"])

    def fingerprint(self) -> str:
        """SHA-256 of weight, bias and place."""
        parts = [fingerprint(self.weight), None if self.bias is None else fingerprint(self.bias)]
        return fingerprint(canonical_json([*parts, self.name, self.prints]))

    def _wide(self, features: Tensor) -> torch.dtype:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            found = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features: expected a floating tensor, got {found}")
        if features.dim() != 2 or features.shape[1] != self.width:
            raise ValueError(f"features: expected shape [N, {self.width}], got {tuple(features.shape)}")
        return torch.promote_types(torch.promote_types(features.dtype, self.weight.dtype), torch.float32)

    def _blocks(self, features: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
        rows, dtype = integer("rows", rows, 1), self._wide(features)
        weight = self.weight.to(features.device, dtype)
        bias = None if self.bias is None else self.bias.to(features.device, dtype)
        for start in range(0, len(features), rows):
            block = slice(start, min(start + rows, len(features)))
            yield block, nn.functional.linear(features[block].detach().to(dtype), weight, bias)

    def __repr__(self) -> str:
        place = f" at {self.name!r}" if self.name else ""
        return f"Head({self.width} features to {self.outputs} outputs{place})"


def find_head(model: nn.Module, name: str | None = None) -> tuple[str, nn.Linear]:
    """Path and module of the linear layer that makes a classifier's logits.

    Args:
        model: any module; one under ``torch.compile`` is taken by its original names.
        name: the layer's path. Without it: the end of what usually is the head (``classifier``, ``score``, ``fc``,
            ``head``), where its rows are as many as the configuration's labels; else the last ``nn.Linear`` of the
            module tree.

    Raises:
        TypeError: ``model`` is no module, ``name`` no text.
        ValueError: no such module, one that is no ``nn.Linear`` with plain weights, or a model without any.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = dict(copy_in_use(plain_name(path), layer) for path, layer in linears(model).items())
    layers = {path: layer for path, layer in layers.items() if not isinstance(layer, Conv1D)}
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"head: expected the path of a layer, got {type(name).__name__}")
        name = plain_name(name)
        if name in layers:
            return name, _plain(name, layers[name])
        found = {plain_name(path): module for path, module in model.named_modules()}.get(name)
        got = f"a {type(found).__name__}" if found is not None else "no module of the model"
        raise ValueError(f"head: expected the path of an nn.Linear such as {list(layers)[-3:]}, {name!r} is {got}")
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    for usual in _USUAL:
        inside = [path for path in layers if path == usual or path.startswith(f"{usual}.")]
        if inside and labels in (None, (features(layers[inside[-1]]) or (0, 0))[1]):
            return inside[-1], _plain(inside[-1], layers[inside[-1]])
    if not layers:
        raise ValueError("head: the model has no nn.Linear; give the path of its last layer, or a model that has one")
    path, layer = list(layers.items())[-1]
    return path, _plain(path, layer)


def _plain(name: str, layer: nn.Module) -> nn.Linear:
    if isinstance(layer, nn.Linear) and plain(layer):
        return layer
    raise ValueError(
        f"head: {name!r} is a {type(layer).__name__} without a plain float weight (adapted, quantised or computed); "
        "merge adapters first, or load the model as it was before it was quantised"
    )


def print_of(name: str, parameter: Tensor) -> dict[str, Any]:
    """What tells a model's parameter from another: ``{"shape", "dtype", "sha256"}``.

    Raises:
        ValueError: it has no bits to look at (meta device).
    """
    if parameter.is_meta:
        raise ValueError(f"model: parameter {name!r} is on the meta device (offloaded or not loaded)")
    dtype = str(parameter.dtype).removeprefix("torch.")
    return {"shape": list(parameter.shape), "dtype": dtype, "sha256": fingerprint(parameter)}


def _own(name: str, value: Any, least: torch.dtype) -> Tensor:
    """A finite copy on the CPU, of type ``least`` or wider."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating tensor (not quantised), got {found}")
    value = value.detach().to("cpu", torch.promote_types(value.dtype, least), copy=True).contiguous()
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got {value[~value.isfinite()][0]}")
    return value
