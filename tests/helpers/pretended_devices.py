"""Devices that are not there: CPU tensors that say they lie on ``cpu:0`` or ``cpu:1``, operations that do not mix them.

What an operation makes lies where its arguments lie; only ``to`` moves. As on GPUs, numbers without dimensions and
indices may come from the host, whose device is plain ``cpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = torch.device("cpu")
_aten = torch.ops.aten
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index)


class Mixed(RuntimeError):
    """An operation on tensors of two devices."""


class _Places:
    """Device by memory; memory that is used again is written anew by the operation that gets it."""

    def __init__(self) -> None:
        self._of: dict[int, torch.device] = {}

    def of(self, tensor: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            return self._of.get(tensor.untyped_storage()._cdata, HOST)

    def put(self, tensor: Tensor, device: torch.device) -> None:
        with torch._C.DisableTorchFunction():
            self._of[tensor.untyped_storage()._cdata] = device


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: _Places, device: torch.device) -> Tensor:
        ctx.places, ctx.source = places, places.of(tensor)
        moved = tensor.clone()
        places.put(moved, device)
        return moved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        moved = gradient.clone()
        ctx.places.put(moved, ctx.source)
        return moved, None, None


class _Operations(TorchDispatchMode):
    """Refuses operations that mix devices, and says where their results lie."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = HOST
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        found = {self.places.of(tensor) for tensor in tensors if tensor.dim()}
        if func.overloadpacket in _INDEXING:
            found.discard(HOST)
        if len(found) > 1:
            raise Mixed(f"{func}: {[(tuple(t.shape), str(self.places.of(t))) for t in tensors]}")
        scalars = {self.places.of(tensor) for tensor in tensors} - {HOST}
        home = next(iter(found or scalars), HOST)
        out = func(*args, **kwargs)
        if func is _aten.lift_fresh.default:  # memory that torch.tensor filled itself
            home = HOST
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf):
                self.places.put(leaf, torch.device(asked) if asked is not None else home)
        return out


class _Questions(TorchFunctionMode):
    """Answers where tensors lie, and moves them."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.places.of(args[0])
        if func is Tensor.cpu:
            return _Move.apply(args[0], self.places, HOST)
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": HOST}).to(kwargs["device"])
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *(kwargs.get(name) for name in ("device", "dtype", "other"))]
        device, dtype = None, None
        for value in given:
            if isinstance(value, (torch.device, str)):
                device = torch.device(value)
            elif isinstance(value, torch.dtype):
                dtype = value
            elif torch.is_tensor(value):
                device, dtype = self.places.of(value), value.dtype
        if device is not None and device != self.places.of(tensor):
            tensor = _Move.apply(tensor, self.places, device)
        return tensor if dtype is None else tensor.type(dtype)


@contextmanager
def pretended(model: nn.Module, devices: dict[str, torch.device]) -> Iterator[_Places]:
    """``model`` with the modules of these paths on pretended devices, as accelerate places them.

    Args:
        devices: module path to device; ``""`` is that of everything else and of inputs and outputs.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    places = _Places()
    for name in sorted(devices):
        module = model.get_submodule(name)
        for tensor in (*module.parameters(), *module.buffers()):
            places.put(tensor, devices[name])
    with _Questions(places), _Operations(places):
        for name, device in devices.items():
            moves = AlignDevicesHook(device, io_same_device=not name)
            moves.init_hook = lambda module: module  # the weights are there
            add_hook_to_module(model.get_submodule(name), moves)
        try:
            yield places
        finally:
            remove_hook_from_module(model, recurse=True)
