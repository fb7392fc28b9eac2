"""The one-weight tilt: orthogonality, Eq. 7 and 8, and the closed form between rate and angle, both ways."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.methods.fcr.orthogonal import angle_of_rate, orthogonal_weight, pull, rate_of_angle, tilted_weight

# Of ordinary size: products of the extremes stay far from the limits of float64.
ROWS = st.lists(st.floats(-30, 30).filter(lambda w: abs(w) > 1e-3), min_size=1, max_size=40)


def normals(row: torch.Tensor, index: int, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normals (w, -1) of the hyperplane before and after."""
    before = torch.cat([row.double(), torch.tensor([-1.0], dtype=torch.float64)])
    after = before.clone()
    after[index] = weight
    return before, after


@settings(max_examples=100, deadline=None)
@given(ROWS, st.data())
def test_rate_one_is_orthogonal(values, data):
    index = data.draw(st.integers(0, len(values) - 1))
    row = torch.tensor(values, dtype=torch.float64)
    before, after = normals(row, index, orthogonal_weight(row, index))
    assert abs(float(before @ after)) <= 1e-12 * float((before * after).abs().sum())
    assert tilted_weight(row, index, 1.0) == orthogonal_weight(row, index)
    assert tilted_weight(row, index, 0.0) == float(row[index])
    # The literal Eq. 7, which loses digits where one weight is most of the norm.
    literal = -(float(row.square().sum()) - values[index] ** 2 + 1) / values[index]
    assert orthogonal_weight(row, index) == pytest.approx(literal, rel=1e-8, abs=1e-8)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.floats(0, 3), st.data())
def test_angle_and_rate_are_inverse(values, rate, data):
    index = data.draw(st.integers(0, len(values) - 1))
    row = torch.tensor(values, dtype=torch.float64)
    angle = angle_of_rate(row, index, rate)
    before, after = normals(row, index, tilted_weight(row, index, rate))
    cosine = float(before @ after) / float(before.norm() * after.norm())
    assert math.degrees(math.acos(max(-1, min(1, cosine)))) == pytest.approx(angle, abs=2e-5)  # acos near 0 and 180
    assert rate_of_angle(row, index, angle) == pytest.approx(rate, rel=1e-9, abs=1e-12)
    ratio = (float(row.square().sum()) + 1) / values[index] ** 2
    stated = (1 - rate) / math.sqrt(1 - 2 * rate + rate**2 * ratio)
    assert cosine == pytest.approx(stated, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.floats(0, 90), st.data())
def test_rate_of_an_angle(values, angle, data):
    index = data.draw(st.integers(0, len(values) - 1))
    row = torch.tensor(values, dtype=torch.float64)
    rate = rate_of_angle(row, index, angle)
    assert 0 <= rate <= 1
    assert angle_of_rate(row, index, rate) == pytest.approx(angle, rel=1e-9, abs=1e-9)


def test_the_weight_moves_by_the_pull():
    row = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    for rate in (0.0, 0.13, 1.0, 1.7):
        assert tilted_weight(row, 1, rate) == pytest.approx(-1.2 + rate * pull(row, 1), rel=1e-14)


def test_most_of_the_tilt_is_at_small_rates():
    row = torch.zeros(500, dtype=torch.float64)
    row[0], row[1] = 0.05, math.sqrt(0.35 - 0.05**2)  # N / w^2 = 540, a row of a ResNet-50
    for rate, angle in ((0.02, 25), (0.13, 74), (0.65, 89), (1.0, 90)):
        assert angle_of_rate(row, 0, rate) == pytest.approx(angle, abs=0.6)


def test_a_single_weight():
    row = torch.tensor([2.0])
    assert orthogonal_weight(row, 0) == -0.5
    assert rate_of_angle(row, 0, 90) == 1.0


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda r: orthogonal_weight(r, 1), "weight 1 is 0"),
        (lambda r: orthogonal_weight(r, 3), "below 3"),
        (lambda r: orthogonal_weight(r, -1), "at least 0"),
        (lambda r: orthogonal_weight(r[None], 0), "row: expected"),
        (lambda r: tilted_weight(r, 0, -0.1), "rate: expected a finite number from 0, got -0.1"),
        (lambda r: tilted_weight(r, 0, math.nan), "rate: expected"),
        (lambda r: angle_of_rate(r, 0, math.inf), "rate: expected"),
        (lambda r: rate_of_angle(r, 0, -1), "angle: expected"),
        (lambda r: rate_of_angle(r, 0, 179.9), "angle: expected 0 up to below"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.tensor([0.5, 0.0, 1.0]))


def test_wrong_types():
    with pytest.raises(TypeError, match="rate: expected a number"):
        tilted_weight(torch.ones(2), 0, "1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="index"):
        orthogonal_weight(torch.ones(2), 0.5)  # type: ignore[arg-type]
