"""Figures of scores, accuracies and searches; needs matplotlib (``pip install 'spurge[plots]'``).

Each function returns a ``matplotlib.figure.Figure`` that belongs to no window and no global state: show it in a
notebook, or write it with ``figure.savefig(path)``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from spurge.engine.scores import NeuronScores

Row = Mapping[str, Any]


def scores(maps: Mapping[str, NeuronScores]) -> Any:
    """Sum of the positive and of the negative scores of each site, side by side for each map.

    Args:
        maps: name to scores, e.g. ``{"causal": located.causal, "spurious": located.spurious}``; all of the same sites.

    Raises:
        ValueError: no maps, or maps of different sites.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not maps:
        raise ValueError("maps: need at least 1, got 0")
    sites = list(next(iter(maps.values())).values)
    for name, found in maps.items():
        if list(found.values) != sites:
            raise ValueError(f"maps: {name!r} has other sites than the first map")
    figure, axes = _figure("neurons' scores by layer", "layer", "sum of scores")
    width = 0.8 / len(maps)
    places = np.arange(len(sites))
    for index, (name, found) in enumerate(maps.items()):
        for sign, label in ((1, name), (-1, None)):
            sums = [float((sign * vector).clamp_min(0).sum()) * sign for vector in found.values.values()]
            axes.bar(places + (index - (len(maps) - 1) / 2) * width, sums, width, color=f"C{index}", label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(places, [str(place) for place in places])
    axes.legend()
    return figure


def accuracies(rows: Iterable[Row], metric: str = "accuracy") -> Any:
    """Bars of one metric by case and method, with the interval or ± the spread of each.

    Args:
        rows: flat rows ``{"case", "method", "metric", "value", "spread"}``; interval ends as ``{metric}_low`` and
            ``{metric}_high``.

    Raises:
        ValueError: no row has the metric.
        ModuleNotFoundError: matplotlib is not installed.
    """
    found = {(row["case"], row["method"], row["metric"]): row for row in rows}
    own = [(case, method) for case, method, name in found if name == metric]
    if not own:
        raise ValueError(f"metric: no row has {metric!r}")
    cases, methods = (list(dict.fromkeys(pair[i] for pair in own)) for i in range(2))
    unit = found[own[0][0], own[0][1], metric].get("unit")
    figure, axes = _figure(f"{metric} by test set", "", f"{metric}, {unit}" if unit else metric)
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        for place, case in enumerate(cases):
            row = found.get((case, method, metric))
            if row is None:
                continue
            value, spread = float(row["value"]), row.get("spread")
            ends = [found.get((case, method, f"{metric}_{end}")) for end in ("low", "high")]
            error: Any = None if spread is None else float(spread)
            if ends[0] is not None and ends[1] is not None:
                gaps = (value - float(ends[0]["value"]), float(ends[1]["value"]) - value)
                error = np.maximum(gaps, 0)[:, None]
            axes.bar(
                place + (index - (len(methods) - 1) / 2) * width,
                value,
                width,
                yerr=error,
                capsize=2,
                color=f"C{index}",
                label=method if place == 0 else None,
            )
    axes.set_xticks(range(len(cases)), cases)
    axes.legend()
    return figure


def history(records: Sequence[Row], *, step: str | None = None) -> Any:
    """A search over its steps: every number of the records that changes, one line each.

    Args:
        records: one mapping of numbers per step, as edits keep it in ``edit.info["history"]``.
        step: the field that counts the steps; default ``iteration`` or ``step`` where the records have it.

    Raises:
        ValueError: no records, or a field `step` that they lack.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not records:
        raise ValueError("records: need at least 1, got 0")
    if step is None:
        step = next((name for name in ("iteration", "step") if name in records[0]), None)
    elif step not in records[0]:
        raise ValueError(f"step: records have no {step!r}, their fields are {sorted(records[0])}")
    figure, axes = _figure("search", step or "record", "value")
    places = [float(record[step]) for record in records] if step else list(range(len(records)))
    for name, first in records[0].items():
        if name == step or isinstance(first, bool) or not isinstance(first, (int, float)):
            continue
        values = [float(record.get(name, float("nan"))) for record in records]
        axes.plot(places, values, label=name)
    axes.legend()
    return figure


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    try:
        module = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'spurge[plots]'", name="matplotlib") from error
    figure = module.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes
