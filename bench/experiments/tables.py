"""Numbers of an experiment, one per seed: a table for people, and rows for `spurge.report.results.Results`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from spurge.report.results import Results
from spurge.report.tables import grid


@dataclass
class Line:
    """One method: its values by metric and seed, and which labels it used."""

    labels: str
    note: str
    values: dict[str, list[float]] = field(default_factory=dict)


class Table:
    """Methods down, metrics across; mean ± standard deviation over seeds.

    Args:
        case: what is measured; the case of every row.
        unit: of all numbers but rates, which have none.
        digits: that are shown behind the point, of all numbers but rates.
    """

    def __init__(self, case: str, unit: str = "percent", digits: int = 1) -> None:
        self.case, self.unit, self.digits = case, unit, digits
        self.lines: dict[str, Line] = {}

    def add(self, method: str, values: Mapping[str, Any], *, labels: str, note: str) -> None:
        """Numbers of one seed.

        Args:
            method: name of the line.
            values: metric to number, or to a tensor of one.
            labels: what the method used beyond the training labels of the model: "none", "class" or "group".
            note: for what it used them.
        """
        line = self.lines.setdefault(method, Line(labels, note))
        for metric, value in values.items():
            line.values.setdefault(metric, []).append(float(value))

    def mean(self, method: str, metric: str) -> float:
        """Over the seeds."""
        return fmean(self.lines[method].values[metric])

    def write(self, results: Results, seeds: Sequence[int]) -> None:
        """One row for each method and metric; the note names the seeds."""
        for method, line in self.lines.items():
            for metric, values in line.values.items():
                note = f"{line.note}; seeds {', '.join(map(str, seeds[: len(values)]))}"
                mean, spread = fmean(values), _spread(values)
                row = (self.case, method, metric, mean)
                unit = "" if metric.endswith("rate") else self.unit
                results.add(*row, spread=spread, n=len(values), unit=unit, labels=line.labels, note=note)

    def show(self, metrics: Sequence[str] | None = None) -> None:
        """Prints the table; by default all metrics."""
        metrics = metrics or list(dict.fromkeys(metric for line in self.lines.values() for metric in line.values))
        lines = [[self.case, "labels", *(metric.replace("_", " ") for metric in metrics)]]
        for method, line in self.lines.items():
            lines.append(
                [method, line.labels, *(self._cell(metric, line.values.get(metric, ())) for metric in metrics)]
            )
        print(f"\n{grid(lines, left=2)}\n", flush=True)

    def _cell(self, metric: str, values: Sequence[float]) -> str:
        if not values:
            return ""
        digits = 3 if metric.endswith("rate") else self.digits
        spread = _spread(values)
        return f"{fmean(values):.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
