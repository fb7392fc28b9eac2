"""Temporary changes to a model: every one is undone on the way out, whatever happens inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without parameter gradients; both are put back on the way out."""
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


@contextmanager
def hook(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """``function(module, args, output)`` after each forward of ``module``."""
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def hook_before(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """``function(module, args, kwargs)`` before each forward of ``module``."""
    handle = module.register_forward_pre_hook(function, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
