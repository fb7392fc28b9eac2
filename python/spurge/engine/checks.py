"""Checks of arguments that several modules share; each error names the argument, the rule and what came."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def integer(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``; TypeError for another type or bool, ValueError if below."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    value = value.__index__()
    if value < least:
        raise ValueError(f"{name}: need at least {least}, got {value}")
    return value


def share_of(name: str, value: Any) -> float:
    """``value`` as a float in (0, 1]; TypeError for no number, ValueError outside."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = float(value)
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a number above 0 and at most 1, got {value}")
    return value


def number(name: str, value: Any, least: float | None = None) -> float:
    """``value`` as a finite float of at least ``least``; TypeError for no number or bool, ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: must be finite, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")
    return value
