"""Signals at the edges of temporary changes: none is lost, none is kept for later, and nothing stays changed."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Iterator

import pytest

from spurge.engine.base import temporary as module
from spurge.engine.base.temporary import shielded, temporary, uncut, within


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_second_signal_while_a_block_that_was_cut_is_undone_raises_there() -> None:
    done: list[str] = []

    @temporary
    def change() -> Iterator[None]:
        interrupt()
        done.append("changed")
        yield
        interrupt()
        done.append("undone")

    with pytest.raises(KeyboardInterrupt), change():
        done.append("not reached")
    assert done == ["changed", "undone"]
    assert not module._waiting  # else it would raise in the next block that is left
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("strikes", [1, 2])
def test_a_signal_as_handlers_are_put_back_undoes_the_step(monkeypatch: pytest.MonkeyPatch, strikes: int) -> None:
    """Behind the last check for waiting signals: the step is done, and who called it has no handle of it yet."""
    real, left, state = module.set_handler, [strikes], ["as it was"]

    def put(which: int, handler: object) -> None:
        real(which, handler)  # type: ignore[arg-type]
        if handler is signal.default_int_handler and left[0]:
            left[0] -= 1
            interrupt()

    monkeypatch.setattr(module, "set_handler", put)
    with pytest.raises(KeyboardInterrupt):
        uncut(lambda: state.append("changed"), lambda: state.remove("changed"))
    assert state == ["as it was"]
    assert not module._waiting
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_an_object_is_freed_is_not_lost() -> None:
    freed: list[str] = []

    @shielded
    def gone(reference: object) -> None:
        interrupt()
        freed.append("gone")

    class Thing:
        pass

    class Block:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    def free_one() -> None:
        thing = Thing()
        reference = weakref.ref(thing, gone)
        with within(Block()):
            del thing
            assert freed == ["gone"]
            assert reference() is None

    with pytest.raises(KeyboardInterrupt):
        free_one()
