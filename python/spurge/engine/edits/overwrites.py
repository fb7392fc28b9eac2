"""Weights overwritten in place on a running model, in layers that come off in any order and give the exact bits back.

A layer is new values of some entries of one parameter. Where layers meet, the last one counts; below all of them lie
the model's own bits. Everything that looks at a model through here sees its own bits, whatever is applied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spurge.engine.base.temporary import Temporaries, every, temporary, uncut
from spurge.engine.models.hooks import alone
from spurge.engine.models.parameters import Place, cast, plain_name, read, same_bits, write

Changes = dict[str, tuple[Tensor, Tensor]]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class _Layer:
    """New ``values`` ``[n]`` of the entries ``indices`` of a parameter, the model's ``old`` bits there; on the CPU."""

    indices: Tensor
    values: Tensor
    old: Tensor
    info: Mapping[str, Any]
    wanted: bool = True  # not undone, also while it is lifted


_LOCK = threading.RLock()
_STACKS: WeakKeyDictionary[nn.Module, dict[str, list[_Layer]]] = WeakKeyDictionary()


def original(place: Place) -> Tensor:
    """The parameter as if nothing were applied to it: itself, or a copy.

    Raises:
        ValueError: its edited entries have changed since they were written.
    """
    parameter = place.parameter.detach()
    stack = _stack(place)
    if not stack:
        return parameter
    with _LOCK:
        indices, old, _ = _merged(place, stack)
    parameter = parameter.clone()
    write(parameter, indices, old)
    return parameter


class Overwritten:
    """Entries of a model's parameters that have new values until :meth:`undo`.

    They are written between two runs of Spurge on the model; a plain forward that another thread has under way may
    read a part of them.

    Args:
        model: whose parameters they are.
        lasting: written below all layers, as the model's own bits from now on; such a handle is undone last.
    """

    def __init__(self, model: nn.Module, *, lasting: bool = False) -> None:
        self._model, self._lasting = model, lasting
        self._layers: list[tuple[Place, _Layer]] = []

    def apply(self, places: Mapping[str, Place], changes: Changes, info: Mapping[str, Any]) -> None:
        """Writes ``(indices [n], values [n])`` by name, all or none.

        Raises:
            ValueError: values that the parameter's type cannot hold, entries that others have changed since they were
                edited, or a lasting change below what is applied now.
        """
        with alone(self._model), _LOCK:
            current, layers = [], []
            for name, (indices, values) in changes.items():
                place = places[name]
                stack = _stack(place)
                if stack and self._lasting:
                    raise ValueError(f"fold: an edit is applied to {name!r} now; take it off first")
                values = cast(name, indices, values, place.parameter.dtype)
                if stack:
                    _merged(place, stack)
                current.append(read(place.parameter, indices))
                old = current[-1]
                for layer in reversed(stack):
                    old = _replaced(indices, old, layer.indices, layer.old)
                layers.append((place, _Layer(indices, values, old, info)))
            self._layers = list(layers)

            def put() -> None:
                for place, layer in layers:
                    if not self._lasting:
                        _STACKS.setdefault(place.module, {}).setdefault(place.key, []).append(layer)
                    write(place.parameter, layer.indices, layer.values)

            uncut(put, partial(self._write_back, current))

    def undo(self, *, surely: bool = False) -> None:
        """Puts the old bits back, or what layers applied since have there; a second call does nothing.

        Args:
            surely: Ctrl-C does not end the waiting for a run of Spurge in another thread.

        Raises:
            ValueError: the written entries have changed since (training, a cast, another fold); nothing is written.
        """
        with alone(self._model, surely=surely), _LOCK:
            todo = []
            for place, layer in self._layers:
                stack = _stack(place)
                if self._lasting and stack:
                    raise ValueError(f"undo: an edit is applied to {place.name!r} now; take it off first")
                rest = [other for other in stack if other is not layer]
                if self._lasting or len(rest) < len(stack):
                    expected = layer.values if self._lasting else _composed(layer.indices, layer.old, stack)
                    _check_bits(place, layer.indices, expected)
                    todo.append((place, layer, _composed(layer.indices, layer.old, rest)))
            uncut(partial(every, self._finish, todo))
            self.forget()

    def _write_back(self, current: list[Tensor]) -> None:
        def put(written: tuple[tuple[Place, _Layer], Tensor]) -> None:
            (place, layer), before = written
            _drop(place, layer)
            write(place.parameter, layer.indices, before)

        every(put, list(zip(self._layers, current, strict=True)))
        self._layers = []

    def _finish(self, undone: tuple[Place, _Layer, Tensor]) -> None:
        place, layer, values = undone
        write(place.parameter, layer.indices, values)
        _drop(place, layer)
        self._layers = [(other, own) for other, own in self._layers if own is not layer]

    def forget(self) -> None:
        """Leaves the weights as they are; nothing is put back any more."""
        with _LOCK:
            for place, layer in self._layers:
                _drop(place, layer)
            self._layers = []


@temporary
def overwritten(
    model: Model, places: Mapping[str, Place], changes: Changes, info: Mapping[str, Any]
) -> Iterator[Model]:
    """Changes that are applied inside the ``with`` block and always undone after it."""
    handle = Overwritten(model)
    handle.apply(places, changes, info)
    yield model
    try:
        handle.undo(surely=True)
    finally:
        handle.forget()


def is_overwritten(model: nn.Module) -> bool:
    """Whether changes are applied to weights of ``model`` now; those folded in are not counted."""
    return any(_STACKS.get(module) for module in model.modules())


def overwrites_on(model: nn.Module) -> tuple[Changes, list[Mapping[str, Any]]]:
    """What is applied to the weights of ``model`` now, by parameter name, as it acts; and where it comes from.

    Raises:
        ValueError: as :func:`original`.
    """
    changes: Changes = {}
    infos: dict[int, Mapping[str, Any]] = {}
    with _LOCK:
        for place, stack in _applied(model):
            indices, _, values = _merged(place, stack)
            changes[place.name] = (indices, values)
            infos |= {id(layer.info): layer.info for layer in stack}
    return changes, list(infos.values())


@temporary
def lifted(model: nn.Module) -> Iterator[None]:
    """The model as if nothing were applied to its weights, inside the ``with`` block.

    Runs of Spurge in other threads wait until it ends; a plain forward there sees the model as this thread does.

    Raises:
        ValueError: as :func:`original`.
    """
    with alone(model), Temporaries() as changes:
        with _LOCK:
            found = [(place, stack, *_merged(place, stack)[:2]) for place, stack in _applied(model)]
        changes.callback(every, _put_back, found)
        for place, _, indices, old in found:
            write(place.parameter, indices, old)
            _STACKS[place.module].pop(place.key, None)
        yield


def _stack(place: Place) -> list[_Layer]:
    return _STACKS.get(place.module, {}).get(place.key, [])


def _drop(place: Place, layer: _Layer) -> None:
    """Takes a layer off its stack if it is on it, and keeps it off."""
    layer.wanted = False
    keys = _STACKS.get(place.module, {})
    rest = [other for other in keys.get(place.key, []) if other is not layer]
    if rest:
        keys[place.key] = rest
    else:
        keys.pop(place.key, None)


def _put_back(lifted: tuple[Place, list[_Layer], Tensor, Tensor]) -> None:
    """Writes lifted layers again, those that were not undone meanwhile."""
    place, stack, indices, old = lifted
    rest = [layer for layer in stack if layer.wanted]
    if rest:
        _STACKS.setdefault(place.module, {})[place.key] = rest
    write(place.parameter, indices, _composed(indices, old, rest))


def _applied(model: nn.Module) -> list[tuple[Place, list[_Layer]]]:
    return [
        (Place(plain_name(f"{path}.{key}" if path else key), module, key), stack)
        for path, module in model.named_modules()
        for key, stack in _STACKS.get(module, {}).items()
    ]


def _merged(place: Place, stack: list[_Layer]) -> tuple[Tensor, Tensor, Tensor]:
    """All entries that a stack touches, ascending, with the bits below it and those on top, which must be there now."""
    indices = torch.cat([layer.indices for layer in stack]).unique()
    old = torch.zeros(len(indices), dtype=stack[0].old.dtype)
    for layer in stack:
        old = _replaced(indices, old, layer.indices, layer.old)
    values = _composed(indices, old, stack)
    _check_bits(place, indices, values)
    return indices, old, values


def _composed(indices: Tensor, values: Tensor, stack: list[_Layer]) -> Tensor:
    """What a stack of layers makes of some entries."""
    for layer in stack:
        values = _replaced(indices, values, layer.indices, layer.values)
    return values


def _replaced(indices: Tensor, values: Tensor, above: Tensor, new: Tensor) -> Tensor:
    """``values`` at ``indices``, those that are also in ``above`` replaced by ``new``; both ascending."""
    at = torch.searchsorted(above, indices).clamp_max(len(above) - 1)
    return torch.where(above[at] == indices, new[at], values)


def _check_bits(place: Place, indices: Tensor, expected: Tensor) -> None:
    parameter = place.parameter
    if parameter.dtype != expected.dtype or not same_bits(read(parameter, indices), expected):
        raise ValueError(
            f"model: the edited weights of {place.name!r} have changed since the edit (training, a cast, another "
            "fold); undo that first"
        )
