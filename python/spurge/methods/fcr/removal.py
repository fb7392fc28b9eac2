"""What a removal by single weights did: the edges, the edited head, and how the rate was chosen."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spurge.engine.base.checks import choice, integer, number, shaped
from spurge.engine.base.files import canonical_json
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.tables import Table, folded, page, wrapped
from spurge.engine.base.tensor_files import Contents
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.features.features import Features
from spurge.engine.last_layer.rate_sweep import Sweep, sweep
from spurge.engine.models.heads import Head
from spurge.methods.fcr.edges import Edge, rounds, shifts
from spurge.methods.fcr.rates import Dependence

_STEPS = ("rates", "average", "worst", "worst_group", "sizes", "groups", "intervals")
_TERMS = ("rates", "gaps", "drifts")


@dataclass(frozen=True, eq=False, repr=False)
class Removal(Saved, kind="removal", what="a removal"):
    """Made by :class:`spurge.FCR`.

    Attributes:
        edges: the edited weights, in the order of the edits.
        original, head: the classifier's head before and after.
        labels: which labels of classes or groups were used, beside those of the feature: none, class or group.
        fictitious: the head for the feature, or None.
        curve: the criterion on the selection data for every rate shared by the edges (the first of each row), or None
            where the tilt was given.
        info: settings, fingerprint of the data, and in ``says`` what was labelled; JSON-able.
    """

    edges: tuple[Edge, ...]
    original: Head
    head: Head
    labels: str
    fictitious: Head | None = None
    curve: Sweep | Dependence | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", json.loads(canonical_json(self.info)))

    def edit(self) -> WeightEdit:
        """The new weights as an edit of the model that the head comes from.

        Raises:
            ValueError: the head belongs to no model (it was not made by ``Head.of``).
        """
        info = {**self.info, "labels": self.labels, "edges": [edge.to_dict() for edge in self.edges]}
        return WeightEdit.for_head(self.original, weight=self.head.weight, info=info)

    def sweep(self, features: Features, *, high: float = 1.0) -> Sweep:
        """Accuracies on labelled features for every rate from 0 to ``high`` that all edges share.

        Raises:
            ValueError: two of the edges are in one row, where logits do not follow the rate along lines.
        """
        if len(rounds(self.edges)) > 1:
            raise ValueError("sweep: two edges of one row do not move logits along lines; measure each rate by itself")
        rows = torch.tensor([edge.row for edge in self.edges], device=features.values.device)
        moves = shifts(self.original, self.edges, features.values)
        logits = self.original.logits(features.values)
        return sweep(logits, moves, rows, features.labels, features.groups, low=0.0, high=high)

    def rows(self) -> list[dict[str, Any]]:
        """Flat result rows ``{"case", "method", "metric", "value", "n", "unit", "labels"}``, as reports write them."""
        out = []
        for edge in self.edges:
            case = f"row {edge.row}, unit {edge.column}"
            numbers = (("weight", edge.weight, ""), ("new weight", edge.new, ""), ("score", edge.score, ""))
            for metric, value, unit in (*numbers, ("rate", edge.rate, ""), ("angle", edge.angle, "degrees")):
                row = {"case": case, "method": "FCR", "metric": metric, "value": value, "spread": None, "n": 1}
                out.append({**row, "unit": unit, "labels": self.labels})
        return out

    def _to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        places = {}
        for name, head in (("original", self.original), ("head", self.head), ("fictitious", self.fictitious)):
            if head is not None:
                own, places[name] = head.to_parts(f"{name}.")
                tensors |= own
        texts: dict[str, Any] = {
            "heads": places,
            "edges": [edge.to_dict() for edge in self.edges],
            "labels": self.labels,
            "info": self.info,
        }
        if isinstance(self.curve, Sweep):
            texts["range"] = [self.curve.low, self.curve.high]
            tensors |= {f"curve.{name}": getattr(self.curve, name) for name in _STEPS}
        elif self.curve is not None:
            texts["range"] = [self.curve.high]
            tensors |= {f"curve.{name}": getattr(self.curve, name) for name in _TERMS}
        return tensors, texts

    @classmethod
    def _of_parts(cls, file: Contents) -> Removal:
        places = file.value("heads", dict)
        heads = {name: Head.of_parts(file.tensors, place, f"{name}.") for name, place in places.items()}
        original, head = heads["original"], heads["head"]
        if head.weight.shape != original.weight.shape:
            raise ValueError(f"head: expected shape {tuple(original.weight.shape)}, got {tuple(head.weight.shape)}")
        edges = tuple(_checked_edge(edge, original) for edge in file.value("edges", list))
        labels = choice("labels", file.value("labels", str), ("none", "class", "group"))
        return cls(edges, original, head, labels, heads.get("fictitious"), _curve_of(file), file.value("info", dict))

    def __repr__(self) -> str:
        edges = ", ".join(f"[{edge.row}, {edge.column}] at rate {edge.rate:.4g}" for edge in self.edges)
        return f"Removal({edges}; labels: {self.labels})"

    def __str__(self) -> str:
        """A table with one line per edge, and what was labelled."""
        return wrapped("\n".join([*folded(self._table(), left=0, gap=1), *self._notes()]))

    def _repr_html_(self) -> str:
        return page([Table("edited weights", self._table(), left=0)], self._notes())

    def _table(self) -> list[list[str]]:
        table = [["row", "unit", "for", "score", "weight", "new", "rate", "angle", ""]]
        for edge in self.edges:
            numbers = (f"{edge.weight:.4g}", f"{edge.new:.4g}", f"{edge.rate:.4g}", f"{edge.angle:.1f}°")
            places = map(str, (edge.row, edge.column, edge.target))
            table.append([*places, f"{edge.score:.3g}", *numbers, "raises its class" if edge.raises else ""])
        return table

    def _notes(self) -> list[str]:
        return [f"labels used: {self.info.get('says', self.labels)}"]


def _checked_edge(fields: dict[str, Any], head: Head) -> Edge:
    """An edge of a file, once it lies in the head and its numbers are some."""
    edge = Edge(**fields)
    for name, below in (("row", head.outputs), ("column", head.width), ("target", None)):
        place = integer(name, getattr(edge, name), 0)
        if below is not None and place >= below:
            raise ValueError(f"{name}: must lie below {below}, got {place}")
    for name in ("weight", "score", "new", "rate", "angle"):
        number(name, getattr(edge, name))
    return edge


def _curve_of(file: Contents) -> Sweep | Dependence | None:
    """The curve in a file of a removal, if it has one."""
    if "range" not in file.texts:
        return None
    reach = [number("range", end) for end in file.value("range", list)]
    tensors = {name: file.tensors.get(f"curve.{name}") for name in (*_STEPS, *_TERMS)}
    count = len(shaped("rates", tensors["rates"], torch.float64, None))
    if len(reach) == 2:
        for name in ("average", "worst"):
            shaped(name, tensors[name], torch.float64, count)
        rows = len(shaped("groups", tensors["groups"], torch.int64, None))
        shaped("worst_group", tensors["worst_group"], torch.int64, count)
        shaped("sizes", tensors["sizes"], torch.int64, None)
        shaped("intervals", tensors["intervals"], torch.float64, rows, 2)
        return Sweep(*reach, *(tensors[name] for name in _STEPS))  # type: ignore[arg-type]
    (high,) = reach
    rates, gaps, drifts = (shaped(name, tensors[name], torch.float64, count) for name in _TERMS)
    return Dependence(rates, gaps, drifts, high)
