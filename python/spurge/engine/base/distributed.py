"""Work that several processes, *ranks*, share: started by torchrun, connected by torch.distributed.

There is one pattern: every rank sends a message to rank 0, which replies to each of them. Rank 0 waits for one rank
at a time and so can name the one it missed, which torch's collectives cannot. Where a rank raises, its error goes out
in place of its next message and comes back to all others as the reply, so that nobody waits for what will not come.

Messages are JSON and CPU tensors, packed as safetensors; nothing is pickled. They travel by gloo on machines with GPUs
too: they are small, and NCCL answers a lost rank by ending the process where gloo raises an error.
"""

from __future__ import annotations

import io
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from spurge.engine.base.checks import number
from spurge.engine.base.process_groups import join_all, join_beside, own_device
from spurge.engine.base.ranks import ProcessRank, RankError, RankFailed, RankLost
from spurge.engine.base.temporary import Temporaries, handler_of, replace_handler, temporary
from spurge.engine.base.tensor_files import pack, unpack

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ALONE", "Message", "RankError", "RankFailed", "RankLost", "Ranks"]

TIMEOUT = 1800.0
"""Seconds that an exchange waits for the slowest rank."""

_MESSAGE, _FAILURE = 0, 1  # kinds of what is sent
_LONGEST = 2**31 - 1  # bytes of a message; a rank that announces more is out of step
_SEVERITY = ("lost", "failed", "ended")  # kinds of failure; the first of several is what all ranks report


@dataclass(frozen=True, eq=False)
class Message:
    """What one rank sends: anything that JSON can write, and tensors by name (sent as their CPU copies)."""

    facts: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Ranks:
    """The ranks of a job, as seen by one of them.

    Every method is called by all ranks in the same order; alone (``size`` 1) it costs nothing. Made by
    :meth:`from_environment` or :meth:`current`.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        device: where this rank's model belongs.
        local_size: how many of them share this machine.
        doing: what the ranks are at, in the past tense, for errors: "rank 2 of 4 stopped answering while ...".
    """

    _around: Ranks | None = None  # of the `from_environment` that this code runs in

    def __init__(
        self,
        process: ProcessRank,
        device: torch.device,
        *,
        timeout: float = TIMEOUT,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size, self.local_size, self.device = process.rank, process.size, process.local_size, device
        self.doing = "the job began"
        self._group, self._timeout = group, timeout
        self._shared: BaseException | None = None  # the error that all ranks know of
        self._busy = False  # inside an exchange; left True by an error there: the ranks are out of step then
        self._signal = 0

    # ---- joining and leaving -----------------------------------------------------------------------------------

    @classmethod
    @contextmanager
    def from_environment(cls, device: torch.device | str | None = None, timeout: float = TIMEOUT) -> Iterator[Ranks]:
        """The ranks that torchrun started, connected within the block; without torchrun, this process alone.

        Joins torch.distributed (gloo, and NCCL for tensors on GPUs) and leaves it on every way out; a process group
        that is there already is used and left as it is. Leaving waits for the other ranks: all leave well, or all with
        an error. SIGTERM, by which torchrun ends a job that lost a rank, raises here, so that the error can be named::

            with spurge.Ranks.from_environment() as ranks:
                found = macu.locate(model.to(ranks.device), tokenizer, train, golden, resume="blocks")
                if ranks.rank == 0:
                    found.save("located.safetensors")

        Args:
            device: where this rank works; ``"cuda"`` means its own GPU, the one of its number on this machine. By
                default a GPU where there is one.
            timeout: seconds that an exchange waits for the slowest rank.

        Raises:
            ValueError: a timeout that is negative or not finite, or a device that this machine does not have.
            RankLost: another rank was killed, was signalled to end, or did not answer in time.
            RankFailed: another rank raised an error.
        """
        timeout = number("timeout", timeout, 0)
        process, foreign = ProcessRank.from_environment(), dist.is_available() and dist.is_initialized()
        if foreign:
            process = replace(process, rank=dist.get_rank(), size=dist.get_world_size())
        own = own_device(device, process)
        if process.size == 1:
            yield cls(process, own)
            return
        with Temporaries() as changes:
            group = None
            if foreign:
                group = join_beside(changes, timeout)
            else:
                join_all(changes, own, process, timeout)
            ranks = cls(process, own, timeout=timeout, group=group)
            changes.enter_context(ranks._deferring_signals())
            changes.callback(setattr, Ranks, "_around", Ranks._around)
            Ranks._around = ranks
            with ranks._together():
                yield ranks

    @classmethod
    @contextmanager
    def current(cls, mesh: DeviceMesh | None = None) -> Iterator[Ranks]:
        """The ranks this process works with: those of :meth:`from_environment` around the call, those of the process
        group that torch.distributed has, or itself alone. An error that leaves the block on one rank leaves it on all.

        Args:
            mesh: the ranks that hold the model together (tensor parallelism), if any: they run the same rows and share
                no work, so each counts as alone.

        Raises:
            RankLost, RankFailed: as :meth:`from_environment`.
        """
        if mesh is not None:
            yield ALONE
        elif cls._around is not None:
            with cls._around._together():
                yield cls._around
        elif dist.is_available() and dist.is_initialized():
            with cls.from_environment() as ranks:
                yield ranks
        else:
            yield ALONE

    # ---- exchanges ---------------------------------------------------------------------------------------------

    def gather(self, message: Message) -> list[Message]:
        """The messages of all ranks, in their order, on rank 0; nothing elsewhere.

        Raises:
            RankLost, RankFailed: as :meth:`from_environment`; so do all exchanges.
        """
        kept: list[Message] = []

        def keep(messages: list[Message]) -> Message:
            kept.extend(messages)
            return Message()

        self._exchange(message, keep)
        return kept

    def broadcast(self, message: Message) -> Message:
        """The message of rank 0, on every rank; what the others give is not sent."""
        return self._exchange(message if self.rank == 0 else Message(), lambda messages: messages[0])

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor of the same shape over the ranks, in their order; on the CPU, the same on every rank."""

        def added(messages: list[Message]) -> Message:
            total = messages[0].tensors["sum"].clone()
            for message in messages[1:]:
                total += message.tensors["sum"]
            return Message(None, {"sum": total})

        return self._exchange(Message(None, {"sum": tensor.cpu()}), added).tensors["sum"]

    def agree(self, name: str, value: Any) -> None:
        """Makes sure that all ranks were given the same.

        Args:
            name: what it is, for the error.
            value: anything that JSON can write.

        Raises:
            ValueError, RankFailed: they were not.
        """

        def compare(messages: list[Message]) -> Message:
            for rank, message in enumerate(messages):
                if message.facts != messages[0].facts:
                    raise ValueError(
                        f"{name}: must be the same on all ranks, rank 0 has {messages[0].facts!r}, rank {rank} has "
                        f"{message.facts!r}"
                    )
            return Message()

        self._exchange(Message(value), compare)

    def _exchange(self, message: Message, combine: Callable[[list[Message]], Message]) -> Message:
        """Everyone's message to rank 0, which combines them into the reply that all get."""
        if self.size == 1:
            return combine([message])
        self._shared = None
        packed = _packed(message) if self.rank > 0 else bytearray()
        with self._exchanging():
            if self.rank > 0:
                kind, reply = self._request(_MESSAGE, packed)
                if kind == _FAILURE:
                    raise self._error_of(reply.facts)
                return reply
            messages, failure = self._collect([])
            if failure is not None:
                self._reply(_FAILURE, _packed(Message(failure)))
                raise self._error_of(failure)
            try:
                reply = combine([message, *messages])
                packed = _packed(reply)
            except Exception as error:
                self._shared = error
                self._reply(_FAILURE, _packed(Message(self._described(error))))
                raise
            self._reply(_MESSAGE, packed)
            return reply

    # ---- errors ------------------------------------------------------------------------------------------------

    @contextmanager
    def _together(self) -> Iterator[None]:
        """An error that leaves the block on one rank leaves it on all of them."""
        try:
            yield
            self._exchange(Message(), lambda _: Message())
        except BaseException as error:
            if error is self._shared or self._busy:  # known to all, or out of step: then connections close
                raise
            ended = self._signal and isinstance(error, (KeyboardInterrupt, SystemExit))
            severest = self._report(error)
            if ended and isinstance(severest, RankError):  # the signal came because of that other rank
                raise severest from None
            self._shared = error
            raise

    def _report(self, error: BaseException) -> BaseException:
        """Sends ``error`` in place of the next message. Returns the severest error of all ranks, as this one has it."""
        self._shared, failure = error, self._described(error)
        try:
            with self._exchanging():
                if self.rank > 0:
                    failure = self._request(_FAILURE, _packed(Message(failure)))[1].facts
                else:
                    failure = self._collect([failure])[1] or failure
                    self._reply(_FAILURE, _packed(Message(failure)))
        except RankLost as lost:
            return lost
        return error if failure["rank"] == self.rank else self._error_of(failure)

    def _described(self, error: BaseException) -> dict[str, Any]:
        """An error of this rank as the others receive it."""
        ended = isinstance(error, (KeyboardInterrupt, SystemExit))
        text = signal.Signals(self._signal).name if ended and self._signal else type(error).__name__
        return {
            "kind": "ended" if ended else "failed",
            "rank": self.rank,
            "text": text if ended else f"{text}: {error}",
        }

    def _error_of(self, failure: dict[str, Any]) -> BaseException:
        """The error that this rank raises for the failure of another."""
        who = f"rank {failure['rank']} of {self.size}"
        error: BaseException
        if failure["kind"] == "failed":
            error = RankFailed(f"{who}: {failure['text']}")
        elif failure["kind"] == "lost":
            error = RankLost(f"{who} {failure['text']} while {self.doing}", failure["rank"])
        elif self._signal:
            error = _of_signal(self._signal)
        else:
            error = RankLost(f"{who} was ended ({failure['text']}) while {self.doing}", failure["rank"])
        self._shared = error
        return error

    @temporary
    def _deferring_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT raise within the block, but never in the middle of an exchange."""
        if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
            yield
            return

        usual: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

        def note(signum: int, frame: FrameType | None) -> None:
            self._signal = signum
            if self._shared is not None:  # an error is on its way out: not cut off, but a second signal is obeyed
                replace_handler(signum, usual[signum])
            elif not self._busy:
                raise _of_signal(signum)

        mine = [signum for signum, handler in usual.items() if handler_of(signum) == handler]
        for signum in mine:
            replace_handler(signum, note)
        yield
        awaited = self._shared is not None  # an error that all know of: torchrun's SIGTERM is still to come
        for signum in mine:
            if not awaited or signum == signal.SIGINT:
                replace_handler(signum, usual[signum])

    # ---- transport ---------------------------------------------------------------------------------------------

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Signals wait until the block is done. What leaves it and is not known to all leaves the ranks out of step."""
        self._busy = True
        try:
            yield
        except BaseException as error:
            self._busy = error is not self._shared
            raise
        self._busy = False
        if self._signal and self._shared is None:
            raise _of_signal(self._signal)

    def _request(self, kind: int, packed: bytearray) -> tuple[int, Message]:
        """Sends to rank 0 and receives its reply."""
        try:
            self._send(0, kind, packed)
            return self._receive(0, 2 * self._timeout)  # rank 0 may itself wait that long for another rank
        except RuntimeError as error:
            raise self._error_of({"kind": "lost", "rank": 0, "text": _cause(error)}) from None

    def _collect(self, failures: list[dict[str, Any]]) -> tuple[list[Message], dict[str, Any] | None]:
        """On rank 0: what the others sent, and the severest of the failures, theirs and those given."""
        messages = []
        for rank in range(1, self.size):
            try:
                kind, message = self._receive(rank, self._timeout)
            except RuntimeError as error:
                failures.append({"kind": "lost", "rank": rank, "text": _cause(error)})
                continue
            if kind == _FAILURE:
                failures.append(message.facts)
            else:
                messages.append(message)
        return messages, min(failures, key=lambda failure: _SEVERITY.index(failure["kind"]), default=None)

    def _reply(self, kind: int, packed: bytearray) -> None:
        for rank in range(1, self.size):
            # A rank lost here is found missing by the next exchange; after the last one it is not missed.
            with suppress(RuntimeError):
                self._send(rank, kind, packed)

    def _send(self, rank: int, kind: int, packed: bytearray) -> None:
        for part in (torch.tensor([kind, len(packed)]), torch.frombuffer(packed, dtype=torch.uint8)):
            _wait(dist.isend(part, rank, group=self._group), self._timeout)

    def _receive(self, rank: int, timeout: float) -> tuple[int, Message]:
        head = torch.zeros(2, dtype=torch.int64)
        _wait(dist.irecv(head, rank, group=self._group), timeout)
        kind, size = head.tolist()
        if kind not in (_MESSAGE, _FAILURE) or not 0 < size <= _LONGEST:
            raise RuntimeError(f"announced {size} bytes of kind {kind}, which no message has")
        packed = torch.empty(size, dtype=torch.uint8)
        _wait(dist.irecv(packed, rank, group=self._group), timeout)
        return kind, _unpacked(packed.numpy().tobytes())


ALONE = Ranks(ProcessRank(), torch.device("cpu"))
"""One process that shares its work with no other."""


def _wait(work: dist.Work | None, timeout: float) -> None:
    assert work is not None  # this rank belongs to the group
    work.wait(timedelta(seconds=timeout))


def _packed(message: Message) -> bytearray:
    """The bytes of a message; ValueError where they are more than one may have."""
    facts = json.dumps(message.facts)
    size = len(facts) + sum(tensor.nbytes for tensor in message.tensors.values())
    if size > _LONGEST:
        raise ValueError(f"message: ranks send at most {_LONGEST} bytes at once, got {size}; give smaller blocks")
    return bytearray().join(pack(message.tensors, {"facts": facts}))


def _unpacked(packed: bytes) -> Message:
    tensors, texts = unpack(io.BytesIO(packed))
    return Message(json.loads(texts["facts"]), tensors)


def _cause(error: RuntimeError) -> str:
    """What gloo's error means, without its file names and line numbers."""
    return "did not answer in time" if "imed out" in str(error) else "stopped answering"


def _of_signal(signum: int) -> BaseException:
    return KeyboardInterrupt() if signum == signal.SIGINT else SystemExit(128 + signum)
