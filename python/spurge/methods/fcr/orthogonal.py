r"""One weight of a linear layer moved until its hyperplane is tilted by a given angle (FCR Theorem 2, Eq. 7 and 8).

The hyperplane of output i is the graph of :math:`y = w \cdot x + b`, with normal :math:`n = (w, -1)`. Moving weight j
by :math:`-r N / w_j`, :math:`N = \|w\|^2 + 1`, gives :math:`n' \cdot n = (1 - r) N` and

.. math:: \tan\theta = \frac{r \sqrt{K - 1}}{1 - r}, \qquad K = N / w_j^2

so rate 1 is orthogonal, and most of the tilt happens at small rates where K is large. Everything here is float64.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from spurge.engine.base.checks import integer


def orthogonal_weight(row: Tensor, index: int) -> float:
    r"""The weight that makes the hyperplane orthogonal to what it was (Eq. 7).

    .. math:: f(w_j) = -\frac{\|w\|^2 - w_j^2 + 1}{w_j}

    Args:
        row: weights of one output, floating ``[M]``.
        index: j.

    Raises:
        ValueError: the weight is 0: no weight along that axis is a solution.

    >>> import torch
    >>> orthogonal_weight(torch.tensor([0.5, 2.0]), 0)
    -10.0
    """
    weight, rest = _parts(row, index)
    return -rest / weight


def tilted_weight(row: Tensor, index: int, rate: float) -> float:
    """The weight at rate r (Eq. 8): ``r f(w_j) + (1 - r) w_j``; 0 leaves it, 1 is :func:`orthogonal_weight`.

    Raises:
        ValueError: the weight is 0, or a rate that is negative or not finite.
    """
    weight, rest = _parts(row, index)
    rate = checked_rate(rate)
    return rate * (-rest / weight) + (1 - rate) * weight


def pull(row: Tensor, index: int) -> float:
    r"""What rate 1 adds to the weight, :math:`-N / w_j`: logit i moves by this times the rate times :math:`x_j`."""
    weight, rest = _parts(row, index)
    return -(rest + weight * weight) / weight


def angle_of_rate(row: Tensor, index: int, rate: float) -> float:
    """Degrees between the hyperplane and what it was, for a rate; 90 at rate 1, above that beyond."""
    weight, rest = _parts(row, index)
    rate = checked_rate(rate)
    return math.degrees(math.atan2(rate * math.sqrt(rest) / abs(weight), 1 - rate))


def rate_of_angle(row: Tensor, index: int, angle: float) -> float:
    """The rate that tilts the hyperplane by ``angle`` degrees; the inverse of :func:`angle_of_rate`.

    Raises:
        ValueError: the weight is 0, or an angle that is negative or that no rate reaches.
    """
    weight, rest = _parts(row, index)
    root = math.sqrt(rest) / abs(weight)
    angle = _number("angle", angle)
    most = 180 - math.degrees(math.atan(root))  # of an infinite rate
    if not 0 <= angle < most:
        raise ValueError(f"angle: expected 0 up to below {most:.4g} degrees for this weight, got {angle}")
    if angle == 90:
        return 1.0
    radians = math.radians(angle)
    return math.sin(radians) / (math.sin(radians) + root * math.cos(radians))


def checked_rate(rate: Any) -> float:
    """``rate`` as a float; ValueError where it is negative or not finite."""
    rate = _number("rate", rate)
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate: expected a finite number from 0, got {rate}")
    return rate


def _parts(row: Tensor, index: int) -> tuple[float, float]:
    """The weight, and what the others and the -1 of the normal add to N, without cancellation."""
    if not isinstance(row, Tensor) or not row.is_floating_point() or row.dim() != 1 or not row.numel():
        raise ValueError("row: expected the weights of one output, a floating tensor [M]")
    index = integer("index", index, 0)
    if index >= row.numel():
        raise ValueError(f"index: expected a value below {row.numel()}, got {index}")
    wide = row.detach().double()
    weight = float(wide[index])
    if weight == 0:
        raise ValueError(f"index: weight {index} is 0, and no weight along its axis makes the hyperplane orthogonal")
    others = wide.clone()
    others[index] = 0
    return weight, float(others.square().sum()) + 1


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)
