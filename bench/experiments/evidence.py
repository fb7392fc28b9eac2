"""The page of evidence: for each claim the paper's numbers, those measured here, and whether it holds.

python bench/experiments/evidence.py --out bench/experiments/EVIDENCE.md

The numbers come from `bench/results`, and each verdict from the numbers; a claim whose file is not there says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.claims import CLAIMS
from experiments.claims.claim import Claim
from spurge.engine.base import files
from spurge.report.results import Results

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEAD = """# Evidence

What the papers of Spurge's methods claim, what this project wants of its own, and what the experiments of this folder
measured of it. Written by `python bench/experiments/evidence.py` from the files of
[bench/results](../results/README.md): each verdict follows from the numbers beside it. Models are small and data sets
cut to what two cores can do, so a claim that does not hold here may hold at full size; one that an interval leaves open
is not shown. [bench/README.md](../README.md#experiments) says what was measured how.
"""


def page(claims: Iterable[Claim] = CLAIMS, folder: Path = RESULTS) -> str:
    """The page, Markdown.

    Raises:
        ValueError: a results file lacks a number that decides.
    """
    lines = [HEAD]
    for method, own in groupby(claims, key=lambda claim: claim.method):
        lines += [f"## {method}", "", "| claim | published | measured here | |", "|---|---|---|---|"]
        lines += [*(_row(claim, folder) for claim in own), ""]
    return "\n".join(lines)


def _row(claim: Claim, folder: Path) -> str:
    path = folder / f"{claim.file}.json"
    if not path.exists():
        return f"| {claim.text} | {claim.published} | | not measured |"
    rows = Results.load(path).rows
    try:
        values = [number.of(rows) for number in claim.numbers]
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    shown = ", ".join(
        f"{number.name} {value:.{number.digits}f}" for number, value in zip(claim.numbers, values, strict=True)
    )
    measured = f"{shown} ([file](../results/{path.name}))"
    verdict = {True: "holds", False: "does not hold", None: "not shown"}[claim.holds(*values)]
    return f"| {claim.text} | {claim.published} | {measured} | **{verdict}**: {claim.reason} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 2 for a wrong argument or file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(argv)
    try:
        files.write_bytes(args.out, page().encode())
    except (ValueError, OSError) as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
