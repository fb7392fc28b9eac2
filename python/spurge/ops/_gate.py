"""``open_rows`` and ``gate_columns_``: the rows of a cascade, and neurons multiplied by gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spurge import _core, reference
from spurge.ops._registry import (
    check,
    check_device,
    check_floating,
    check_same,
    copied,
    numbers,
    register,
    run,
    written,
)


def _open_rows_fake(x: Tensor, u: Tensor, alphas: Sequence[float]) -> Tensor:
    check_floating("x", x)
    check(x.dim() >= 1, lambda: "x: must have at least 1 dimension [B, ...], got a scalar")
    check_same("x", x, "u", u)
    return x.new_empty((len(alphas) * x.shape[0], *x.shape[1:]))


def _open_rows_kernel(x: Tensor, u: Tensor, alphas: Sequence[float]) -> Tensor:
    shape = x.shape
    out = x.new_empty(len(alphas) * shape[0], *shape[1:]) if shape else x.new_empty(0)
    run(_core.open_rows, out, x.contiguous(), u.contiguous(), alphas)
    return out


_open_rows = register(
    "open_rows(Tensor x, Tensor u, float[] alphas) -> Tensor",
    _open_rows_fake,
    _open_rows_kernel,
    lambda x, u, alphas: reference.open_rows(x, u, alphas).to(x.dtype),
)


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
    return _open_rows(x, u, numbers(alphas))


def _gate_columns_fake(z: Tensor, columns: Tensor, gates: Tensor) -> None:
    check_floating("z", z)
    check(z.dim() == 3, lambda: f"z: must have 3 dimensions [R, T, F], got shape {tuple(z.shape)}")
    check(columns.dim() == 1, lambda: f"columns: must have 1 dimension [n], got shape {tuple(columns.shape)}")
    check(columns.dtype == torch.int64, lambda: f"columns: dtype must be int64, got {columns.dtype}")
    check(gates.dtype == torch.float32, lambda: f"gates: dtype must be float32, got {gates.dtype}")
    check(
        gates.dim() == 2 and gates.shape[1] == columns.shape[0],
        lambda: f"gates: shape must be [P, {columns.shape[0]}], got {tuple(gates.shape)}",
    )
    check(
        gates.shape[0] >= 1 and z.shape[0] % gates.shape[0] == 0,
        lambda: f"gates: the {z.shape[0]} rows of z must be a multiple of its P = {gates.shape[0]} particles",
    )
    check_device("z", z, "columns", columns)
    check_device("z", z, "gates", gates)


def _gate_columns_kernel(z: Tensor, columns: Tensor, gates: Tensor) -> None:
    columns, gates = columns.contiguous(), gates.contiguous()
    written(z, lambda rows: run(_core.gate_columns, rows, columns, gates))


_gate_columns_ = register(
    "gate_columns_(Tensor(a!) z, Tensor columns, Tensor gates) -> ()",
    _gate_columns_fake,
    _gate_columns_kernel,
    lambda z, columns, gates: copied(z, reference.gate_columns(z, columns, gates)),
)


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
