"""What all ops share: their definition, the call of the compiled module, and checks."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from spurge import _core

_LIB = library.Library("spurge", "DEF")
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# torch >= 2.10 hands C++ its tensors and its current stream; older ones go through __dlpack__, which
# refuses tensors that require grad, and the stream has to be passed.
_EXCHANGE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def check(condition: bool, message: Callable[[], str]) -> None:
    torch._check_value(condition, message)


def check_floating(name: str, x: Tensor) -> None:
    check(
        x.dtype in _FLOATING,
        lambda: f"{name}: dtype must be float32, bfloat16, float16 or float64, got {x.dtype}",
    )


def check_same(name: str, x: Tensor, other: str, y: Tensor) -> None:
    check(
        x.shape == y.shape,
        lambda: f"{name} and {other} must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}",
    )
    check(x.dtype == y.dtype, lambda: f"{name} and {other} must have the same dtype, got {x.dtype} and {y.dtype}")
    check_device(name, x, other, y)


def check_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    check(
        x.device == y.device,
        lambda: f"{name} and {other} must be on the same device, got {x.device} and {y.device}",
    )


def run(kernel: Callable[..., Any], *args: Any) -> Any:
    """Call a ``_core`` function on detached tensors, with the thread count and, for old torch, the stream."""
    if _EXCHANGE:
        return kernel(*args, torch.get_num_threads())
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    stream = None
    for a in args:
        if isinstance(a, Tensor) and a.is_cuda:
            stream = torch.cuda.current_stream(a.device).cuda_stream
            break
    return kernel(*args, torch.get_num_threads(), stream)


def written(x: Tensor, write: Callable[[Tensor], None]) -> None:
    """Let ``write`` change ``x`` in place, through a contiguous copy where it has to be, and tell autograd."""
    if x.is_contiguous():
        write(x)
        torch.autograd.graph.increment_version(x)
    else:
        copy = x.contiguous()
        write(copy)
        x.copy_(copy)


def workspace(like: Tensor, size: Callable[..., int], *shape: int) -> Tensor:
    """Memory that a CUDA kernel works in."""
    return like.new_empty(size(*shape) if like.is_cuda else 0, dtype=torch.float64)


def copied(to: Tensor, result: Tensor) -> None:
    to.copy_(result)


# The oldest GPU generation that machine code was built for ("80-real 90-real 120" -> 80).
_OLDEST_ARCH = min((int(a) for a in re.findall(r"\d+", _core.build_config()["cuda_archs"] or "")), default=0)


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= _OLDEST_ARCH


def _slow(name: str, device: torch.device) -> None:
    built = "" if _core.built_with_cuda else " (this build has no CUDA kernels; see `spurge doctor`)"
    warnings.warn(f"spurge::{name} has no kernel for {device}{built}: running the float64 reference", stacklevel=3)


def register(
    schema: str,
    fake: Callable[..., Any],
    kernel: Callable[..., Any],
    twin: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define one op: ``fake`` for shapes, ``kernel`` for CPU (and CUDA where built), ``twin`` elsewhere.

    With ``backward`` it is differentiable once, as PyTorch's ``register_autograd`` has it; without, not at all.
    """
    name = schema.split("(", 1)[0]

    def elsewhere(*args: Any) -> Any:
        _slow(name, next(a.device for a in args if isinstance(a, Tensor)))
        return twin(*args)

    def on_cuda(*args: Any) -> Any:
        return kernel(*args) if _runs_kernels(args[0].device) else elsewhere(*args)

    _LIB.define(schema)
    _LIB.impl(name, kernel, "CPU")
    if _core.built_with_cuda:
        _LIB.impl(name, on_cuda, "CUDA")
    _LIB.impl(name, elsewhere, "CompositeExplicitAutograd")
    if backward is None:
        _LIB.impl(name, library.fallthrough_kernel, "Autograd")
    else:
        library.register_autograd(f"spurge::{name}", backward, setup_context=setup_context, lib=_LIB)
    library.register_fake(f"spurge::{name}", fake, lib=_LIB)
    return getattr(torch.ops.spurge, name).default


def numbers(values: Sequence[float] | Tensor) -> Sequence[float]:
    return values.tolist() if isinstance(values, Tensor) else values


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
