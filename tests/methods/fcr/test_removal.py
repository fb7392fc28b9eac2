"""What a removal hands on: an edit of the model, files, result rows and a table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.planted_features import unit_features
from spurge.engine.base.files import FileError
from spurge.engine.features.features import Features
from spurge.engine.last_layer.rate_sweep import Sweep
from spurge.engine.models.heads import Head
from spurge.methods.fcr.fcr import FCR
from spurge.methods.fcr.rates import Dependence
from spurge.methods.fcr.removal import Removal
from spurge.report.results import Results


@pytest.fixture(scope="module")
def sets():
    train, shortcut = unit_features(400, 0.95, 0)
    select, _ = unit_features(200, 0.5, 1, train.head)
    return train, shortcut, select


@pytest.mark.parametrize("criterion", ["gap", "worst_class", "independence", None])
def test_a_file_holds_all_of_it(sets, tmp_path, criterion):
    train, shortcut, select = sets
    tilt = {"rate": 0.05} if criterion is None else {"select": select, "criterion": criterion}
    removal = FCR().remove_feature(train, shortcut, **tilt)
    removal.save(tmp_path / "removal.safetensors")
    again = Removal.load(tmp_path / "removal.safetensors")
    assert again.edges == removal.edges
    assert (again.labels, again.info) == (removal.labels, removal.info)
    for name in ("original", "head", "fictitious"):
        assert getattr(again, name).fingerprint() == getattr(removal, name).fingerprint()
    assert type(again.curve) is type(removal.curve)
    if isinstance(removal.curve, Sweep):
        assert again.curve.best("worst_group") == removal.curve.best("worst_group")
        assert torch.equal(again.curve.at([0.0, 0.3])[1], removal.curve.at([0.0, 0.3])[1])
    if isinstance(removal.curve, Dependence):
        assert again.curve.best() == removal.curve.best()
    assert str(again) == str(removal)


def test_a_removed_class_has_no_fictitious_head(sets, tmp_path):
    removal = FCR().remove_class(sets[0], 1)
    removal.save(tmp_path / "removal.safetensors")
    assert Removal.load(tmp_path / "removal.safetensors").fictitious is None


def test_other_files_are_refused(sets, tmp_path):
    sets[0].save(tmp_path / "features.safetensors")
    with pytest.raises(FileError, match="holds 'features', expected 'removal'"):
        Removal.load(tmp_path / "features.safetensors")


def test_the_edit_changes_the_model_and_nothing_else_in_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    inputs, labels = torch.randn(90, 6), torch.arange(90) % 3
    with torch.no_grad():
        features = Features(model[:2](inputs), labels, Head.of(model))
        removal = FCR(weights=2).remove_class(features, 1, rate=0.5)
        edit = removal.edit()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        plain = model(inputs)
        with edit.applied(model):
            torch.testing.assert_close(model(inputs), removal.head.logits(features.values))
            moved = model(inputs) - plain
        assert torch.equal(model(inputs), plain)
    assert moved[:, [0, 2]].abs().max() == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(edit) == 2
    assert edit.info["method"] == "FCR"
    assert edit.info["labels"] == "class"
    assert [edge["column"] for edge in edit.info["edges"]] == [edge.column for edge in removal.edges]


def test_a_head_without_a_model_has_no_edit():
    features = Features(torch.rand(8, 3), torch.arange(8) % 2, Head(torch.tensor([[1.0, 2, 3], [1, 1, 1]])))
    with pytest.raises(ValueError, match="belongs to no model"):
        FCR().remove_class(features, 0).edit()


def test_rows_are_results(sets):
    train, shortcut, _ = sets
    removal = FCR().remove_feature(train, shortcut, rate=0.05)
    results = Results("fcr")
    results.extend(removal.rows())
    edge = removal.edges[0]
    case = f"row {edge.row}, unit {edge.column}"
    assert results.select(case=case, metric="rate")[0]["value"] == 0.05
    assert results.select(case=case, metric="angle")[0]["unit"] == "degrees"
    assert results.rows[0]["labels"] == "none"


def test_what_people_see(sets):
    train, shortcut, select = sets
    removal = FCR().remove_feature(train, shortcut, select=select, criterion="gap")
    assert repr(removal).startswith("Removal([0, 2] at rate 0.")
    lines = str(removal).splitlines()
    assert lines[0].split() == ["row", "unit", "for", "score", "weight", "new", "rate", "angle"]
    assert lines[1].split()[:3] == ["0", "2", "0"]
    assert any(line.startswith("labels used: feature labels of 400 samples") for line in lines)
    assert max(map(len, lines)) <= 80
    assert removal._repr_html_().startswith("<div><table><caption>edited weights</caption>")
