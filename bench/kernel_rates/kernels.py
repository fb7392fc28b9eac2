"""``run.py kernels``: the measurements of ``spurge bench`` with more peers, for each number of threads."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from typing import Any

import numpy
import torch

from common.harness import threads
from spurge.bench.case import MIB, SIZES, Case
from spurge.bench.kernels import DTYPES, KERNELS, check, counted, measure, rows
from spurge.bench.timing import Call


def compiled(case: Case) -> Any:
    """The usual form under ``torch.compile``; compiled anew for the present number of threads."""
    torch._dynamo.reset()
    return torch.compile(case.usual, dynamic=False)


def _numpy_medians(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.median(x.numpy()[order.numpy()], axis=0))


def peers(case: Case, *, device: str, with_compile: bool) -> dict[str, Call]:
    """What stands beside the kernel, eager torch and a copy."""
    more: dict[str, Call] = {}
    if not case.kernel.startswith(
        ("gate_columns_", "swarm")
    ):  # the others return new memory, which has to be found first
        more["clone"] = torch.rand(max(1, case.traffic // 8), device=device).clone
    if case.kernel == "segment_medians" and device == "cpu" and case.dtype == torch.float32:
        more["numpy"] = partial(_numpy_medians, *case.inputs)
    if with_compile:
        more["torch.compile"] = partial(compiled(case), *case.inputs)
    return more


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """``run.py kernels``."""
    from kernel_rates import swarms

    sizes = SIZES[torch.device(args.device).type]
    sizes = {name: mib for name, mib in sizes.items() if name in (["cache"] if args.quick else args.sizes)}
    for name in KERNELS:
        if not any(fnmatch(name, pattern) for pattern in args.only):
            continue
        for dtype in DTYPES[name]:
            for size, mib in sizes.items():
                torch.manual_seed(0)
                case = KERNELS[name](mib * MIB, dtype, args.device)
                if mib <= 32:  # above, the copies would need too much memory
                    check(case)
                for count in args.threads:
                    with threads(count):
                        more = peers(case, device=args.device, with_compile=args.compile)
                        timings = measure(case, device=args.device, more=more, repeats=7, budget=8.0)
                    label = f"{case.name} ({size}, {counted(count)})"
                    found = list(rows(case, label, timings))
                    results.extend(found)
                    _show(label, found)
                save()
    if any(fnmatch("swarm", pattern) for pattern in args.only):
        swarms.run(args, results, save)


def _show(label: str, found: list[dict[str, Any]]) -> None:
    print(label, flush=True)
    for method in dict.fromkeys(row["method"] for row in found):
        values = {row["metric"]: row["value"] for row in found if row["method"] == method}
        rate = f"{values['bandwidth']:9.2f} GB/s {values['copy_share']:6.0f} % of a copy"
        each = f" {values['ns_per_element']:9.2f} ns per element" if "ns_per_element" in values else ""
        print(f"    {method:16s} {rate}{each}", flush=True)
