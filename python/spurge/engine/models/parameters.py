"""Parameters that may be written to in place: what kind they are, who else uses them, and their exact bits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spurge.engine.base.checks import first_not_finite
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import within

FLOATS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""Types of plain weights, and the integers of the same size that hold their bits."""


_AROUND = ("_orig_mod", "module", "net")  # what torch and people call the one module inside another
_ADAPTED = ["base_model", "model"]  # what peft calls it


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter of a model by where it is, so that it is found again after ``model.to(device)``.

    Attributes:
        name: its full name, as in ``model.named_parameters()``.
        module: the module that owns it.
        key: its name there.
        added: what adapters add to it, of an edit that gives their sum new values.
    """

    name: str
    module: nn.Module
    key: str
    added: tuple[Tensor, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now, edits included; ValueError if the module has lost it."""
        parameter = self.module._parameters.get(self.key)
        if parameter is None:
            raise ValueError(f"model: {self.name!r} is no parameter any more (computed from others, or removed)")
        return parameter


def plain_name(path: str) -> str:
    """The path of a module or parameter as it is without ``torch.compile``, of the whole or of parts of a model."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def bare_name(path: str) -> str:
    """The path of a module or parameter as it is without wrappers around the model, and without adapters in it.

    >>> bare_name("module.base_model.model.classifier.modules_to_save.default.weight")
    'classifier.weight'
    """
    parts = plain_name(path).split(".")
    while parts and (parts[0] in _AROUND or parts[:2] == _ADAPTED):
        parts = parts[1 if parts[0] in _AROUND else 2 :]
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        parts = parts[:place] + parts[place + 2 :]
    return ".".join(part for part in parts if part != "base_layer")


def named_as(name: str, own: Iterable[str]) -> str:
    """The shortest of a model's ``own`` names that is ``name`` but for wrappers; ``name`` where there is none."""
    names = set(own)
    bare = bare_name(name)
    return name if name in names else min((own for own in names if bare_name(own) == bare), key=len, default=name)


def copy_in_use(path: str, layer: Any) -> tuple[str, Any]:
    """Of a layer that peft keeps beside trained copies of it (``modules_to_save``), the one that runs."""
    copies = getattr(layer, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return path, layer
    adapters = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in copies]
    if not adapters:
        return f"{path}.original_module", layer.original_module
    return f"{path}.modules_to_save.{adapters[0]}", copies[adapters[0]]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that hold nothing else: compiled, in parallel, or an own class's ``net``."""
    inner = model
    while len(children := dict(inner.named_children())) == 1 and not children.keys().isdisjoint(_AROUND):
        (inner,) = children.values()
        if isinstance(inner, PreTrainedModel) or "net" not in children:
            model = inner
    return model


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float tensors of one type are equal bit for bit; devices may differ."""
    bits = FLOATS[a.dtype]
    return torch.equal(a.contiguous().view(bits), b.to(a.device).contiguous().view(bits))


def oddity(parameter: Tensor | None) -> str | None:
    """What keeps a parameter from being a plain float tensor (quantised, wrapped, computed), or None."""
    if parameter is None:
        return "computed"
    if type(parameter) in (nn.Parameter, Tensor) and parameter.dtype in FLOATS:
        return None
    return f"{type(parameter).__name__} of {parameter.dtype}"


def bits(name: str, tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a parameter or buffer consists of: itself, or those a quantised one is made of.

    Raises:
        ValueError: it hides them.
    """
    if type(tensor) in (nn.Parameter, Tensor):
        return [tensor]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return [part for inner in flatten()[0] for part in bits(name, getattr(tensor, inner))]
    try:
        held = tensor.detach().as_subclass(Tensor)
        held.data_ptr()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"model: {name!r} is a {type(tensor).__name__} (quantised) whose bits cannot be read; expected one with "
            "__tensor_flatten__, or the model before it was quantised"
        ) from error
    return [held]


def sharer(model: nn.Module, owner: nn.Module, key: str) -> str | None:
    """Name of another parameter or buffer of ``model`` in the memory of ``owner``'s parameter ``key``, or None."""
    parameter = owner._parameters[key]
    assert parameter is not None
    start, end = _span(parameter)
    for path, module in model.named_modules():
        for name, other in (*module._parameters.items(), *module._buffers.items()):
            if other is None or other.device != parameter.device or (module is owner and name == key):
                continue
            first, last = (0, 0) if other.layout != torch.strided else _span(other)
            if first < end and start < last:
                return plain_name(f"{path}.{name}".lstrip("."))
    return None


def find_places(model: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """The named parameters of a model; one in wrappers, or with adapters, is taken by its original names.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no parameter of a name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    owners = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = plain_name(f"{path}.{key}" if path else key)
                owners[name] = Place(name, module, key)
    names = list(names)
    bare = {} if all(name in owners for name in names) else _by_bare_names(model, owners)
    found = {}
    for name in names:
        place = owners.get(name) or bare.get(bare_name(str(name)))
        if place is None:
            near = difflib.get_close_matches(str(name), owners, n=3, cutoff=0.3) or list(owners)[-3:]
            raise ValueError(f"model: has no parameter {name!r}; similar ones are {near}")
        found[name] = place
    return found


def _by_bare_names(model: nn.Module, owners: Mapping[str, Place]) -> dict[str, Place]:
    """Parameters by their names without wrappers; of copies that peft keeps, those that run."""
    copies = {}
    for path, module in model.named_modules():
        kept, _ = copy_in_use(path, module)
        if kept != path:
            copies[f"{plain_name(path)}."] = f"{plain_name(kept)}."
    found: dict[str, Place] = {}
    for name, place in owners.items():
        around = next((path for path in copies if name.startswith(path)), None)
        if around is None:
            found.setdefault(bare_name(name), place)
        elif name.startswith(copies[around]):
            found.setdefault(bare_name(around + name.removeprefix(copies[around])), place)
    return found


def check_writable(model: nn.Module, place: Place) -> None:
    """Raises ValueError unless a parameter is a plain float tensor with bits that nothing else uses."""
    parameter = place.parameter
    if odd := oddity(parameter):
        raise ValueError(
            f"model: {place.name!r} must be a plain float parameter, got {odd} (quantised or wrapped); gates "
            "of neurons work (NeuronEdit.applied)"
        )
    if parameter.is_meta:
        raise ValueError(f"model: parameter {place.name!r} is on the meta device (offloaded or not loaded)")
    every = model.named_parameters(remove_duplicate=False)
    others = sorted({plain_name(name) for name, other in every if other is parameter} - {place.name})
    if not others and (other := sharer(model, place.module, place.key)):
        others = [other]
    if others:
        raise ValueError(
            f"model: parameter {place.name!r} is shared with {', '.join(map(repr, others))} (tied), which an edit "
            "would change too"
        )


def cast(name: str, indices: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` rounded to a parameter's type, on the CPU.

    Raises:
        ValueError: a value that is not finite in that type.
    """
    values = values.detach().cpu()
    rounded = values.to(dtype)
    bad = first_not_finite(rounded)
    if bad is not None:
        raise ValueError(
            f"values: expected finite numbers that {str(dtype).removeprefix('torch.')} can hold, got "
            f"{float(values[bad])} at {name!r}[{int(indices[bad])}]"
        )
    return rounded


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a dense tensor and the one after its last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _where(parameter: Tensor, indices: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A view of a parameter, and where in it the flat ``indices`` are (without the imports of unravel_index)."""
    view = parameter.detach().reshape(1) if parameter.dim() == 0 else parameter.detach()
    rest, where = indices.to(parameter.device), []
    for size in reversed(view.shape):
        where.append(rest % size)
        rest = rest // size
    return view, tuple(reversed(where))


def read(parameter: Tensor, indices: Tensor) -> Tensor:
    """The entries at flat ``indices`` ``[n]``, on the CPU."""
    view, where = _where(parameter, indices)
    return view[where].cpu()


def replaced(values: Tensor, indices: Tensor, new: Tensor) -> Tensor:
    """A copy of a tensor with ``new`` ``[n]`` at flat ``indices`` ``[n]``."""
    return values.reshape(-1).index_copy(0, indices, new).reshape(values.shape)


def write(parameter: Tensor, indices: Tensor, values: Tensor) -> None:
    """Writes the entries at flat ``indices`` ``[n]`` in place; autograd notices, but keeps no history."""
    with within(torch.inference_mode(parameter.is_inference())), grad_mode(False):
        view, where = _where(parameter, indices)
        view.index_put_(where, values.to(view.device))
    torch.clear_autocast_cache()  # which keeps the old weights in half precision until the outermost autocast ends
