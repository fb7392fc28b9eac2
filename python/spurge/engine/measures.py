"""The numbers of an evaluation, and how they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TITLES = {
    "accuracy": "accuracy, percent",
    "change": "change of accuracy, points",
    "worst_group": "worst group's accuracy, percent",
    "gap": "average less worst group's accuracy, points",
    "worst_class": "worst class's accuracy, percent",
    "class_difference": "mean difference of two classes' accuracies, points",
    "eta": "eta, mean proximity to spurious words (0 to 2)",
}
UNITS = {"change": "points", "gap": "points", "class_difference": "points", "eta": ""}  # of others: percent


@dataclass(frozen=True)
class Measure:
    """One number of a report.

    Attributes:
        case: test set, ``set/group`` for one group of it, or ``average`` over the sets.
        method: ``none``, the edit's name, ``zero-all`` or ``random``; of last layers, as they were called.
        metric: ``accuracy``, ``change`` (against the first method on the same examples), ``worst_group``, ``eta``; of
            last layers also ``gap``, ``worst_class`` and ``class_difference``.
        value: the number; for ``random``, and for several layers under one name, the mean over draws.
        spread: standard error by bootstrap; for draws their standard deviation.
        low, high: 95 % bootstrap interval over examples; None for draws.
        n: examples; sets for ``average``; draws for ``random``.
        unit: percent, points, or empty.
        labels: labels that the method used to make its edit: none, class or group; None if it does not say.
    """

    case: str
    method: str
    metric: str
    value: float
    spread: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    labels: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """Measures of one evaluation, in reading order; prints as a table.

    Attributes:
        measures: all numbers.
        settings: what the evaluation was asked for, with fingerprints of the sets; JSON-able.
    """

    measures: tuple[Measure, ...]
    settings: dict[str, Any]

    def value(self, case: str, method: str, metric: str = "accuracy") -> float:
        """One number.

        Raises:
            ValueError: the report has none of that name.
        """
        for m in self.measures:
            if (m.case, m.method, m.metric) == (case, method, metric):
                return m.value
        raise ValueError(f"case, method, metric: the report has no {case!r}, {method!r}, {metric!r}")

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows ``case, method, metric, value, spread, n, unit, labels, seed``.

        The ends of an interval are rows of their own, with ``_low`` and ``_high`` behind the metric's name.
        """
        rows = []
        for m in self.measures:
            rest = {"n": m.n, "unit": m.unit, "labels": m.labels, "seed": self.settings["seed"]}
            name = {"case": m.case, "method": m.method}
            rows.append({**name, "metric": m.metric, "value": m.value, "spread": m.spread, **rest})
            for end, value in (("low", m.low), ("high", m.high)):
                if value is not None:
                    rows.append({**name, "metric": f"{m.metric}_{end}", "value": value, "spread": None, **rest})
        return rows

    def to_frame(self) -> Any:
        """The measures as a pandas DataFrame; needs pandas."""
        import pandas as pd

        return pd.DataFrame([vars(m) for m in self.measures])

    def __str__(self) -> str:
        return "\n\n".join(self._table(metric) for metric in TITLES if any(m.metric == metric for m in self.measures))

    __repr__ = __str__

    def _table(self, metric: str) -> str:
        own = [m for m in self.measures if m.metric == metric]
        methods = list(dict.fromkeys(m.method for m in own))
        cells: dict[str, dict[str, str]] = {}
        for m in own:
            cells.setdefault(m.case, {})[m.method] = _cell(m)
        lines = [[TITLES[metric], *(self._head(method) for method in methods)]]
        lines += [[case, *(row.get(method, "") for method in methods)] for case, row in cells.items()]
        columns = [max(len(line[i]) for line in lines) for i in range(len(methods) + 1)]
        return "\n".join(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, columns, strict=True)))
            for line in lines
        )

    def _head(self, method: str) -> str:
        return f"random ({self.settings['draws']} draws)" if method == "random" else method


def _cell(m: Measure) -> str:
    digits = 3 if m.metric == "eta" else 1
    sign = "+" if m.metric == "change" else ""
    text = f"{m.value:{sign}.{digits}f}"
    if m.low is not None and m.high is not None:
        return f"{text} [{m.low:{sign}.{digits}f}, {m.high:{sign}.{digits}f}]"
    return text if m.spread is None else f"{text} ± {m.spread:.{digits}f}"
