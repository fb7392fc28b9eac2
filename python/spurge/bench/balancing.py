"""Cases of ``balance``: entropy balancing of one problem, of many, and of units in strata."""

from __future__ import annotations

import torch
from torch import Tensor

from spurge import ops
from spurge.bench.case import Case, Function, examples, normal, size_of


def balance_sweep(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """Value and gradient of one problem with 500 covariates; the peer computes in float32, Spurge in float64."""
    columns = 500
    rows = examples(traffic, columns * dtype.itemsize)
    x = normal(rows, columns, dtype=dtype, device=device)
    base, dual = torch.ones(rows, dtype=torch.float64, device=device), torch.randn(columns, device=device).double() / 50

    def usual(x: Tensor, dual: Tensor) -> Tensor:
        return x.t() @ (x @ dual.to(x.dtype)).softmax(0)

    calls: dict[str, Function] = {
        "spurge": lambda x, dual: ops.balance_sweep(x, base, dual)[1].to(dtype),
        "torch": usual,
    }
    return Case("balance_sweep", f"{rows}x{columns}", dtype, size_of(x), (x, dual), calls, usual, x.numel())


def balance_batch(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """Problems of 500 rows and 6 covariates, solved; the peer takes as many Newton steps, without a line search."""
    rows, columns, steps = 500, 6, 5
    problems = examples(traffic, rows * columns * dtype.itemsize)
    x = normal(problems, rows, columns, dtype=dtype, device=device)
    targets = x.double().mean(1) + 0.1
    base = torch.ones(rows, dtype=torch.float64, device=device)
    outcomes = torch.randn(rows, 1, device=device).double()

    def spurge(x: Tensor, targets: Tensor) -> Tensor:
        return ops.balance_batch(x, base, targets, outcomes, torch.zeros_like(targets))[1].to(dtype)

    def usual(x: Tensor, targets: Tensor) -> Tensor:
        y = x.double() - targets[:, None]
        dual = torch.zeros_like(targets)
        for _ in range(steps):
            w = torch.einsum("pnk,pk->pn", y, dual).softmax(1)
            gradient = torch.einsum("pn,pnk->pk", w, y)
            hessian = torch.einsum("pn,pnj,pnk->pjk", w, y, y) - gradient[:, :, None] * gradient[:, None]
            dual = dual - torch.linalg.solve(hessian, gradient)
        return (torch.einsum("pnk,pk->pn", y, dual).softmax(1) @ outcomes).to(dtype)

    calls: dict[str, Function] = {"spurge": spurge, "torch": usual}
    shape = f"{problems}x{rows}x{columns}"
    return Case("balance_batch", shape, dtype, size_of(x), (x, targets), calls, usual, x.numel())


def balance_strata(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """Units of 1,000 rows in ten strata; the peer is a dense Newton over the 21 moments, its arrays made beforehand."""
    size, strata, steps = 100, 10, 4
    rows = size * strata
    units = max(1, examples(traffic, rows * dtype.itemsize) // 8)  # an eighth: the peer's arrays are 22 times as large
    x = normal(units, rows, dtype=dtype, device=device)
    starts = torch.arange(0, rows + 1, size, device=device)
    base = torch.ones(rows, dtype=torch.float64, device=device)
    masses = torch.full((strata,), 1 / strata, dtype=torch.float64, device=device)
    parts = x.double().view(units, strata, size)
    means, squares = parts.mean(2) + 0.1, parts.square().mean((1, 2)) + 0.05
    outcomes, start = (
        torch.randn(rows, 1, device=device).double(),
        torch.zeros(units, strata + 1, device=device).double(),
    )
    marks = torch.eye(strata, dtype=torch.float64, device=device).repeat_interleave(size, 0)

    def spurge(x: Tensor) -> Tensor:
        return ops.balance_strata(x, starts, base, masses, means, squares, outcomes, start)[1].to(dtype)

    def usual(x: Tensor) -> Tensor:
        v = x.double()[..., None]
        y = torch.cat([marks[:, :-1].expand(units, -1, -1), v * marks, v.square()], 2)
        target = torch.cat([masses[:-1].expand(units, -1), masses * means, squares[:, None]], 1)
        y = y - target[:, None]
        dual = torch.zeros_like(target)
        for _ in range(steps):
            w = torch.einsum("pnk,pk->pn", y, dual).softmax(1)
            gradient = torch.einsum("pn,pnk->pk", w, y)
            hessian = (w[..., None] * y).transpose(1, 2) @ y - gradient[:, :, None] * gradient[:, None]
            dual = dual - torch.linalg.solve(hessian, gradient)
        return (torch.einsum("pnk,pk->pn", y, dual).softmax(1) @ outcomes).to(dtype)

    calls: dict[str, Function] = {"spurge": spurge, "torch": usual}
    shape = f"{units}x{rows}, {strata} strata"
    return Case("balance_strata", shape, dtype, size_of(x), (x,), calls, usual, x.numel())
