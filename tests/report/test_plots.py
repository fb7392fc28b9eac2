"""Figures hold what they were given; without matplotlib the error says what to install."""

from __future__ import annotations

import importlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spurge.demo.oracle import oracle
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.last_layer.rate_sweep import Sweep, sweep
from spurge.methods.mediation.mediation import Mediation
from spurge.methods.mediation.mediators import Mediators
from spurge.report import plots

matplotlib = pytest.importorskip("matplotlib")

MAPS = {
    "causal": NeuronScores({"a.0": torch.tensor([1.0, -2.0]), "a.1": torch.tensor([0.5])}),
    "spurious": NeuronScores({"a.0": torch.tensor([0.0, 1.0]), "a.1": torch.tensor([-1.0])}),
}
ROWS = [
    {"case": "broken", "method": "none", "metric": "accuracy", "value": 60.0, "spread": None, "unit": "percent"},
    {"case": "broken", "method": "none", "metric": "accuracy_low", "value": 55.0, "unit": "percent"},
    {"case": "broken", "method": "none", "metric": "accuracy_high", "value": 65.0, "unit": "percent"},
    {"case": "kept", "method": "random", "metric": "accuracy", "value": 99.0, "spread": 0.5, "unit": "percent"},
]


def heights(figure: Any) -> list[float]:
    return [float(bar.get_height()) for bar in figure.axes[0].patches]


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    plots.save(plots.scores(MAPS), path)
    old = path.read_bytes()
    assert old.startswith(b"\x89PNG")
    figure = plots.scores(MAPS)
    figure.savefig = lambda stream, **_: stream.write(b"half") / 0
    with pytest.raises(ZeroDivisionError):
        plots.save(figure, path)
    assert path.read_bytes() == old
    for name in ("a.xyz", "a"):
        with pytest.raises(
            ValueError, match=f"plot: expected a file that ends in one of .*png.*, got '{tmp_path / name}'"
        ):
            plots.save(figure, tmp_path / name)
    assert list(tmp_path.iterdir()) == [path]


def test_scores_by_site() -> None:
    figure = plots.scores(MAPS)
    assert heights(figure) == [1.0, 0.5, -2.0, 0.0, 1.0, 0.0, 0.0, -1.0]
    figure.savefig(io.BytesIO(), format="png")


def test_accuracies_with_intervals() -> None:
    figure = plots.accuracies(ROWS)
    assert heights(figure) == [60.0, 99.0]
    figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("name", ["iteration", "step", "other"])
def test_history(name: str) -> None:
    records = [{name: 0, "best": 1.0, "note": "x"}, {name: 5, "best": 2.0, "note": "y"}]
    figure = plots.history(records, step=name)
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [0.0, 5.0]
    assert list(line.get_ydata()) == [1.0, 2.0]
    assert len(plots.history(records).axes[0].lines) == (2 if name == "other" else 1)


def sweep_of() -> Sweep:
    """Two samples of class 0 and one of class 1, which the shift of logit 0 turns over at 0.25, 0.5 and 0.75."""
    logits = torch.tensor([[0.25, 0.0], [0.5, 0.0], [0.75, 0.0]])
    return sweep(logits, -torch.ones(3, 1), torch.tensor([0]), torch.tensor([0, 0, 1]))


def test_rates_of_a_sweep_are_its_steps() -> None:
    found = sweep_of()
    figure = plots.rates({"FCR": found}, chosen=0.8)
    worst, average, mark = figure.axes[0].lines
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "FCR, worst",
        "FCR, average",
        "r = 0.8",
    ]
    assert list(mark.get_xdata()) == [0.8, 0.8]
    places, values = np.array(average.get_xdata()), np.array(average.get_ydata())
    assert (places[0], places[-1]) == (0, 1)
    assert list(places[1:-1:2]) == list(places[2::2]) == found.rates[1:].tolist()
    assert list(values[::2]) == list(values[1::2]) == found.average.tolist()
    assert list(np.array(worst.get_ydata())[::2]) == found.worst.tolist()
    for at in (0.1, 0.3, 0.6, 0.9):
        plateau = np.searchsorted(places[::2], at, side="right") - 1
        assert values[::2][plateau] == pytest.approx(found.at([at])[0].item())
    figure.savefig(io.BytesIO(), format="png")


def test_rates_of_repeats() -> None:
    pairs = {"removed": ([0, 0.01, 0.1], [[90, 50, 0], [94, 60, 2.0]]), "retained": (np.arange(3), torch.ones(3))}
    figure = plots.rates(pairs, log=True)
    removed, retained = figure.axes[0].lines
    assert list(removed.get_ydata()) == [92, 55, 1]
    assert list(retained.get_ydata()) == [1, 1, 1]
    assert len(figure.axes[0].collections) == 1
    assert figure.axes[0].get_xscale() == "log"
    figure.savefig(io.BytesIO(), format="png")


def test_classes_before_and_after() -> None:
    figure = plots.classes([90.0, float("nan")], torch.tensor([0.0, 91.0]), ["cat", "dog"])
    assert heights(figure)[0] == 90
    assert heights(figure)[2:] == [0, 91]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["cat", "dog"]
    figure.savefig(io.BytesIO(), format="png")
    repeats = plots.classes([[90, 80], [92, 80]], [[1, 80], [3, 84]])
    assert heights(repeats) == [91, 80, 2, 82]
    assert len(repeats.axes[0].containers) == 4  # bars and their errors
    repeats.savefig(io.BytesIO(), format="png")
    plots.classes(torch.rand(100), torch.rand(100)).savefig(io.BytesIO(), format="png")


def test_distribution_of_scores() -> None:
    scores = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [float("nan")] * 4])
    figure = plots.distribution(scores, names=["cat", "dog"], bins=4)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["cat: 2 of 4 above", "threshold 0"]
    figure.savefig(io.BytesIO(), format="png")
    named = plots.distribution({"a": [1.0, 1.0], "b": np.zeros(3)}, 0.5)
    texts = [text.get_text() for text in named.legends[0].get_texts()]
    assert texts == ["a: 2 of 2 above", "b: 0 of 3 above", "threshold 0.5"]


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plots.rates({}), ValueError, "curves: need at least 1, got 0"),
        (lambda: plots.rates({"a": 1.0}), TypeError, "curves: 'a' needs a sweep, or rates and accuracies, got float"),
        (lambda: plots.rates({"a": ([], [])}), ValueError, "an accuracy for each of 0 rates"),
        (lambda: plots.rates({"a": ([0, 1], [1])}), ValueError, "an accuracy for each of 2 rates, got 1"),
        (lambda: plots.rates({"a": ([0, 1], torch.ones(1, 1, 2))}), ValueError, "a: expected one or two dimensions"),
        (lambda: plots.classes([], []), ValueError, "the same 0 classes"),
        (lambda: plots.classes([1, 2], [1]), ValueError, "after: expected accuracies of the same 2 classes, got 1"),
        (lambda: plots.classes([1, 2], [1, 2], ["a"]), ValueError, "names: expected 2, got 1"),
        (lambda: plots.distribution({}), ValueError, "values: need at least 1 finite score"),
        (lambda: plots.distribution([float("nan")]), ValueError, "values: need at least 1 finite score"),
        (lambda: plots.distribution([[1.0], [2.0]], names="a"), ValueError, "names: expected 2, got 1"),
        (lambda: plots.distribution([1.0], bins=0), ValueError, "bins: need at least 1, got 0"),
    ],
)
def test_bad_curves(draw: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="maps: need at least 1"):
        plots.scores({})
    with pytest.raises(ValueError, match="maps: 'other' has other sites"):
        plots.scores({**MAPS, "other": NeuronScores({"b": torch.zeros(1)})})
    with pytest.raises(ValueError, match="metric: no row has 'eta'"):
        plots.accuracies(ROWS, "eta")
    with pytest.raises(ValueError, match="records: need at least 1"):
        plots.history([])
    with pytest.raises(ValueError, match="a search that had nothing to move has no history"):
        plots.history({})
    with pytest.raises(ValueError, match="records: columns must have the same length"):
        plots.history({"step": [0, 1], "value": [0.5]})
    with pytest.raises(ValueError, match="step: records have no 'epoch'"):
        plots.history([{"step": 1}], step="epoch")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *rest: object) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'spurge\[plots\]'"):
        plots.accuracies(ROWS)


def mediated(level="mlp", widths=None):
    """Effects of two MLPs, or of the neurons of two sites."""
    made = oracle(0, rows=400)
    widths = widths or {"layer.0": 1, "layer.1": 1}
    rows = torch.cat([made.units, made.units])[: sum(widths.values())]
    edges = dict(zip(widths, [0, *torch.tensor(list(widths.values())).cumsum(0).tolist()], strict=False))

    def read(site, part):
        return rows[edges[site] : edges[site] + widths[site]][part]

    units = Mediators(level, widths, 400, 1, {}, read)
    return Mediation(resamples=5, progress=False).effects(units, made.treatment, made.outcome, made.topics)


def test_effects_of_both_sides_with_intervals():
    found = mediated()
    (axes,) = plots.effects(found).axes
    bars = axes.containers
    assert [bar.get_label() for bar in bars] == ["unadjusted", "adjusted"]
    points = bars[1].lines[0].get_ydata()
    assert points.tolist() == pytest.approx(found.adjusted.aie.tolist())
    assert axes.get_ylabel() == "AIE"


def test_flagged_units_are_crossed():
    found = mediated()
    for least_ess in (0.0, 2.0):  # none is too small, or all are
        found.info["settings"]["least_ess"] = least_ess
        flagged = [unit for unit, flags in enumerate(found.adjusted.flags(least_ess)) if flags]
        crosses = [line for line in plots.effects(found).axes[0].lines if line.get_label() == "flagged"]
        assert [list(line.get_ydata()) for line in crosses] == ([list(found.adjusted.aie[flagged])] if flagged else [])
    assert flagged == [0, 1]


def test_effects_of_neurons_are_summed_by_layer():
    found = mediated("neuron", {"layer.0": 3, "layer.1": 1})
    (axes,) = plots.effects(found).axes
    totals = axes.containers[1].lines[0].get_ydata()
    want = [float(part.abs().nansum()) for part in found.adjusted.aie.split([3, 1])]
    assert totals.tolist() == pytest.approx(want)


def test_effects_need_an_estimate():
    found = mediated()
    side = replace(found.adjusted, aie=torch.full((2,), torch.nan).double())
    with pytest.raises(ValueError, match="found: no unit has an estimate"):
        plots.effects(replace(found, adjusted=side))


def test_legends_stand_beside_the_axes() -> None:
    for figure in (plots.accuracies(ROWS), plots.scores(MAPS), plots.classes([50.0, 60.0], [70.0, 40.0])):
        figure.savefig(io.BytesIO(), format="png")  # lays it out
        legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
        assert legend.x0 >= axes.x1
        assert legend.x1 <= figure.bbox.x1
        assert tuple(figure.get_size_inches()) == (10.0, 5.6)


def test_controls_are_grey_and_the_baseline_is_marked() -> None:
    rows = [
        {"case": case, "method": method, "metric": "accuracy", "value": value, "spread": None, "unit": "percent"}
        for case, shift in (("a", 0), ("b", 10))
        for method, value in (("none", 60 + shift), ("edit", 80), ("random", 61), ("edit: threshold", 70))
    ]
    figure = plots.accuracies(rows)
    colours = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches]
    assert colours[::2] == ["#1a1a1a", "#0072b2", "#707070", "#9a9a9a"]
    assert [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"] == [60, 70]
    assert {"60.0", "80.0"} <= {text.get_text() for text in figure.axes[0].texts}


def test_an_axis_is_logarithmic_where_a_spike_hides_the_rest() -> None:
    spike = {"causal": NeuronScores({f"a.{i}": torch.tensor([500.0 if i == 2 else 1.0]) for i in range(5)})}
    axes = plots.scores(spike).axes[0]
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylabel().endswith("(logarithmic)")
    assert plots.scores(MAPS).axes[0].get_yscale() == "linear"
