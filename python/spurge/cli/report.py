"""``spurge report``: one page of what was found, edited and measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from spurge.cli.inputs import prepare, write_results
from spurge.report.html import write_report
from spurge.report.results import Results


def run(arguments: argparse.Namespace) -> int:
    """Writes the page of ``--out`` and the cards of ``--card``."""
    cards = {f"card_{number}": path for number, path in enumerate(arguments.card)}
    for name, path in cards.items():
        setattr(arguments, name, path)
        if Path(path).suffix.lower() not in (".md", ".json"):
            raise ValueError(f"card: expected a file that ends in .md or .json, got {path!r}")
    prepare(arguments, "out", *cards)
    card = write_report(arguments.folders, arguments.out, title=arguments.title)
    print(f"report: {arguments.out}")
    for path in arguments.card:
        card.save(path)
        print(f"edit card: {path}")
    results = Results("report", {"title": arguments.title})
    results.add("all", "report", "bytes", Path(arguments.out).stat().st_size, unit="bytes", n=1)
    write_results(arguments, results)
    return 0
