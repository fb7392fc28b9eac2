r"""The kernels as torch sees them: for each op its schema, its contract, its kernel and its public face.

* The schema and the *fake* kernel (shapes, dtypes, error messages) are the contract; ``torch.compile``
  and ``opcheck`` use them. The same checks guard the public functions.
* The kernel allocates the outputs and calls the compiled module ``_core``, which sees no torch. CUDA
  kernels run on torch's current stream, and can be captured in a CUDA graph.
* On a device without kernels (another accelerator, or CUDA where the build has none) the op runs its
  float64 twin in :mod:`spurge.reference`, and says so once.

None of the ops is differentiable: the public functions run under ``no_grad``.

Letters: B examples, T tokens, H hidden, F neurons of a site, S nodes, R rows, P particles, n columns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spurge import _core, reference

_LIB = torch.library.Library("spurge", "DEF")
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# torch >= 2.10 hands C++ its tensors and its current stream; older ones go through __dlpack__, which
# refuses tensors that require grad, and the stream has to be passed.
_EXCHANGE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def _check(condition: bool, message: Callable[[], str]) -> None:
    torch._check_value(condition, message)


def _check_floating(name: str, x: Tensor) -> None:
    _check(
        x.dtype in _FLOATING,
        lambda: f"{name}: dtype must be float32, bfloat16, float16 or float64, got {x.dtype}",
    )


def _check_same(name: str, x: Tensor, other: str, y: Tensor) -> None:
    _check(
        x.shape == y.shape,
        lambda: f"{name} and {other} must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}",
    )
    _check(x.dtype == y.dtype, lambda: f"{name} and {other} must have the same dtype, got {x.dtype} and {y.dtype}")
    _check_device(name, x, other, y)


def _check_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    _check(
        x.device == y.device,
        lambda: f"{name} and {other} must be on the same device, got {x.device} and {y.device}",
    )


def _run(kernel: Callable[..., Any], *args: Any) -> Any:
    """Call a ``_core`` function on detached tensors, with the thread count and, for old torch, the stream."""
    if _EXCHANGE:
        return kernel(*args, threads=torch.get_num_threads())
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    stream = None
    for a in args:
        if isinstance(a, Tensor) and a.is_cuda:
            stream = torch.cuda.current_stream(a.device).cuda_stream
            break
    return kernel(*args, threads=torch.get_num_threads(), stream=stream)


def _written(x: Tensor, write: Callable[[Tensor], None]) -> None:
    """Let ``write`` change ``x`` in place, through a contiguous copy where it has to be, and tell autograd."""
    if x.is_contiguous():
        write(x)
        torch.autograd.graph.increment_version(x)
    else:
        copy = x.contiguous()
        write(copy)
        x.copy_(copy)


def _slow(name: str, device: torch.device) -> None:
    built = "" if _core.built_with_cuda else " (this build has no CUDA kernels; see `spurge doctor`)"
    warnings.warn(
        f"spurge::{name} has no kernel for {device}{built}: running the float64 reference", stacklevel=3
    )


def _register(
    schema: str, fake: Callable[..., Any], kernel: Callable[..., Any], twin: Callable[..., Any]
) -> Callable[..., Any]:
    """Define one op: ``fake`` for shapes, ``kernel`` for CPU (and CUDA where built), ``twin`` elsewhere."""
    name = schema.split("(", 1)[0]

    def elsewhere(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        _slow(name, device)
        return twin(*args)

    _LIB.define(schema)
    _LIB.impl(name, kernel, "CPU")
    if _core.built_with_cuda:
        _LIB.impl(name, kernel, "CUDA")
    _LIB.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spurge::{name}", fake, lib=_LIB)
    return getattr(torch.ops.spurge, name).default


def _numbers(name: str, values: Sequence[float] | Tensor) -> list[float]:
    """A list of finite Python floats, from a sequence or a 1-D tensor."""
    numbers = [float(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
    _check(all(map(math.isfinite, numbers)), lambda: f"{name}: must be finite, got {numbers}")
    return numbers


# ---- gate: open_rows, gate_columns_ --------------------------------------------------------------


def _open_rows_fake(x: Tensor, u: Tensor, alphas: Sequence[float]) -> Tensor:
    _check_floating("x", x)
    _check(x.dim() >= 1, lambda: "x: must have at least 1 dimension [B, ...], got a scalar")
    _check_same("x", x, "u", u)
    return x.new_empty((len(alphas) * x.shape[0], *x.shape[1:]))


def _open_rows_kernel(x: Tensor, u: Tensor, alphas: Sequence[float]) -> Tensor:
    out = _open_rows_fake(x, u, alphas)
    _run(_core.open_rows, out, x.contiguous(), u.contiguous(), alphas)
    return out


_open_rows = _register(
    "open_rows(Tensor x, Tensor u, float[] alphas) -> Tensor",
    _open_rows_fake,
    _open_rows_kernel,
    lambda x, u, alphas: reference.open_rows(x, u, alphas).to(x.dtype),
)


@torch.no_grad()
def open_rows(x: Tensor, u: Tensor, alphas: Sequence[float] | Tensor) -> Tensor:
    r"""The rows of all quadrature nodes at once, opened behind a down projection.

    .. math:: \mathrm{out}_{sB+b} = x_b + (\alpha_s - 1)\, u_b

    ``x`` holds the unedited rows and ``u`` the projection's output in them; a projection is linear, so the
    result is what ``x`` would be with the neurons scaled by ``alphas[s]``. Bitwise the same for any number
    of threads, any instruction set, and on the GPU. Not differentiable.

    Args:
        x: unedited rows, ``[B, ...]``, float32, bfloat16, float16 or float64.
        u: what the scaled part adds to them, same shape and dtype.
        alphas: the nodes, ``[S]``. A list, or a tensor (which is read: on a GPU that waits for it).

    Returns:
        ``[S*B, ...]``, node-major, in the dtype of ``x``.

    Raises:
        ValueError: ``x`` and ``u`` differ in shape, dtype or device, or a node is not finite.

    >>> open_rows(torch.tensor([[3.0]]), torch.tensor([[2.0]]), [0.0, 0.5, 1.0]).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    return _open_rows(x, u, _numbers("alphas", alphas))


def _gate_columns_fake(z: Tensor, columns: Tensor, gates: Tensor) -> None:
    _check_floating("z", z)
    _check(z.dim() == 3, lambda: f"z: must have 3 dimensions [R, T, F], got shape {tuple(z.shape)}")
    _check(columns.dim() == 1, lambda: f"columns: must have 1 dimension [n], got shape {tuple(columns.shape)}")
    _check(columns.dtype == torch.int64, lambda: f"columns: dtype must be int64, got {columns.dtype}")
    _check(gates.dtype == torch.float32, lambda: f"gates: dtype must be float32, got {gates.dtype}")
    _check(
        gates.dim() == 2 and gates.shape[1] == columns.shape[0],
        lambda: f"gates: shape must be [P, {columns.shape[0]}], got {tuple(gates.shape)}",
    )
    _check(
        gates.shape[0] >= 1 and z.shape[0] % gates.shape[0] == 0,
        lambda: f"gates: the {z.shape[0]} rows of z must be a multiple of its P = {gates.shape[0]} particles",
    )
    _check_device("z", z, "columns", columns)
    _check_device("z", z, "gates", gates)


def _gate_columns_kernel(z: Tensor, columns: Tensor, gates: Tensor) -> None:
    _gate_columns_fake(z, columns, gates)
    columns, gates = columns.contiguous(), gates.contiguous()
    _written(z, lambda rows: _run(_core.gate_columns, rows, columns, gates))


def _gate_columns_twin(z: Tensor, columns: Tensor, gates: Tensor) -> None:
    z.copy_(reference.gate_columns(z, columns, gates))


_gate_columns_ = _register(
    "gate_columns_(Tensor(a!) z, Tensor columns, Tensor gates) -> ()",
    _gate_columns_fake,
    _gate_columns_kernel,
    _gate_columns_twin,
)


@torch.no_grad()
def gate_columns_(z: Tensor, columns: Tensor, gates: Tensor) -> Tensor:
    r"""Multiply chosen neurons by gates, in place, each group of rows by its own.

    .. math:: z_{pB+b,\,t,\,c_j} \leftarrow g_{pj}\; z_{pB+b,\,t,\,c_j}

    A gate of 1 leaves a neuron as it is, 0 erases it (0 times infinity is NaN, as in torch). Rows are
    grouped particle-major. Bitwise the same for any number of threads, any instruction set, and on the GPU.
    Not differentiable.

    Args:
        z: activations, ``[R, T, F]`` with ``R = P*B``; float32, bfloat16, float16 or float64. A
            non-contiguous ``z`` is changed through a copy.
        columns: the neurons, int64 ``[n]``, distinct, in any order.
        gates: float32 ``[P, n]``.

    Returns:
        ``z`` itself.

    Raises:
        ValueError: a shape or dtype does not fit; on the CPU also for a column outside ``[0, F)`` or named
            twice. (A CUDA kernel cannot look before it runs: the former stops the device, the latter is a
            data race.)

    >>> gate_columns_(torch.ones(2, 1, 3), torch.tensor([1]), torch.tensor([[0.0], [2.0]])).flatten().tolist()
    [1.0, 0.0, 1.0, 1.0, 2.0, 1.0]
    """
    _gate_columns_(z, columns, gates)
    return z


# ---- ig: node_sum, multiply_sum ------------------------------------------------------------------


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _node_sum_fake(grads: Tensor, weights: Sequence[float]) -> Tensor:
    nodes = len(weights)
    _check_floating("grads", grads)
    _check(nodes >= 1, lambda: "weights: need at least 1, got 0")
    _check(
        grads.dim() >= 1 and grads.shape[0] % nodes == 0,
        lambda: f"grads: its first dimension must be a multiple of the {nodes} weights, got shape {tuple(grads.shape)}",
    )
    return grads.new_empty((grads.shape[0] // nodes, *grads.shape[1:]), dtype=_sum_dtype(grads.dtype))


def _node_sum_kernel(grads: Tensor, weights: Sequence[float]) -> Tensor:
    out = _node_sum_fake(grads, weights)
    _run(_core.node_sum, out, grads.contiguous(), weights)
    return out


_node_sum = _register(
    "node_sum(Tensor grads, float[] weights) -> Tensor",
    _node_sum_fake,
    _node_sum_kernel,
    lambda grads, weights: reference.node_sum(grads, weights).to(_sum_dtype(grads.dtype)),
)


@torch.no_grad()
def node_sum(grads: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    r"""Gradients of all quadrature nodes, summed with the nodes' weights.

    .. math:: \mathrm{out}_b = \sum_s w_s\, g_{sB+b}

    Reads each gradient once and adds in the order of the nodes, in float32 (float64 for float64). Bitwise the
    same for any number of threads, any instruction set, and on the GPU. Not differentiable.

    Args:
        grads: ``[S*B, ...]``, node-major; float32, bfloat16, float16 or float64.
        weights: ``[S]``. A list, or a tensor (which is read: on a GPU that waits for it).

    Returns:
        ``[B, ...]``, float32 (float64 for float64).

    Raises:
        ValueError: no weights, a weight that is not finite, or rows that they do not divide.

    >>> node_sum(torch.tensor([[1.0], [2.0]]), [0.5, 0.25]).tolist()
    [[1.0]]
    """
    return _node_sum(grads, _numbers("weights", weights))


def _multiply_sum_fake(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    _check_floating("p", p)
    _check(p.dim() == 3, lambda: f"p: must have 3 dimensions [B, T, F], got shape {tuple(p.shape)}")
    _check_same("p", p, "z", z)
    if mask is not None:
        _check(mask.dtype in (torch.bool, torch.uint8), lambda: f"mask: dtype must be bool or uint8, got {mask.dtype}")
        _check(
            mask.shape == p.shape[:2],
            lambda: f"mask: shape must be {tuple(p.shape[:2])}, got {tuple(mask.shape)}",
        )
        _check_device("p", p, "mask", mask)
    return p.new_empty((p.shape[0], p.shape[2]), dtype=_sum_dtype(p.dtype))


def _multiply_sum_kernel(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    out = _multiply_sum_fake(p, z, mask)
    kept = None if mask is None else mask.contiguous().view(torch.uint8)
    _run(_core.multiply_sum, out, p.contiguous(), z.contiguous(), kept)
    return out


_multiply_sum = _register(
    "multiply_sum(Tensor p, Tensor z, Tensor? mask) -> Tensor",
    _multiply_sum_fake,
    _multiply_sum_kernel,
    lambda p, z, mask: reference.multiply_sum(p, z, mask).to(_sum_dtype(p.dtype)),
)


@torch.no_grad()
def multiply_sum(p: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Attribution of each neuron: gradient times activation, summed over the tokens.

    .. math:: \mathrm{out}_{bk} = \sum_t m_{bt}\; p_{btk}\, z_{btk}, \qquad p = \bar g\, W_2

    Accumulates in float32 (float64 for float64). On the CPU over the tokens in order: bitwise the same for
    any number of threads and any instruction set. On a GPU in a fixed order of its own: the same from run to
    run. Not differentiable.

    Args:
        p: gradient at each neuron, ``[B, T, F]``; float32, bfloat16, float16 or float64.
        z: activation of each neuron, same shape and dtype.
        mask: bool or uint8 ``[B, T]``; a token where it is 0 does not count, whatever it holds. None counts all.

    Returns:
        ``[B, F]``, float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    >>> multiply_sum(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [4.0]]])).tolist()
    [[11.0]]
    """
    return _multiply_sum(p, z, mask)
