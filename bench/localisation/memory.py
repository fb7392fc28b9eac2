"""``run.py memory``: is what a job needs beyond the model's own memory below the budget, and are the scores the
same."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.harness import peak_of_child, relative_error

METHOD = "spurge-4"
NO_LIMIT = "1024 GiB"


def parse_mebibytes(text: str) -> int:
    """Bytes of ``"256 MiB"``; the library's own parser, so that a budget means here what it means there."""
    from spurge.engine.base.budgets import parse_bytes

    return parse_bytes(text)


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """Each budget in a process of its own, and one with memory without end to compare the scores with."""
    for job in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            scores: dict[str, torch.Tensor] = {}
            for budget in [NO_LIMIT, *args.budgets]:
                file = Path(folder) / "scores.safetensors"
                child = ["locate", job, METHOD, "--threads", str(args.threads), "--device", args.device]
                peak = peak_of_child([*child, "--memory", budget, "--save", str(file)])["peak_bytes"]
                found = torch.cat([value for _, value in sorted(load_file(file).items())], 1)
                scores.setdefault("all", found)
                difference, allowed = relative_error(found, scores["all"]), parse_mebibytes(budget)
                case = f"{job}, memory={'no limit' if budget == NO_LIMIT else budget}"
                results.add(case, METHOD, "peak_bytes", peak, unit="bytes")
                results.add(case, METHOD, "budget_share", 100 * peak / allowed, unit="percent")
                results.add(case, METHOD, "difference", difference, unit="relative 2-norm")
                print(f"{case:36s} peak {peak / 2**20:8.0f} MiB   scores differ by {difference:.1e}", flush=True)
                save()
