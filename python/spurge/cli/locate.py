"""``spurge locate``: scores of all neurons, and the sets chosen by them."""

from __future__ import annotations

import argparse
import time
from typing import Any

from torch import nn

from spurge.cli.inputs import prepare, read_data, read_golden, read_macu, read_model, read_weights, write_results
from spurge.cli.plan import plan_locating
from spurge.engine.base.distributed import Ranks
from spurge.engine.base.tables import wrapped
from spurge.engine.data.examples import Examples
from spurge.methods.golden.coverage import coverage
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU
from spurge.report.results import Results
from spurge.report.tables import seconds

LEAST_SWAPPED, LEAST_NEUTRAL = 0.2, 0.05  # of the texts, below which a search has little to learn from
LONG_RUN = 60.0  # seconds: a run that takes longer prints its plan first


def run(arguments: argparse.Namespace) -> int:
    """Locates, prints the table of sites and writes the file of ``--out``."""
    with Ranks.from_environment(arguments.device) as ranks:
        prepare(arguments, "out", folders=("resume",))
        macu = read_macu(arguments)
        model, tokenizer = read_model(arguments, device=str(ranks.device))
        train = read_data(arguments, arguments.data, model)
        weights = read_weights(arguments, arguments.data)
        golden = read_golden(arguments, train.labels)
        assert golden is not None  # the parser asks for one
        if ranks.rank == 0:
            for line in coverage(train, golden).summary():
                print(wrapped(f"note: {line}"), flush=True)
        if not arguments.quiet and ranks.size == 1:
            _print_plan_of_long_run(macu, model, tokenizer, train)
        start = time.perf_counter()
        located = macu.locate(model, tokenizer, train, golden, weights=weights, resume=arguments.resume)
        if ranks.rank == 0:
            _write(arguments, located, time.perf_counter() - start)
    return 0


def _print_plan_of_long_run(macu: MacU, model: nn.Module, tokenizer: Any, train: Examples) -> None:
    plan = plan_locating(macu, model, tokenizer, train)
    if plan.seconds > LONG_RUN:
        print(wrapped(f"plan: {plan.summary()}"), flush=True)


def _few_texts(counts: dict[str, int] | None) -> list[str]:
    """What is to be said where few texts could be changed; ``counts`` is of each kind, None for another objective."""
    if counts is None:
        return []
    lines = []
    for kind, least, cure in (
        ("swapped", LEAST_SWAPPED, "more causal words would swap more (spurge find proposes some)"),
        ("neutral", LEAST_NEUTRAL, "irrelevant words that go with a label would make more (spurge find proposes some)"),
    ):
        if counts[kind] < least * counts["kept"]:
            lines.append(f"only {counts[kind]} {kind} texts of {counts['kept']}; {cure}")
    return lines


def _write(arguments: argparse.Namespace, located: Located, elapsed: float) -> None:
    located.save(arguments.out)
    print(located)
    for line in _few_texts(located.info.get("counterfactual")):
        print(wrapped(f"note: {line}"))
    print(f"located in {seconds(elapsed)}: {arguments.out}")
    results = Results("locate", {"data": str(arguments.data), "model": str(arguments.model), **located.info})
    results.extend(located.rows())
    results.add("all", "MacU", "seconds", elapsed, unit="s", n=1)
    write_results(arguments, results)
