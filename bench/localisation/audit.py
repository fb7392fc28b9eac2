"""``run.py audit``: do the intervals of the gradient path's audit hold what they are to hold?

The exact effects of all neurons are known here, and with them how good the values really are. Then the audit draws
again and again and looks its effects up instead of running the model: all else is the library's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from common.harness import relative_error, threads
from localisation.exact import TOKENS, Asked, Question, exact_effects, minilm
from localisation.faithfulness import correlation, rank_correlation, top_overlap

INTERVALS, BOUNDS = ("spearman", "pearson"), ("error", "missed")


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """One batch after the other; saved after each of its targets."""
    repetitions = 4 if args.quick else args.repetitions
    held: dict[str, list[bool]] = {name: [] for name in (*INTERVALS, *BOUNDS)}
    with threads(args.threads):
        for text in args.batches:
            seed, sentences = (int(part) for part in text.split("x"))
            tokens = 8 if args.quick else TOKENS
            sizes = {"tokens": tokens, "sentences": sentences, "seed": seed}
            question = minilm(args.minilm, args.texts, **sizes, proximity=True)
            exact = exact_effects(question, args.cache)
            for target, asked in question.targets.items():
                case = f"{question.name} {target}"
                found = coverage(question, asked, exact[target], repetitions)
                for name, (truth, own, sizes_) in found.items():
                    held[name] += own
                    _add(results, case, name, truth, own, sizes_)
                save()
    for name, own in held.items():
        _add_share(results, "all", name, own)


def coverage(
    question: Question, asked: Asked, exact: Tensor, repetitions: int
) -> dict[str, tuple[float, list[bool], list[float]]]:
    """Of each number of an audit: the truth, what held it in each repetition, and how wide that was or how high.

    Args:
        exact: of all neurons, ``[B, N]`` float64.
    """
    from spurge.engine.cascade.audit import agreements
    from spurge.engine.cascade.cascade import Cascade
    from spurge.engine.cascade.first_order import first_order
    from spurge.engine.cascade.gradient_path import AUDIT, EXACT, Effort, effects_of_units
    from spurge.engine.models.hooks import frozen

    cascade = Cascade(question.model, attention=question.attention)
    with frozen(question.model):
        (trace,) = cascade.read(question.inputs).traces
        estimates = first_order(trace.graded, asked.target, keep=False)
    starts = torch.tensor([0, *(site.width for site in cascade.sites)]).cumsum(0)

    def look_up(units: Tensor, owners: Tensor) -> Tensor:
        return exact[None, owners, starts[units[:, 0]] + units[:, 1]].float()

    made = []
    for seed in range(repetitions):
        found = effects_of_units(estimates, look_up, Effort(EXACT, AUDIT, None, seed))
        values = torch.cat([value.double() for value in found.values], 2)
        made.append(agreements(values.flatten(1), [found.sample])[0])
    truth = {
        "spearman": rank_correlation(values[0], exact),
        "pearson": correlation(values[0], exact),
        "error": relative_error(values[0], exact),
        "missed": 1 - top_overlap(values[0], exact) / 100,
    }
    out = {}
    for name in INTERVALS:
        ranges = [getattr(one, name) for one in made]
        out[name] = (truth[name], [r.low <= truth[name] <= r.high for r in ranges], [r.high - r.low for r in ranges])
    for name in BOUNDS:
        bounds = [getattr(one, f"{name}_bound") for one in made]
        out[name] = (truth[name], [truth[name] <= bound for bound in bounds], bounds)
    return out


def _add(results: Any, case: str, name: str, truth: float, held: list[bool], sizes: list[float]) -> None:
    results.add(case, "exact", name, truth)
    what = "median interval width" if name in INTERVALS else "median bound"
    results.add(case, "audit", f"{name} {what}", median(sizes), n=len(sizes))
    _add_share(results, case, name, held)
    print(f"{case:28} {name:9} {truth:.4f}   {what} {median(sizes):.4f}", flush=True)


def _add_share(results: Any, case: str, name: str, held: list[bool]) -> None:
    kind = "of 95 % intervals" if name in INTERVALS else "of one-sided 95 % bounds"
    share = 100 * fmean(held)
    results.add(case, "audit", f"{name} coverage", share, n=len(held), unit="percent", note=kind)
    print(f"{case:28} {name:9} {share:5.1f} % {kind}", flush=True)
