"""NeuronTune: scores against a loop over medians, every reading on a planted shortcut, and every edge case."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.planted_features import CORE_DIMENSIONS, SHORTCUT_DIMENSIONS, dimension_sets
from spurge.engine.base.files import FileError
from spurge.engine.evaluation.groups import accuracies
from spurge.engine.features.features import Features
from spurge.engine.last_layer.fitting import Sgd, fit_head
from spurge.engine.models.heads import Head
from spurge.methods.neurontune.dimensions import Scores, encode, score
from spurge.methods.neurontune.neurontune import NeuronTune
from spurge.methods.neurontune.tuned import Tuned

SETTINGS = NeuronTune(l2=1e-3)


def worst(answer: Any, test: Features) -> float:
    logits = answer.logits(test.values)
    return accuracies(logits, test.labels, test.groups).worst_group


def by_hand(features: Features, predictions: Tensor, form: Any) -> np.ndarray:
    """Scores by numpy's medians, one class and dimension at a time."""
    found = []
    for y in range(len(features.names)):
        own, right = features.labels == y, predictions == features.labels
        parts = [form(features.values[own & part].double().numpy()) for part in (~right, right)]
        found.append(np.median(parts[0], 0) - np.median(parts[1], 0))
    return np.stack(found)


FORMS: dict[str, Any] = {
    "raw": lambda v: v,
    "magnitude": np.abs,
    "relu": lambda v: v.clip(0),
    "split": lambda v: np.concatenate([v.clip(0), (-v).clip(0)], 1),
}


@pytest.mark.parametrize("signs", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_scores_are_differences_of_medians(signs: Any, dtype: torch.dtype) -> None:
    values, labels = torch.randn(300, 7).to(dtype), torch.arange(300) % 3
    features = Features(values, labels, Head(torch.randn(3, 7)))
    found = score(features, signs=signs)
    want = by_hand(features, features.predictions(), FORMS[signs])
    np.testing.assert_allclose(found.deltas.numpy(), want, rtol=0, atol=1e-6)
    assert found.sfit == pytest.approx(np.abs(want).sum(), abs=1e-5)
    assert found.wrong.tolist() == [int(((labels == y) & ~features.right()).sum()) for y in range(3)]
    assert (found.wrong + found.right).tolist() == [100, 100, 100]
    np.testing.assert_array_equal(found.mask(0.1).numpy(), (want > 0.1).any(0))
    np.testing.assert_array_equal(found.mask(0.1, "intersection").numpy(), (want > 0.1).all(0))
    np.testing.assert_array_equal(found.mask(0.1, "each").numpy(), want > 0.1)


def made(rows: list[list[float]], labels: list[int], predicted: list[int], classes: int = 2) -> tuple[Features, Tensor]:
    head = Head(torch.zeros(classes, len(rows[0])))
    return Features(torch.tensor(rows), torch.tensor(labels), head), torch.tensor(predicted)


def test_even_counts_average_the_middle_two_and_ties_are_not_above() -> None:
    rows = [[1.0, 4.0], [3.0, 4.0], [2.0, 4.0], [2.0, 1.0], [5.0, 1.0], [5.0, 0.0]]
    features, predicted = made(rows, [0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1])
    found = score(features, predicted, least_wrong=1)
    assert found.deltas.tolist() == [[0.0, 1.5], [0.0, 1.0]]
    assert found.mask().tolist() == [False, True]  # a score of exactly the threshold stays
    assert found.mask(1.0).tolist() == [False, True]
    assert found.mask(1.5).tolist() == [False, False]
    assert found.mask(1.0, "intersection").tolist() == [False, False]
    assert found.mask(-0.1).tolist() == [True, True]


def test_a_class_with_too_few_wrong_predictions_is_skipped_aloud() -> None:
    rows = [[float(i), 1.0] for i in range(12)]
    labels = [0] * 6 + [1] * 4 + [2] * 2
    features, predicted = made(rows, labels, [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 2, 2], classes=3)
    with pytest.warns(UserWarning, match=r"2 of 3 classes have fewer than 3 wrong .* \(wrong: 1 1, 2 0\)"):
        found = score(features, predicted, least_wrong=3)
    assert found.skipped == (1, 2)
    assert found.deltas[0].tolist() == [3.0, 0.0]
    assert bool(found.deltas[1:].isnan().all())
    assert found.sfit == 3.0
    for classes in ("union", "intersection"):  # of the classes that are left
        assert found.mask(0.0, classes).tolist() == [True, False]
    assert found.mask(0.0, "each").tolist() == [[True, False], [False, False], [False, False]]
    assert list(found.by_class()) == ["0"]
    with pytest.raises(ValueError, match=r"no class has 4 wrong predictions and one right \(wrong: \[3, 1, 0\]"):
        score(features, predicted, least_wrong=4)
    everything_wrong = torch.tensor(labels).roll(6) * 0 + (torch.tensor(labels) + 1) % 3
    with pytest.raises(ValueError, match="no class has 1 wrong predictions and one right"):
        score(features, everything_wrong, least_wrong=1)


def test_nothing_left_and_nothing_masked() -> None:
    sets = dimension_sets()
    with pytest.raises(ValueError, match=r"all 96 dimensions have a score above -10\.0, nothing is left to train on"):
        NeuronTune(threshold=-10.0).tune(sets.validation, sets.train)
    with pytest.raises(ValueError, match=r"have a score above -10\.0 in a class"):
        NeuronTune(threshold=-10.0, classes="each").tune(sets.validation, sets.train)
    with pytest.warns(UserWarning, match=r"no dimension has a score above 10.0: nothing is masked"):
        tuned = NeuronTune(threshold=10.0).tune(sets.validation, sets.train)
    assert tuned.suppressed == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_masking_beats_the_same_retraining_without_a_mask(seed: int) -> None:
    """The case the method is for: a shortcut of 95 % in training and validation alike."""
    sets = dimension_sets(seed)
    scores = SETTINGS.score(sets.validation)
    mask = SETTINGS.mask(scores)
    assert bool(mask[list(SHORTCUT_DIMENSIONS)].all())
    assert 0.3 < float(mask.double().mean()) < 0.9
    plain = worst(sets.train.head, sets.test)
    nothing = torch.zeros(96, dtype=torch.bool)
    tuned = SETTINGS.tune(sets.validation, sets.train)
    without = worst(SETTINGS.retrain(sets.validation, sets.train, nothing).head, sets.test)
    assert torch.equal(tuned.mask, mask)
    assert worst(tuned, sets.test) > without + 5
    assert worst(tuned, sets.test) > plain + 50
    first, second = sets.validation.split(seed=0)
    dagger = SETTINGS.halves(sets.validation)
    half = worst(SETTINGS.retrain(first, second, nothing).head, sets.test)
    assert worst(dagger, sets.test) > half + 10
    assert dagger.info["data"] == {"identify": first.fingerprint(), "train": second.fingerprint()}
    # hardly any dimension is above 0 for both classes, so the intersection leaves the shortcut in
    both = replace(SETTINGS, classes="intersection").tune(sets.validation, sets.train)
    assert both.suppressed < 0.15
    assert worst(both, sets.test) < without + 3


def test_errors_of_another_kind_mislead() -> None:
    """A model that leans on the class as well errs in all groups, and its errors point at the class's dimensions."""
    sets = dimension_sets(core=0.2)
    head = fit_head(sets.train.values, sets.train.labels, 2, weights=None)
    validation, train = sets.validation.with_head(head), sets.train.with_head(head)
    scores = SETTINGS.score(validation)
    assert not bool(scores.mask()[list(SHORTCUT_DIMENSIONS)].all())
    nothing = torch.zeros(96, dtype=torch.bool)
    without = worst(SETTINGS.retrain(validation, train, nothing).head, sets.test)
    assert worst(SETTINGS.tune(validation, train), sets.test) < without - 5


def test_on_balanced_validation_data_the_mask_adds_nothing() -> None:
    sets = dimension_sets(validation=0.5)
    first, second = sets.validation.split(seed=0)
    half = worst(SETTINGS.retrain(first, second, torch.zeros(96, dtype=torch.bool)).head, sets.test)
    assert half > worst(sets.train.head, sets.test) + 50
    assert worst(SETTINGS.halves(sets.validation), sets.test) < half + 2


def test_signs_agree_behind_a_relu() -> None:
    sets = dimension_sets()
    plain = SETTINGS.tune(sets.validation, sets.train)
    for signs in ("raw", "relu", "split"):
        tuned = replace(SETTINGS, signs=signs).tune(sets.validation, sets.train)
        torch.testing.assert_close(tuned.logits(sets.test.values), plain.logits(sets.test.values), rtol=0, atol=2e-3)
        assert torch.equal(tuned.mask[:96], plain.mask)
        assert not bool(tuned.mask[96:].any())
        torch.testing.assert_close(tuned.plain().weight, plain.head.weight, rtol=0, atol=1e-3)
        assert not tuned.signed


def test_signed_features_need_their_parts_judged_alone() -> None:
    sets = dimension_sets(validation=0.95, signed=True, core=0.4)
    found = {
        s: replace(SETTINGS, signs=s).tune(sets.validation, sets.train) for s in ("split", "raw", "magnitude", "relu")
    }
    scores = {signs: worst(tuned, sets.test) for signs, tuned in found.items()}
    assert found["split"].signed
    assert scores["split"] > 90
    assert scores["split"] > max(scores["raw"], scores["magnitude"])
    assert found["raw"].suppressed > 0.75  # by raw values nearly every dimension rises in one of the classes
    parts = found["split"].mask.view(2, 96)
    assert bool(parts[0, list(SHORTCUT_DIMENSIONS)].all())
    assert bool(parts[1, list(SHORTCUT_DIMENSIONS)].all())
    assert found["split"].head.width == 192
    assert encode(sets.test.values, "split").shape == (2000, 192)
    for signs in ("split", "relu"):
        with pytest.raises(ValueError, match=f"signs: with '{signs}' the new layer reads positive parts"):
            found[signs].plain()
    assert found["magnitude"].plain() is found["magnitude"].head


def test_partial_suppression_and_masks_of_each_output() -> None:
    sets = dimension_sets()
    full = SETTINGS.tune(sets.validation, sets.train)
    assert bool((full.head.weight[:, full.mask] == 0).all())
    kept = [worst(replace(SETTINGS, keep=keep).tune(sets.validation, sets.train), sets.test) for keep in (0.2, 0.6)]
    assert worst(full, sets.test) > max(kept)
    each = replace(SETTINGS, classes="each").tune(sets.validation, sets.train)
    assert each.mask.shape == (2, 96)
    assert bool((each.head.weight[each.mask] == 0).all())
    assert bool((each.head.weight[~each.mask] != 0).any())
    assert "2 masks of 96 dimensions" in repr(each)


def test_sfit_is_of_the_new_predictions_on_unmasked_features() -> None:
    sets = dimension_sets()
    tuned = SETTINGS.tune(sets.validation, sets.train)
    (candidate,) = tuned.info["candidates"]
    predictions = tuned.predictions(sets.validation.values)
    want = by_hand(sets.validation, predictions, np.abs)  # all 96 dimensions, the suppressed ones too
    assert candidate["sfit"] == pytest.approx(np.abs(want).sum(), rel=1e-6)
    found = accuracies(predictions, sets.validation.labels)
    assert candidate["worst_class"] == pytest.approx(found.worst_class)
    assert candidate["class_difference"] == pytest.approx(found.class_difference)
    # sums of magnitudes grow with the features, so that they compare layers of one backbone only
    doubled = replace(sets.validation, values=2 * sets.validation.values)
    predicted = sets.validation.predictions()
    assert score(doubled, predicted).sfit == pytest.approx(2 * score(sets.validation, predicted).sfit)


@pytest.mark.parametrize("select", ["sfit", "worst_class", "class_difference"])
def test_the_best_candidate_is_kept(select: Any) -> None:
    sets = dimension_sets()
    method = replace(SETTINGS, threshold=(0.0, 0.2), l2=(1e-3, 0.3), select=select)
    tuned = method.tune(sets.validation, sets.train)
    candidates = tuned.info["candidates"]
    assert [(c["threshold"], c["l2"]) for c in candidates] == [(0.0, 1e-3), (0.0, 0.3), (0.2, 1e-3), (0.2, 0.3)]
    values = [c[select] for c in candidates]
    best = candidates[values.index(min(values) if select == "class_difference" else max(values))]
    again = replace(method, threshold=best["threshold"], l2=best["l2"]).tune(sets.validation, sets.train)
    # from another start, the same minimum
    torch.testing.assert_close(tuned.head.weight, again.head.weight, rtol=0, atol=1e-3)
    assert tuned.info["threshold"] == best["threshold"]


def test_minibatches_choose_an_epoch_and_are_the_same_for_a_seed() -> None:
    sets = dimension_sets()
    method = NeuronTune(solver="sgd", sgd=Sgd(epochs=4, batches=30, rate=0.02), select="worst_class")
    tuned = method.tune(sets.validation, sets.train)
    candidates = tuned.info["candidates"]
    assert [c["epoch"] for c in candidates] == [1, 2, 3, 4]
    predicted = tuned.predictions(sets.validation.values)
    assert accuracies(predicted, sets.validation.labels).worst_class == max(c["worst_class"] for c in candidates)
    assert bool((tuned.head.weight[:, tuned.mask] == 0).all())
    assert worst(tuned, sets.test) > 70
    assert torch.equal(tuned.head.weight, method.tune(sets.validation, sets.train).head.weight)
    warm = replace(method, start="head", signs="split", sgd=Sgd(epochs=1, batches=1, rate=1e-9))
    begun = warm.tune(sets.validation, sets.train)  # the model's own layer without the suppressed dimensions
    own = torch.cat([sets.train.head.weight, -sets.train.head.weight], 1) * ~begun.mask
    torch.testing.assert_close(begun.head.weight, own, rtol=0, atol=1e-6)


def test_a_bare_head_stays_bare_and_labels_are_only_of_classes() -> None:
    sets = dimension_sets()
    bare = Head(sets.train.head.weight)
    tuned = SETTINGS.tune(
        sets.validation.with_head(bare).with_groups(None), sets.train.with_head(bare).with_groups(None)
    )
    assert tuned.head.bias is None
    assert tuned.labels == "class"
    with_groups = SETTINGS.tune(sets.validation.with_head(bare), sets.train.with_head(bare))
    assert torch.equal(tuned.head.weight, with_groups.head.weight)


def test_the_edit_is_the_new_layer_in_the_model() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(96, 2))
    sets = dimension_sets(signed=True)
    with torch.no_grad():
        model[1].weight.copy_(dimension_sets().train.head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = Head.of(model, "1")
    parts = {
        name: replace(features, values=features.values.relu(), head=head)
        for name, features in (("validation", sets.validation), ("train", sets.train))
    }
    tuned = SETTINGS.tune(parts["validation"], parts["train"])
    for signs in ("magnitude", "split"):
        tuned = replace(SETTINGS, signs=signs).tune(parts["validation"], parts["train"])
        with tuned.edit().applied(model), torch.no_grad():
            torch.testing.assert_close(model(sets.test.values), tuned.logits(sets.test.values.relu()))
        assert tuned.edit().info["labels"] == "class"
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="belongs to no model"):
        replace(tuned, base=Head(head.weight, head.bias)).edit()


def test_files(tmp_path: Path) -> None:
    sets = dimension_sets()
    for method in (SETTINGS, replace(SETTINGS, signs="split", classes="each", threshold=(0.0, 0.1))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = method.tune(sets.validation, sets.train)
        tuned.save(tmp_path / "t.safetensors")
        again = Tuned.load(tmp_path / "t.safetensors")
        assert torch.equal(again.logits(sets.test.values), tuned.logits(sets.test.values))
        assert torch.equal(again.mask, tuned.mask)
        assert torch.equal(again.scores.deltas, tuned.scores.deltas)
        assert (again.info, again.signs, again.signed, repr(again)) == (tuned.info, tuned.signs, False, repr(tuned))
        assert torch.equal(again.base.weight, tuned.base.weight)
    sets.train.save(tmp_path / "f.safetensors")
    with pytest.raises(FileError, match="holds 'features', expected 'neurontune'"):
        Tuned.load(tmp_path / "f.safetensors")


def test_the_same_rows_twice_and_another_head_are_noticed() -> None:
    sets = dimension_sets()
    with pytest.warns(UserWarning, match="identify: the same rows as train"):
        SETTINGS.tune(sets.validation, sets.validation)
    other = sets.train.with_head(Head(torch.randn(2, 96)))
    with pytest.raises(ValueError, match="train: its head is not that of identify"):
        SETTINGS.tune(sets.validation, other)
    with pytest.raises(TypeError, match="identify: expected Features, got Tensor"):
        SETTINGS.tune(sets.validation.values, sets.train)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="validation: expected Features, got dict"):
        SETTINGS.halves({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="features: expected Features"):
        score(torch.ones(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"predictions: expected shape \(1200,\)"):
        score(sets.validation, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="classes: expected one of union, intersection, each, got 'any'"):
        score(sets.validation).mask(0.0, "any")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"threshold": float("nan")}, ValueError, "threshold: must be finite"),
        ({"threshold": "0"}, TypeError, "threshold: expected a number, got str"),
        ({"threshold": ()}, ValueError, "threshold: need at least 1 value"),
        ({"l2": -1.0}, ValueError, "l2: must be at least 0.0, got -1.0"),
        ({"l2": (0.1, None)}, TypeError, "l2: expected a number, got NoneType"),
        ({"classes": "all"}, ValueError, "classes: expected one of union, intersection, each, got 'all'"),
        ({"signs": "abs"}, ValueError, "signs: expected one of magnitude"),
        ({"select": "accuracy"}, ValueError, "select: expected one of sfit"),
        ({"solver": "adam"}, ValueError, "solver: expected one of lbfgs, sgd"),
        ({"start": "warm"}, ValueError, "start: expected one of fresh, head"),
        ({"least_wrong": 0}, ValueError, "least_wrong: need at least 1, got 0"),
        ({"keep": 1.0}, ValueError, "keep: must be at least 0 and below 1"),
        ({"sgd": {}}, TypeError, "sgd: expected Sgd, got dict"),
        ({"memory": "lots"}, ValueError, "memory: expected bytes"),
        ({"device": "moon"}, ValueError, "device: 'moon' cannot be used here"),
        ({"device": 0}, TypeError, "device: expected a device or its name, got int"),
        ({"seed": -1}, ValueError, "seed: need at least 0"),
    ],
)
def test_bad_settings(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        NeuronTune(**change)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.lists(st.integers(-3, 3), min_size=3, max_size=3)),
        min_size=4,
        max_size=40,
    ),
    st.sampled_from(list(FORMS)),
    st.floats(-2, 2),
)
def test_masks_grow_with_the_readings(rows: list[Any], signs: Any, threshold: float) -> None:
    labels, predicted = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    features = Features(torch.tensor([r[2] for r in rows]).float(), labels, Head(torch.zeros(3, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found: Scores = score(features, predicted, signs=signs, least_wrong=1)
        except ValueError:
            return
    union, both, each = (found.mask(threshold, c) for c in ("union", "intersection", "each"))  # type: ignore[arg-type]
    assert not bool((both & ~union).any())
    assert torch.equal(each.any(0), union)
    assert not bool((found.mask(threshold + 0.5) & ~union).any())
    shuffled = torch.randperm(len(rows))
    again = score_quietly(features.subset(shuffled), predicted[shuffled], signs)
    assert torch.equal(again.deltas.nan_to_num(9), found.deltas.nan_to_num(9))


def score_quietly(features: Features, predicted: Tensor, signs: Any) -> Scores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return score(features, predicted, signs=signs, least_wrong=1)


def test_reprs() -> None:
    sets = dimension_sets()
    assert "96 dimensions" in repr(SETTINGS.score(sets.validation))
    assert "labels used: class" in repr(SETTINGS.tune(sets.validation, sets.train))
    assert not set(CORE_DIMENSIONS) & set(SHORTCUT_DIMENSIONS)
