"""``run.py coverage``: do the intervals of mediation hold the true effects, on prompts whose effects are known?

Prompts are made up anew for every repetition (`spurge.demo.oracle`): a topic moves the treatment, both units and the
outcome; the mediator has an indirect effect of 0.5, the follower none, and the total effect is 0.8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

from common.harness import threads

TRUTH = {"mediator": 0.5, "follower": 0.0, "total": 0.8}
ESTIMATORS = ("balancing", "continuous_unit")
SIDES = ("adjusted", "unadjusted")


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """One estimator after the other; saved after each."""
    repetitions, resamples = (4, 20) if args.quick else (args.repetitions, 200)
    with threads(args.threads):
        for estimator in ESTIMATORS:
            start = time.perf_counter()
            rows = [repetition(estimator, seed, args.rows, resamples) for seed in range(repetitions)]
            took = time.perf_counter() - start
            for side in SIDES:
                for name, truth in TRUTH.items():
                    _add(results, f"{estimator}, {name} {truth}", side, [row[side, name] for row in rows], truth)
            results.add(estimator, "both", "seconds", took, n=repetitions, unit="s", note=f"{resamples} resamples each")
            save()


def repetition(
    estimator: Any, seed: int, rows: int, resamples: int
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Estimate and ends of the 95 % interval of each effect, adjusted and not."""
    from spurge.demo.oracle import oracle
    from spurge.engine.base.statistics import interval
    from spurge.methods.mediation.mediation import Mediation

    made = oracle(1000 + seed, rows)
    settings = Mediation(estimator=estimator, resamples=resamples, seed=seed, progress=False)
    found = settings.effects(made.units, made.treatment, made.outcome, made.topics)
    out = {}
    for side in SIDES:
        own = getattr(found, side)
        low, high = own.interval
        for unit, name in enumerate(("mediator", "follower")):
            out[side, name] = (float(own.aie[unit]), float(low[unit]), float(high[unit]))
        ends = interval(own.total_draws)
        out[side, "total"] = (own.total_effect, float(ends[0]), float(ends[1]))
    return out


def _add(results: Any, case: str, side: str, found: list[tuple[float, float, float]], truth: float) -> None:
    known = [row for row in found if row[0] == row[0]]
    held = 100 * fmean(low <= truth <= high for _, low, high in known)
    mean, spread = fmean(row[0] for row in known), stdev(row[0] for row in known)
    results.add(case, side, "estimate", mean, spread=spread, n=len(known))
    results.add(case, side, "interval coverage", held, n=len(known), unit="percent", note="of 95 % intervals")
    print(f"{case:32} {side:11} {mean:+.3f} ± {spread:.3f}   {held:5.1f} % of {len(known)} intervals", flush=True)
