"""The theorems' checks, on few draws."""

from __future__ import annotations

import pytest

from experiments import theory


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_follow_the_spurious_pull(seed: int):
    found = theory.sensitivity(seed)
    assert found["correlation"] > 0.9
    assert found["slope"] == pytest.approx(1, abs=0.15)
    assert found["same_sign_rate"] > 0.85


def test_the_edit_of_one_weight_turns_the_normal_by_a_right_angle():
    found = theory.orthogonality(0)
    assert found == {"cosine": pytest.approx(0, abs=1e-12), "weights moved": 1}


def test_units_that_fire_for_fewer_classes_are_worth_more():
    assert theory.classes_of_units(0)["classes that fire"] < -0.8
