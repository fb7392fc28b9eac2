"""What a repair trains: a copy of the model whose chosen weights are free, and the deltas that these end with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from spurge.engine.base.gradients import grad_mode
from spurge.engine.edits.weight_deltas import Delta, Dense, LowRank, Slices, WeightDeltas
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.parameters import check_writable, find_places, plain_name
from spurge.engine.models.projections import Linear, linears
from spurge.engine.models.sites import Site, incoming

Which = Literal["neurons", "lora", "all"]


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a parameter that is free: rows (dim 0), columns (dim 1) or entries of it."""

    dim: int
    indices: Tensor


Free = Mapping[str, "int | Part | None"]
"""What of a model's parameters is free, by name: a delta of this rank, a part, or (None) every entry."""


def free_weights(handle: Handle, which: Which, *, neurons: NeuronSet | None = None, rank: int = 8) -> Free:
    """What is trained.

    ``"all"``: every weight, bias and norm but the embeddings and what is tied to them. ``"lora"``: low-rank deltas of
    the linear layers of all blocks. ``"neurons"``: of each neuron, what it reads (a row of every incoming projection
    and its bias) and writes (a column of the down projection).

    Raises:
        ValueError: nothing is left to train, neurons of routed experts or of adapted layers, or parameters that are
            quantised or on the meta device.
    """
    model = handle.model
    free: dict[str, int | Part | None] = {}
    if which == "all":
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        fixed = {id(parameter) for table in tables for parameter in table.parameters(recurse=False)}
        free = {plain_name(name): None for name, parameter in model.named_parameters() if id(parameter) not in fixed}
    elif which == "lora":
        blocks = {site.block_name: site.block for site in handle.sites}
        names = [f"{block}.{path}.weight" for block, module in blocks.items() for path in linears(module)]
        free = {plain_name(name): rank for name in names}
    else:
        assert neurons is not None
        sites = {site.name: site for site in handle.sites}
        neurons.check({name: site.width for name, site in sites.items()})
        for name in neurons.sites:
            free |= _parts(sites[name], neurons.indices(name))
    if not free:
        raise ValueError(f"which: {which!r} leaves nothing to train in {type(model).__name__}")
    for place in find_places(model, free).values():
        check_writable(model, place)
    return free


def _parts(site: Site, indices: Tensor) -> dict[str, int | Part | None]:
    """What the neurons ``indices`` of a site read and write."""
    if not isinstance(site.projection, Linear):
        raise ValueError(
            f"which: 'neurons' trains plain linear layers, {site.name!r} is a {type(site.down).__name__}; use 'all'"
        )
    found: dict[str, int | Part | None] = {}
    found[f"{site.name}.weight"] = Part(0 if isinstance(site.down, Conv1D) else 1, indices)
    for path, module in incoming(site).items():
        transposed, bias = isinstance(module, Conv1D), module._parameters.get("bias")
        weight = module._parameters["weight"]
        assert weight is not None
        both = weight.shape[1 if transposed else 0] == 2 * site.width
        rows = torch.cat([indices, indices + site.width]) if both else indices
        found[f"{path}.weight"] = Part(1 if transposed else 0, rows)
        if bias is not None:
            found[f"{path}.bias"] = Part(0, rows)
    return found


class _LowRank(nn.Module):
    """W + up @ down; up begins with zeros, so that the model begins as it was."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, *weight.shape)
        down = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.down = nn.Parameter(down.to(weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down

    def delta(self) -> Delta:
        return LowRank(self.up, self.down)


class _Slices(nn.Module):
    """W with something added to some rows, columns or entries."""

    indices: Tensor

    def __init__(self, weight: Tensor, part: Part) -> None:
        super().__init__()
        self.dim = part.dim
        self.register_buffer("indices", part.indices.to(weight.device))
        shape = [*weight.shape]
        shape[part.dim] = len(part.indices)
        self.values = nn.Parameter(weight.new_zeros(shape))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_add(self.dim, self.indices, self.values)

    def delta(self) -> Delta:
        return Slices(self.dim, self.indices, self.values)


class Student:
    """A copy of a model, in evaluation mode and at least float32, with free weights to train; the model is only read.

    Made where none of the model's parameters asks for gradients (`spurge.engine.models.hooks.frozen`): it shares those
    that are not trained.

    Args:
        handle: of the model.
        free: what is trained.
        seed: of what low-rank deltas begin with.

    Attributes:
        handle: of the copy.
        parameters: what is trained, by a name of its own.

    Raises:
        ValueError: the model cannot be copied.
    """

    def __init__(self, handle: Handle, free: Free, seed: int) -> None:
        model = copied(handle.model, free, widened=True)
        self.handle = Handle(model, handle.tokenizer)
        self.parameters: dict[str, nn.Parameter] = {}
        self._starts: dict[str, Tensor] = {}
        self._formed: dict[str, _LowRank | _Slices] = {}
        generator = torch.Generator().manual_seed(seed)
        places = find_places(model, free)
        for name, form in free.items():
            weight = places[name].parameter
            if form is None:
                weight.requires_grad_(True)
                self.parameters[name] = weight
                self._starts[name] = find_places(handle.model, [name])[name].parameter.detach()
                continue
            made = _LowRank(weight, form, generator) if isinstance(form, int) else _Slices(weight, form)
            parametrize.register_parametrization(places[name].module, places[name].key, made)
            self._formed[name] = made
            self.parameters |= {f"{name}:{key}": parameter for key, parameter in made.named_parameters()}

    def deltas(self) -> dict[str, Delta]:
        """What has been added so far, by parameter name of the model."""
        dense = {name: Dense(self.parameters[name].detach() - start) for name, start in self._starts.items()}
        return dense | {name: made.delta() for name, made in self._formed.items()}


def copied(model: nn.Module, free: Iterable[str], *, widened: bool = False) -> nn.Module:
    """A copy in evaluation mode that has its own free parameters and shares the others with the model.

    Args:
        model: one under ``torch.compile`` is copied as it is without.
        free: names of the parameters that are to be the copy's own.
        widened: half-precision parameters become float32, and then all of them are the copy's own.

    Raises:
        ValueError: a part of the model cannot be copied.
    """
    model = getattr(model, "_orig_mod", model)
    narrow = widened and any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())
    own = set() if narrow else {id(place.parameter) for place in find_places(model, free).values()}
    shared = {} if narrow else {id(tensor): tensor for tensor in _tensors(model) if id(tensor) not in own}
    try:
        made = copy.deepcopy(model, dict(shared))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"model: cannot be copied, and a copy of it is what is trained: {error}") from error
    return (made.float() if narrow else made).eval()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def write_edited(model: nn.Module, into: nn.Module, edit: WeightDeltas) -> None:
    """Gives the parameters of a copy the values that the edit gives those of the model it was made for."""
    originals, places = find_places(model, edit.deltas), find_places(into, edit.deltas)
    with grad_mode(False):
        for name, place in places.items():
            place.parameter.copy_(edit.edited(name, originals[name].parameter))
