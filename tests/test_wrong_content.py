"""Files whose SHA-256 fits, and whose content does not, are refused by the field that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spurge
from helpers.earlier import V1
from spurge.engine.base.files import FileError
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.tensor_files import read_tensors, write_tensors
from spurge.engine.edits.weight_deltas import WeightDeltas

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def put(name: str, tensor: Tensor) -> Change:
    return lambda tensors, values: tensors.update({name: tensor})


def say(*path: Any, value: Any) -> Change:
    """Another value at a place in the JSON texts."""

    def change(_: dict[str, Tensor], values: dict[str, Any]) -> None:
        for step in path[:-1]:
            values = values[step]
        values[path[-1]] = value

    return change


CASES: list[tuple[str, type[Saved], Change, str]] = [
    ("neuron-edit", spurge.NeuronEdit, say("info", value=[1]), "info: expected dict, got list"),
    ("neuron-edit", spurge.NeuronEdit, say("model", value=["a"]), "model: expected dict, got list"),
    ("weight-edit", spurge.WeightEdit, say("model", "classifier.bias", "shape", value=[2**70]), "model: expected"),
    ("weight-deltas", WeightDeltas, say("forms", "classifier.weight", value="Sparse"), "forms: 'classifier.weight' is"),
    ("weight-deltas", WeightDeltas, put("classifier.weight:values", torch.zeros(2, 31)), "deltas: 'classifier.weight'"),
    ("located", spurge.Located, say("info", "settings", value=3), "info: settings: expected dict, got int"),
    ("located", spurge.Located, say("certificate", "agreement", value=["x"]), "'list' object has no attribute"),
    ("features", spurge.Features, say("names", "names", value="ab"), "names: expected list, got str"),
    ("features", spurge.Features, say("head", "prints", value={"a": 1}), "prints: 'a': expected dict, got int"),
    ("removal-gap", spurge.Removal, say("edges", 0, "row", value=7), "row: must lie below 2, got 7"),
    ("removal-gap", spurge.Removal, say("edges", 0, "weight", value=None), "weight: expected a number"),
    ("removal-gap", spurge.Removal, say("labels", value="all"), "labels: expected one of none, class, group"),
    ("removal-gap", spurge.Removal, put("curve.worst", torch.zeros(1)), "worst: expected torch.float64"),
    ("removal-gap", spurge.Removal, put("head.weight", torch.zeros(2, 31)), r"head: expected shape \(2, 32\)"),
    ("tuned", spurge.Tuned, put("mask", torch.zeros(2, 31, dtype=torch.bool)), "mask: expected shape"),
    ("tuned", spurge.Tuned, say("tuned", "signed", value=1), "signed: expected bool, got int"),
    ("tuned", spurge.Tuned, say("info", "labels", value=None), "info: labels: expected str"),
    (
        "effects",
        spurge.Effects,
        put("adjusted/aie", torch.zeros(5, dtype=torch.float64)),
        "adjusted/aie: expected shape",
    ),
    ("effects", spurge.Effects, say("rest", "level", value="head"), "level: expected one of mlp, neuron, unit"),
    ("effects", spurge.Effects, say("rest", "confidence", value=2), "confidence: expected a number above 0"),
    ("effects", spurge.Effects, say("rest", "info", "settings", value={}), "'least_ess' is missing"),
]


@pytest.mark.parametrize(("name", "kind", "change", "message"), CASES)
def test_wrong_content_is_refused_by_its_field(
    name: str, kind: type[Saved], change: Change, message: str, tmp_path: Path
) -> None:
    tensors, texts = read_tensors(V1 / f"{name}.safetensors")
    tensors = dict(tensors)
    values = {key: json.loads(text) for key, text in texts.items() if key not in ("kind", "schema", "spurge", "sha256")}
    change(tensors, values)
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"kind": texts["kind"]} | {key: json.dumps(value) for key, value in values.items()})
    with pytest.raises(FileError, match=f"^{path}: not .*: {message}"):
        kind.load(path)
