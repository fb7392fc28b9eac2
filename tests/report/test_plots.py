"""Figures hold what they were given; without matplotlib the error says what to install."""

from __future__ import annotations

import importlib
import io
from typing import Any

import pytest
import torch

from spurge.engine.scores import NeuronScores
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


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="maps: need at least 1"):
        plots.scores({})
    with pytest.raises(ValueError, match="maps: 'other' has other sites"):
        plots.scores({**MAPS, "other": NeuronScores({"b": torch.zeros(1)})})
    with pytest.raises(ValueError, match="metric: no row has 'eta'"):
        plots.accuracies(ROWS, "eta")
    with pytest.raises(ValueError, match="records: need at least 1"):
        plots.history([])
    with pytest.raises(ValueError, match="step: records have no 'epoch'"):
        plots.history([{"step": 1}], step="epoch")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *rest: object) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'spurge\[plots\]'"):
        plots.accuracies(ROWS)
