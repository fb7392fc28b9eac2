"""MacU over several ranks: the same files for 1, 2 and 4 of them, and a job that goes on after a rank was killed.

Run by torchrun, this file is the work of one rank.
"""

from __future__ import annotations

import os
import signal
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import planted_texts
from helpers.tiny_models import tiny, tiny_tokenizer
from helpers.torchrun import torchrun
from spurge.engine.base.distributed import Ranks
from spurge.engine.base.tensor_files import read_tensors
from spurge.engine.cascade.cascade import Cascade
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.models.neurons import NeuronSet, frequent
from spurge.methods.macu import screening
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.screening import SIDES, Block
from spurge.methods.macu.search import Climb
from spurge.methods.macu.swarm import Swarm

SMALL: dict[str, Any] = {
    "texts": 22,
    "edit_texts": 8,
    "batch_size": 4,
    "certify": 2,
    "certify_texts": 4,
    "progress": False,
}
BLOCKS = 6  # of 22 texts in batches of 4
GAPS = {"effect": 36.0, "gap": 1.0}
PAPER = MacU.paper(**SMALL, swarm=Swarm(particles=7, iterations=4), guard=20.0, fraction=0.05, share=0.3)
BEST = MacU.best(**SMALL | {"texts": 8}, climb=Climb(steps=4, look=2))


def arguments() -> tuple[Any, ...]:
    return tiny("bert"), tiny_tokenizer(), planted_texts.train()


def located(macu: MacU, **options: Any) -> Located:
    return macu.locate(*arguments(), planted_texts.GOLDEN, **options)


def forced(found: Located) -> Located:
    """With an overlap for the swarm and something to erase."""
    return Located(found.causal, found.spurious, found.spurious.top(9), found.spurious.top(12))


def work(folder: Path, rank: int, swarm: Path | None = None, blocks: Path | None = None) -> None:
    """Everything that is shared between ranks; each writes what it holds in the end."""
    for name, macu in (("paper", PAPER), ("best", BEST)):
        found = located(macu, resume=blocks if macu is PAPER else None)
        found.save(folder / f"{name}-{rank}.located")
        edit = macu.edit(*arguments(), forced(found), planted_texts.GOLDEN, resume=swarm if macu is PAPER else None)
        edit.save(folder / f"{name}-{rank}.edit")


def breaks(folder: Path, ranks: Ranks) -> None:
    """An error of rank 2 in the swarm's third iteration; then rank 1 is killed in the second round of blocks."""
    calls = {"gated": 0, "attribute": 0}
    gated, attribute = Cascade.gated, Cascade.attribute

    def failing(self: Cascade, *given: Any) -> Any:
        calls["gated"] += 1
        if ranks.rank == 2 and calls["gated"] == 3:
            raise ValueError("a bad batch")
        return gated(self, *given)

    def dying(self: Cascade, *given: Any, **options: Any) -> Any:
        calls["attribute"] += 1
        found = attribute(self, *given, **options)
        if ranks.rank == 1 and calls["attribute"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Cascade.gated = failing  # type: ignore[method-assign]
    try:
        PAPER.edit(
            *arguments(),
            forced(Located.load(folder / "paper-0.located")),
            planted_texts.GOLDEN,
            resume=folder / "swarm",
        )
    except (ValueError, RuntimeError) as error:
        (folder / f"error-{ranks.rank}").write_text(f"{type(error).__name__}: {error}")
    Cascade.attribute = dying  # type: ignore[method-assign]
    located(PAPER, resume=folder / "blocks")


def same(one: Path, many: Path, ranks: int) -> None:
    for name in ("paper.located", "paper.edit", "best.located", "best.edit"):
        stem, kind = name.split(".")
        for rank in range(ranks):
            found = many / f"{stem}-{rank}.{kind}"
            assert found.read_bytes() == (one / f"{stem}-0.{kind}").read_bytes(), found


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_files_and_goes_on_where_another_stopped(tmp_path: Path) -> None:
    one, four, two = (tmp_path / name for name in ("one", "four", "two"))
    for folder in (one, four, two):
        folder.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's ranks have: sums round alike
    try:
        work(one, 0)
    finally:
        torch.set_num_threads(threads)
    found = Located.load(one / "paper-0.located")
    assert found.info["batches"] == BLOCKS
    assert len(found.spurious_set) > 0

    done = torchrun(4, __file__, "four", four)
    same(one, four, 4)  # before the end, which comes by SIGKILL
    assert done.returncode != 0
    failed = [(four / f"error-{rank}").read_text() for rank in range(4)]
    assert failed[2] == "ValueError: a bad batch"
    assert {failed[rank] for rank in (0, 1, 3)} == {"RankFailed: rank 2 of 4: ValueError: a bad batch"}
    lost = "rank 1 of 4 stopped answering while blocks were gathered (block 3 is the last one written)"
    assert f"RankLost: {lost}; start again with the same resume folder to go on" in done.stderr
    assert "frame #" not in done.stderr

    written = {path.name: path.stat().st_mtime_ns for path in (four / "blocks").iterdir()}
    assert {f"block-0000{number}.safetensors" for number in range(4)} <= set(written)
    assert not any(name.startswith(".") for name in written)
    assert len(read_tensors(four / "swarm", "swarm")[0]["history"]) == 2
    done = torchrun(2, __file__, "two", two, four / "swarm", four / "blocks")
    assert done.returncode == 0, done.stderr
    same(one, two, 2)
    after = {path.name: path.stat().st_mtime_ns for path in (four / "blocks").iterdir()}
    assert len(after) == BLOCKS
    assert all(after[name] == time for name, time in written.items())


def test_what_is_kept_does_not_grow_with_the_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is what the blocks, all kept, add up to."""
    maps = [
        {side: NeuronScores({"mlp.0": torch.randn(5), "mlp.1": torch.randn(3)}) for side in SIDES} for _ in range(9)
    ]
    made: list[weakref.ref[Block]] = []
    most = 0

    def answered(cascade: Any, questions: Any, number: int, blocks: Any) -> Block:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in made))
        row = {f"{side}_{name}": float(number) for side in SIDES for name in ("effect", "moved", "missed")}
        block = Block({side: scores * 1.0 for side, scores in maps[number].items()}, {"mlp.0": row}, number)
        made.append(weakref.ref(block))
        return block

    monkeypatch.setattr(screening, "_answered", answered)
    select = partial(NeuronScores.select, fraction=0.5)
    found = screening.screen(Cascade(tiny("bert"), path="layer"), range(9), select)  # type: ignore[arg-type]
    assert most <= 1
    assert (found.blocks, found.nodes) == (9, 8)
    assert found.gaps() == {"mlp.0": {f"{side}_{name}": value for side in SIDES for name, value in GAPS.items()}}
    for side in SIDES:
        votes = [select(scores[side]) for scores in maps]
        assert found.frequent(side, 0.3) == frequent(votes, 0.3)
        for site, values in found.total(side, {}).values.items():
            whole = torch.stack([scores[side].values[site] for scores in maps]).double().sum(0)
            torch.testing.assert_close(values, whole.float())


def test_sets_of_a_job_of_one(tmp_path: Path) -> None:
    """Blocks that are read again add up to the same as when they were made."""
    first, again = (located(PAPER, resume=tmp_path / "blocks") for _ in range(2))
    assert first.spurious_set == again.spurious_set != NeuronSet()
    assert first.info == again.info
    for site, values in first.causal.values.items():
        assert torch.equal(values, again.causal.values[site])


if __name__ == "__main__":
    job, given = sys.argv[1], [Path(word) for word in sys.argv[2:]]
    with Ranks.from_environment("cpu") as shared:
        work(given[0], shared.rank, *given[1:])
        if job == "four":
            breaks(given[0], shared)
