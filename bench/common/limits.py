"""What this machine can do at most: the rates every other number is held against.

Copy bandwidth counts bytes read plus bytes written by ``Tensor.copy_``; the matrix rate counts 2 operations for each
multiply-add of ``torch.mm``. Both are what torch reaches here, not what a data sheet says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from common.harness import compare, threads
from spurge.bench.timing import copy_call

MIB = 1 << 20

# rows of a job x in x out: 2 nodes and 20 nodes of 8 sentences of 32 tokens through the first FFN matrix of each model
JOB_SHAPES = {
    "minilm, 2 nodes": (512, 384, 1536),
    "minilm, 20 nodes": (5120, 384, 1536),
    "bert, 2 nodes": (512, 768, 3072),
    "bert, 20 nodes": (5120, 768, 3072),
}


def copy_bandwidth(traffic: int, *, device: torch.device | str = "cpu", repeats: int = 7) -> float:
    """GB/s (1e9 bytes, read plus written) of such a copy."""
    calls = {"copy": copy_call(traffic, device=device)}
    timing = compare(calls, repeats=repeats, budget=10.0, sample_seconds=0.02, device=device)["copy"]
    return traffic / timing.seconds / 1e9


def matmul_rate(
    rows: int, inner: int, columns: int, dtype: torch.dtype, *, device: torch.device | str = "cpu", repeats: int = 5
) -> float:
    """GFLOP/s of ``[rows, inner] @ [inner, columns]``, the second factor stored as a Linear layer stores its weight."""
    left = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    calls = {"mm": lambda: torch.mm(left, weight.t(), out=out)}
    timing = compare(calls, repeats=repeats, budget=10.0, sample_seconds=0.05, device=device)["mm"]
    return 2 * rows * inner * columns / timing.seconds / 1e9


def best_matmul_rate(dtype: torch.dtype, *, device: torch.device | str = "cpu", quick: bool = False) -> float:
    """The rate that FLOPs are divided by: a square product large enough to reach the machine's best."""
    size = 1024 if quick else 4096
    return matmul_rate(size, size, size, dtype, device=device, repeats=3)


def record_rates(results: Any, *, device: torch.device | str = "cpu", quick: bool = False) -> dict[torch.dtype, float]:
    """The best matrix rate of float32 and bfloat16, GFLOP/s, each as a row of ``results`` too."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        rates[dtype] = best_matmul_rate(dtype, device=device, quick=quick)
        case, metric = f"matmul {1024 if quick else 4096}", f"rate_{str(dtype).removeprefix('torch.')}"
        results.add(case, "torch", metric, rates[dtype], unit="GFLOP/s")
    return rates


def all_limits(*, device: torch.device | str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    """Every limit as flat rows: case, method, metric, value, unit."""
    rows: list[dict[str, Any]] = []
    sizes = (1, 32) if quick else (1, 8, 32, 128, 1024)
    for size in sizes:
        rate = copy_bandwidth(size * MIB, device=device)
        case = f"copy, {size} MiB moved"
        rows.append({"case": case, "method": "torch", "metric": "bandwidth", "value": rate, "unit": "GB/s"})
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        shapes = dict(JOB_SHAPES) if quick else {"square": (4096, 4096, 4096), **JOB_SHAPES}
        for label, (rows_, inner, columns) in shapes.items():
            rate = matmul_rate(rows_, inner, columns, dtype, device=device)
            case = f"matmul {rows_}x{inner}x{columns}, {name} ({label})"
            rows.append({"case": case, "method": "torch", "metric": "rate", "value": rate, "unit": "GFLOP/s"})
    return rows


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """``run.py limits``."""
    with threads(args.threads):
        for row in all_limits(device=args.device, quick=args.quick):
            results.add(**row)
            print(f"{row['case']:48s} {row['value']:9.1f} {row['unit']}", flush=True)
