"""``node_sum``, ``multiply_sum`` and ``first_order``: the sums of integrated gradients and of first-order estimates."""

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
    numbers,
    register,
    run,
    sum_dtype,
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


_node_sum = register(
    "node_sum(Tensor grads, float[] weights) -> Tensor",
    _node_sum_fake,
    _node_sum_kernel,
    lambda grads, weights: reference.node_sum(grads, weights).to(sum_dtype(grads.dtype)),
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


def _check_products(p: Tensor, z: Tensor, mask: Tensor | None) -> None:
    check_floating("p", p)
    check(p.dim() == 3, lambda: f"p: must have 3 dimensions [B, T, F], got shape {tuple(p.shape)}")
    check_same("p", p, "z", z)
    if mask is not None:
        check(mask.dtype in (torch.bool, torch.uint8), lambda: f"mask: dtype must be bool or uint8, got {mask.dtype}")
        _check_tokens("mask", mask, p)


def _check_tokens(name: str, x: Tensor, p: Tensor) -> None:
    check(x.shape == p.shape[:2], lambda: f"{name}: shape must be {tuple(p.shape[:2])}, got {tuple(x.shape)}")
    check_device("p", p, name, x)


def _sums(p: Tensor) -> Tensor:
    """New memory for one sum over the tokens; the kernel refuses a p of another rank."""
    return p.new_empty((p.shape[0], p.shape[2]) if p.dim() == 3 else (0,), dtype=sum_dtype(p.dtype))


def _bytes(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    return mask.contiguous().view(torch.uint8) if mask.dtype == torch.bool else mask.contiguous()


def _multiply_sum_fake(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    _check_products(p, z, mask)
    return _sums(p)


def _multiply_sum_kernel(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    out = _sums(p)
    run(_core.multiply_sum, out, p.contiguous(), z.contiguous(), _bytes(mask))
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


def _first_order_fake(p: Tensor, z: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check_products(p, z, mask)
    dtype = sum_dtype(p.dtype)
    check(scale.dtype == dtype, lambda: f"scale: dtype must be {dtype}, got {scale.dtype}")
    _check_tokens("scale", scale, p)
    return _sums(p), _sums(p), _sums(p)


def _first_order_kernel(p: Tensor, z: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    total, magnitude, reach = out = _sums(p), _sums(p), _sums(p)
    tokens = scale.contiguous(), _bytes(mask)
    run(_core.first_order, total, magnitude, reach, p.contiguous(), z.contiguous(), *tokens)
    return out


def _first_order_twin(p: Tensor, z: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    total, magnitude, reach = (x.to(sum_dtype(p.dtype)) for x in reference.first_order(p, z, scale, mask))
    return total, magnitude, reach


_first_order = register(
    "first_order(Tensor p, Tensor z, Tensor scale, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    _first_order_fake,
    _first_order_kernel,
    _first_order_twin,
)


def first_order(p: Tensor, z: Tensor, scale: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    r"""First-order estimate of what each neuron adds, and two numbers that say how far it can be trusted.

    .. math::
        \mathrm{total}_{bk} = \sum_t m_{bt}\; p_{btk}\, z_{btk}, \qquad
        \mathrm{magnitude}_{bk} = \sum_t m_{bt}\; |p_{btk}\, z_{btk}|, \qquad
        \mathrm{reach}_{bk} = \max_t\, m_{bt}\; |z_{btk}|\, s_{bt}

    ``total`` is :func:`multiply_sum`, bit for bit. A ``magnitude`` far above ``|total|`` tells of tokens that cancel;
    ``reach``, with the inverse norm of the residual stream as scale, of a step too long for a straight line. p and z
    are read once and no product is written. The sums keep the promises of :func:`multiply_sum`; the largest number
    does not depend on the order. Not differentiable.

    Args:
        p: gradient at each neuron, ``[B, T, F]``; float32, bfloat16, float16 or float64.
        z: activation of each neuron, same shape and dtype.
        scale: ``[B, T]``, float32 (float64 for float64), not negative (a negative one counts as 0).
        mask: bool or uint8 ``[B, T]``; a token where it is 0 does not count, whatever it holds. None counts all.

    Returns:
        ``total``, ``magnitude`` and ``reach``, each ``[B, F]`` float32 (float64 for float64). ``reach`` is 0 where no
        token counts, and NaN where one that counts makes it NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    >>> p, z = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [-4.0]]])
    >>> [x.item() for x in first_order(p, z, torch.tensor([[1.0, 0.5]]))]
    [-5.0, 11.0, 3.0]
    """
    return _first_order(p, z, scale, mask)
