"""``run.py kernels``: bytes per second of each kernel beside a copy of as many bytes, eager torch and torch.compile."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch

from common.harness import Timing, compare, relative_error, threads
from common.limits import copy_call
from kernel_rates.cases import DTYPES, KERNELS, MIB, SIZES, Case


def compiled(case: Case) -> Any:
    """The usual form under ``torch.compile``; compiled anew for the present number of threads."""
    torch._dynamo.reset()
    return torch.compile(case.usual, dynamic=False)


def check(case: Case) -> None:
    """Every method of a case computes the same, to what its dtype can hold.

    Raises:
        ValueError: one does not; there is no sense in timing it.
    """
    bound = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
    want = case.outputs(case.calls["torch"])
    for name, function in case.calls.items():
        for place, (value, reference) in enumerate(zip(case.outputs(function), want, strict=True)):
            error = relative_error(value, reference)
            if not error <= bound:
                raise ValueError(
                    f"{case.name}: output {place} of {name} is {error:.1e} from torch's, above {bound:.0e}"
                )


def measure(case: Case, *, device: str, with_compile: bool) -> dict[str, Timing]:
    """The timing of each method and, in turn with them, of a ``copy`` and a ``clone`` of as many bytes."""
    functions = dict(case.calls)
    if with_compile:
        functions["torch.compile"] = compiled(case)
    calls = {"copy": copy_call(case.traffic, device=device)}
    if not case.kernel.startswith("gate_columns_"):  # the others return new memory, which has to be found first
        calls["clone"] = torch.rand(max(1, case.traffic // 8), device=device).clone
    calls |= {name: partial(function, *case.inputs) for name, function in functions.items()}
    return compare(calls, repeats=7, budget=8.0, sample_seconds=0.02, device=device)


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """``run.py kernels``."""
    from kernel_rates import swarms

    sizes = SIZES[torch.device(args.device).type]
    sizes = {name: mib for name, mib in sizes.items() if name in (["cache"] if args.quick else args.sizes)}
    names = [name for name in KERNELS if any(fnmatch(name, pattern) for pattern in args.only)]
    for name in names:
        for dtype in DTYPES[name]:
            for size, mib in sizes.items():
                torch.manual_seed(0)
                case = KERNELS[name](mib * MIB, dtype, args.device)
                if mib <= 32:  # above, the copies would need too much memory
                    check(case)
                for count in args.threads:
                    with threads(count):
                        timings = measure(case, device=args.device, with_compile=args.compile)
                    label = f"{case.name} ({size}, {count} thread{'s' * (count > 1)})"
                    print(label, flush=True)
                    for method, timing in timings.items():
                        rate, share = (
                            case.traffic / timing.seconds / 1e9,
                            100 * timings["copy"].seconds / timing.seconds,
                        )
                        results.add(
                            label, method, "seconds", timing.seconds, spread=timing.spread, n=timing.n, unit="s"
                        )
                        results.add(label, method, "bandwidth", rate, unit="GB/s")
                        results.add(label, method, "copy_share", share, unit="percent")
                        print(f"    {method:16s} {rate:9.2f} GB/s {share:6.0f} % of a copy", flush=True)
                save()
    if any(fnmatch("swarm", pattern) for pattern in args.only):
        swarms.run(args, results, save)
