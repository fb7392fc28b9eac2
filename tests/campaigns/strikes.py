"""Real SIGINTs at drawn moments of a call."""

from __future__ import annotations

import ctypes
import itertools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

Mark = Callable[[str], None]
"""What a call says as each of its phases begins."""

_libc = ctypes.CDLL(None, use_errno=True)
_MONOTONIC = 1


class _Event(ctypes.Structure):
    """``struct sigevent``: which signal a timer sends."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    ]


class _Due(ctypes.Structure):
    """``struct itimerspec``: once, after a time."""

    _fields_ = [("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2)]


class Alarm:
    """A timer of the kernel that sends SIGINT: it waits for no other thread, and so strikes at any instruction."""

    def __init__(self) -> None:
        self._timer = ctypes.c_void_p()
        event = _Event(None, signal.SIGINT, 0, b"")
        if _libc.timer_create(_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def set(self, seconds: float) -> None:
        """Strikes after so many seconds; never after 0."""
        whole = int(seconds)
        due = _Due((0, 0), (whole, int((seconds - whole) * 1e9)))
        if _libc.timer_settime(self._timer, 0, ctypes.byref(due), None):
            raise OSError(ctypes.get_errno(), "timer_settime")


@dataclass
class Outcome:
    """What became of one call: how often it was struck, and its answer if it ended."""

    strikes: int = 0
    answer: Any = None
    ended: bool = False


@dataclass
class Striker:
    """Calls functions and interrupts them.

    While a call runs, a strike raises as Python's own handler does. Those that come late are dropped.
    """

    alarm: Alarm = field(default_factory=Alarm)
    left: int = 0  # strikes that may still raise
    struck: int = 0
    again: float = 0.0

    def handler(self, which: int, frame: FrameType | None) -> None:
        """The process's handler of SIGINT."""
        if self.left:
            self.left -= 1
            self.struck += 1
            if self.left:
                self.alarm.set(self.again)
            raise KeyboardInterrupt

    def durations(self, call: Callable[[Mark], Any]) -> dict[str, float]:
        """Seconds of each phase of a call, of the fastest of three."""
        fastest: dict[str, float] = {}
        for _ in range(3):
            times: list[tuple[str, float]] = []
            call(lambda phase, times=times: times.append((phase, time.perf_counter())))  # type: ignore[misc]
            times.append(("", time.perf_counter()))
            for (phase, start), (_, end) in itertools.pairwise(times):
                fastest[phase] = min(fastest.get(phase, end - start), end - start)
        return fastest

    def strike(self, call: Callable[[Mark], Any], phase: str, moment: float, *, twice: float | None) -> Outcome:
        """Calls, and strikes ``moment`` seconds after the phase has begun; ``twice``: and so long after that again."""
        outcome = Outcome()

        def mark(name: str) -> None:
            if name == phase:
                self.alarm.set(moment)

        self.struck, self.again = 0, twice or 0.0
        self.left = 2 if twice else 1
        try:
            self._call(call, mark, outcome)
        except KeyboardInterrupt:  # a second one, as the first is caught
            self.left = 0
        outcome.strikes = self.stopped().strikes
        return outcome

    def stopped(self) -> Outcome:
        """No strike is to come any more; what a call that raised an error of its own has come to."""
        self.left = 0
        self.alarm.set(0)
        return Outcome(self.struck)

    def _call(self, call: Callable[[Mark], Any], mark: Mark, outcome: Outcome) -> None:
        try:
            outcome.answer = call(mark)
            self.left = 0
            outcome.ended = True
        except KeyboardInterrupt:
            self.left = 0
