"""Temporary changes to a model: every one is undone on the way out, whatever happens inside.

Hooks and replaced forwards act for the thread that installed them: others that run the model meanwhile run it as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import Temporaries, acquire, every, temporary

_locks: Any = WeakTensorKeyDictionary()  # a model's first parameter -> its lock: a wrapper has the same one
_locks_guard = threading.Lock()
_AUTOCAST = ("cpu", "cuda")  # devices that have a state of their own


@temporary
def alone(model: nn.Module, *, surely: bool = False) -> Iterator[None]:
    """No other thread runs or edits ``model`` through Spurge meanwhile; those that want to wait. Blocks nest.

    Args:
        surely: Ctrl-C does not end the waiting: for what has to be undone.
    """
    first = next(model.parameters(), None)
    if first is None:
        yield
        return
    with _locks_guard:
        lock = _locks.setdefault(first, threading.RLock())
    if surely:
        lock.acquire()
    else:
        acquire(lock)
    yield
    lock.release()


class _Eager:
    """Makes code under ``torch.compile`` run eagerly, in all threads, while any hook of Spurge is to act in it.

    A compiled model does not look for hooks that came after it was compiled, and keeps those it was compiled
    with: they would be ignored, or stay after they were taken off, without a word.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._stance: Any = None

    @temporary
    def held(self) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._stance = torch.compiler.set_stance("force_eager")
            self._holders += 1
        yield
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._stance.__exit__(None, None, None)


EAGER = _Eager()


def _compiled(model: nn.Module) -> bool:
    """Whether a model, or a part of it, runs under ``torch.compile``."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@temporary
def frozen(model: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """The model in evaluation mode, without parameter gradients and for one thread alone; all is put back after.

    Modes and flags are the model's: another thread that trains it meanwhile does so without dropout, and with
    ``gradients`` without parameter gradients. One that only runs it in evaluation mode sees no difference.

    Args:
        gradients: whether the block wants gradients, by activations. False: torch computes none in it, and parameters
            stay as they are.

    Raises:
        ValueError: gradients are wanted inside ``torch.inference_mode``.
    """
    if gradients and torch.is_inference_mode_enabled():
        raise ValueError(
            "torch.inference_mode: there are no gradients inside it, expected torch.no_grad or neither of both"
        )
    with alone(model), Temporaries() as changes:
        if _compiled(model):
            changes.enter_context(EAGER.held())
        changes.enter_context(grad_mode(gradients))
        changes.enter_context(_same_autocast())
        modules = [module for module in model.modules() if module.training]
        changes.callback(every, _train, modules)
        for module in modules:
            module.training = False
        if gradients:
            wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
            changes.callback(every, torch.Tensor.requires_grad_, wanted)
            for parameter in wanted:
                parameter.requires_grad_(False)
        yield


def _train(module: nn.Module) -> None:
    module.training = True


@temporary
def _same_autocast() -> Iterator[None]:
    """Puts back what blocks of autocast in a model's own code change: Ctrl-C may cut one as it is left."""
    states = [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in _AUTOCAST]
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    yield
    torch.autocast_increment_nesting()
    while torch.autocast_decrement_nesting() > depth:
        torch.clear_autocast_cache()
    for name, enabled, dtype in states:
        torch.set_autocast_enabled(name, enabled)
        torch.set_autocast_dtype(name, dtype)


@temporary
def hook(module: nn.Module, function: Callable[..., Any], *, foremost: bool = False) -> Iterator[None]:
    """``function(module, args, output)`` after each forward of ``module`` in this thread.

    Args:
        foremost: in front of the hooks that the module has, whatever they make of its output.
    """
    handle = module.register_forward_hook(in_this_thread(function), prepend=foremost)
    yield
    handle.remove()


@temporary
def hook_before(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """``function(module, args, kwargs)`` before each forward of ``module`` in this thread."""
    handle = module.register_forward_pre_hook(in_this_thread(function), with_kwargs=True)
    yield
    handle.remove()


@temporary
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` runs ``forward`` instead of its own in this thread."""
    before = module.__dict__.get("forward")  # a wrapper such as a device placement hook, else the class's method
    module.__dict__["forward"] = in_this_thread(forward, module.forward)
    yield
    if before is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = before


def configurations(model: nn.Module) -> list[Any]:
    """Those of a model's parts, each once."""
    parts = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in parts if config is not None}.values())


@temporary
def for_rows(configs: Sequence[Any]) -> Iterator[None]:
    """The model of these configurations takes rows of any number: they ask for no cache, and name a padding token.

    Layers may run several times on different rows, which a cache would add up. Of one row, heads of transformers read
    the last token where no padding token is named, and refuse several: here they read that of each.
    """
    with Temporaries() as changes:
        for config in configs:
            for name, value, instead in (("use_cache", True, False), ("pad_token_id", None, -1)):
                if getattr(config, name, ...) is value:
                    changes.callback(setattr, config, name, value)
                    setattr(config, name, instead)
        yield


def in_this_thread(function: Callable[..., Any], elsewhere: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
    """A function that does what ``function`` does in the thread that is running now, and ``elsewhere`` in others.

    By default it does nothing there: a hook that is being installed or taken off in another thread is called in either
    of torch's ways.
    """
    thread = threading.get_ident()

    def called(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == thread else elsewhere)(*args, **kwargs)

    return called


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
