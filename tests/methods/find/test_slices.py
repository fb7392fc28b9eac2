"""Slices of a class with more errors than the rest of it."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.planted_slices import ODD, planted_slices
from spurge import find_slices
from spurge.methods.find.slices import wilson


def test_the_part_that_the_head_gets_wrong_leads():
    features = planted_slices()
    found = find_slices(features, clusters=4)
    leading = found.rows[0]
    assert leading.label == "no"
    assert leading.q < 0.001
    assert leading.errors > 90
    assert leading.low <= leading.errors <= leading.high
    inside = (found.numbers == 0).nonzero()[:, 0]
    assert set(range(ODD)) <= set(inside.tolist())
    assert leading.count == len(inside)
    wrong = ~features.right()
    others = (features.labels == 0) & (found.numbers != 0)
    assert leading.errors == pytest.approx(100 * float(wrong[inside].double().mean()))
    assert leading.rest == pytest.approx(100 * float(wrong[others].double().mean()))


def test_slices_cut_classes_and_become_groups():
    features = planted_slices()
    found = find_slices(features, seed=3)
    grouped = found.groups(features)
    assert grouped.group_names == tuple(row.name for row in found.rows)
    assert grouped.group_counts().tolist() == [row.count for row in found.rows]
    for number, row in enumerate(found.rows):
        assert set(features.labels[found.numbers == number].tolist()) == {features.names.index(row.label)}
    assert torch.equal(found.numbers, find_slices(features, seed=3).numbers)
    with pytest.raises(ValueError, match="expected 600 rows, got 10"):
        found.groups(features.subset(range(10)))


def test_what_cannot_be_cut_is_refused():
    features = planted_slices()
    with pytest.raises(ValueError, match="at least 20 rows"):
        find_slices(features.subset(range(12)))
    with pytest.raises(ValueError, match="clusters: need at least 2"):
        find_slices(features, clusters=1)
    with pytest.raises(TypeError, match="features: expected Features"):
        find_slices(torch.zeros(3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "total"), [(0, 7), (3, 9), (9, 9)])
def test_wilsons_ends_solve_his_equation(count, total):
    share = count / total
    for end in wilson(count, total):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / total))
