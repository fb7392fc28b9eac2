"""``spurge doctor``: see `spurge.doctor`."""

from __future__ import annotations

import argparse

from spurge import doctor


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings; 1 if something is wrong."""
    diagnosis = doctor.examine()
    print(diagnosis)
    if arguments.json:  # needs torch, whose absence the doctor must survive
        from spurge.cli.inputs import write_results
        from spurge.report.results import Results

        results = Results("doctor", diagnosis.facts)
        results.extend(diagnosis.rows())
        write_results(arguments, results)
    return 0 if diagnosis.healthy else 1
