"""``node_sum`` and ``multiply_sum``: the sums of integrated gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spurge import _core, reference
from spurge.ops._registry import (
    check,
    check_device,
    check_floating,
    check_place,
    check_same,
    copied,
    numbers,
    register,
    run,
    sum_dtype,
    written,
)


def _node_sum_fake(grads: Tensor, weights: Sequence[float]) -> Tensor:
    nodes = len(weights)
    check_floating("grads", grads)
    check(nodes >= 1, lambda: "weights: need at least 1, got 0")
    check(
        grads.dim() >= 1 and grads.shape[0] % nodes == 0,
        lambda: f"grads: its first dimension must be a multiple of the {nodes} weights, got shape {tuple(grads.shape)}",
    )
    return grads.new_empty((grads.shape[0] // nodes, *grads.shape[1:]), dtype=sum_dtype(grads.dtype))


def _node_sum_kernel(grads: Tensor, weights: Sequence[float]) -> Tensor:
    shape, dtype = grads.shape, sum_dtype(grads.dtype)
    out = grads.new_empty(shape[0] // max(len(weights), 1), *shape[1:], dtype=dtype) if shape else grads.new_empty(0)
    run(_core.node_sum, out, grads.contiguous(), weights)
    return out


def _node_sum_into_fake(out: Tensor, grads: Tensor, weights: Sequence[float]) -> None:
    check_same("out", out, "the sum", _node_sum_fake(grads, weights))


def _node_sum_into_kernel(out: Tensor, grads: Tensor, weights: Sequence[float]) -> None:
    shape = (grads.shape[0] // max(len(weights), 1), *grads.shape[1:]) if grads.dim() else ()
    check_place("out", out, shape, sum_dtype(grads.dtype))
    grads = grads.contiguous()
    written(out, lambda into: run(_core.node_sum, into, grads, weights))


_node_sum = register(
    "node_sum(Tensor grads, float[] weights) -> Tensor",
    _node_sum_fake,
    _node_sum_kernel,
    lambda grads, weights: reference.node_sum(grads, weights).to(sum_dtype(grads.dtype)),
)

_node_sum_ = register(
    "node_sum_(Tensor(a!) out, Tensor grads, float[] weights) -> ()",
    _node_sum_into_fake,
    _node_sum_into_kernel,
    lambda out, grads, weights: copied(out, reference.node_sum(grads, weights)),
)


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
    return _node_sum(grads, numbers(weights))


def node_sum_(out: Tensor, grads: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """:func:`node_sum` into memory that is there already: ``out``, ``[B, ...]``, is written and returned.

    Worth it for large gradients in a loop, as :func:`open_rows_` is; ``out`` must not share memory with ``grads``.

    >>> node_sum_(torch.empty(1, 1), torch.tensor([[1.0], [2.0]]), [0.5, 0.25]).tolist()
    [[1.0]]
    """
    _node_sum_(out, grads, numbers(weights))
    return out


def _multiply_sum_fake(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    check_floating("p", p)
    check(p.dim() == 3, lambda: f"p: must have 3 dimensions [B, T, F], got shape {tuple(p.shape)}")
    check_same("p", p, "z", z)
    if mask is not None:
        check(mask.dtype in (torch.bool, torch.uint8), lambda: f"mask: dtype must be bool or uint8, got {mask.dtype}")
        check(
            mask.shape == p.shape[:2],
            lambda: f"mask: shape must be {tuple(p.shape[:2])}, got {tuple(mask.shape)}",
        )
        check_device("p", p, "mask", mask)
    return p.new_empty((p.shape[0], p.shape[2]), dtype=sum_dtype(p.dtype))


def _multiply_sum_kernel(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    shape, dtype = p.shape, sum_dtype(p.dtype)
    out = p.new_empty(shape[0], shape[2], dtype=dtype) if len(shape) == 3 else p.new_empty(0)
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8) if mask.dtype == torch.bool else mask.contiguous()
    run(_core.multiply_sum, out, p.contiguous(), z.contiguous(), mask)
    return out


_multiply_sum = register(
    "multiply_sum(Tensor p, Tensor z, Tensor? mask) -> Tensor",
    _multiply_sum_fake,
    _multiply_sum_kernel,
    lambda p, z, mask: reference.multiply_sum(p, z, mask).to(sum_dtype(p.dtype)),
)


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
