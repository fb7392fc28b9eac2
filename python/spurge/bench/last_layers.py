"""Cases of ``association``, ``median`` and ``sweep``: features and logits of a last layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spurge import ops
from spurge.bench.case import Case, Function, examples, normal, size_of


def associate(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """Ten classes of equal size and a row for each."""
    outputs, width = 10, 512
    edges = (outputs, width)
    kept = 2 * (8 + 8 + 8) * outputs * width  # sums, logs and activations, read and written
    samples = max(1, examples(max(traffic - kept, 0), width * dtype.itemsize + 4 * outputs) // outputs)
    x = normal(samples * outputs, width, dtype=dtype, device=device)
    g = torch.rand(samples * outputs, outputs, device=device)
    starts = torch.arange(0, len(x) + 1, samples, device=device)
    classes = torch.arange(outputs, device=device)
    scales = torch.full((outputs,), 1 / samples, dtype=torch.float64, device=device)
    places = [torch.zeros(edges, dtype=torch.float64, device=device) for _ in range(3)]
    picked, nothing = torch.zeros(edges, device=device), torch.zeros(0, dtype=torch.float64, device=device)

    def spurge(sums: Tensor, logs: Tensor, activations: Tensor, picked: Tensor, x: Tensor, g: Tensor) -> Any:
        ops.associate_(sums, logs, nothing, picked, activations, x, g, starts, classes, scales)
        return sums, logs, activations, picked

    def streaming(sums: Tensor, logs: Tensor, activations: Tensor, picked: Tensor, x: Tensor, g: Tensor) -> Any:
        for c in range(outputs):
            size = x[c * samples : (c + 1) * samples].float().abs()
            total = (g[c * samples : (c + 1) * samples].abs().t() @ size).div_(samples)
            sums += total
            picked[c] = total[c]
            logs += total.log().nan_to_num_(neginf=0.0).mul_(total)
            activations[c] += size.mean(0)
        return sums, logs, activations, picked

    def usual(sums: Tensor, logs: Tensor, activations: Tensor, picked: Tensor, x: Tensor, g: Tensor) -> Any:
        size = x.float().abs().view(outputs, samples, width)
        total = g.abs().view(outputs, samples, outputs).transpose(1, 2) @ size / samples
        sums += total.sum(0)
        logs += torch.special.xlogy(total, total).sum(0)
        activations += size.mean(1)
        return sums, logs, activations, picked.copy_(total.diagonal(dim1=0, dim2=1).t())

    calls = {"spurge": spurge, "torch": streaming, "torch-usual": usual}
    moved = size_of(x) + size_of(g) + kept
    inputs = *places, picked, x, g
    return Case("associate_", f"{len(x)}x{outputs}x{width}", dtype, moved, inputs, calls, usual, x.numel())


def segment_medians(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """One segment with an odd number of rows in any order: with an even one, ``torch.median`` is another number."""
    columns = 1024
    rows = examples(traffic, columns * dtype.itemsize) | 1
    x, order = normal(rows, columns, dtype=dtype, device=device), torch.randperm(rows, device=device)
    starts = torch.tensor([0, rows], device=device)

    def usual(x: Tensor, order: Tensor) -> Tensor:
        return x[order].median(0).values

    calls: dict[str, Function] = {
        "spurge": lambda x, order: ops.segment_medians(x, order, starts)[0].to(dtype),
        "torch": usual,
    }
    moved = size_of(x) + size_of(order) + 4 * columns
    return Case("segment_medians", f"{rows}x{columns}", dtype, moved, (x, order), calls, usual, x.numel())


def correct_interval(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """One edited row of ten; the length of each interval, since empty ones cannot be subtracted."""
    outputs, edited = 10, torch.tensor([3], device=device)
    rows = examples(traffic, (outputs + 1) * dtype.itemsize + 8 + 16)
    logits, shifts = (3 * normal(rows, n, dtype=dtype, device=device) for n in (outputs, 1))
    labels = torch.randint(0, outputs, (rows,), device=device)

    def length(interval: Tensor) -> Tensor:
        return (interval[..., 1] - interval[..., 0]).clamp_min(0)

    def usual(logits: Tensor, shifts: Tensor, labels: Tensor) -> Tensor:
        z, s = logits.double(), torch.zeros_like(logits, dtype=torch.float64)
        s[:, edited] = shifts.double()
        gap, slope = z - z.gather(1, labels[:, None]), s.gather(1, labels[:, None]) - s
        at = gap / slope
        first = at.where(slope > 0, -torch.inf).amax(1).clamp_min(0)
        last = at.where(slope < 0, torch.inf).amin(1).clamp_max(1)
        never = ((slope == 0) & (gap > 0)).any(1)
        return length(torch.stack([first, last.where(~never, -1.0)], 1))

    calls: dict[str, Function] = {
        "spurge": lambda z, s, labels: length(ops.correct_interval(z, s, edited, labels, 0.0, 1.0)),
        "torch": usual,
    }
    moved = size_of(logits) + size_of(shifts) + size_of(labels) + 16 * rows
    inputs = logits, shifts, labels
    return Case("correct_interval", f"{rows}x{outputs}, 1 row", dtype, moved, inputs, calls, usual, logits.numel())
