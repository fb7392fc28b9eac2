"""``run.py last-layer``: scores of all edges, medians, and accuracy at every rate, beside what people write today.

Three parts, each in a module of its own: `associations`, `medians`, `sweeps`; `common.comparison` measures
their cases. Every case is saved when it is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fnmatch import fnmatch
from types import ModuleType
from typing import Any

import torch

from common.comparison import measure
from common.harness import threads
from last_layers import associations, medians, sweeps

PARTS: dict[str, ModuleType] = {"association": associations, "medians": medians, "sweeps": sweeps}


def child(rest: list[str]) -> dict[str, Any]:
    """What ``run.py child last-layer`` prints: the peak memory of one method, or whether it runs in so much."""
    torch.set_num_threads(int(rest[0]))
    part, *arguments = rest[1:]
    if part == "limited":
        return associations.under_limit(arguments)
    return {"peak_bytes": PARTS[part].peak(arguments)}


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """The parts that ``args.only`` names, one case after the other."""
    from spurge.engine.base.budgets import free_bytes

    chosen = {name: part for name, part in PARTS.items() if any(fnmatch(name, pattern) for pattern in args.only)}
    if not chosen:
        raise ValueError(f"only: expected patterns of {', '.join(PARTS)}, got {','.join(args.only)}")
    settings = {"repeats": 2 if args.quick else 5, "budget": 2.0 if args.quick else 20.0, "device": args.device}
    with threads(args.threads):
        for part in chosen.values():
            for case in part.cases(quick=args.quick, device=args.device):
                print(case.name, flush=True)
                measure(case, results, free=free_bytes(args.device), threads=args.threads, **settings)
                save()
        if "association" in chosen and torch.device(args.device).type == "cpu":
            associations.show_limit(results, quick=args.quick, threads=args.threads)
