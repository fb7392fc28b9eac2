"""Ctrl-C at every place of a call where Python looks at signals, one after the other."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Cut(KeyboardInterrupt):
    """The Ctrl-C of a test."""


def cuts(call: Callable[[], Any], *, every: int = 1) -> Iterator[int]:
    """Runs ``call`` once for each place and yields after it; the last run is not cut off.

    Places are those at which functions begin and calls of C functions end: there, and where loops jump back, Python
    looks at signals.

    Args:
        every: only each so many-th place.
    """
    number = 0
    while _cut_at(call, number):
        yield number
        number += every
    yield number


def _cut_at(call: Callable[[], Any], number: int) -> bool:
    """Whether ``call`` has so many places, at the last of which a SIGINT has come."""
    seen = 0

    def handler(which: int, frame: FrameType | None) -> None:
        raise Cut

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal seen
        if event in ("call", "c_return") and seen <= number:
            seen += 1
            if seen > number:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, handler)
    try:
        sys.setprofile(look)
        call()
    except Cut:
        pass
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, before)
    return seen > number
