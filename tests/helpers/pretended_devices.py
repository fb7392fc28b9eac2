"""Devices that are not there: CPU tensors that say they lie on ``cuda:0`` or ``cpu:1``, never mixed by an operation.

What an operation makes lies where its arguments lie; only ``to``, ``cpu`` and ``copy_`` move. As on GPUs, numbers
without dimensions and indices may come from the host, whose device is plain ``cpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

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
    """Refuses operations that mix devices, and says where their results lie.

    Attributes:
        ours: of each op of the project that ran, the devices of its tensors.
    """

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places
        self.ours: dict[str, set[torch.device]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = HOST
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        if func is _aten.copy_.default:
            return func(*args, **kwargs)
        found = {self.places.of(tensor) for tensor in tensors if tensor.dim()}
        if func.namespace == "spurge":
            self.ours.setdefault(func._schema.name.split("::")[1], set()).update(found)
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
    """Answers where tensors lie, and moves them; in what a backward pass calls, too."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __enter__(self) -> _Questions:
        run = torch.autograd._engine_run_backward

        def backward(*args: Any, **kwargs: Any) -> Any:  # torch leaves the mode for it
            with _Again(self):
                return run(*args, **kwargs)

        self._patch = mock.patch.object(torch.autograd, "_engine_run_backward", backward)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.places.of(args[0])
        if func is Tensor.cpu:
            return self._to(args[0], HOST)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if kwargs.get("device") is not None:  # torch itself would look for it
            made = func(*args, **kwargs | {"device": HOST})
            if func is torch.as_tensor:  # which may be what it was given
                return self._to(made, kwargs["device"])
            self.places.put(made, torch.device(kwargs["device"]))
            return made
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
        return tensor if dtype is None else tensor.to(dtype)


class _Again(TorchFunctionMode):
    """The same answers."""

    def __init__(self, questions: _Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.questions.__torch_function__(func, types, args, kwargs)


@contextmanager
def stand_in(device: torch.device, *modules: nn.Module) -> Iterator[dict[str, set[torch.device]]]:
    """``modules`` as if they lay on ``device`` as a whole, where other tensors can be moved, too.

    Yields:
        Of each op of the project that ran since, the devices of its tensors.
    """
    places = _Places()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            places.put(tensor, device)
    operations = _Operations(places)
    with _Questions(places), operations:
        yield operations.ours


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
