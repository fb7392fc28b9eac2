"""Classifiers that give no label: one number (regression), or several labels at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helpers.tiny_models import tiny, tiny_inputs, tiny_tokenizer
from spurge.engine.cascade.cascade import Cascade, Rows
from spurge.engine.data.examples import Examples
from spurge.engine.evaluation.evaluation import evaluate
from spurge.engine.evaluation.prediction import accuracy, predict
from spurge.engine.features.extraction import extract
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.macu import MacU

KINDS: dict[str, dict[str, Any]] = {
    "one output": {"labels": 1},
    "regression": {"labels": 1, "problem_type": "regression"},
    "several numbers": {"labels": 2, "problem_type": "regression"},
    "several labels": {"labels": 2, "problem_type": "multi_label_classification"},
}
TEXTS = Examples.load([("the movie was great", "good"), ("the plot was bad", "bad")])
GOLDEN = GoldenTokens(("good", "bad"), {"good": ("great",), "bad": ("bad",)})

JUDGES: dict[str, Callable[[Any], Any]] = {
    "evaluate": lambda model: evaluate(model, tiny_tokenizer(), TEXTS, bootstrap=0, progress=False),
    "accuracy": lambda model: accuracy(model, tiny_tokenizer(), TEXTS),
    "extract": lambda model: extract(model, TEXTS, tokenizer=tiny_tokenizer()),
    "locate": lambda model: MacU().locate(model, tiny_tokenizer(), TEXTS, GOLDEN),
}


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_not_judged_where_there_are_none(kind: str, judge: str) -> None:
    model = tiny("bert", layers=1, **KINDS[kind])
    outputs, problem = KINDS[kind]["labels"], KINDS[kind].get("problem_type")
    with pytest.raises(ValueError, match=rf"model: .* num_labels={outputs} and problem_type={problem!r}; attribution"):
        JUDGES[judge](model)


@pytest.mark.parametrize("kind", KINDS)
def test_attribution_to_a_target_of_ones_own_works(kind: str) -> None:
    def first(rows: Rows) -> Any:
        return rows.logits[:, 0]

    model = tiny("bert", layers=2, **KINDS[kind])
    found = Cascade(model, nodes=12, path="layer").attribute(tiny_inputs("bert"), first)
    assert found.relative_residual() < 1e-3
    assert any(float(values.abs().max()) > 0 for values in found.values.values())


def test_logits_of_several_labels_are_given() -> None:
    model = tiny("bert", layers=1, **KINDS["several labels"])
    assert predict(model, tiny_tokenizer(), TEXTS).shape == (2, 2)


def test_a_single_label_is_judged() -> None:
    model = tiny("bert", layers=1, labels=2, problem_type="single_label_classification")
    assert accuracy(model, tiny_tokenizer(), TEXTS) in (0.0, 50.0, 100.0)
