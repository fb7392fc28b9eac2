"""Accuracies by group and class against counting by hand, and the comparison of layers with its intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.evaluation import numbers
from spurge.engine.evaluation.groups import accuracies, compare
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head


def test_accuracies_of_a_small_case() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 4, 4])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0, 2, 2])
    found = accuracies(predicted, labels, groups)
    assert found.average == 75
    assert found.classes.tolist() == [75, 50, 100]
    assert found.groups[[0, 1, 2, 4]].tolist() == [100, 50, 50, 100]
    assert found.groups[3].isnan()
    assert (found.worst_class, found.worst_group, found.gap) == (50, 50, 25)
    assert found.class_difference == pytest.approx((25 + 25 + 50) / 3)
    logits = torch.nn.functional.one_hot(predicted, 4).float()
    wide = accuracies(logits, labels)
    assert wide.classes[:3].tolist() == [75, 50, 100]
    assert wide.classes[3].isnan()
    assert wide.worst_class == 50
    assert wide.class_difference == pytest.approx(100 / 3)
    assert not len(wide.groups)
    assert np.isnan(wide.worst_group)
    assert accuracies(torch.ones(3, 2), torch.zeros(3, dtype=torch.long)).average == 100  # a tie is the first


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40))
def test_accuracies_are_counts(rows: list[tuple[int, int, int]]) -> None:
    labels, groups, predicted = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = accuracies(predicted, labels, groups, classes=5)
    for classes, parts in ((True, labels), (False, groups)):
        for index, value in enumerate((found.classes if classes else found.groups).tolist()):
            own = parts == index
            if own.any():
                assert value == pytest.approx(100 * float((predicted == labels)[own].double().mean()))
            else:
                assert np.isnan(value)
    present = found.classes[~found.classes.isnan()]
    pairs = torch.combinations(present, 2)
    want = float((pairs[:, 0] - pairs[:, 1]).abs().mean()) if len(pairs) else 0.0
    assert found.class_difference == pytest.approx(want, abs=1e-9)
    assert found.worst_group <= found.average + 1e-9


def sample(n: int = 400, grouped: bool = True) -> Features:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    values = torch.randn(n, 3, generator=g)
    values[:, 0] += 2 * labels - 1
    group = 2 * labels + (torch.arange(n) % 10 == 0)
    head = Head(torch.tensor([[-1.0, 0, 0], [1, 0, 0]]))
    parts: dict[str, Any] = {"groups": group, "group_names": ("g0", "g1", "g2", "g3")} if grouped else {}
    return Features(values, labels, head, names=("a", "b"), **parts)


def test_compare_is_the_accuracies_with_intervals() -> None:
    test = sample()
    other = test.head.with_(weight=torch.randn(2, 3))
    report = compare(
        {"here": test, "there": sample(300, grouped=False)},
        {"ERM": test.head, "other": lambda features: other.logits(features.values), "draws": [other, test.head]},
        labels_used={"other": "group"},
        bootstrap=300,
    )
    for name, head in (("ERM", test.head), ("other", other)):
        want = accuracies(head.logits(test.values), test.labels, test.groups)
        for metric in ("worst_group", "gap", "worst_class", "class_difference"):
            assert report.value("here", name, metric) == pytest.approx(getattr(want, metric))
        assert report.value("here", name) == pytest.approx(want.average)
        assert report.value("here/g2", name) == pytest.approx(float(want.groups[2]))
    of = {(m.case, m.method, m.metric): m for m in report.measures}
    erm = of["here", "ERM", "accuracy"]
    share = erm.value / 100
    assert erm.spread == pytest.approx(100 * (share * (1 - share) / 400) ** 0.5, rel=0.2)  # the bootstrap's own error
    assert erm.low is not None
    assert erm.high is not None
    assert erm.low < erm.value < erm.high
    change = of["here", "other", "change"]
    assert change.value == pytest.approx(of["here", "other", "accuracy"].value - erm.value)
    assert (change.unit, change.labels, change.n) == ("points", "group", 400)
    draws = of["here", "draws", "accuracy"]
    assert draws.value == pytest.approx((erm.value + of["here", "other", "accuracy"].value) / 2)
    assert (draws.n, draws.low) == (2, None)
    assert of["here/g1", "ERM", "accuracy"].n == int(test.group_counts()[1])
    assert not any(case == "there" and metric == "worst_group" for case, _, metric in of)
    assert report.value("here", "other: threshold") == of["here", "other: threshold", "accuracy"].value
    assert not any(method == "draws: threshold" for _, method, _ in of)
    assert "worst group's accuracy, percent" in str(report)
    again = compare(test, {"ERM": test.head}, bootstrap=300)
    assert again.measures[0].low == pytest.approx(erm.low)
    assert {row["metric"] for row in again.rows()} >= {"accuracy_low", "gap", "worst_class_high"}


def test_a_method_may_be_called_random() -> None:
    test = sample()
    report = compare(test, {"ERM": test.head, "random": [test.head, test.head]}, bootstrap=0)
    assert "random" in str(report).splitlines()[1]
    assert "draws" not in str(report)


def test_compare_takes_answers_of_one_set() -> None:
    test = sample()
    report = compare(test, {"logits": test.logits(), "classes": test.predictions()}, bootstrap=0)
    assert report.value("test", "logits") == report.value("test", "classes")
    assert report.value("test", "classes", "change") == 0


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"answers": [1]}, TypeError, "answers: expected a tensor, got list"),
        ({"answers": torch.ones(3)}, ValueError, "answers: expected logits"),
        ({"answers": torch.ones(4).long()}, ValueError, r"answers: expected shape \(3,\)"),
        ({"labels": torch.ones(3)}, TypeError, "labels: expected a tensor of whole numbers"),
        ({"labels": torch.ones(0).long()}, ValueError, "labels: expected shape"),
        ({"groups": torch.tensor([0, -1, 0])}, ValueError, "groups: expected values from 0, got -1 at row 1"),
        ({"classes": 1}, ValueError, "labels: expected values below 1, got 1 at row 0"),
    ],
)
def test_bad_input_of_accuracies(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"answers": torch.ones(3).long(), "labels": torch.ones(3).long(), **change}
    with pytest.raises(error, match=text):
        accuracies(**arguments)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"tests": {}}, ValueError, "need at least 1 each"),
        ({"tests": {"a": 1}}, TypeError, "tests: expected name to Features, got 'a': int"),
        ({"methods": {}}, ValueError, "need at least 1 each"),
        ({"methods": {"m": []}}, ValueError, "needs at least 1 draw"),
        ({"methods": {"m": lambda features: 1}}, TypeError, "methods: 'm' must be or give a tensor, got int"),
        ({"methods": {"m": torch.ones(3)}}, ValueError, r"'m' must give logits \(400, 2\) or predictions"),
        ({"labels_used": {"n": "group"}}, ValueError, "labels_used: expected a method"),
        ({"labels_used": {"m": "all"}}, ValueError, "labels_used: expected a method and none"),
        ({"bootstrap": -1}, ValueError, "bootstrap: need at least 0"),
    ],
)
def test_bad_input_of_compare(change: dict[str, Any], error: type[Exception], text: str) -> None:
    test = sample()
    arguments: dict[str, Any] = {"tests": test, "methods": {"m": test.head}, **change}
    with pytest.raises(error, match=text):
        compare(**arguments)


def test_many_classes_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    test = sample()
    whole = compare(test, {"m": test.head}, bootstrap=50)
    monkeypatch.setattr(numbers, "_COLUMNS", 2)
    assert compare(test, {"m": test.head}, bootstrap=50).measures == whole.measures
