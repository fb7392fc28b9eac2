"""``spurge edit``: gates for located neurons."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from spurge.cli.inputs import prepare, read_data, read_golden, read_macu, read_model, write_results
from spurge.engine.base.distributed import Ranks
from spurge.engine.data.words import CorrelationTokens
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.methods.macu.located import Located
from spurge.report.results import Results
from spurge.report.tables import seconds


def run(arguments: argparse.Namespace) -> int:
    """Searches gates, and writes the file of ``--out``. Without ``--preset``, the one that `locate` was run with.

    Correlation tokens and units are read as `locate` read them.
    """
    with Ranks.from_environment(arguments.device) as ranks:
        prepare(arguments, "out", "resume")
        located = Located.load(arguments.located)
        preset = "paper" if located.info.get("objective") == "proximity" else "best"
        units = located.info.get("settings", {}).get("units", "neurons")
        macu = read_macu(arguments, preset, units=units, **tokens_of(located))
        model, tokenizer = read_model(arguments, device=str(ranks.device))
        train = read_data(arguments, arguments.data, model)
        golden = read_golden(arguments, train.labels)
        assert golden is not None  # the parser asks for one
        start = time.perf_counter()
        edit = macu.edit(model, tokenizer, train, located, golden, resume=arguments.resume)
        if ranks.rank == 0:
            _write(arguments, edit, time.perf_counter() - start)
    return 0


def tokens_of(located: Located) -> dict[str, Any]:
    """Settings of MacU that say how the texts' correlation tokens were read when these neurons were located."""
    return asdict(CorrelationTokens.of(located.info.get("settings", {})))


def _write(arguments: argparse.Namespace, edit: NeuronEdit, elapsed: float) -> None:
    edit.save(arguments.out)
    print(f"{edit}\nedited in {seconds(elapsed)}: {arguments.out}")
    results = Results("edit", {"data": str(arguments.data), "model": str(arguments.model), **edit.info})
    for site, count in edit.neurons.counts().items():
        results.add(site, "MacU", "neurons", count, unit="neurons")
    results.add("all", "MacU", "neurons", len(edit), unit="neurons")
    results.add("all", "MacU", "objective", edit.info.get("value"))
    results.add("all", "MacU", "seconds", elapsed, unit="s", n=1)
    write_results(arguments, results)
