"""The controls: no mask, random masks of the same size, and DFR against scikit-learn's liblinear."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.planted_features import dimension_features, dimension_sets
from spurge.engine.evaluation.groups import accuracies, compare
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head
from spurge.methods.neurontune.controls import STRENGTHS, dfr, random_masks, without_mask
from spurge.methods.neurontune.neurontune import NeuronTune

SETTINGS = NeuronTune(l2=1e-3)


def test_controls_stand_beside_the_result() -> None:
    sets = dimension_sets()
    first, second = sets.validation.split()
    tuned = SETTINGS.tune(first, second)
    plain = without_mask(tuned, SETTINGS, first, second)
    random = random_masks(tuned, SETTINGS, first, second, draws=3, seed=1)
    nothing = torch.zeros(96, dtype=torch.bool)
    assert torch.equal(plain.head.weight, SETTINGS.retrain(first, second, nothing).head.weight)
    assert plain.suppressed == 0
    assert [own.info["method"] for own in (plain, *random)] == ["no mask"] + ["random mask"] * 3
    assert {int(own.mask.sum()) for own in random} == {int(tuned.mask.sum())}
    assert not torch.equal(random[0].mask, random[1].mask)
    again = random_masks(tuned, SETTINGS, first, second, draws=1, seed=1)
    assert torch.equal(again[0].mask, random[0].mask)
    oracle = dfr(sets.validation, retrains=3, strengths=(0.3, 0.1))
    report = compare(
        sets.test,
        {"ERM": sets.test.head, "NeuronTune": tuned, "no mask": plain, "random mask": random, "DFR": oracle},
        labels_used={"ERM": "none", "NeuronTune": "class", "DFR": "group"},
        bootstrap=20,
    )
    values = {name: report.value("test", name, "worst_group") for name in ("ERM", "NeuronTune", "no mask", "DFR")}
    assert values["NeuronTune"] > max(values["no mask"], report.value("test", "random mask", "worst_group"))
    assert values["DFR"] > values["ERM"] + 40
    assert values["DFR"] > values["no mask"]


def test_random_masks_fall_on_live_dimensions_and_keep_their_shape() -> None:
    sets = dimension_sets()
    dead = torch.ones(96)
    dead[72:] = 0  # the dimensions of noise
    first, second = (replace(f, values=f.values * dead) for f in sets.validation.split())
    tuned = replace(SETTINGS, classes="each").tune(first, second)
    (drawn,) = random_masks(tuned, SETTINGS, first, second, draws=1)
    assert drawn.mask.shape == (2, 96)
    assert torch.equal(drawn.mask.sum(1), tuned.mask.sum(1))
    assert not bool(drawn.mask[:, 72:].any())
    wide = replace(tuned, mask=torch.arange(96) < 90)  # more than there are live ones
    (drawn,) = random_masks(wide, SETTINGS, first, second, draws=1)
    assert int(drawn.mask.sum()) == 90


def test_dfr_is_the_original() -> None:
    """One strength, one retrain, groups that are equal already: one fit of scikit-learn's, up to its bias penalty."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = dimension_features(600, 0.8, 3)
    assert features.groups is not None
    size = int(features.group_counts().min())
    rows = torch.cat([(features.groups == g).nonzero()[:size, 0] for g in range(4)])
    equal = features.subset(rows)
    x = equal.values.double()
    x = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = linear_model.LogisticRegression(
            C=0.3, penalty="l1", solver="liblinear", intercept_scaling=1e3, tol=1e-8, max_iter=10_000
        ).fit(x, equal.labels.numpy())
    head = dfr(equal, strengths=[0.3], retrains=1, tolerance=1e-7)
    logits = head.logits(equal.values.double())
    want = torch.as_tensor(model.decision_function(x))
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], want, rtol=0, atol=5e-3)
    twice = dfr(equal, strengths=[0.3], retrains=2, tolerance=1e-7)  # the same rows, in the same order
    torch.testing.assert_close(twice.weight, head.weight)


def test_dfr_ignores_how_common_groups_are() -> None:
    sets = dimension_sets()
    head = dfr(sets.validation, train=sets.train, retrains=4, strengths=(1.0, 0.1))
    found = accuracies(head.logits(sets.test.values), sets.test.labels, sets.test.groups)
    # 13 rows a group are little to learn from, but they have no shortcut
    assert found.gap < 15
    assert found.worst_group > accuracies(sets.train.logits(), sets.train.labels, sets.train.groups).worst_group + 30
    again = dfr(sets.validation, train=sets.train, retrains=4, strengths=(1.0, 0.1))
    assert torch.equal(head.weight, again.weight)
    assert not torch.equal(head.weight, dfr(sets.validation, retrains=2, strengths=(0.1,), seed=1).weight)
    assert STRENGTHS == (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)


def test_dfr_keeps_the_place_or_adds_a_bias() -> None:
    features = dimension_features(400, 0.7, 1)
    prints: dict[str, Any] = {"fc.weight": {"shape": [2, 96], "dtype": "float32", "sha256": "0"}}
    placed = features.with_head(Head(features.head.weight, features.head.bias, "fc", prints))
    assert dfr(placed, strengths=[0.1], retrains=1).prints == prints
    bare = dfr(features.with_head(Head(features.head.weight)), strengths=[0.1], retrains=1)
    assert bare.bias is not None


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"validation": torch.ones(2)}, TypeError, "validation: expected Features"),
        (
            {"validation": dimension_features(40, 1.0, 0)},
            ValueError,
            "validation: group 'ab' has 0 rows, too few to halve",
        ),
        (
            {"validation": dimension_features(40, 1.0, 0).with_groups(None)},
            ValueError,
            "groups: these features have none",
        ),
        ({"strengths": ()}, ValueError, "strengths: expected numbers above 0"),
        ({"strengths": (1.0, 0.0)}, ValueError, "strengths: expected numbers above 0"),
        ({"retrains": 0}, ValueError, "retrains: need at least 1"),
        ({"seed": -1}, ValueError, "seed: need at least 0"),
    ],
)
def test_bad_input_of_dfr(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"validation": dimension_features(200, 0.7, 0), **change}
    with pytest.raises(error, match=text):
        dfr(**arguments)


def test_progress_shows_nothing_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    features: Features = dimension_features(200, 0.7, 0)
    dfr(features, strengths=[0.1], retrains=1)
    assert capsys.readouterr().err == ""
    dfr(features, strengths=[0.1], retrains=1, progress=True)
    assert "DFR" in capsys.readouterr().err
