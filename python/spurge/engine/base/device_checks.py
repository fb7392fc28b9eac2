"""Checks of numbers on a device that need not wait for it: kept while work is queued, looked at when results are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

from spurge.engine.base.temporary import temporary

Check = tuple[Tensor, Callable[[], str]]  # a bool scalar, and the message of the error where it is false

_kept: ContextVar[list[Check] | None] = ContextVar("kept", default=None)


def require(holds: Tensor, complaint: Callable[[], str]) -> None:
    """Raises ``ValueError(complaint())`` unless ``holds`` (bool, one number): now, or where a block defers it."""
    kept = _kept.get()
    if kept is None:
        settle([(holds, complaint)])
    else:
        kept.append((holds, complaint))


def deferring() -> bool:
    """Whether a block keeps checks: nothing in it should wait for the device."""
    return _kept.get() is not None


def settle(checks: list[Check]) -> None:
    """Looks at checks, which waits for their device.

    Raises:
        ValueError: one does not hold.
    """
    for holds, complaint in checks:
        if not bool(holds):
            raise ValueError(complaint())


@temporary
def deferred() -> Iterator[list[Check]]:
    """The checks that the block meets are kept, not looked at."""
    kept: list[Check] = []
    token = _kept.set(kept)
    yield kept
    _kept.reset(token)
