"""What needs gradients turns them on, whatever block it is called in; what cannot says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.tiny_models import tiny, tiny_inputs
from helpers.tolerance import assert_near
from spurge.engine.cascade.cascade import Cascade, predicted_logit
from spurge.engine.cascade.locator import Locator
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.probes import token_scores
from spurge.engine.models.sites import find_sites
from spurge.engine.planning.plan import plan

QUESTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "layer": lambda model, inputs: Cascade(model, path="layer").attribute(inputs, predicted_logit).values,
    "radau": lambda model, inputs: Cascade(model, rule="radau", path="layer").attribute(inputs, predicted_logit).values,
    "joint": lambda model, inputs: Cascade(model, path="joint").attribute(inputs, predicted_logit).values,
    "locator": lambda model, inputs: Locator(model, path="layer")(inputs).values,
    "prompt": lambda model, inputs: (
        Locator(model, rule="radau", path="layer")(Locator(model, rule="radau", path="layer").read(inputs)).values
    ),
    "tokens": lambda model, inputs: {"": token_scores(model, inputs, kind="gradient_x_input")},
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_grad_changes_nothing(name: str) -> None:
    model, inputs = tiny("bert", layers=2), tiny_inputs("bert")
    want = QUESTIONS[name](model, inputs)
    with torch.no_grad():
        got = QUESTIONS[name](model, inputs)
        assert not torch.is_grad_enabled()
    for key, value in want.items():
        assert_near(got[key], value, terms=10)


@pytest.mark.parametrize("name", QUESTIONS)
def test_inference_mode_is_refused_where_gradients_are_needed(name: str) -> None:
    model, inputs = tiny("bert", layers=2), tiny_inputs("bert")
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"torch.inference_mode: .* expected torch.no_grad or neither"),
    ):
        QUESTIONS[name](model, inputs)
    QUESTIONS[name](model, inputs)


def test_plans_and_ablations_are_made_under_no_grad() -> None:
    model, inputs = tiny("bert", layers=2), tiny_inputs("bert")
    neurons = NeuronSet({find_sites(model)[0].name: [1]})
    want = Cascade(model, path="layer").ablate(inputs, predicted_logit, neurons)
    with torch.no_grad():
        assert plan(Cascade(model, path="layer"), inputs).flops == plan(Cascade(model, path="layer"), inputs).flops
        assert_near(Cascade(model, path="layer").ablate(inputs, predicted_logit, neurons), want, terms=10)
