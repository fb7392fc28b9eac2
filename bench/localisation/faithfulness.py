"""``run.py faithfulness``: estimates of what switching each neuron off does, beside the exact effects.

Exact: one forward row for every neuron (`localisation.exact`). Values of all texts and neurons are compared at once.
Accuracy, time and peak memory are asked for apart (``--only``): a machine has to be quiet for time alone. ``tolerance``
asks for a relative error, and has a fresh audit say whether it holds.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from common.harness import Timing, compare, peak_of_call, peak_of_child, relative_error, threads
from localisation.exact import SENTENCES, SMOLLM2_NEURONS, TOKENS, Asked, Question, exact_effects, flat, minilm, smollm2
from localisation.jobs import Scores, right_riemann
from peers.anatomy import logits

Run = Callable[[], Scores]
STEPS = 20
QUICK_NEURONS = 4  # of each layer
TOLERANCES = (0.2, 0.1)
FRESH = {"audit": 1024, "seed": 1}  # what checks them


@dataclass(frozen=True)
class Method:
    """A way to get a value for each neuron; ``prepare(question, asked)`` is done once and returns what is timed.

    ``logit_only``: it knows no other target. ``unlike``: for targets that another one estimates. ``peak``: its peak
    memory is measured.
    """

    name: str
    prepare: Callable[[Question, Asked], Run]
    logit_only: bool = False
    unlike: bool = False
    peak: bool = True
    note: str = ""


def _gradient(question: Question, asked: Asked, **settings: Any) -> Run:
    from spurge.engine.cascade.cascade import Cascade

    cascade = Cascade(question.model, attention=question.attention, **settings)
    measured = asked.measured if asked.measured is not asked.target else None
    return lambda: _first(cascade.attribute(question.inputs, asked.target, measured=measured))


def _own(question: Question, asked: Asked, **settings: Any) -> Run:
    return _gradient(question, Asked.of(asked.measured), **settings)


def _path(question: Question, asked: Asked, *, path: Any, nodes: int) -> Run:
    from spurge.engine.cascade.cascade import Cascade

    settings: dict[str, Any] = {"nodes": nodes, "completeness": False, "attention": question.attention}
    cascade = Cascade(question.model, path=path, **settings)
    return lambda: _first(cascade.attribute(question.inputs, asked.path))


def _first(found: Any) -> Scores:
    return {site: value[0] for site, value in found.values.items()}


def _labels(question: Question) -> Tensor:
    with torch.no_grad():
        return logits(question.model, question.ids).argmax(1)


def _captum(question: Question, asked: Asked) -> Run:
    from peers.captum_lig import captum_layers

    labels, rows = _labels(question), 5 * len(question.ids) if len(question.neurons) > 6 else None
    return lambda: captum_layers(question.model, question.ids, labels, STEPS, rows=rows, zero_baseline=True)


def _knowledge(question: Question, asked: Asked) -> Run:
    from peers.knowledge_neurons import knowledge_neurons_loop

    labels, chunk = _labels(question), 5 if len(question.neurons) > 6 else None
    return lambda: knowledge_neurons_loop(question.model, question.ids, labels, *right_riemann(STEPS), chunk=chunk)


def _forward(question: Question, asked: Asked) -> Run:
    def run() -> Scores:
        with torch.no_grad():
            logits(question.model, question.ids)
        return {}

    return run


def _forward_backward(question: Question, asked: Asked) -> Run:
    """Of the predicted logit, to the input embeddings: parameters are frozen."""
    embedding = question.model.get_input_embeddings()

    def run() -> Scores:
        handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
        try:
            answer = logits(question.model, question.ids)
        finally:
            handle.remove()
        answer.max(1).values.sum().backward()
        return {}

    return run


def all_methods(layer_nodes: int) -> list[Method]:
    """Every method; those without values are ``forward`` and ``forward-backward``, the floor for time."""
    short = [
        Method(f"gradient+{m}", partial(_gradient, exact=m, audit=0), peak=m == 512, note=f"{m} a text measured")
        for m in (16, 24, 32, 128, 512)
    ]
    return [
        Method("forward", _forward),
        Method("forward-backward", _forward_backward, note="of the predicted logit, to the input embeddings"),
        Method("gradient", partial(_gradient, exact=0, audit=0)),
        *short,
        Method("gradient-own", partial(_own, exact=0, audit=0), unlike=True, note="of the measured target itself"),
        Method("spurge", partial(_gradient, audit=0), note="as it comes, its audit left out"),
        Method("spurge+audit", _gradient, note="as it comes"),
        Method(f"layer-{layer_nodes}", partial(_path, path="layer", nodes=layer_nodes)),
        Method("joint-4", partial(_path, path="joint", nodes=4)),
        Method("captum", _captum, logit_only=True, note=f"layer by layer, {STEPS} steps, baseline zero"),
        Method("knowledge-neurons", _knowledge, logit_only=True, note=f"{STEPS} steps"),
    ]


def methods_of(question: Question, target: str, patterns: list[str]) -> list[Method]:
    """Those that know the target, are installed and asked for."""
    every = all_methods(4 if len(question.neurons) <= 6 else 2)
    if importlib.util.find_spec("captum") is None:
        every = [method for method in every if method.name != "captum"]
    asked = question.targets[target]
    known = [method for method in every if target == "logit" or not method.logit_only]
    known = [method for method in known if asked.measured is not asked.target or not method.unlike]
    return [method for method in known if any(fnmatch(method.name, pattern) for pattern in patterns)]


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over all elements; NaN where one side is constant."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a @ b) / (a.norm() * b.norm()))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, over all elements; ties have their mean rank."""
    return correlation(*(torch.from_numpy(rankdata(value.numpy(), axis=None)) for value in (a, b)))


def top_overlap(value: Tensor, exact: Tensor) -> float:
    """Percent of the true top 1 % of all elements that is among the top 1 % of the values."""
    count = max(1, round(exact.numel() / 100))
    mine, theirs = (set(one.flatten().topk(count).indices.tolist()) for one in (value, exact))
    return 100 * len(mine & theirs) / count


def accuracy(value: Tensor, exact: Tensor) -> dict[str, tuple[float, str]]:
    """Metric -> value and unit, of ``[B, n]`` float64 on the CPU."""
    return {
        "spearman": (rank_correlation(value, exact), "correlation"),
        "pearson": (correlation(value, exact), "correlation"),
        "relative_error": (relative_error(value, exact), "relative 2-norm"),
        "top1_overlap": (top_overlap(value, exact), "percent"),
    }


def questions(args: argparse.Namespace) -> list[Callable[[], Question]]:
    """What ``args`` asks about, each made when it is its turn."""
    if args.minilm is not None and args.texts is None:
        raise ValueError("texts: MiniLM needs a file of labelled texts, got none")
    made: list[Callable[[], Question]] = []
    tokens, sentences = (8, 2) if args.quick else (TOKENS, SENTENCES)
    if args.minilm is not None:
        made.append(lambda: minilm(args.minilm, args.texts, tokens=tokens, sentences=sentences, seed=0, proximity=True))
    if args.smollm2:
        neurons = QUICK_NEURONS if args.quick else SMOLLM2_NEURONS
        made.append(lambda: smollm2(tokens=tokens, neurons=neurons))
    if not made:
        raise ValueError("model: expected --minilm FOLDER or --smollm2, got neither")
    return made


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """``run.py faithfulness``; saved after every case and part."""
    for make in questions(args):
        question = make()
        measure(question, args, results, save)


def measure(question: Question, args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """All that ``args`` asks for, about one question."""
    with threads(args.threads):
        exact = exact_effects(question, args.cache) if "accuracy" in args.only else {}
        for target, asked in question.targets.items():
            case, methods = f"{question.name} {target}", methods_of(question, target, args.methods)
            if "accuracy" in args.only:
                _add_accuracy(results, case, question, asked, methods, exact[target])
                save()
            if "time" in args.only:
                _add_times(results, case, question, asked, methods, args)
                save()
            if "tolerance" in args.only:
                for tolerance in TOLERANCES:
                    _add_tolerance(results, case, question, asked, tolerance, args)
                save()
            if "peak" in args.only:
                _add_peaks(results, case, methods, args)
                save()


def _add_accuracy(
    results: Any, case: str, question: Question, asked: Asked, methods: list[Method], exact: Tensor
) -> None:
    results.add(case, "exact", "neurons", exact.shape[1], note="measured one by one")
    results.add(case, "exact", "zeros", 100 * float((exact == 0).double().mean()), unit="percent", note="of effects")
    for method in methods:
        scores = method.prepare(question, asked)()
        if not scores:
            continue
        found = accuracy(flat(scores, question), exact)
        for metric, (value, unit) in found.items():
            results.add(case, method.name, metric, value, unit=unit, note=method.note or None)
        line = "   ".join(f"{metric} {value:.4f}" for metric, (value, _) in found.items())
        print(f"{case:24s} {method.name:18s} {line}", flush=True)


def _add_times(
    results: Any, case: str, question: Question, asked: Asked, methods: list[Method], args: argparse.Namespace
) -> None:
    first: dict[str, float] = {}
    calls: dict[str, Run] = {}
    for method in methods:
        calls[method.name] = method.prepare(question, asked)
        start = perf_counter()
        calls[method.name]()
        first[method.name] = perf_counter() - start
    turns = {name: call for name, call in calls.items() if first[name] <= args.budget}
    timings = {name: Timing(taken, 0.0, 1, float("nan")) for name, taken in first.items()}
    timings |= compare(turns, repeats=args.repeats, budget=args.budget, first={name: first[name] for name in turns})
    for method in methods:
        timing, note = timings[method.name], method.note or None
        results.add(case, method.name, "seconds", timing.seconds, spread=timing.spread, n=timing.n, unit="s", note=note)
        print(f"{case:24s} {method.name:18s} {timing.seconds:9.4f} s", flush=True)


def _add_tolerance(
    results: Any, case: str, question: Question, asked: Asked, tolerance: float, args: argparse.Namespace
) -> None:
    from spurge.engine.cascade.cascade import Cascade

    def cascade(**settings: Any) -> Any:
        return Cascade(question.model, attention=question.attention, **settings)

    measured = asked.measured if asked.measured is not asked.target else None
    name, nodes = f"tolerance-{tolerance:g}", 4 if len(question.neurons) <= 6 else 2
    found = cascade(tolerance=tolerance).attribute(question.inputs, asked.target, measured=measured)
    each = found.exact // len(question.ids)
    fresh = cascade(exact=each, **FRESH).attribute(question.inputs, asked.target, measured=measured)
    note = f"{each} neurons of each text measured"
    for metric, own in (("own", found.agreement[0]), ("fresh", fresh.agreement[0])):
        drawn = f"{note}; by {own.drawn} drawn"
        results.add(case, name, f"relative_error {metric}", own.error, unit="relative 2-norm", note=drawn)
        results.add(case, name, f"error_bound {metric}", own.error_bound, unit="relative 2-norm", note=drawn)
    calls = {
        name: _gradient(question, asked, tolerance=tolerance),
        f"{name} without audit": _gradient(question, asked, exact=each, audit=0),
        f"layer-{nodes}": _path(question, asked, path="layer", nodes=nodes),
    }
    for method, timing in compare(calls, repeats=args.repeats, budget=args.budget).items():
        results.add(case, method, "seconds", timing.seconds, spread=timing.spread, n=timing.n, unit="s", note=note)
    print(f"{case:24s} {name:18s} {note}; fresh: {fresh.agreement[0]}", flush=True)


def _add_peaks(results: Any, case: str, methods: list[Method], args: argparse.Namespace) -> None:
    model, target = ("minilm" if case.startswith("minilm") else "smollm2"), case.rpartition(" ")[2]
    for method in methods:
        if not method.peak:
            continue
        rest = ["--quick"] if args.quick else []
        rest += ["--minilm", str(args.minilm), "--texts", str(args.texts)] if model == "minilm" else []
        child = ["faithfulness", target, method.name, "--threads", str(args.threads), *rest]
        peak = peak_of_child(child)["peak_bytes"]
        results.add(case, method.name, "peak_bytes", peak, unit="bytes", note=method.note or None)
        print(f"{case:24s} {method.name:18s} {peak / 1e6:9.0f} MB", flush=True)


def child(rest: list[str]) -> dict[str, int]:
    """``run.py child faithfulness``: bytes above the model's own at the peak of a call, set-up included.

    A call with its result is made before, on fewer and shorter texts, so that libraries are in memory.
    """
    options = argparse.ArgumentParser()
    options.add_argument("target")
    options.add_argument("method")
    options.add_argument("--minilm", type=Path)
    options.add_argument("--texts", type=Path)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--quick", action="store_true")
    args = options.parse_args(rest)

    def peak(quick: bool) -> int:
        sizes = argparse.Namespace(minilm=args.minilm, texts=args.texts, smollm2=args.minilm is None, quick=quick)
        (question,) = (make() for make in questions(sizes))
        (method,) = methods_of(question, args.target, [args.method])
        return peak_of_call(lambda: method.prepare(question, question.targets[args.target])())

    with threads(args.threads):
        peak(quick=True)
        return {"peak_bytes": peak(quick=args.quick)}
