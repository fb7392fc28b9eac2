"""Ctrl-C at every place of every change to a model: model and process are as before, or a handle undoes the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from helpers.cuts import cuts
from helpers.states import differences, model_state, process_state
from helpers.tiny_models import tiny
from spurge.engine.edits.gates import suspended
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.overwrites import lifted
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.last_layer.capture import captured
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.hooks import alone, frozen, hook, hook_before, replaced_forward
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites


def layers() -> Any:
    """A model of two parts, one of them in evaluation mode, and one parameter without a gradient."""
    model = nn.Module()
    model.inner, model.classifier = nn.Dropout(), nn.Linear(4, 3)
    model.inner.eval()
    model.classifier.bias.requires_grad_(False)
    return model


def neuron_edit(model: Any) -> NeuronEdit:
    return NeuronEdit.build(model, NeuronSet({site.name: range(3) for site in find_sites(model)}), 0.5)


def weight_edit(model: Any) -> WeightEdit:
    return WeightEdit.build(model, {name: ([0, 1], [3.0, 4.0]) for name in ("classifier.weight", "classifier.bias")})


def edited(monkeypatch: pytest.MonkeyPatch, kind: str) -> tuple[Any, Any]:
    """A model and an edit of it that is known to fit: that is found out before anything is changed."""
    model = tiny("bert", layers=1) if kind == "neurons" else layers()
    edit: Any = neuron_edit(model) if kind == "neurons" else weight_edit(model)
    fitting = edit.fit(model)
    monkeypatch.setattr(type(edit), "fit", lambda *_, **__: fitting)
    return model, edit


def check(model: Any, call: Callable[[], Any], left: list[Any]) -> None:
    """Cuts ``call`` everywhere; what it puts into ``left`` is undone after it."""
    call()
    while left:
        left.pop().undo()
    before = model_state(model), process_state()
    for place in cuts(call):
        while left:
            left.pop().undo()
        found = differences(before[0], model_state(model)) + differences(before[1], process_state())
        assert not found, f"cut at place {place}"


@pytest.mark.parametrize("kind", ["neurons", "weights"])
@pytest.mark.parametrize("use", ["apply", "fold"])
def test_a_handle_is_returned_or_nothing_is_changed(monkeypatch, kind, use):
    model, edit = edited(monkeypatch, kind)
    left = []

    def changed():
        left.append(edit.apply(model) if use == "apply" else edit.fold(model))
        left[-1].undo()

    check(model, changed, left)


@pytest.mark.parametrize("kind", ["neurons", "weights"])
def test_blocks_of_edits(monkeypatch, kind):
    model, edit = edited(monkeypatch, kind)
    off = suspended if kind == "neurons" else lifted

    def changed():
        with edit.applied(model), off(model):
            pass

    check(model, changed, [])


BLOCKS: dict[str, Callable[[Any], Any]] = {
    "alone": alone,
    "frozen": frozen,
    "frozen without gradients": lambda model: frozen(model, gradients=False),
    "hook": lambda model: hook(model.classifier, print),
    "hook before": lambda model: hook_before(model.classifier, print),
    "replaced forward": lambda model: replaced_forward(model.classifier, print),
    "captured": lambda model: captured(model.classifier),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_hooks_and_flags(block):
    model = layers()

    def changed():
        with BLOCKS[block](model):
            pass

    check(model, changed, [])


@pytest.mark.parametrize("family", ["bert", "deberta_v2"])
def test_attention_rows(family):
    model = tiny(family, layers=1)
    attention = find_sites(model)[-1].attention

    def changed():
        with AttentionRow(attention, lambda rows: torch.zeros(rows, dtype=torch.int64), keep_values=True):
            pass

    check(model, changed, [])
