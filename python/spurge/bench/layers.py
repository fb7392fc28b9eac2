"""Cases of ``gate`` and ``ig``: the activations behind a layer, shapes of MiniLM."""

from __future__ import annotations

import torch
from torch import Tensor

from spurge import ops
from spurge.bench.case import HIDDEN, NEURONS, NODES, TOKENS, Case, Function, examples, normal, size_of


def open_rows(traffic: int, dtype: torch.dtype, device: str) -> Case:
    batch = examples(traffic, TOKENS * HIDDEN * dtype.itemsize * (2 + NODES))
    x, u = (normal(batch, TOKENS, HIDDEN, dtype=dtype, device=device) for _ in range(2))
    alphas = [0.07, 0.33, 0.67, 0.93]
    shift = (torch.tensor(alphas, device=device) - 1).to(dtype).view(-1, 1, 1, 1)

    def usual(x: Tensor, u: Tensor) -> Tensor:
        return (x + shift * u).flatten(0, 1)

    calls = {
        "spurge": lambda x, u: ops.open_rows(x, u, alphas),
        "torch": lambda x, u: torch.addcmul(x, shift, u).flatten(0, 1),
        "torch-usual": usual,
    }
    shape = f"{NODES}x{batch}x{TOKENS}x{HIDDEN}"
    return Case("open_rows", shape, dtype, (2 + NODES) * size_of(x), (x, u), calls, usual)


def _gate(kernel: str, columns: Tensor, traffic: int, line: int, dtype: torch.dtype, device: str) -> Case:
    touched = line * len((columns.cpu() * dtype.itemsize // line).unique())  # bytes of a token's row that must move
    particles = examples(traffic, 2 * 2 * TOKENS * touched)
    z = normal(2 * particles, TOKENS, NEURONS, dtype=dtype, device=device)
    gates = torch.randint(0, 2, (particles, len(columns)), device=device).float() * 2 - 1  # +-1: z keeps its size
    whole = torch.ones(particles, NEURONS, device=device)
    whole[:, columns] = gates
    whole = whole.to(dtype).view(particles, 1, 1, NEURONS)

    def usual(z: Tensor) -> Tensor:
        groups = z.view(particles, -1, TOKENS, NEURONS)
        groups[..., columns] *= gates[:, None, None].to(dtype)
        return z

    def multiply_all(z: Tensor) -> Tensor:
        z.view(particles, -1, TOKENS, NEURONS).mul_(whole)
        return z

    calls: dict[str, Function] = {
        "spurge": lambda z: ops.gate_columns_(z, columns, gates),
        "torch": multiply_all,
        "torch-usual": usual,
    }
    moved = 2 * z.shape[0] * TOKENS * touched + size_of(gates)
    shape = f"{z.shape[0]}x{TOKENS}x{NEURONS}, {len(columns)} columns"
    return Case(kernel, shape, dtype, moved, (z,), calls, multiply_all)


def gate_all(traffic: int, dtype: torch.dtype, device: str) -> Case:
    return _gate("gate_columns_", torch.arange(NEURONS, device=device), traffic, dtype.itemsize, dtype, device)


def gate_few(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """One column in 16, drawn at random: whole cache lines (GPU: sectors of 32 bytes) count as moved."""
    columns = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(0))[: NEURONS // 16].sort().values
    line = 64 if device == "cpu" else 32
    return _gate("gate_columns_ few", columns.to(device), traffic, line, dtype, device)


def node_sum(traffic: int, dtype: torch.dtype, device: str) -> Case:
    batch = examples(traffic, TOKENS * HIDDEN * (NODES * dtype.itemsize + 4))
    grads = normal(NODES * batch, TOKENS, HIDDEN, dtype=dtype, device=device)
    weights = [0.174, 0.326, 0.326, 0.174]
    column = torch.tensor(weights, device=device)

    def usual(grads: Tensor) -> Tensor:
        return (column.view(-1, 1, 1, 1) * grads.view(NODES, batch, TOKENS, HIDDEN)).sum(0)

    def product(grads: Tensor) -> Tensor:
        return (column.to(dtype) @ grads.view(NODES, -1)).view(batch, TOKENS, HIDDEN)

    calls = {"spurge": lambda grads: ops.node_sum(grads, weights), "torch": product, "torch-usual": usual}
    moved = size_of(grads) + 4 * batch * TOKENS * HIDDEN
    return Case("node_sum", f"{NODES}x{batch}x{TOKENS}x{HIDDEN}", dtype, moved, (grads,), calls, usual)


def multiply_sum(traffic: int, dtype: torch.dtype, device: str) -> Case:
    batch = examples(traffic, 2 * TOKENS * NEURONS * dtype.itemsize)
    p, z = (normal(batch, TOKENS, NEURONS, dtype=dtype, device=device) for _ in range(2))
    mask = torch.ones(batch, TOKENS, dtype=torch.uint8, device=device)
    mask[:, -3:] = 0

    def usual(p: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        return (p * z * mask[..., None]).float().sum(1)

    def einsum(p: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        return torch.einsum("btf,btf,bt->bf", p, z, mask.to(p.dtype))

    calls = {"spurge": ops.multiply_sum, "torch": einsum, "torch-usual": usual}
    moved = size_of(p) + size_of(z) + size_of(mask) + 4 * batch * NEURONS
    return Case("multiply_sum", f"{batch}x{TOKENS}x{NEURONS}", dtype, moved, (p, z, mask), calls, usual)


def first_order(traffic: int, dtype: torch.dtype, device: str) -> Case:
    batch = examples(traffic, 2 * TOKENS * NEURONS * dtype.itemsize)
    p, z = (normal(batch, TOKENS, NEURONS, dtype=dtype, device=device) for _ in range(2))
    scale = torch.rand(batch, TOKENS, device=device)
    mask = torch.ones(batch, TOKENS, dtype=torch.uint8, device=device)
    mask[:, -3:] = 0

    def usual(p: Tensor, z: Tensor, scale: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        product = p * z * mask[..., None]
        reach = (z.abs() * (scale * mask)[..., None]).amax(1)
        return product.float().sum(1), product.abs().float().sum(1), reach

    calls = {"spurge": ops.first_order, "torch": usual}
    moved = size_of(p) + size_of(z) + size_of(scale) + size_of(mask) + 3 * 4 * batch * NEURONS
    return Case("first_order", f"{batch}x{TOKENS}x{NEURONS}", dtype, moved, (p, z, scale, mask), calls, usual)
