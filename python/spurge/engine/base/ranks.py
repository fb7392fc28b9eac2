"""Which of the processes that torchrun started this one is, and what can go wrong between them. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class ProcessRank:
    """The number of this process among those of a job, and how many they are.

    Attributes:
        rank: its number, from 0.
        size: how many ranks there are.
        local_rank, local_size: the same among the ranks of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> ProcessRank:
        """As torchrun's environment variables have it; without them the only rank of its job.

        Raises:
            ValueError: a variable is no whole number.
        """
        if not all(name in os.environ for name in _VARIABLES):
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        numbers = []
        for name, default in zip(names, (0, 1, 0, 1), strict=True):
            text = os.environ.get(name, str(default))
            if not text.isdecimal():
                raise ValueError(f"{name}: expected a whole number in the environment, got {text!r}")
            numbers.append(int(text))
        return cls(*numbers)


class RankError(RuntimeError):
    """The job cannot go on because of another rank."""


class RankLost(RankError):
    """A rank was killed, was signalled to end, or did not answer in time.

    Attributes:
        rank: which one; None where the ranks never met.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class RankFailed(RankError):
    """A rank raised an error; the message has its number, and the error's class and text."""
