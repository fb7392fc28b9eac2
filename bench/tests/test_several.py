"""Several classes removed at once."""

from __future__ import annotations

import torch

from experiments import several
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head


def _test_set() -> Features:
    """Ten classes, two rows of each: the first clear, the second as near to the class after it."""
    labels = torch.arange(20) // 2
    values = torch.eye(10)[labels]
    values[1::2] += 0.9 * torch.eye(10)[(labels[1::2] + 1) % 10]
    return Features(values, labels, Head(torch.eye(10), torch.zeros(10)))


def _without(head: Head, label: int, bias: float) -> Head:
    assert head.bias is not None
    return head.with_(bias=head.bias + bias * torch.eye(10)[label])


def test_smaller_sets_lie_inside_larger_ones():
    for small, large in zip(several.sets(10, 3, seed=1), several.sets(10, 8, seed=1), strict=True):
        assert len(small) == 3
        assert len(set(large)) == 8
        assert set(small) < set(large)
    assert several.sets(10, 3, seed=1) != several.sets(10, 3, seed=2)


def test_each_removal_changes_its_own_output_alone():
    head = _test_set().head
    removals = [[_without(head, label, -1.0), _without(head, label, -2.0)] for label in range(10)]
    both = several.together(head, removals, [2, 5])
    assert [one.bias.tolist() for one in both] == [[0, 0, -shift, 0, 0, -shift, 0, 0, 0, 0] for shift in (1.0, 2.0)]
    assert all(torch.equal(one.weight, head.weight) for one in both)


def test_the_removed_and_the_others_are_told_apart():
    test = _test_set()
    off = [[_without(test.head, label, -5.0)] for label in range(10)]
    found = several.removed(test, {"off": off}, 4, seed=0)
    assert found["before"] == {"removed_accuracy": 100, "retained_accuracy": 100, "change_of_others": 0}
    assert found["off"]["removed_accuracy"] == 0
    assert found["off"]["retained_accuracy"] == 100
    harmful = [[_without(test.head, label, 0.5)] for label in range(10)]
    values = several.removed(test, {"harmful": harmful}, 1, seed=0)["harmful"]
    assert values["removed_accuracy"] == 100
    assert abs(values["retained_accuracy"] - (100 - 50 / 9)) < 1e-9  # the class before loses its second row
    assert abs(values["change_of_others"] + 50 / 9) < 1e-9
