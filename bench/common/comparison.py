"""One job done by several methods: who can do it in this memory, do they agree, how long does each take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter, process_time
from typing import Any

import torch

from common.harness import Timing, compare, peak_of_call, peak_of_child

Agreement = Callable[[Any], Mapping[str, tuple[float, str] | tuple[float, str, str]]]


@dataclass(frozen=True)
class Method:
    """A way to do the job.

    ``scale``: the call does one part in so many of the work; its seconds are multiplied, but for those of ``rest``,
    what is done however small the part. ``once``: too slow to take turns, its one run counts. ``needs``: bytes of its
    largest arrays together, where they can be more than there are.
    """

    call: Callable[[], Any]
    scale: float = 1.0
    rest: Callable[[], Any] | None = None
    once: bool = False
    needs: int = 0
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A job and its methods. ``agreement`` turns an answer into metric -> (value, unit) or (value, unit, note); None:
    answers are not compared. ``parts``: answers of a part of the work are, too.

    ``limits``: name -> (seconds, note), what nobody can be faster than. ``peaks``: methods whose peak memory is
    measured; on a GPU it is that of all. ``child``: arguments of ``run.py child COMMAND THREADS`` but for the method's
    name, which measure it in a process of its own.
    """

    name: str
    methods: dict[str, Method]
    agreement: Agreement | None = None
    limits: dict[str, tuple[float, str]] = field(default_factory=dict)
    child: tuple[str, ...] = ()
    peaks: tuple[str, ...] = ()
    command: str = "last-layer"
    parts: bool = False


def _first(method: Method, device: str) -> tuple[Any, Timing]:
    start, cpu = perf_counter(), process_time()
    answer = method.call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return answer, Timing(perf_counter() - start, 0.0, 1, process_time() - cpu)


def _scaled(timing: Timing, method: Method, device: str) -> Timing:
    """Of the whole work."""
    if method.scale == 1:
        return timing
    rest = Timing(0.0, 0.0, 1, 0.0) if method.rest is None else _first(replace(method, call=method.rest), device)[1]

    def whole(part: float, always: float) -> float:
        return always + method.scale * max(0.0, part - always)

    seconds, cpu = whole(timing.seconds, rest.seconds), whole(timing.cpu_seconds, rest.cpu_seconds)
    return Timing(seconds, method.scale * timing.spread, timing.n, cpu)


def measure(
    case: Case, results: Any, *, free: int, threads: int, repeats: int, budget: float, device: str
) -> dict[str, Timing]:
    """Time every method that ``free`` bytes suffice for; the others have a row that says what they need."""
    first: dict[str, Timing] = {}
    for name, method in case.methods.items():
        if method.needs > free:
            note = f"does not run here: {free / 1e9:.1f} GB are free. {method.note}".strip()
            results.add(case.name, name, "needed_bytes", method.needs, unit="bytes", note=note)
            print(f"    {name:30s} needs {method.needs / 1e9:.1f} GB, does not run", flush=True)
            continue
        answer, first[name] = _first(method, device)
        if case.agreement is not None and (case.parts or method.scale == 1):
            for metric, (value, unit, *note) in case.agreement(answer).items():
                results.add(case.name, name, metric, value, unit=unit, note=note[0] if note and note[0] else None)
        del answer
    turns = {name: case.methods[name].call for name in first if not case.methods[name].once}
    warm = {name: first[name].seconds for name in turns}
    sample = 0.02 if max(warm.values(), default=1.0) < 1 else 0.0
    taken = compare(turns, repeats=repeats, budget=budget, sample_seconds=sample, first=warm, device=device)
    timings = {name: _scaled(taken.get(name, timing), case.methods[name], device) for name, timing in first.items()}
    for name, timing in timings.items():
        method = case.methods[name]
        extra = {"note": method.note} if method.note else {}
        results.add(case.name, name, "seconds", timing.seconds, spread=timing.spread, n=timing.n, unit="s", **extra)
        results.add(case.name, name, "cpu_seconds", timing.cpu_seconds, n=timing.n, unit="s", **extra)
    _add_limits(case, timings, results)
    _add_peaks(case, timings, results, threads, device)
    return timings


def _add_limits(case: Case, timings: Mapping[str, Timing], results: Any) -> None:
    ours = timings.get("spurge")
    for name, (seconds, note) in case.limits.items():
        results.add(case.name, name, "seconds", seconds, unit="s", note=note)
        if ours is not None:
            results.add(case.name, "spurge", f"times_{name.replace(' ', '_')}", ours.seconds / seconds, unit="ratio")
    for name, timing in timings.items():
        if ours is not None and name != "spurge":
            times = timing.seconds / ours.seconds
            results.add(case.name, "spurge", f"times_faster_than_{name}", times, unit="ratio")
        print(f"    {name:30s} {timing.seconds * 1e3:12.3f} ms   cpu {timing.cpu_seconds * 1e3:12.3f} ms", flush=True)
    for name, (seconds, _) in case.limits.items():
        print(f"    {name:30s} {seconds * 1e3:12.3f} ms", flush=True)


def _add_peaks(case: Case, timings: Mapping[str, Timing], results: Any, threads: int, device: str) -> None:
    """Peak memory beyond the inputs; on a GPU torch's allocator knows, on the CPU a process of its own."""
    on_gpu = torch.device(device).type == "cuda"
    for name in timings:
        method = case.methods[name]
        if on_gpu and not method.once:
            peak = peak_of_call(method.call, device)
        elif name in case.peaks and not on_gpu:
            peak = peak_of_child([case.command, str(threads), *case.child, name])["peak_bytes"]
        else:
            continue
        extra = {"note": method.note} if method.note else {}
        results.add(case.name, name, "peak_bytes", peak, unit="bytes", **extra)
        print(f"    {name:30s} {peak / 1e6:12.1f} MB at the peak", flush=True)
