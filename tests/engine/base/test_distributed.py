"""Ranks as real processes: what they exchange, and how they end when one of them raises, is killed or hangs.

Run by torchrun, this file is the work of one rank: each job is a function that writes what its rank saw.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.torchrun import torchrun
from spurge.engine.base import distributed
from spurge.engine.base.distributed import ALONE, Message, RankError, RankFailed, RankLost, Ranks
from spurge.engine.base.ranks import ProcessRank
from spurge.engine.models.handle import input_device

TENSOR = torch.tensor([0.1, 1e8, -1e-9], dtype=torch.float64)


def test_alone_nothing_is_joined_and_nothing_changes() -> None:
    with Ranks.from_environment("cpu") as ranks, Ranks.current() as inner:
        assert (ranks.rank, ranks.size, ranks.device) == (0, 1, torch.device("cpu"))
        assert inner is ALONE
        assert not dist.is_initialized()
        message = Message({"a": [1, None]}, {"t": TENSOR})
        assert ranks.gather(message) == [message]
        assert ranks.broadcast(message) is message
        assert torch.equal(ranks.sum(TENSOR), TENSOR)
        ranks.agree("settings", [1])
    with pytest.raises(ValueError, match="device: 'moon' cannot be used here"), Ranks.from_environment("moon"):
        pass
    with pytest.raises(ValueError, match="timeout: must be at least 0"), Ranks.from_environment(timeout=-1):
        pass


def test_the_place_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert ProcessRank.from_environment() == ProcessRank()  # not torchrun's: the other variables are missing
    for name, value in {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ProcessRank.from_environment() == ProcessRank(3, 4, 1, 1)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK: expected a whole number in the environment, got 'first'"):
        ProcessRank.from_environment()


class Work:
    """A transfer that is done."""

    def wait(self, timeout: object) -> None:
        pass


def test_a_message_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_LONGEST", 1000)
    message = Message("x" * 100, {"a": torch.zeros(200, dtype=torch.uint8)})
    packed = distributed._packed(message)
    assert distributed._unpacked(bytes(packed)).facts == message.facts
    with pytest.raises(ValueError, match="message: ranks send at most 1000 bytes at once, got 1102"):
        distributed._packed(Message("x" * 100, {"a": torch.zeros(250)}))


@pytest.mark.parametrize("head", [[0, 2**62], [0, -1], [0, 0], [2, 8]])
def test_a_message_that_cannot_be_is_refused_before_memory_is_taken(
    monkeypatch: pytest.MonkeyPatch, head: list[int]
) -> None:
    def receive(into: Tensor, *_: object, **__: object) -> Work:
        into.copy_(torch.tensor(head))
        return Work()

    monkeypatch.setattr(distributed.dist, "irecv", receive)
    with pytest.raises(RuntimeError, match=f"announced {head[1]} bytes of kind {head[0]}"):
        distributed.Ranks(ProcessRank(0, 2), torch.device("cpu"))._receive(1, 1.0)


def test_inputs_go_where_the_embeddings_are() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Embedding(2, 2, device="meta"))
    assert input_device(model).type == "cpu"
    model.get_input_embeddings = lambda: model[1]  # type: ignore[assignment]
    model[1]._hf_hook = type("Hook", (), {"execution_device": "cpu:0"})()  # as accelerate's: the weights come when used
    assert input_device(model) == torch.device("cpu:0")
    with pytest.raises(ValueError, match="model: has no parameters"):
        input_device(torch.nn.ReLU())


# ---- jobs of several ranks -----------------------------------------------------------------------------------------


def run(tmp_path: Path, job: str, ranks: int) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """The finished job, and what each rank wrote; {} where it did not come to that."""
    done = torchrun(ranks, __file__, job, tmp_path, limit=60)
    files = [tmp_path / f"{job}-{rank}.json" for rank in range(ranks)]
    return done, [json.loads(path.read_text()) if path.exists() else {} for path in files]


def exchanges() -> dict[str, Any]:
    """What ranks say to each other, errors that all of them get, and a group that the caller made."""
    seen: dict[str, Any] = {}
    with Ranks.from_environment("cpu") as ranks:
        me = ranks.rank
        gathered = ranks.gather(Message({"rank": me, "nan": float("nan")}, {"t": TENSOR * me, "none": torch.empty(0)}))
        seen["gathered"] = [m.facts["rank"] for m in gathered]
        seen["exact"] = all(torch.equal(m.tensors["t"], TENSOR * r) for r, m in enumerate(gathered))
        got = ranks.broadcast(Message([me], {"half": torch.full((2,), me + 1).bfloat16()}))
        seen["broadcast"] = [got.facts, got.tensors["half"].tolist(), str(got.tensors["half"].dtype)]
        total = sum((TENSOR * r for r in range(1, ranks.size)), TENSOR * 0)
        seen["sum"] = torch.equal(ranks.sum(TENSOR * me), total)
        for name in ("agree", "raise"):
            try:
                with Ranks.current() as inner:
                    seen["inner"] = inner is ranks
                    if name == "agree":
                        ranks.agree("settings", [min(me, 1)])
                    elif me == 2:
                        raise KeyError("a bad batch")
                    ranks.sum(TENSOR)
            except (RankError, ValueError, KeyError) as error:
                seen[name] = f"{type(error).__name__}: {error}"
        seen["after"] = ranks.sum(torch.ones(1)).item()  # an error that was caught leaves the ranks in step
    seen["left"] = not dist.is_initialized()
    dist.init_process_group("gloo")
    with Ranks.current() as ranks:
        seen["current"] = [ranks.rank, ranks.size, ranks.sum(torch.ones(1)).item()]
    with Ranks.from_environment("cpu") as ranks:
        seen["beside"] = ranks.sum(torch.ones(1)).item()
    seen["kept"] = dist.is_initialized()
    dist.destroy_process_group()
    return seen


@pytest.mark.slow
def test_messages_and_errors_reach_all_ranks(tmp_path: Path) -> None:
    done, ranks = run(tmp_path, "exchanges", 4)
    assert done.returncode == 0, done.stderr
    for me, seen in enumerate(ranks):
        assert seen["gathered"] == ([0, 1, 2, 3] if me == 0 else [])
        assert seen["broadcast"] == [[0], [1.0, 1.0], "torch.bfloat16"]
        assert all(seen[fact] is True for fact in ("exact", "sum", "inner", "left", "kept"))
        unlike = "ValueError: settings: must be the same on all ranks, rank 0 has [0], rank 1 has [1]"
        assert seen["agree"] == (unlike if me == 0 else f"RankFailed: rank 0 of 4: {unlike}")
        assert seen["raise"] == (
            "KeyError: 'a bad batch'" if me == 2 else "RankFailed: rank 2 of 4: KeyError: 'a bad batch'"
        )
        assert seen["after"] == seen["beside"] == 4
        assert seen["current"] == [me, 4, 4]


def killed() -> dict[str, Any]:
    """Rank 2 is killed while rank 0 works, one waits, and the last works too."""
    try:
        with Ranks.from_environment("cpu") as ranks:
            ranks.sum(TENSOR)
            ranks.doing = "they slept"
            if ranks.rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0 if ranks.rank == 1 else 50)
            ranks.sum(TENSOR)
    except RankLost as error:
        print(f"{error} ({error.rank})", file=sys.stderr)
        write({"error": str(error), "lost": error.rank})
        sys.exit(3)
    return {}


@pytest.mark.slow
def test_a_killed_rank_is_named_and_nobody_waits_for_it(tmp_path: Path) -> None:
    start = time.monotonic()
    done, ranks = run(tmp_path, "killed", 4)
    assert time.monotonic() - start < 45
    assert done.returncode != 0
    assert ranks[2] == {}
    for seen in (ranks[0], ranks[1], ranks[3]):
        assert seen == {"error": "rank 2 of 4 stopped answering while they slept", "lost": 2}
    assert "frame #" not in done.stderr
    assert "gloo" not in done.stderr


def lost() -> dict[str, Any]:
    """A rank that does not answer in time, one that leaves, and then the first is killed."""
    seen: dict[str, Any] = {}
    try:
        with Ranks.from_environment("cpu", timeout=1.0) as ranks:
            time.sleep(3 * ranks.rank)
            ranks.sum(TENSOR)
    except RankLost as error:
        seen["late"] = str(error)
    try:
        with Ranks.from_environment("cpu") as ranks:
            if ranks.rank == 1:
                sys.exit(0)
            ranks.sum(TENSOR)
    except (RankLost, SystemExit) as error:
        seen["gone"] = repr(error)
    try:
        with Ranks.from_environment("cpu") as ranks:
            if ranks.rank == 0:
                write(seen)
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.sum(TENSOR)
    except RankError as error:
        seen["killed"] = f"{type(error).__name__}: {error}"
    return seen


@pytest.mark.slow
def test_a_rank_that_hangs_or_leaves_and_the_death_of_the_first(tmp_path: Path) -> None:
    done, (first, second) = run(tmp_path, "lost", 2)
    assert done.returncode != 0
    assert first["late"] == "rank 1 of 2 did not answer in time while the job began"
    assert second["late"] == "rank 0 of 2 stopped answering while the job began"
    assert "rank 1 of 2 was ended (SystemExit) while the job began" in first["gone"]
    assert second["gone"] == "SystemExit(0)"
    assert second["killed"] == "RankLost: rank 0 of 2 stopped answering while the job began"
    assert "frame #" not in done.stderr


def test_errors_between_ranks_are_of_one_kind() -> None:
    assert issubclass(RankLost, RankError)
    assert issubclass(RankFailed, RankError)


def write(seen: dict[str, Any]) -> None:
    (Path(sys.argv[2]) / f"{sys.argv[1]}-{ProcessRank.from_environment().rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    write({"exchanges": exchanges, "killed": killed, "lost": lost}[sys.argv[1]]())
