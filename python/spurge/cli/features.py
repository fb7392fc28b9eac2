"""``spurge features``: what the last layer of a text classifier reads, as a file."""

from __future__ import annotations

import argparse
import time

import torch

from spurge.cli.inputs import prepare, read_data, read_model, write_results
from spurge.engine.features.extraction import extract
from spurge.engine.features.features import Features
from spurge.report.results import Results
from spurge.report.tables import grid, seconds


def run(arguments: argparse.Namespace) -> int:
    """Extracts, prints the accuracy of every class and group, and writes the file of ``--out``."""
    prepare(arguments, "out", folders=("cache",))
    if arguments.cross_groups and arguments.group_column is None:
        raise ValueError("cross-groups: needs --group-column")
    model, tokenizer = read_model(arguments)
    data = read_data(arguments, arguments.data, model)
    start = time.perf_counter()
    features = extract(
        model,
        data,
        head=arguments.head,
        token=arguments.token,
        tokenizer=tokenizer,
        batch_size=arguments.batch_size,
        dtype=getattr(torch, arguments.autocast) if arguments.autocast else None,
        storage=getattr(torch, arguments.storage),
        cache=arguments.cache,
        max_length=arguments.max_length,
        memory=arguments.memory,
        group_names=arguments.group_names.split(",") if arguments.group_names else None,
        progress=not arguments.quiet,
    )
    elapsed = time.perf_counter() - start
    if arguments.cross_groups:
        features = features.crossed()
    features.save(arguments.out)
    results = Results("features", {"model": str(arguments.model), "data": str(arguments.data), **features.info})
    lines = [["accuracy, %", "rows", "accuracy"]]
    for name, rows, accuracy in _accuracies(features):
        results.add(name, "none", "accuracy", accuracy, unit="percent", n=rows)
        lines.append([name, str(rows), f"{accuracy:.1f}"])
    print(grid(lines))
    print(f"{features.head}, {len(features)} rows in {seconds(elapsed)}: {arguments.out}")
    results.add("all", "none", "seconds", elapsed, unit="s", n=1)
    write_results(arguments, results)
    return 0


def _accuracies(features: Features) -> list[tuple[str, int, float]]:
    """Name, rows and accuracy in percent of all rows, of each class and of each group that has rows."""
    right = features.right()
    subsets = [("all", torch.ones_like(right))]
    subsets += [(f"class {name}", features.labels == number) for number, name in enumerate(features.names)]
    if features.groups is not None:
        subsets += [(f"group {name}", features.groups == number) for number, name in enumerate(features.group_names)]
    return [(name, int(rows.sum()), 100 * float(right[rows].double().mean())) for name, rows in subsets if rows.any()]
