"""Checks of arguments that several modules share: errors name the argument, the rule and what came; and warnings."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

_Choice = TypeVar("_Choice")
_Kind = TypeVar("_Kind")
_PACKAGE = __name__.partition(".")[0]


def integer(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``; TypeError for another type or bool, ValueError if below."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    value = value.__index__()
    if value < least:
        raise ValueError(f"{name}: need at least {least}, got {value}")
    return value


def choice(name: str, value: _Choice, allowed: Iterable[object]) -> _Choice:
    """``value``, once it is one of ``allowed``; ValueError otherwise.

    >>> choice("rule", "simpson", ("legendre", "radau"))
    Traceback (most recent call last):
    ValueError: rule: expected one of legendre, radau, got 'simpson'
    """
    if value not in (known := list(allowed)):
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")
    return value


def device_of(name: str, value: Any) -> torch.device:
    """The device that ``value`` names (``"cuda"``, ``"cuda:1"``, a `torch.device`), once a tensor can be made there.

    Raises:
        TypeError: another type.
        ValueError: no such device.
    """
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name}: expected a device or its name, got {type(value).__name__}")
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name}: {str(value)!r} cannot be used here: {error}") from error
    return device


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


def instance(name: str, value: Any, kind: type[_Kind]) -> _Kind:
    """``value``, once it is of the type ``kind``; TypeError otherwise."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def shaped(name: str, value: Any, dtype: torch.dtype, *shape: int | None) -> Tensor:
    """``value``, once it is a tensor of this type and shape, in which None stands for any size.

    Raises:
        TypeError: no tensor, or one of another type.
        ValueError: another shape.
    """
    if not isinstance(value, Tensor) or value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {getattr(value, 'dtype', type(value).__name__)}")
    sizes = tuple(value.shape)
    if len(sizes) != len(shape) or any(want not in (None, size) for size, want in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name}: expected shape {[size or 'any' for size in shape]}, got {list(sizes)}")
    return value


def first_not_finite(values: Tensor) -> int | None:
    """The first row of ``[N, ...]`` that holds a number that is not finite; None where all are."""
    finite = values.isfinite()
    bad = (~(finite.flatten(1).all(1) if values.dim() > 1 else finite)).nonzero()
    return int(bad[0]) if len(bad) else None


def checked_values(name: str, values: Any, width: int | None = None) -> Tensor:
    """``values`` detached, once they are finite, floating and ``[N, M]``.

    Raises:
        TypeError: no floating tensor.
        ValueError: another shape, no rows or columns, or numbers that are not finite.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name}: expected a floating tensor, got {found}")
    if values.dim() != 2 or not values.numel() or width not in (None, values.shape[1]):
        raise ValueError(f"{name}: expected shape [N, {width or 'M'}], got {tuple(values.shape)}")
    values = values.detach()
    # A float64 sum of narrower finite numbers cannot overflow, and needs no mask as large as the values.
    for row in (~values.sum(1, dtype=torch.float64).isfinite()).nonzero()[:, 0].tolist():
        bad = (~values[row].isfinite()).nonzero()[:, 0]
        if len(bad):
            raise ValueError(f"{name}: expected finite numbers, got {values[row, bad[0]]} at row {row}")
    return values


def checked_labels(name: str, labels: Any, rows: int, below: int | None = None) -> Tensor:
    """``labels`` as int64 ``[rows]`` from 0, below ``below`` where given.

    Raises:
        TypeError: no tensor of whole numbers.
        ValueError: another shape, none, or a number out of range.
    """
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: expected a tensor of whole numbers, got {found}")
    if labels.shape != (rows,) or not rows:
        raise ValueError(f"{name}: expected shape ({rows or 'N'},), got {tuple(labels.shape)}")
    labels = labels.detach().to(torch.int64)
    wrong = labels < 0 if below is None else (labels < 0) | (labels >= below)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        rule = "from 0" if below is None or labels[row] < 0 else f"below {below}"
        raise ValueError(f"{name}: expected values {rule}, got {int(labels[row])} at row {row}")
    return labels


def warn(message: str) -> None:
    """A UserWarning that names the line outside this package that led to it, however deep it comes from."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
