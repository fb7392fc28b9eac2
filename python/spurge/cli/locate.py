"""``spurge locate``: scores of all neurons, and the sets chosen by them."""

from __future__ import annotations

import argparse
import time
from typing import Any

from torch import nn

from spurge.cli.inputs import prepare, read_data, read_golden, read_model, read_weights, settings, write_results
from spurge.cli.plan import of_locating
from spurge.engine.base.distributed import Ranks
from spurge.engine.data.examples import Examples
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU
from spurge.report.results import Results
from spurge.report.tables import seconds

LONG = 60.0  # seconds: what takes longer is announced


def run(arguments: argparse.Namespace) -> int:
    """Locates, prints the table of sites and writes the file of ``--out``."""
    with Ranks.from_environment(arguments.device) as ranks:
        prepare(arguments, "out")
        macu = settings(arguments)
        model, tokenizer = read_model(arguments, device=str(ranks.device))
        train = read_data(arguments, arguments.data, model)
        weights = read_weights(arguments, arguments.data)
        golden = read_golden(arguments, train.labels)
        assert golden is not None  # the parser asks for one
        if not arguments.quiet and ranks.size == 1:
            _announce(macu, model, tokenizer, train)
        start = time.perf_counter()
        located = macu.locate(model, tokenizer, train, golden, weights=weights, resume=arguments.resume)
        if ranks.rank == 0:
            _tell(arguments, located, time.perf_counter() - start)
    return 0


def _announce(macu: MacU, model: nn.Module, tokenizer: Any, train: Examples) -> None:
    """Says what a long run will take."""
    expected = of_locating(macu, model, tokenizer, train)
    if expected.seconds > LONG:
        print(f"plan: {expected.summary()}", flush=True)


def _tell(arguments: argparse.Namespace, located: Located, took: float) -> None:
    located.save(arguments.out)
    print(located)
    print(f"located in {seconds(took)}: {arguments.out}")
    results = Results("locate", {"data": str(arguments.data), "model": str(arguments.model), **located.info})
    results.extend(located.rows())
    results.add("all", "MacU", "seconds", took, unit="s", n=1)
    write_results(arguments, results)
