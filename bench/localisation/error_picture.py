"""Error against seconds of the methods of ``run.py faithfulness``, drawn from its results.

    python bench/localisation/error_picture.py ACCURACY.json TIMES.json [MORE.json ...] --out FILE.svg

One panel for each case whose errors and times are both in the files; both axes are logarithmic, and where a forward and
backward pass was timed, a line stands at it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Numbers = dict[str, dict[str, dict[str, float]]]  # case -> method -> metric -> value
FLOOR = "forward-backward"


def read(files: Sequence[Path]) -> Numbers:
    """What the files say of errors and times; a later file counts over an earlier one."""
    found: Numbers = {}
    for file in files:
        for row in json.loads(file.read_text())["rows"]:
            if row["metric"] in ("seconds", "relative_error"):
                found.setdefault(row["case"], {}).setdefault(row["method"], {})[row["metric"]] = row["value"]
    return found


def drawn(numbers: Numbers) -> Any:
    """A matplotlib figure.

    Raises:
        ValueError: no case has both errors and times.
    """
    from matplotlib.figure import Figure

    panels = {
        case: both
        for case, methods in numbers.items()
        if (both := {name: own for name, own in methods.items() if len(own) == 2})
    }
    if not panels:
        raise ValueError("files: no case has errors and times, expected one of each")
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (case, methods) in zip(axes, panels.items(), strict=True):
        axis.set(title=case, xscale="log", yscale="log", xlabel="seconds", ylabel="relative error")
        axis.margins(0.25)
        if (floor := numbers[case].get(FLOOR)) is not None:
            axis.axvline(floor["seconds"], color="0.6", linestyle=":", label=FLOOR)
            axis.legend(loc="lower left", frameon=False, fontsize="small")
        for name, own in methods.items():
            if name.startswith("spurge"):  # the default is one of the others by another name
                continue
            place = (own["seconds"], own["relative_error"])
            axis.plot(*place, "o", color="C0" if name.startswith("gradient") else "C1")
            axis.annotate(name, place, textcoords="offset points", xytext=(4, 4), fontsize="x-small")
    return figure


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", type=Path, nargs="+", metavar="FILE")
    options.add_argument("--out", type=Path, required=True)
    args = options.parse_args()
    drawn(read(args.files)).savefig(args.out)


if __name__ == "__main__":
    main()
