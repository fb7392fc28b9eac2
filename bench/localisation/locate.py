"""``run.py locate``: scores of all neurons of a model, by Spurge and by what users pick today, in one run.

Each method runs once with its operations counted, which warms it up and gives its scores; then all take turns
against the clock; then each runs in a process of its own for its peak memory. Errors are relative
2-norms against a 48-node float64 reference. A method whose cost is a sum over layers, and too slow to run in
full on a deep model, is measured on the two middle layers and scaled to all of them; its rows say so.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file

from common.harness import Timing, compare, count_flops, peak_of_call, peak_of_child, relative_error, threads
from common.limits import record_rates
from localisation.accuracy import overlap_top1
from localisation.jobs import Job, Scores, gauss_legendre, make_job, reference_scores, right_riemann

Layers = Sequence[int] | None
Run = Callable[[Layers], Scores]
TOLERANCE = 1e-3
DEEP = 6  # with more layers than this the slow methods run in chunks of 5 steps, their fastest setting there


@dataclass(frozen=True)
class Method:
    """A way to get the scores: ``prepare(job)`` is done once for a model and returns what is timed.

    ``by_layer``: the cost is a sum over layers and linear in a layer's position, so few layers can stand for all.
    """

    name: str
    prepare: Callable[[Job], Run]
    dtype: torch.dtype = torch.float32
    by_layer: bool = False


def _spurge(job: Job, **settings: Any) -> Run:
    from spurge.engine.cascade.cascade import Cascade

    cascade = Cascade(job.model, **({"path": "layer"} | settings))
    return lambda layers: {k: v[0] for k, v in cascade.attribute(job.inputs, job.target).values.items()}


def _captum(job: Job, *, steps: int, zero_baseline: bool = False) -> Run:
    from peers.captum_lig import captum_layers

    rows = 5 * len(job.ids) if job.layers > DEEP else None
    settings = {"rows": rows, "zero_baseline": zero_baseline}
    return lambda layers: captum_layers(job.model, job.ids, job.labels, steps, layers=layers, **settings)


def _loop(job: Job, *, module: str, function: str) -> Run:
    loop = getattr(importlib.import_module(f"peers.{module}"), function)
    chunk = 5 if job.layers > DEEP else None
    return lambda layers: loop(job.model, job.ids, job.labels, *right_riemann(20), layers=layers, chunk=chunk)


def _best(job: Job) -> Run:
    from peers.hand_loop import collapsed_loop

    return lambda layers: collapsed_loop(job.model, job.ids, job.labels, *gauss_legendre(4))


def all_methods() -> list[Method]:
    """Every method; ``run.py child`` finds them by name."""
    knowledge = partial(_loop, module="knowledge_neurons", function="knowledge_neurons_loop")
    hand = partial(_loop, module="hand_loop", function="suffix_loop")
    methods = [
        Method("captum", partial(_captum, steps=20), by_layer=True),
        Method("captum-50", partial(_captum, steps=50), by_layer=True),
        Method("captum-zero-baseline", partial(_captum, steps=20, zero_baseline=True), by_layer=True),
        Method("knowledge-neurons", knowledge, by_layer=True),
        Method("hand-written", hand, by_layer=True),
        Method("hand-written-best", _best),
        Method("hand-written-best-bf16", _best, torch.bfloat16),
    ]
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "-bf16")):
        methods += [Method(f"spurge-{n}{suffix}", partial(_spurge, nodes=n), dtype) for n in (2, 3, 4, 8)]
        methods += [
            Method(f"spurge-radau-{n}{suffix}", partial(_spurge, nodes=n, rule="radau"), dtype) for n in (1, 2, 3)
        ]
    methods.append(Method("spurge-tolerance", partial(_spurge, tolerance=TOLERANCE)))
    return methods


QUICK = ("captum", "knowledge-neurons", "hand-written", "hand-written-best", "spurge-2", "spurge-radau-2-bf16")


@dataclass
class Measured:
    """What was found out about one method on one job."""

    method: Method
    error: float
    worst_sentence: float
    overlap: float
    first_seconds: float
    flops: int
    timing: Timing = field(default_factory=lambda: Timing(float("nan"), 0.0, 0, float("nan")))
    peak: int = 0
    note: str = ""


def _stack(scores: Scores, names: Iterable[str]) -> torch.Tensor:
    return torch.cat([scores[name].double().cpu() for name in names], 1)  # [B, neurons]


def _first_look(method: Method, job: Job, layers: Layers, reference: Scores) -> tuple[Run, Measured]:
    held: list[Any] = []

    def first() -> None:
        held.append(method.prepare(job))
        held.append(held[0](layers))

    start = perf_counter()
    flops = count_flops(first)
    seconds = perf_counter() - start
    run, scores = held
    names = [job.sites[i] for i in (range(job.layers) if layers is None else layers)]
    got, want = _stack(scores, names), _stack(reference, names)
    sentences = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
    found = Measured(method, relative_error(got, want), sentences, overlap_top1(got, want), seconds, flops)
    if job.ids.is_cuda:  # torch's allocator counts what this call takes; no child process is needed
        found.peak = peak_of_call(lambda: run(layers), job.ids.device)
    return run, found


def _to_all_layers(part: Timing, none: Timing, layers: int, measured: int) -> Timing:
    """From ``measured`` layers to all: what is done whatever the layers (``none``) is counted once."""

    def scale(a: float, b: float) -> float:
        return b + (a - b) * layers / measured

    cpu = scale(part.cpu_seconds, none.cpu_seconds)
    return Timing(scale(part.seconds, none.seconds), part.spread * layers / measured, part.n, cpu)


def measure_job(name: str, args: argparse.Namespace) -> list[Measured]:
    """All methods that ``args`` asks for, on one job."""
    job = make_job(name, device=args.device)
    if job.generative:
        raise ValueError(f"shapes: locate measures classifiers, latency language models; got {name!r}")
    with threads(args.reference_threads):
        nodes, exact = (16, torch.float32) if args.quick else (48, torch.float64)
        reference = reference_scores(job, nodes=nodes, dtype=exact, cache=args.reference)
    methods = [m for m in all_methods() if any(fnmatch(m.name, p) for p in args.methods)]
    if args.quick:
        methods = [m for m in methods if m.name in QUICK]
    if importlib.util.find_spec("captum") is None:
        print("captum is not installed (extra bench): left out", flush=True)
        methods = [m for m in methods if not m.name.startswith("captum")]
    jobs = {dtype: job if dtype == torch.float32 else job.to(dtype) for dtype in {m.dtype for m in methods}}
    middle = [job.layers // 2 - 1, job.layers // 2]
    runs: dict[str, Run] = {}
    found: dict[str, Measured] = {}
    part: dict[str, Layers] = {}
    with threads(args.threads):
        for method in methods:
            part[method.name] = middle if method.by_layer and job.layers > DEEP and not args.full else None
            print(f"{name}: {method.name}", flush=True)
            runs[method.name], found[method.name] = _first_look(
                method, jobs[method.dtype], part[method.name], reference
            )
        calls = {m: partial(run, part[m]) for m, run in runs.items()}
        seconds = {m: found[m].first_seconds for m in runs}
        timings = compare(calls, repeats=args.repeats, budget=args.budget, first=seconds, device=args.device)
        for key, measured in found.items():
            measured.timing = timings[key]
            if part[key] is not None:
                nothing = compare({key: partial(runs[key], [])}, repeats=3, device=args.device)[key]
                fixed = count_flops(partial(runs[key], []))
                measured.timing = _to_all_layers(timings[key], nothing, job.layers, len(middle))
                measured.flops = fixed + (measured.flops - fixed) * job.layers // len(middle)
                measured.note = f"extrapolated from layers {middle[0]}+{middle[1]}"
    del calls, runs, jobs, job
    if args.peak and torch.device(args.device).type == "cpu":
        for key, measured in found.items():
            print(f"{name}: peak memory of {key}", flush=True)
            child = ["locate", name, key, "--device", args.device, "--threads", str(args.threads)]
            measured.peak = peak_of_child(child)["peak_bytes"]
    return list(found.values())


def child(rest: list[str]) -> dict[str, int]:
    """``run.py child locate``: bytes above the model's own at the peak of one call, set-up included.

    For the methods that go layer by layer, the first layer alone: they keep the most for the backward pass there.
    A call on a tiny job comes first, so that libraries are in memory before the measured one.
    """
    options = argparse.ArgumentParser()
    options.add_argument("job")
    options.add_argument("method")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--memory")
    options.add_argument("--save", type=Path, help="file for the scores")
    args = options.parse_args(rest)
    method = next(m for m in all_methods() if m.name == args.method)
    prepare = method.prepare if args.memory is None else partial(method.prepare, memory=args.memory)
    layers = [0] if method.by_layer else None
    scores: list[Scores] = []

    def peak(name: str) -> int:
        job = make_job(name, device=args.device)
        job = job if method.dtype == torch.float32 else job.to(method.dtype)
        return peak_of_call(lambda: scores.append(prepare(job)(layers)), args.device)

    with threads(args.threads):
        peak("tiny-8x2")
        found = {"peak_bytes": peak(args.job)}
    if args.save is not None:
        save_file({site: value.detach().cpu().contiguous() for site, value in scores[-1].items()}, args.save)
    return found


def add_rows(results: Any, case: str, found: list[Measured], rates: dict[torch.dtype, float]) -> None:
    """The rows of one job; their shape is in bench/README.md."""
    for m in found:
        extra = {"note": m.note} if m.note else {}

        def add(
            metric: str, value: float, unit: str, m: Measured = m, extra: dict[str, str] = extra, **more: Any
        ) -> None:
            results.add(case, m.method.name, metric, value, unit=unit, **more, **extra)

        add("seconds", m.timing.seconds, "s", spread=m.timing.spread, n=m.timing.n)
        add("cpu_seconds", m.timing.cpu_seconds, "s", n=m.timing.n)
        add("first_seconds", m.first_seconds, "s", n=1)
        add("error", m.error, "relative 2-norm")
        add("error_worst_sentence", m.worst_sentence, "relative 2-norm")
        add("overlap_top1", m.overlap, "percent")
        add("flops", m.flops, "FLOP")
        floor = m.flops / rates[m.method.dtype] / 1e9
        add("floor_seconds", floor, "s")
        add("matmul_share", 100 * floor / m.timing.seconds, "percent")
        if m.peak:
            add("peak_bytes", m.peak, "bytes")
    _add_headline(results, case, found)


def _add_headline(results: Any, case: str, found: list[Measured]) -> None:
    """Rows of the plain names ``spurge`` and ``spurge-bf16``, and how many times faster than each peer.

    ``spurge``: the rule and nodes of fewest operations whose error is no larger than the smaller of the
    knowledge-neurons loop's and the hand-written loop's; ``spurge-bf16``: the same in bfloat16. The note names them.
    """
    by_name = {m.method.name: m for m in found}
    peers = [m for m in found if not m.method.name.startswith("spurge")]
    bound = min((by_name[k].error for k in ("knowledge-neurons", "hand-written") if k in by_name), default=float("inf"))
    fixed = [m for m in found if fnmatch(m.method.name, "spurge-*[0-9]") and m.method.dtype == torch.float32]
    if not fixed:
        return
    accurate = [m for m in fixed if m.error <= bound]
    chosen = min(accurate, key=lambda m: m.flops) if accurate else min(fixed, key=lambda m: m.error)
    for name, m in (("spurge", chosen), ("spurge-bf16", by_name.get(chosen.method.name + "-bf16"))):
        if m is None:
            continue
        extra = {"note": m.method.name}
        results.add(case, name, "seconds", m.timing.seconds, spread=m.timing.spread, n=m.timing.n, unit="s", **extra)
        results.add(case, name, "error", m.error, unit="relative 2-norm", **extra)
        if m.peak:
            results.add(case, name, "peak_bytes", m.peak, unit="bytes", **extra)
        for peer in peers:
            times = peer.timing.seconds / m.timing.seconds
            results.add(case, name, f"times_faster_than_{peer.method.name}", times, unit="ratio", **extra)


def table(case: str, found: list[Measured], rates: dict[torch.dtype, float]) -> str:
    """The same for people."""
    lines = [f"{case:24s} {'seconds':>9s} {'cpu-s':>9s} {'error':>9s} {'GFLOP':>8s} {'% matmul':>8s} {'peak MB':>8s}"]
    for m in found:
        share = 100 * m.flops / rates[m.method.dtype] / 1e9 / m.timing.seconds
        lines.append(
            f"{m.method.name:24s} {m.timing.seconds:9.3f} {m.timing.cpu_seconds:9.3f} {m.error:9.1e} "
            f"{m.flops / 1e9:8.1f} {share:8.1f} {m.peak / 1e6:8.0f}  {m.note}"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """``run.py locate``."""
    with threads(args.threads):
        rates = record_rates(results, device=args.device, quick=args.quick)
    for name in args.shapes:
        found = measure_job(name, args)
        add_rows(results, name, found, rates)
        print(table(name, found, rates), flush=True)
        save()
