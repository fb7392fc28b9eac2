"""Figures of scores, accuracies, rates and searches; needs matplotlib (``pip install 'spurge[plots]'``).

Each function returns a ``matplotlib.figure.Figure`` that belongs to no window and no global state: show it in a
notebook, or write it with :func:`save`. Figures have the size of a slide, their legend beside them, and colours that
survive colour blindness (Okabe and Ito, 2008); controls are grey, and an axis is logarithmic where one value would hide
the rest, which its label then says.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spurge.engine.base.files import PathLike, write_bytes
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.evaluation.report import NONE
from spurge.report.marks import SPIKE, is_control

Row = Mapping[str, Any]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
_GREYS = ("#707070", "#9a9a9a", "#bdbdbd", "#d9d9d9")  # of controls
_SIZE, _FONT = (10.0, 5.6), 13.0  # inches, points: a slide
_MOST_VALUES = 12  # bars that have their value beside them


def save(figure: Any, path: PathLike, **options: Any) -> None:
    """Writes a figure, all or nothing.

    Args:
        figure: of matplotlib.
        path: the file; its ending says the format.
        options: of ``figure.savefig``.

    Raises:
        ValueError: an ending that is no format of figures.
        OSError: the file cannot be written.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format=check_format(path), **options)
    write_bytes(path, stream.getvalue())


def check_format(path: PathLike) -> str:
    """The format that the ending of a figure's file names; raises as :func:`save`, without a figure."""
    ending, figure = Path(path).suffix.removeprefix(".").lower(), _figure("", "", "")[0]
    known = figure.canvas.get_supported_filetypes()
    if ending not in known:
        raise ValueError(f"plot: expected a file that ends in one of {', '.join(sorted(known))}, got {str(path)!r}")
    return ending


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
    positions = np.arange(len(sites))
    for index, (name, found) in enumerate(maps.items()):
        for sign, label in ((1, name), (-1, None)):
            sums = [float((sign * vector).clamp_min(0).sum()) * sign for vector in found.values.values()]
            axes.bar(positions + (index - (len(maps) - 1) / 2) * width, sums, width, color=_colour(index), label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(positions, [str(position) for position in positions])
    _spread_out(axes, [bar.get_height() for bar in axes.patches])
    _legend(figure)
    return figure


def accuracies(rows: Iterable[Row], metric: str = "accuracy") -> Any:
    """Bars of one metric by case and method, with the interval or ± the spread of each.

    Controls are grey, and a dashed line marks what ``none``, the method that is no edit, has in each case.

    Args:
        rows: flat rows ``{"case", "method", "metric", "value", "spread"}``; interval ends as ``{metric}_low`` and
            ``{metric}_high``.

    Raises:
        ValueError: no row has the metric.
        ModuleNotFoundError: matplotlib is not installed.
    """
    by_key = {(row["case"], row["method"], row["metric"]): row for row in rows}
    bars = [(case, method) for case, method, name in by_key if name == metric]
    if not bars:
        raise ValueError(f"metric: no row has {metric!r}")
    cases, methods = (list(dict.fromkeys(pair[i] for pair in bars)) for i in range(2))
    unit = by_key[bars[0][0], bars[0][1], metric].get("unit")
    figure, axes = _figure(f"{metric} by test set", "", f"{metric}, {unit}" if unit else metric)
    width, colours = 0.8 / len(methods), _colours_of(methods)
    for position, case in enumerate(cases):
        base = by_key.get((case, NONE, metric))
        if base is not None:
            across = position - 0.4, position + 0.4
            axes.plot(across, [float(base["value"])] * 2, color="black", linestyle="--", linewidth=1, zorder=3)
    labelled: set[str] = set()
    for index, method in enumerate(methods):
        for position, case in enumerate(cases):
            row = by_key.get((case, method, metric))
            if row is None:
                continue
            value, spread = float(row["value"]), row.get("spread")
            ends = [by_key.get((case, method, f"{metric}_{end}")) for end in ("low", "high")]
            error: Any = None if spread is None else float(spread)
            if ends[0] is not None and ends[1] is not None:
                distances = (value - float(ends[0]["value"]), float(ends[1]["value"]) - value)
                error = np.maximum(distances, 0)[:, None]
            drawn = axes.bar(
                position + (index - (len(methods) - 1) / 2) * width,
                value,
                width,
                yerr=error,
                capsize=2,
                color=colours[method],
                label=None if method in labelled else method,
            )
            labelled.add(method)
            if len(bars) <= _MOST_VALUES:
                axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=_FONT - 4)
    axes.set_xticks(range(len(cases)), cases, rotation=30 if len(" ".join(cases)) > 60 else 0)
    _legend(figure)
    return figure


def history(records: Sequence[Row] | Mapping[str, Sequence[float | None]], *, step: str | None = None) -> Any:
    """A search over its steps: every number of the records that changes, one line each.

    Args:
        records: columns of numbers, one of each per step, as edits keep them in ``edit.info["history"]``; or one
            mapping of numbers per step.
        step: the field that counts the steps; default ``iteration`` or ``step`` where the records have it.

    Raises:
        ValueError: no records, or a field `step` that they lack.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if isinstance(records, Mapping):
        lengths = {name: len(column) for name, column in records.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"records: columns must have the same length, got {lengths}")
        records = [dict(zip(records, row, strict=True)) for row in zip(*records.values(), strict=True)]
    if not records:
        raise ValueError("records: need at least 1, got 0 (a search that had nothing to move has no history)")
    if step is None:
        step = next((name for name in ("iteration", "step") if name in records[0]), None)
    elif step not in records[0]:
        raise ValueError(f"step: records have no {step!r}, their fields are {sorted(records[0])}")
    figure, axes = _figure("search", step or "record", "value")
    positions = [float(record[step]) for record in records] if step else list(range(len(records)))
    for name, first in records[0].items():
        if name == step or isinstance(first, bool) or not isinstance(first, (int, float)):
            continue
        values = [float("nan") if record.get(name) is None else float(record[name]) for record in records]
        axes.plot(positions, values, label=name, color=_colour(len(axes.lines)))
    _spread_out(axes, np.concatenate([line.get_ydata() for line in axes.lines]) if axes.lines else [])
    _legend(figure)
    return figure


def rates(curves: Mapping[str, Any], *, log: bool = False, chosen: float | None = None) -> Any:
    """Accuracy against the rate r of an edit (FCR Figs. 8 and 9).

    Args:
        curves: name to a sweep, drawn as the steps it has: worst group solid, average dashed; or name to a pair of
            rates ``[B]`` and accuracies in percent, ``[B]`` or ``[R, B]`` of R repeats: their mean, ± their standard
            deviation.
        log: logarithmic rates; 0 lies beyond the left end.
        chosen: a rate to mark.

    Raises:
        ValueError: no curves, one without points, or rates and accuracies that do not fit together.
        TypeError: a curve that is neither.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not curves:
        raise ValueError("curves: need at least 1, got 0")
    curve_lines = {name: _curve_lines(name, curve) for name, curve in curves.items()}
    figure, axes = _figure("accuracy by rate", "rate r", "accuracy, percent")
    for index, lines in enumerate(curve_lines.values()):
        for label, style, positions, values, spread in lines:
            axes.plot(positions, values, style, color=_colour(index), label=label)
            if spread is not None:
                axes.fill_between(
                    positions, values - spread, values + spread, color=_colour(index), alpha=0.2, linewidth=0
                )
    if chosen is not None:
        axes.axvline(chosen, color="black", linewidth=0.8, linestyle=":", label=f"r = {chosen:.4g}")
    if log:
        axes.set_xscale("log")
    _legend(figure)
    return figure


def classes(before: Any, after: Any, names: Sequence[str] | None = None) -> Any:
    """Bars of each class's accuracy before and after an edit (FCR Fig. 6).

    Args:
        before, after: accuracies in percent, ``[C]``, or ``[R, C]`` of R repeats: their mean, ± their standard
            deviation. A class without samples may be NaN.
        names: of the classes.

    Raises:
        ValueError: no classes, or numbers or names of other classes.
        ModuleNotFoundError: matplotlib is not installed.
    """
    accuracy = {name: _as_repeats(name, values) for name, values in (("before", before), ("after", after))}
    count = accuracy["before"].shape[1]
    if not count or accuracy["after"].shape[1] != count:
        raise ValueError(f"after: expected accuracies of the same {count} classes, got {accuracy['after'].shape[1]}")
    labels = [str(number) for number in range(count)] if names is None else list(names)
    if len(labels) != count:
        raise ValueError(f"names: expected {count}, got {len(labels)}")
    figure, axes = _figure("accuracy by class", "class", "accuracy, percent")
    for index, (name, values) in enumerate(accuracy.items()):
        error = values.std(0, ddof=1) if len(values) > 1 else None
        how = {"yerr": error, "capsize": 2, "label": name, "color": ("#9a9a9a", COLOURS[0])[index]}
        axes.bar(np.arange(count) + 0.4 * index - 0.2, values.mean(0), 0.4, **how)
    axes.set_xticks(range(count), labels, rotation=90 if len("  ".join(labels)) > 60 else 0)
    _legend(figure)
    return figure


def distribution(
    values: Mapping[str, Any] | Any, threshold: float = 0.0, *, names: Sequence[str] | None = None, bins: int = 60
) -> Any:
    """Histogram of the scores of each class, with the threshold above which they count (NeuronTune).

    Args:
        values: scores ``[C, M]``, or name to scores ``[M]``. Classes that have none, NaN, are left out.
        threshold: the legend counts the scores above it.
        names: of the classes, for ``[C, M]``.
        bins: of the histogram, the same for all classes.

    Raises:
        ValueError: no finite score, other than one name per class, or no bins.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not isinstance(values, Mapping):
        rows = _as_repeats("values", values)
        labels = [str(number) for number in range(len(rows))] if names is None else list(names)
        if len(labels) != len(rows):
            raise ValueError(f"names: expected {len(rows)}, got {len(labels)}")
        values = dict(zip(labels, rows, strict=True))
    if bins < 1:
        raise ValueError(f"bins: need at least 1, got {bins}")
    scores_of = {name: _as_repeats(name, scores).ravel() for name, scores in values.items()}
    finite = {name: scores[np.isfinite(scores)] for name, scores in scores_of.items()}
    if not any(len(scores) for scores in finite.values()):
        raise ValueError("values: need at least 1 finite score, got none")
    figure, axes = _figure("scores by class", "score", "neurons")
    counts: list[np.ndarray] = []
    edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), bins)
    for name, scores in finite.items():
        if len(scores):
            label = f"{name}: {int((scores > threshold).sum())} of {len(scores)} above"
            drawn = axes.hist(scores, edges, histtype="step", linewidth=2, color=_colour(len(counts)), label=label)
            counts.append(drawn[0])
    axes.axvline(threshold, color="black", linewidth=0.8, linestyle=":", label=f"threshold {threshold:g}")
    _spread_out(axes, np.concatenate(counts))
    _legend(figure)
    return figure


def effects(found: Any, *, most: int = 200) -> Any:
    """Average indirect effect of each unit, adjusted and unadjusted, with the intervals of both; flagged ones crossed.

    Neurons are summed up: the total of ``|AIE|`` of each site, whose intervals are those of the resamples.

    Args:
        found: what `spurge.Mediation` returns.
        most: units that are drawn; of more, those of largest adjusted effect, in their order.

    Raises:
        ValueError: no unit has an estimate.
        ModuleNotFoundError: matplotlib is not installed.
    """
    neurons = found.level == "neuron"
    names = list(found.widths)
    units = list(range(len(names))) if neurons else sorted(found.ranking()[:most])
    if not units or not found.ranking():
        raise ValueError("found: no unit has an estimate")
    figure, axes = _figure(
        "average indirect effects" + (" by layer, neurons summed" if neurons else ""),
        "layer" if found.level != "unit" else "unit",
        "sum of |AIE|" if neurons else "AIE",
    )
    places = np.arange(len(units))
    drawn: list[np.ndarray] = []
    for shift, side in ((-0.15, "unadjusted"), (0.15, "adjusted")):
        values, low, high = _by_site(found, side) if neurons else _by_unit(getattr(found, side), units)
        error = np.maximum(np.stack([values - low, high - values]), 0)
        colour = COLOURS[0] if side == "adjusted" else _GREYS[1]
        how = {"fmt": "o", "markersize": 4, "capsize": 2, "label": side, "color": colour}
        axes.errorbar(places + shift, values, np.nan_to_num(error), **how)
        drawn.append(values)
    flags = [] if neurons else found.adjusted.flags(found.least_ess)
    flagged = [place for place, unit in enumerate(units) if flags and flags[unit]]
    if flagged:
        axes.plot(np.array(flagged) + 0.15, drawn[-1][flagged], "x", color=COLOURS[1], markersize=10, label="flagged")
    axes.axhline(0, color="black", linewidth=0.8)
    step = max(1, len(units) // 30)
    texts = [names[unit] for unit in units] if found.level == "unit" else [str(unit) for unit in units]
    axes.set_xticks(places[::step], texts[::step], rotation=90 if found.level == "unit" else 0)
    _spread_out(axes, np.concatenate(drawn))
    _legend(figure)
    return figure


def _by_unit(effects: Any, units: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = effects.interval
    return effects.aie[units].numpy(), low[units].numpy(), high[units].numpy()


def _by_site(found: Any, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    effects, sizes = getattr(found, side), list(found.widths.values())
    values = np.array([float(part.abs().nansum()) for part in effects.aie.split(sizes)])
    draws = np.stack([part.abs().nansum(1).numpy() for part in effects.draws.double().split(sizes, 1)])
    if not draws.shape[1]:
        return values, values, values
    share = 100 * (1 - effects.confidence) / 2
    low, high = np.percentile(draws, [share, 100 - share], axis=1)
    return values, low, high


def _curve_lines(name: str, curve: Any) -> list[tuple[str, str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Label, style, rates, accuracies and their spread of each line of a curve."""
    if hasattr(curve, "average") and hasattr(curve, "worst"):
        starts = _as_repeats(name, curve.rates).ravel()
        corners = np.append(np.repeat(starts, 2)[1:], curve.high)  # both ends of each plateau
        pairs = ((f"{name}, worst", "-", curve.worst), (f"{name}, average", "--", curve.average))
        return [(label, style, corners, np.repeat(_as_repeats(name, y).ravel(), 2), None) for label, style, y in pairs]
    if not isinstance(curve, Sequence) or len(curve) != 2:
        raise TypeError(f"curves: {name!r} needs a sweep, or rates and accuracies, got {type(curve).__name__}")
    positions, values = _as_repeats(name, curve[0]).ravel(), _as_repeats(name, curve[1])
    if not len(positions) or values.shape[1] != len(positions):
        raise ValueError(
            f"curves: {name!r} needs an accuracy for each of {len(positions)} rates, got {values.shape[1]}"
        )
    return [(name, "-", positions, values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None)]


def _as_repeats(name: str, values: Any) -> np.ndarray:
    """Numbers ``[R, C]`` of ``[C]`` or ``[R, C]``, from a tensor on any device, an array or a list."""
    repeats = np.atleast_2d(np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, np.float64))
    if repeats.ndim != 2:
        raise ValueError(f"{name}: expected one or two dimensions, got {repeats.ndim}")
    return repeats


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    try:
        module = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'spurge[plots]'", name="matplotlib") from error
    figure = module.Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=_FONT + 2)
    axes.set_xlabel(x, fontsize=_FONT)
    axes.set_ylabel(y, fontsize=_FONT)
    axes.tick_params(labelsize=_FONT - 2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _colours_of(methods: Sequence[str]) -> dict[str, str]:
    """Black for the model without an edit, greys for controls, and the colours for the others."""
    found: dict[str, str] = {}
    controls = [name for name in methods if is_control(name)]
    found |= {name: _GREYS[index % len(_GREYS)] for index, name in enumerate(controls)}
    others = [name for name in methods if name not in found and name != NONE]
    return found | {NONE: "#1a1a1a"} | {name: _colour(index) for index, name in enumerate(others)}


def _spread_out(axes: Any, values: Any) -> None:
    """A logarithmic axis, linear around 0, where one value would hide the rest."""
    sizes = np.abs(np.asarray(values, np.float64))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    middle = float(np.median(sizes)) if len(sizes) > 2 else 0.0
    if middle and sizes.max() > SPIKE * middle:
        axes.set_yscale("symlog", linthresh=middle)
        axes.set_ylabel(f"{axes.get_ylabel()} (logarithmic)", fontsize=_FONT)


def _legend(figure: Any) -> None:
    """Beside the axes, where it hides nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=_FONT - 2)
