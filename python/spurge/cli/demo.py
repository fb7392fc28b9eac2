"""``spurge demo``: see `spurge.demo.run`."""

from __future__ import annotations

import argparse
from pathlib import Path

from spurge.cli.inputs import prepare, write_results
from spurge.demo.run import Demo


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo and prints its table."""
    prepare(arguments, folders=("out",))
    demo = Demo(seed=arguments.seed, progress=not arguments.quiet)
    outcome = demo.run(Path(arguments.out), keep_model=arguments.keep_model)
    print(outcome)
    write_results(arguments, outcome.results)
    return 0
