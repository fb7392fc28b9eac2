"""Temporary changes to a model or to the process: what they change comes back, wherever Ctrl-C falls.

Python runs the handler of a signal between any two of its instructions: also between a change and the note that it was
made, and when ``__exit__`` has been called but has not begun. A ``with`` block of this module therefore holds signals
back while it is entered and left; they raise right after that, with everything undone, and at once inside the block.
How: from the outermost block on, handlers are wrapped. A wrapped one looks at the frames that it interrupts, and waits
where one of them enters or leaves such a block. Handlers run in the main thread alone, so others need nothing of that.

Blocks nest; where one part of an undoing raises, all other parts are still undone. What must not be changed this way:
anything that takes long to enter or to leave, for Ctrl-C would have to wait for it.
"""

from __future__ import annotations

import functools
import inspect
import signal
import threading
from _signal import getsignal  # signal's own wrappers of these two take ten times as long, looking for enums
from _signal import signal as set_handler
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import CodeType, FrameType
from typing import Any, Generic, Literal, ParamSpec, TypeVar

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

_SIGNALS = (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)  # whose handlers are known to raise
_POLL = 0.05  # seconds between looks at waiting signals while a lock is awaited

_waiting: dict[int, Callable[..., Any]] = {}  # signals that came at a bad time, and their handlers
_shielded: set[CodeType] = set()  # frames that must run to their end


class _Deferring:
    """A handler that waits where nothing may come between."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        self.handler = handler

    def __call__(self, which: int, frame: FrameType | None) -> None:
        if _inside_shield(frame):
            _waiting[which] = self.handler
        else:
            self.handler(which, frame)


def _inside_shield(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _shielded:
            return True
        frame = frame.f_back
    return False


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _hold() -> list[int]:
    """Wraps the handlers that are not wrapped yet; returns whose."""
    held: list[int] = []
    if not _in_main_thread():
        return held
    try:
        for which in _SIGNALS:
            handler = getsignal(which)
            if callable(handler) and not isinstance(handler, _Deferring):
                held.append(which)
                set_handler(which, _Deferring(handler))  # raises first what came before
    except BaseException:
        _unwrap(held)
        raise
    return held


def _unwrap(held: list[int]) -> None:
    """Puts the handlers back, but where the block has set others."""
    if held and _in_main_thread():
        for which in held:
            handler = getsignal(which)
            if isinstance(handler, _Deferring):
                set_handler(which, handler.handler)


def _release(held: list[int]) -> None:
    """Puts the handlers back, and runs those that wait."""
    try:
        _unwrap(held)
    finally:
        if _waiting:
            _deliver(2)


def _deliver(above: int) -> None:
    """Runs the handlers that wait, unless a frame beyond the nearest ``above`` ones holds them, too."""
    frame = inspect.currentframe()
    for _ in range(above + 1):
        frame = frame.f_back if frame is not None else None
    if _in_main_thread() and not _inside_shield(frame):
        _run_waiting(frame)


def _run_waiting(frame: FrameType | None) -> None:
    while _waiting:
        which, handler = _waiting.popitem()
        handler(which, frame)


class Temporary(ABC, Generic[Result]):
    """A change for a ``with`` block. Made by a generator function under :func:`temporary`, or by a class of its own."""

    def __init__(self) -> None:
        self._entered: list[tuple[Iterator[Result], list[int]]] = []

    @abstractmethod
    def _begin(self) -> Iterator[Result]:
        """Up to its ``yield`` it changes something, after that it undoes it."""

    def __enter__(self) -> Result:
        held = _hold()
        steps = self._begin()
        try:
            value = next(steps)
        except BaseException:
            _release(held)
            raise
        self._entered.append((steps, held))
        if not _waiting:
            return value  # from here to the block Python looks at no signal
        try:
            _deliver(1)
        except BaseException:
            try:
                self.__exit__()
            finally:
                if _waiting:
                    _deliver(1)
            raise
        return value

    def __exit__(self, *error: object) -> None:
        steps, held = self._entered.pop()
        try:
            next(steps, None)
        finally:
            _release(held)


class _Generated(Temporary[Result]):
    def __init__(self, begin: Callable[[], Iterator[Result]]) -> None:
        super().__init__()
        self._generate = begin

    def _begin(self) -> Iterator[Result]:
        return self._generate()


def temporary(function: Callable[Parameters, Iterator[Result]]) -> Callable[Parameters, Temporary[Result]]:
    """Makes a context manager of a generator: up to its ``yield`` it changes something, after that it undoes it.

    As ``contextlib.contextmanager``, but for what is said in the module's docstring, and errors of the block do not
    appear at the ``yield``: what follows it runs in any case, and never swallows them.
    """

    @functools.wraps(function)
    def made(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Temporary[Result]:
        return _Generated(functools.partial(function, *args, **kwargs))

    return made


@temporary
def within(context: AbstractContextManager[Result]) -> Iterator[Result]:
    """A context manager of another library, such as ``torch.no_grad()``, entered and left whole."""
    with context as value:
        yield value


class Temporaries(ExitStack):
    """Several temporary changes, undone in reverse order.

    To note an undoing before its change is begun, give ``callback`` one that does no harm without it.
    """

    def __enter__(self) -> Temporaries:
        self._held = _hold()
        if not _waiting:
            return self
        try:
            _deliver(1)
        except BaseException:
            _release(self._held)
            raise
        return self

    def enter_context(self, cm: AbstractContextManager[Result]) -> Result:
        """As that of ``ExitStack``: the value of ``cm``, which is left when the block is."""
        value = super().enter_context(cm)
        if _waiting:
            _deliver(1)
        return value

    def __exit__(self, *error: Any) -> Literal[False]:
        try:
            super().__exit__(*error)
        finally:
            _release(self._held)
        return False


def uncut(step: Callable[[], Result], back: Callable[[], object] = lambda: None) -> Result:
    """``step()``, which no signal cuts; where it raises, or one of those that waited does, ``back()`` undoes it.

    A function whose last call this is, and which then returns a handle of what was done, returns it or raises with all
    undone: from CPython 3.11 on, no signal is looked at between here and the name that its caller gives the handle.

    Args:
        back: does no harm where ``step`` has not begun.
    """
    held: list[int] = []
    try:
        held = _hold()
        value = step()
        if _waiting:
            _deliver(1)
        _release(held)
        return value
    except BaseException:
        try:
            held = [*held, *_hold()]  # those that were put back when the signal came
        finally:
            try:
                back()
            finally:
                _release(held)
        raise


def shielded(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function itself; in blocks of this module signals wait until it has ended and the innermost block is left.

    For what Python calls when an object is freed: it drops errors there, and with them a Ctrl-C.
    """
    _shielded.add(function.__code__)  # type: ignore[attr-defined]
    return function


def acquire(lock: Any) -> None:
    """Waits for a lock, which Ctrl-C may cut also while signals are held back: nothing is to be undone yet.

    Args:
        lock: a ``threading`` lock.
    """
    while not lock.acquire(timeout=_POLL):
        if _waiting and _in_main_thread():
            _run_waiting(inspect.currentframe())


def every(step: Callable[[Any], object], values: Iterable[Any]) -> None:
    """``step(value)`` of every value, also behind one that raises; the first error is raised at the end."""
    first = None
    for value in values:
        try:
            step(value)
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


def handler_of(which: int) -> Any:
    """The handler of a signal, as ``signal.getsignal`` gives it outside of all blocks."""
    handler = getsignal(which)
    return handler.handler if isinstance(handler, _Deferring) else handler


def replace_handler(which: int, handler: Any) -> None:
    """As ``signal.signal``, inside a block that holds back the new handler, too."""
    signal.signal(which, _Deferring(handler) if callable(handler) and which in _SIGNALS else handler)


_shielded |= {
    method.__code__
    for method in (
        Temporary.__enter__,
        Temporary.__exit__,
        Temporaries.__enter__,
        Temporaries.enter_context,
        Temporaries.__exit__,
        uncut,
    )
}
