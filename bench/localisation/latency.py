"""``run.py latency``: seconds from a prompt to the scores of all neurons, prompt by prompt, and how right they are.

Every method is prepared once for a model, as its users would, and then asked about one prompt after the other; methods
take turns at each prompt. Errors are against a reference that has converged (``accuracy.py``), with all layers
measured. The peers run the whole model once or more for every layer: against the clock they are measured on the two
middle layers and scaled to all (the cost is linear in a layer's position); their rows say so, and
``whole_seconds`` is what all layers took where the errors were taken.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from common.harness import count_flops, peak_of_call, peak_of_child, sample, threads
from common.limits import record_rates
from localisation.accuracy import Errors, Reference, converged, errors
from localisation.jobs import Job, Scores, even_steps, make_job, right_riemann

Layers = Sequence[int] | None
Ask = Callable[[Tensor, Tensor, Layers], Scores]  # ids [B, T], their labels [B], which layers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST = 3  # prompts that a slow method is timed on, whatever the budget
STEPS = 20
BLOCK = 1280  # tokens
DEFAULT = "spurge-2"  # the headline where no errors were measured


@dataclass(frozen=True)
class Ready:
    """A method prepared for a model.

    Attributes:
        ask: scores of a prompt, the device waited for.
        plain: the same with every operation asked for one by one, so that they can be counted, and for the labels that
            are given, so that a rounded model that predicts another token answers the same question.
        queue: asks without waiting for the device; None for methods that cannot.
    """

    ask: Ask
    plain: Ask
    queue: Callable[[Tensor], object] | None = None


@dataclass(frozen=True)
class Method:
    """A way to get the scores; ``prepare(model)`` is done once.

    ``half``: on the model rounded to bfloat16. ``by_layer``: the cost is a sum over layers, linear in their position.
    """

    name: str
    prepare: Callable[[nn.Module], Ready]
    half: bool = False
    by_layer: bool = False


def _scores(found: Any) -> Scores:
    return {site: value[0] for site, value in found.values.items()}


def _spurge(model: nn.Module, **settings: Any) -> Ready:
    from spurge.engine.cascade.locator import Locator

    locator = Locator(model, **({"path": "layer"} | settings))

    def inputs(ids: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def plain(ids: Tensor, labels: Tensor, layers: Layers) -> Scores:
        def target(rows: Any) -> Tensor:
            return rows.logits.gather(1, labels[rows.example, None])[:, 0]

        return _scores(locator.cascade.attribute(inputs(ids), target))

    return Ready(lambda ids, labels, layers: _scores(locator(inputs(ids))), plain, lambda ids: locator.ask(inputs(ids)))


def _steps_at_once(ids: Tensor) -> int | None:
    """What is fastest for the peers: everything at once on a GPU, ``BLOCK`` tokens on a CPU; None for all steps."""
    return None if ids.is_cuda else max(1, min(STEPS, BLOCK // ids.numel()))


def _captum(model: nn.Module) -> Ready:
    from peers.captum_lig import captum_layers

    def ask(ids: Tensor, labels: Tensor, layers: Layers) -> Scores:
        rows = len(ids) * (_steps_at_once(ids) or STEPS)
        return captum_layers(model, ids, labels, STEPS, layers=layers, rows=rows, zero_baseline=True)

    return Ready(ask, ask)


def _knowledge(model: nn.Module, rule: tuple[list[float], list[float]]) -> Ready:
    from peers.knowledge_neurons import knowledge_neurons_loop

    def ask(ids: Tensor, labels: Tensor, layers: Layers) -> Scores:
        return knowledge_neurons_loop(model, ids, labels, *rule, layers=layers, chunk=_steps_at_once(ids))

    return Ready(ask, ask)


def all_methods(*, half: bool = True, graphs: bool = False) -> list[Method]:
    """Every method.

    Args:
        half: those on a rounded model too.
        graphs: those without a recorded CUDA graph, beside those with one.
    """
    methods = [
        Method("captum-zero-baseline", _captum, by_layer=True),
        Method("knowledge-neurons", partial(_knowledge, rule=right_riemann(STEPS)), by_layer=True),
        Method("knowledge-neurons-linspace", partial(_knowledge, rule=even_steps(STEPS)), by_layer=True),
    ]
    for suffix, rounded in (("", False), ("-bf16", True))[: 1 + half]:
        for rule, name in (("legendre", "spurge"), ("radau", "spurge-radau")):
            methods += [
                Method(f"{name}-{n}{suffix}", partial(_spurge, nodes=n, rule=rule), half=rounded) for n in (1, 2, 4)
            ]
    if graphs:
        methods.append(Method("spurge-2-no-graph", partial(_spurge, nodes=2, graphs=False)))
    for tolerance in (0.1, 0.03):
        methods.append(Method(f"spurge-tolerance-{tolerance:g}", partial(_spurge, tolerance=tolerance)))
    return methods


QUICK = ("captum-zero-baseline", "knowledge-neurons", "spurge-2", "spurge-2-bf16", "spurge-tolerance-0.1")


@dataclass
class Measured:
    """What was found out about one method on one job; seconds are of all layers."""

    method: Method
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)  # of each prompt
    cpu_seconds: list[float] = field(default_factory=list)
    whole_seconds: list[float] = field(default_factory=list)  # of all layers, measured as they are
    rate: float = 0.0  # prompts per second, many a call
    queued: float = 0.0  # seconds of a prompt when all are asked for before the first answer is looked at
    flops: int = 0
    peak: int = 0
    errors: Errors | None = None
    note: str = ""

    @property
    def middle(self) -> float:
        return median(self.seconds)

    def percentile(self, percent: int) -> float:
        """Linear between the measured prompts."""
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(percent / 100))


def _chosen(args: argparse.Namespace) -> list[Method]:
    cuda = torch.device(args.device).type == "cuda"
    methods = all_methods(half=args.dtype == "float32", graphs=cuda)
    methods = [m for m in methods if any(fnmatch(m.name, pattern) for pattern in args.methods)]
    if args.quick:
        methods = [m for m in methods if m.name in QUICK]
    if importlib.util.find_spec("captum") is None:
        print("captum is not installed (extra bench): left out", flush=True)
        methods = [m for m in methods if not m.name.startswith("captum")]
    return methods


def _one_by_one(ask: Ask, job: Job) -> Callable[[], list[Scores]]:
    """All layers of each of the job's texts, in a call of its own."""
    return lambda: [ask(job.ids[i : i + 1], job.labels[i : i + 1], None) for i in range(len(job.ids))]


class Run:
    """The measurements of one job.

    Args:
        name: of the job, ``MODEL-TOKENSxSENTENCES``; as many texts are in every timed call.
        args: of ``run.py latency``.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.job = make_job(name, device=args.device, dtype=DTYPES[args.dtype])
        methods = _chosen(args)
        half = self.job.to(torch.bfloat16).model if any(m.half for m in methods) else None
        self.models = {m.name: half if m.half else self.job.model for m in methods}
        self.found = {m.name: Measured(m) for m in methods}
        self.ready: dict[str, Ready] = {}
        self.reference: Reference | None = None
        count = len(self.job.ids)
        drawn = self.job.draw(args.prompts * count)
        # far apart in the text inside one call, so that every call has another part of it
        self.prompts = [(ids, self.job.predicted(ids)) for ids in drawn.view(count, args.prompts, -1).unbind(1)]
        middle = [self.job.layers // 2 - 1, self.job.layers // 2]
        self.part: dict[str, Layers] = {
            m.name: middle if m.by_layer and not args.full and self.job.layers > 2 else None for m in methods
        }
        for key, part in self.part.items():
            if part is not None:
                self.found[key].note = f"extrapolated from layers {part[0]}+{part[1]}"

    def scale(self, key: str) -> float:
        """All layers over the measured ones."""
        part = self.part[key]
        return 1.0 if part is None else self.job.layers / len(part)

    def all(self) -> list[Measured]:
        with threads(self.args.threads):
            self.prepare()
            self.time()
            self.many()
            self.errors()
        if self.args.peak:
            self.peaks()
        return list(self.found.values())

    def prepare(self) -> None:
        """First calls, whose seconds include what is prepared, and the operations of later ones."""
        ids, labels = self.prompts[0]
        for key, measured in self.found.items():
            print(f"{self.name}: {key}", flush=True)

            def first(key: str = key, measured: Measured = measured) -> None:
                self.ready[key] = measured.method.prepare(self.models[key])
                self.ready[key].ask(ids, labels, self.part[key])

            measured.first_seconds = sample(first, 1, self.args.device)[0]
            counted = count_flops(partial(self.ready[key].plain, ids, labels, self.part[key]))
            measured.flops = round(counted * self.scale(key))

    def time(self) -> None:
        """Every prompt, methods in turn; a method that is slow gets fewer of them."""
        spent = dict.fromkeys(self.found, 0.0)
        for number, (ids, labels) in enumerate(self.prompts):
            for key, measured in self.found.items():
                if number >= LEAST and spent[key] > self.args.budget:
                    continue
                call = partial(self.ready[key].ask, ids, labels, self.part[key])
                wall, cpu = sample(call, 1, self.args.device)
                spent[key] += wall
                measured.seconds.append(wall * self.scale(key))
                measured.cpu_seconds.append(cpu * self.scale(key))
        if torch.device(self.args.device).type == "cuda":
            for key, measured in self.found.items():
                if (queue := self.ready[key].queue) is not None:
                    every = [partial(queue, ids) for ids, _ in self.prompts]
                    wall = sample(lambda every=every: [ask() for ask in every], 1, self.args.device)[0]
                    measured.queued = wall / len(every)

    def many(self) -> None:
        """Prompts per second with ``--batch`` of them a call; left out where that takes too long."""
        ids = self.job.draw(self.args.batch)
        labels = self.job.predicted(ids)
        for key, measured in self.found.items():
            if measured.middle / self.scale(key) * len(ids) > 2 * self.args.budget * len(self.job.ids):
                continue
            call = partial(self.ready[key].ask, ids, labels, self.part[key])
            wall = sample(call, 1, self.args.device)[0]
            if wall < self.args.budget / 4:  # the first call of a shape also prepares it
                wall = min(wall, *(sample(call, 1, self.args.device)[0] for _ in range(2)))
            measured.rate = len(ids) / (wall * self.scale(key))

    def errors(self) -> None:
        """All layers of ``--exact`` prompts, beside the reference."""
        if not self.args.exact:
            return
        ids = self.job.draw(self.args.exact)
        exact = replace(self.job, ids=ids, labels=self.job.predicted(ids))
        print(f"{self.name}: reference of {len(ids)} prompts", flush=True)
        self.reference = converged(exact, tolerance=self.args.exact_tolerance, cache=self.args.reference)
        for key, measured in self.found.items():
            print(f"{self.name}: errors of {key}", flush=True)
            parts: list[Scores] = []
            call = _one_by_one(self.ready[key].plain, exact)
            wall = sample(lambda call=call, parts=parts: parts.extend(call()), 1, self.args.device)[0]
            measured.whole_seconds = [wall / len(ids)]
            scores = {site: torch.cat([part[site] for part in parts]) for site in self.job.sites}
            measured.errors = errors(scores, self.reference.scores)

    def peaks(self) -> None:
        """Bytes beyond the model's, what is prepared included; on a CPU in a process of its own."""
        ids, labels = self.prompts[0]
        cuda = torch.device(self.args.device).type == "cuda"
        self.ready.clear()
        for key, measured in self.found.items():
            layers = [0] if measured.method.by_layer else None
            if cuda:
                measured.peak = peak_of_call(
                    lambda m=measured.method, layers=layers: m.prepare(self.models[m.name]).ask(ids, labels, layers),
                    self.args.device,
                )
            else:
                print(f"{self.name}: peak memory of {key}", flush=True)
                child = ["latency", self.name, key, "--threads", str(self.args.threads), "--dtype", self.args.dtype]
                measured.peak = peak_of_child(child)["peak_bytes"]


def child(rest: list[str]) -> dict[str, int]:
    """``run.py child latency``: peak memory of one method on a CPU, what it prepares included.

    For the methods that go layer by layer, the first layer alone: they keep the most for the backward pass there. A
    call on a tiny job comes first, so that libraries are in memory before the measured one.
    """
    options = argparse.ArgumentParser()
    options.add_argument("job")
    options.add_argument("method")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--dtype", choices=list(DTYPES), default="float32")
    args = options.parse_args(rest)
    method = next(m for m in all_methods() if m.name == args.method)
    layers = [0] if method.by_layer else None

    def peak(name: str) -> int:
        job = make_job(name, dtype=DTYPES[args.dtype])
        job = job.to(torch.bfloat16) if method.half else job
        return peak_of_call(lambda: method.prepare(job.model).ask(job.ids, job.labels, layers))

    with threads(args.threads):
        peak("llama-tiny-8x1")
        return {"peak_bytes": peak(args.job)}


# ---------------------------------------------------------------------------------------------------------- results


def add_rows(results: Any, case: str, run: Run, rates: Mapping[torch.dtype, float]) -> None:
    """The rows of one job; their meaning is in bench/README.md."""
    dtype = DTYPES[run.args.dtype]
    if run.reference is not None:
        results.add(case, "reference", "residual", run.reference.residual, n=run.args.exact, unit="relative")
        results.add(case, "reference", "change", run.reference.change, n=run.args.exact, unit="relative 2-norm")
    for m in run.found.values():
        add = partial(results.add, case, m.method.name, **({"note": m.note} if m.note else {}))
        low, high = quantiles(m.seconds, n=4, method="inclusive")[::2] if len(m.seconds) > 1 else (0.0, 0.0)
        n = len(m.seconds)
        add("p50_seconds", m.middle, spread=high - low, n=n, unit="s")
        add("p95_seconds", m.percentile(95), n=n, unit="s")
        add("cpu_seconds", median(m.cpu_seconds), n=n, unit="s")
        if not m.note:
            add("first_seconds", m.first_seconds, n=1, unit="s")
        if m.rate:
            add("prompts_per_second", m.rate, n=run.args.batch, unit="prompts/s")
        if m.queued:
            add("queued_seconds", m.queued, n=n, unit="s")
        add("flops", m.flops, unit="FLOP")
        floor = m.flops / rates[torch.bfloat16 if m.method.half else dtype] / 1e9
        add("floor_seconds", floor, unit="s")
        add("matmul_share", 100 * floor / m.middle, unit="percent")
        if m.peak:
            add("peak_bytes", m.peak, unit="bytes")
        if m.errors is None:
            continue
        whole = partial(results.add, case, m.method.name, n=run.args.exact)
        whole("whole_seconds", median(m.whole_seconds), unit="s")
        whole("error", m.errors.total, unit="relative 2-norm")
        whole("error_median_layer", m.errors.median_layer, unit="relative 2-norm")
        whole("error_worst_layer", m.errors.worst_layer, unit="relative 2-norm", note=m.errors.worst)
        whole("overlap_top1", m.errors.overlap, unit="percent")
    _add_headline(results, case, list(run.found.values()))


def _add_headline(results: Any, case: str, found: list[Measured]) -> None:
    """How many times faster each of Spurge's settings is than each peer, and rows of the plain name ``spurge``.

    ``spurge``: the setting in the model's own type of fewest operations whose error is no larger than the smallest of
    the peers'; without errors the library's default. The note names it.
    """
    ours = [m for m in found if m.method.name.startswith("spurge")]
    peers = [m for m in found if m not in ours]
    names = {m.method.name: m for m in ours if not m.method.half and not m.method.name.endswith("no-graph")}
    if peers and all(m.errors is not None for m in found):
        bound = min(m.errors.total for m in peers if m.errors)
        fit = [m for m in names.values() if m.errors and m.errors.total <= bound]
        chosen = min(fit, key=lambda m: m.flops, default=None)
    else:
        chosen = names.get(DEFAULT)
    for m in ours:
        _add_ratios(results, case, m.method.name, m, peers)
    if chosen is not None:
        note = chosen.method.name
        add = partial(results.add, case, "spurge", note=note)
        add("p50_seconds", chosen.middle, n=len(chosen.seconds), unit="s")
        add("p95_seconds", chosen.percentile(95), n=len(chosen.seconds), unit="s")
        if chosen.errors is not None:
            add("error", chosen.errors.total, unit="relative 2-norm")
        _add_ratios(results, case, "spurge", chosen, peers, note=note)


def _add_ratios(results: Any, case: str, name: str, m: Measured, peers: Sequence[Measured], **more: str) -> None:
    for peer in peers:
        times = peer.middle / m.middle
        results.add(case, name, f"times_faster_than_{peer.method.name}", times, unit="ratio", **more)
        if m.rate and peer.rate:
            metric = f"times_more_prompts_than_{peer.method.name}"
            results.add(case, name, metric, m.rate / peer.rate, unit="ratio", **more)


def table(case: str, run: Run, rates: Mapping[torch.dtype, float]) -> str:
    """The same for people."""
    head = f"{'p50 s':>9s} {'p95 s':>9s} {'first s':>8s} {'per s':>7s} {'GFLOP':>8s} {'% mm':>5s} {'MB':>6s}"
    lines = [f"{case:26s} {head} {'error':>8s} {'median':>8s} {'worst':>8s} {'top 1%':>6s}"]
    for m in run.found.values():
        rate = rates[torch.bfloat16 if m.method.half else DTYPES[run.args.dtype]]
        share = 100 * m.flops / rate / 1e9 / m.middle
        e = m.errors
        wrong = f"{e.total:8.1e} {e.median_layer:8.1e} {e.worst_layer:8.1e} {e.overlap:6.1f}" if e else ""
        lines.append(
            f"{m.method.name:26s} {m.middle:9.4f} {m.percentile(95):9.4f} {m.first_seconds:8.2f} {m.rate:7.2f} "
            f"{m.flops / 1e9:8.1f} {share:5.1f} {m.peak / 1e6:6.0f} {wrong}  {m.note}"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """``run.py latency``."""
    with threads(args.threads):
        rates = record_rates(results, device=args.device, quick=args.quick)
    warnings.filterwarnings("ignore", "tolerance .* not reached")  # the errors say so
    for name in args.shapes:
        measured = Run(name, args)
        measured.all()
        add_rows(results, name, measured, rates)
        print(table(name, measured, rates), flush=True)
        save()
