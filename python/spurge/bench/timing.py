"""How calls are timed against each other.

A time is the median over repeats after a warm-up; its spread is the distance between the quartiles. Calls that are to
be compared take turns in the same process, so that a slow minute of the machine falls on all of them, and only ratios
between them mean much.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, distance between the quartiles, and how many calls or samples they come from."""

    seconds: float
    spread: float
    n: int
    cpu_seconds: float  # of all threads of the process: steadier than the wall clock on a machine that others use too


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with ``count`` intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all that was asked of it. The CPU has already."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Call, calls: int, device: torch.device | str) -> tuple[float, float]:
    """Seconds of one of ``calls`` calls, and of the process's CPU time; the device has finished at both ends."""
    synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _summary(samples: Sequence[tuple[float, float]]) -> Timing:
    wall = [sample[0] for sample in samples]
    low, high = (quantiles(wall, n=4, method="inclusive")[0::2]) if len(wall) > 1 else (0.0, 0.0)
    return Timing(median(wall), high - low, len(wall), median(sample[1] for sample in samples))


def compare(
    calls: Mapping[str, Call],
    *,
    repeats: int = 5,
    budget: float = 30.0,
    sample_seconds: float = 0.0,
    first: Mapping[str, float] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time several calls against each other: one after the other, ``repeats`` rounds of it.

    Args:
        calls: name -> what to time.
        repeats: samples of each call. The call made before them warms up and is not counted.
        budget: seconds for one call's samples; a slow call gets fewer of them, but at least one.
        sample_seconds: a call shorter than this is repeated inside a sample until the sample lasts as long.
        first: seconds of a run of each call that warmed it up already; without it the calls are warmed up here.
        device: where the calls work; the clock is read after it has finished.
    """
    once = {name: sample(call, 1, device)[0] for name, call in calls.items()} if first is None else dict(first)
    inner = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        if sample_seconds > once[name] / 100:  # the first call also paid for allocation and compilation: ask again
            once[name] = sample(call, 1, device)[0]
            inner[name] = max(1, round(sample_seconds / max(once[name], 1e-7)))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            if turn == 0 or (turn + 1) * inner[name] * once[name] <= budget:
                samples[name].append(sample(call, inner[name], device))
    return {name: _summary(taken) for name, taken in samples.items()}


def copy_call(traffic: int, *, device: torch.device | str = "cpu") -> Call:
    """A copy that moves ``traffic`` bytes, half of them read and half written."""
    source = torch.rand(max(1, traffic // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """``|value - reference| / |reference|`` in the 2-norm over all elements, in float64. NaN stays NaN."""
    reference = reference.double()
    return float((value.double() - reference).norm() / reference.norm())
