"""The numbers of an evaluation, from the outcomes of examples to the table they are read in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spurge.engine.base.statistics import resampled_sums
from spurge.engine.base.tables import aligned
from spurge.engine.data.examples import Examples

AVERAGE, NONE = "average", "none"  # the case that is the mean over sets, and the method that is no edit
_LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
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
        return "\n".join(aligned(lines))

    def _head(self, method: str) -> str:
        drawn = method == "random" and "draws" in self.settings  # last layers may be called so, too
        return f"random ({self.settings['draws']} draws)" if drawn else method


def _cell(m: Measure) -> str:
    digits = 3 if m.metric == "eta" else 1
    sign = "+" if m.metric == "change" else ""
    text = f"{m.value:{sign}.{digits}f}"
    if m.low is not None and m.high is not None:
        return f"{text} [{m.low:{sign}.{digits}f}, {m.high:{sign}.{digits}f}]"
    return text if m.spread is None else f"{text} ± {m.spread:.{digits}f}"


_Numbers = dict[tuple[str, str], dict[str, np.ndarray]]  # (case, metric) -> method -> [passes, 1 + resamples]


def _of_set(
    case: str,
    examples: Examples,
    found: Mapping[str, list[np.ndarray]],
    bootstrap: int,
    rng: np.random.Generator,
) -> _Numbers:
    """All numbers of one set; ``random`` has passes and no resamples, the others one pass and its resamples."""
    groups = examples.groups
    group = np.array([row.group or "" for row in examples])
    member = np.stack([np.ones(len(examples)), *(group == name for name in groups)])  # [1 + groups, N]
    singles = [method for method in found if method != "random"]
    numbers: _Numbers = {}

    def enter(methods: list[str], outcomes: np.ndarray, bootstrap: int) -> None:
        """``outcomes`` ``[passes, 1 or 2, N]``; the passes are those of each method, or all of one."""
        right = 100 * outcomes[:, 0, None] * member  # [passes, 1 + groups, N]
        columns = np.concatenate([right.reshape(-1, len(examples)), member, *outcomes[:, 1:].swapaxes(0, 1)])
        sums = resampled_sums(columns.T, bootstrap, rng).T  # [columns, 1 + resamples]
        passes, cells = right.shape[:2]
        sizes = sums[passes * cells : (passes + 1) * cells]
        with np.errstate(invalid="ignore"):  # a resample can miss a small group
            means = sums[: passes * cells].reshape(passes, cells, -1) / sizes
        near = sums[(passes + 1) * cells :] / len(examples)
        for number, method in enumerate(methods):
            rows = slice(number, number + 1) if len(methods) == passes else slice(None)
            numbers.setdefault((case, "accuracy"), {})[method] = means[rows, 0]
            for cell, name in enumerate(groups, 1):
                numbers.setdefault((f"{case}/{name}", "accuracy"), {})[method] = means[rows, cell]
            if groups:
                numbers.setdefault((case, "worst_group"), {})[method] = np.fmin.reduce(means[rows, 1:], axis=1)
            if len(near):
                numbers.setdefault((case, "eta"), {})[method] = near[rows]

    enter(singles, np.stack([found[method][0] for method in singles]), bootstrap)
    if "random" in found:
        enter(["random"], np.stack(found["random"]), 0)
    plain = numbers[case, "accuracy"][NONE]
    changes = {
        method: values - plain[:, : values.shape[1]]
        for method, values in numbers[case, "accuracy"].items()
        if method != NONE
    }
    return numbers | ({(case, "change"): changes} if changes else {})


def summarize(
    sets: Mapping[str, Examples],
    found: Mapping[str, Mapping[str, list[np.ndarray]]],
    labels: Mapping[str, str | None],
    bootstrap: int,
    seed: int,
) -> list[Measure]:
    """Measures of all sets and methods, with intervals and averages.

    Args:
        sets: the examples by set.
        found: by set and method the passes, per example whether it is right and, if measured, its proximity,
            ``[1 or 2, N]`` each; one pass a method, several of ``random``.
        labels: what each method used.
        bootstrap: resamples of each set, the same for all its methods.
        seed: of the resamples.
    """
    numbers: _Numbers = {}
    sizes = {AVERAGE: len(sets)}
    for index, (case, examples) in enumerate(sets.items()):
        sizes[case] = len(examples)
        for row in examples:
            if row.group is not None:
                sizes[f"{case}/{row.group}"] = sizes.get(f"{case}/{row.group}", 0) + 1
        numbers |= _of_set(case, examples, found[case], bootstrap, np.random.default_rng((seed, index)))
    first = next(iter(sets))
    for metric in ("accuracy", "change", "eta"):
        if len(sets) > 1 and (first, metric) in numbers:
            numbers[AVERAGE, metric] = {
                method: np.mean([numbers[case, metric][method] for case in sets], axis=0)
                for method in numbers[first, metric]
            }
    return [
        measure(case, method, metric, values, sizes[case], labels[method], draws=method == "random")
        for metric in TITLES
        for (case, found_metric), by_method in numbers.items()
        if found_metric == metric
        for method, values in by_method.items()
    ]


def measure(
    case: str, method: str, metric: str, values: np.ndarray, size: int, labels: str | None, *, draws: bool = False
) -> Measure:
    """One number of ``values [1, 1 + resamples]``, with their interval; of ``[draws, ...]`` with the draws' spread."""
    unit = UNITS.get(metric, "percent")
    if draws:
        mean = float(values[:, 0].mean())
        spread = float(values[:, 0].std(ddof=1)) if len(values) > 1 else None
        return Measure(case, method, metric, mean, spread, None, None, len(values), unit, labels)
    point, resamples = float(values[0, 0]), values[0, 1:]
    resamples = resamples[~np.isnan(resamples)]
    if len(resamples) < 2:
        return Measure(case, method, metric, point, None, None, None, size, unit, labels)
    low, high = map(float, np.percentile(resamples, _LEVEL))
    return Measure(case, method, metric, point, float(resamples.std(ddof=1)), low, high, size, unit, labels)
