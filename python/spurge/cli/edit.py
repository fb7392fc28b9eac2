"""``spurge edit``: gates for located neurons, or a repair."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from spurge.cli.inputs import prepare, read_data, read_golden, read_macu, read_model, write_results
from spurge.engine.base.distributed import Ranks
from spurge.engine.data.words import CorrelationTokens
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_deltas import WeightDeltas
from spurge.methods.macu.located import Located
from spurge.report.results import Results
from spurge.report.tables import seconds


def run(arguments: argparse.Namespace) -> int:
    """Searches gates or trains, and writes the file of ``--out``.

    Without ``--preset``, the one that `locate` was run with, if any was. Correlation tokens and units are read as
    `locate` read them.

    Raises:
        ValueError: gates are asked for, and no located neurons given.
    """
    with Ranks.from_environment(arguments.device) as ranks:
        prepare(arguments, "out", "resume")
        repair = arguments.search == "weights"
        if arguments.located is None and not repair:
            raise ValueError("located: gates need the neurons that spurge locate wrote; only --search weights does not")
        located = None if arguments.located is None else Located.load(arguments.located)
        macu = read_macu(arguments, **({"preset": "best"} if located is None or repair else settings_of(located)))
        model, tokenizer = read_model(arguments, device=str(ranks.device))
        train = read_data(arguments, arguments.data, model)
        dev = None if arguments.dev is None else read_data(arguments, arguments.dev, model)
        golden = read_golden(arguments, train.labels)
        assert golden is not None  # the parser asks for one
        start = time.perf_counter()
        edit = macu.edit(model, tokenizer, train, located, golden, dev=dev, resume=arguments.resume)
        if ranks.rank == 0:
            _write(arguments, edit, time.perf_counter() - start)
    return 0


def settings_of(located: Located) -> dict[str, Any]:
    """The preset and the settings of MacU, units and correlation tokens, with which these neurons were located."""
    preset = "paper" if located.info.get("objective") == "proximity" else "best"
    settings = located.info.get("settings", {})
    return {"preset": preset, "units": settings.get("units", "neurons"), **asdict(CorrelationTokens.of(settings))}


def _write(arguments: argparse.Namespace, edit: NeuronEdit | WeightDeltas, elapsed: float) -> None:
    edit.save(arguments.out)
    print(f"{edit}\nedited in {seconds(elapsed)}: {arguments.out}")
    results = Results("edit", {"data": str(arguments.data), "model": str(arguments.model), **edit.info})
    if isinstance(edit, WeightDeltas):
        _add_repair(results, edit)
    else:
        for site, count in edit.neurons.counts().items():
            results.add(site, "MacU", "neurons", count, unit="neurons")
        results.add("all", "MacU", "neurons", len(edit), unit="neurons")
        results.add("all", "MacU", "objective", edit.info.get("value"))
    results.add("all", "MacU", "seconds", elapsed, unit="s", n=1)
    write_results(arguments, results)


def _add_repair(results: Results, edit: WeightDeltas) -> None:
    """Prints and adds accuracies on dev and on its swaps: before, with the edit, and of the controls."""
    results.add("all", "MacU", "weights", len(edit), unit="weights")
    results.add("all", "MacU", "alpha", edit.info["alpha"])
    found = {"none": edit.info["selection"][0], "MacU": edit.info, **edit.info.get("controls", {})}
    for method, own in found.items():
        for case in ("home", "swapped"):
            results.add(case, method, "accuracy", own[case], unit="percent")
        print(f"{method}: {own['home']:.1f} % of dev, {own['swapped']:.1f} % of its swaps")
