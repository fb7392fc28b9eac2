"""Temporary changes to a model: every one is undone on the way out, whatever happens inside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

_locks: Any = WeakTensorKeyDictionary()  # a model's first parameter -> its lock: a wrapper has the same one
_locks_guard = threading.Lock()


def _lock(model: nn.Module) -> Any:
    first = next(model.parameters(), None)
    if first is None:
        return nullcontext()
    with _locks_guard:
        return _locks.setdefault(first, threading.RLock())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without parameter gradients and for one thread alone; all is put back after."""
    with _lock(model), _frozen(model):
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def hook(module: nn.Module, function: Callable[..., Any]) -> RemovableHandle:
    """``function(module, args, output)`` after each forward of ``module``, until the block ends."""
    return module.register_forward_hook(function)


def hook_before(module: nn.Module, function: Callable[..., Any]) -> RemovableHandle:
    """``function(module, args, kwargs)`` before each forward of ``module``, until the block ends."""
    return module.register_forward_pre_hook(function, with_kwargs=True)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` runs ``forward`` instead of its own."""
    before = module.__dict__.get("forward")  # a wrapper such as a device placement hook, else the class's method
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


class WideAttention(TorchFunctionMode):
    """Scaled dot-product attention of half-precision CPU tensors computed in float32.

    torch's own half-precision CPU kernel takes many times the float32 kernel's time in its backward pass; the two
    casts are a small part of what that costs, and the result is the more accurate one.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        attention: Any = scaled_dot_product_attention
        if func is not attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        dtype = named["query"].dtype
        if named["query"].device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
            return func(*args, **kwargs)
        return func(*map(_wide, args), **{key: _wide(value) for key, value in kwargs.items()}).to(dtype)


def _wide(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value
