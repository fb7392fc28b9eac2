"""Whether torch computes gradients: blocks that Ctrl-C cannot leave open, unlike those of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from spurge.engine.base.temporary import temporary

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


@temporary
def grad_mode(enabled: bool) -> Iterator[None]:
    """Whether torch computes gradients, as ``torch.set_grad_enabled``."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(enabled)
    yield
    torch.set_grad_enabled(before)


def without_gradients(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function in a block without gradients, as under ``@torch.no_grad()``."""

    @functools.wraps(function)
    def called(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with grad_mode(False):
            return function(*args, **kwargs)

    return called
