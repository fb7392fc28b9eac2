"""``run.py plan``: what a plan says a localisation will take, beside what it takes.

Each job runs in a process of its own. Plans are made and calls measured in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from common.harness import count_flops, peak_of_call, peak_of_child
from localisation.jobs import make_job

SETTINGS: dict[str, dict[str, Any]] = {
    "layer-4": {"nodes": 4},
    "layer-2": {"nodes": 2},
    "radau-2": {"nodes": 2, "rule": "radau"},
    "joint-4": {"nodes": 4, "path": "joint"},
    "layer-4-256MiB": {"nodes": 4, "memory": "256MiB"},
}
QUICK = ("layer-2",)
METRICS = (("flops", "FLOP"), ("peak_bytes", "bytes"), ("seconds", "s"))


def child(rest: list[str]) -> dict[str, Any]:
    """What ``run.py child plan`` prints: predicted and measured numbers of one job with one setting."""
    name, setting, device, count, repeats = rest
    torch.set_num_threads(int(count))
    from spurge.engine.cascade.cascade import Cascade
    from spurge.engine.planning.plan import plan

    small = make_job("tiny-8x2", device=device)
    Cascade(small.model, path="layer").attribute(
        small.inputs, small.target
    )  # libraries are in memory before the measured calls
    job = make_job(name, device=device)
    cascade = Cascade(job.model, **({"path": "layer"} | SETTINGS[setting]))

    def call() -> None:
        cascade.attribute(job.inputs, job.target)

    plans, planning, peaks, times = [], [], [], []
    for _ in range(int(repeats)):  # in turn: a slow minute of the machine falls on both
        start = perf_counter()
        plans.append(plan(Cascade(job.model, **({"path": "layer"} | SETTINGS[setting])), job.inputs))
        planning.append(perf_counter() - start)
        start = perf_counter()
        peaks.append(peak_of_call(call, device))
        times.append(perf_counter() - start)
    predicted = {
        "flops": plans[0].flops,
        "peak_bytes": plans[0].bytes_peak,
        "seconds": median(found.seconds for found in plans),
    }
    measured = {"flops": count_flops(call), "peak_bytes": max(peaks), "seconds": median(times)}
    return {"predicted": predicted, "measured": measured, "planning": median(planning)}


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """Every job with every setting."""
    repeats = 1 if args.quick else 3
    for name in args.shapes:
        for setting in QUICK if args.quick else SETTINGS:
            found = peak_of_child(["plan", name, setting, args.device, str(args.threads), str(repeats)])
            for metric, unit in METRICS:
                predicted, measured = found["predicted"][metric], found["measured"][metric]
                ratio = predicted / measured if measured else float("nan")
                n = {"n": 1 if metric == "flops" else repeats}
                results.add(f"{name}, {setting}", "predicted", metric, predicted, unit=unit, n=1)
                results.add(f"{name}, {setting}", "measured", metric, measured, unit=unit, **n)
                results.add(f"{name}, {setting}", "predicted", f"{metric}_ratio", ratio, unit="ratio")
                print(f"{name}, {setting:16s} {metric:12s} {predicted:12.4g} {measured:12.4g} {ratio:6.2f}")
            results.add(f"{name}, {setting}", "predicted", "planning_seconds", found["planning"], unit="s", n=1)
            save()
