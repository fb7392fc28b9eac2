"""The device of a rank, and groups of processes that are left again, whatever happens inside."""

from __future__ import annotations

from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

from spurge.engine.base.ranks import ProcessRank, RankLost
from spurge.engine.base.temporary import Temporaries

_JOINED = count()  # how often this process has joined the others


def own_device(device: torch.device | str | None, process: ProcessRank) -> torch.device:
    """The device of one rank: its own GPU, where only ``"cuda"`` was given.

    Raises:
        ValueError: a device that this machine does not have.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        own = torch.device(device)
        if own.type == "cuda" and own.index is None and process.size > 1:
            own = torch.device("cuda", process.local_rank)
        torch.empty(0, device=own)
    except (RuntimeError, AssertionError) as error:
        which = f"{str(device)!r}" + (f" of rank {process.rank}" if process.size > 1 else "")
        raise ValueError(f"device: {which} cannot be used here: {error}") from error
    return own


def join_all(changes: Temporaries, device: torch.device, process: ProcessRank, timeout: float) -> None:
    """Joins torch.distributed's default group, None in its functions, until the block of ``changes`` ends.

    Raises:
        RankLost: not all ranks came within ``timeout`` seconds.
    """
    if device.type == "cuda":
        changes.callback(torch.cuda.set_device, torch.cuda.current_device())
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    wait = timedelta(seconds=timeout)
    changes.callback(_leave_all)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        # A prefix of its own each time: what an earlier group left in the store would be taken for this one's.
        store = dist.PrefixStore(f"spurge/{next(_JOINED)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    except RuntimeError:
        raise RankLost(f"not all {process.size} ranks came within {timeout:g} s") from None


def _leave_all() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def join_beside(changes: Temporaries, timeout: float) -> dist.ProcessGroup:
    """A gloo group beside the one that the caller made, until the block of ``changes`` ends.

    Raises:
        RankLost: as :func:`join_all`.
    """
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError:
        raise RankLost(f"not all {dist.get_world_size()} ranks came within {timeout:g} s") from None
    changes.callback(dist.destroy_process_group, group)
    return group
