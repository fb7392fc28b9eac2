"""Kills writers at random moments: what they were writing is the old file or the new one, and nothing else is left.

Each writer runs in a child process that writes again and again until SIGKILL. Then every file must be whole, of the
first state or of a later one; a next run must go on from there, and leave no draft behind. Prints counts by writer and
by what was found in the folder; ends with 1 where one of that does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import spurge
from helpers import earlier
from helpers.earlier import V1
from helpers.tiny_models import tiny, tiny_tokenizer
from spurge.cli import main as command
from spurge.engine.base.files import read_json, write_json
from spurge.engine.base.resume import Blocks
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.tensor_files import read_tensors
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.edits.weight_deltas import WeightDeltas
from spurge.engine.features.cache import FeatureCache
from spurge.engine.recordings.store import Store
from spurge.report.results import Results

LONGEST = 0.3  # seconds until a child is killed, once it has begun to write
BULK = torch.zeros(2**18)  # makes a write last

MADE = {"model": "abc", "block": 1, "tokens": "t", "generate": 0, "neurons": False, "storage": "float32"}
HEADER = {"made": MADE, "prompts": [*"abcdefgh"], "rows": 1, "sites": [{"name": "x", "width": 1, "hidden": 2**16}]}

Writer = Callable[[Path, int], object]  # writes state n into a folder
Reader = Callable[[Path], object]  # reads all that is there; raises where it is not whole

# ---- writers and readers ---------------------------------------------------------------------------------------------


def of_result(kind: type[Saved], name: str) -> tuple[Writer, Reader]:
    found = kind.load(V1 / f"{name}.safetensors")
    return lambda folder, _: found.save(folder / "a"), lambda folder: kind.load(folder / "a")


def write_scores(folder: Path, number: int) -> None:
    NeuronScores({"site": BULK + number}).save(folder / "a")


def read_scores(folder: Path) -> None:
    values = NeuronScores.load(folder / "a").values["site"]
    assert bool((values == values[0]).all())


def write_numbers(folder: Path, number: int) -> None:
    write_json(folder / "a", {"numbers": [number] * 20_000})


def read_numbers(folder: Path) -> None:
    numbers = json.loads((folder / "a").read_bytes())["numbers"]
    assert len(numbers) == 20_000
    assert len(set(numbers)) == 1


def write_results(folder: Path, number: int) -> None:
    results = Results("kills")
    for row in range(500):
        results.add(f"case {row}", "method", "seconds", float(number), unit="s")
    results.write(folder / "a")


def blocks(folder: Path) -> Blocks:
    return Blocks(folder, "block", "a block", "print")


def write_blocks(folder: Path, number: int) -> None:
    blocks(folder).keep(f"block-{number % 8}", {"values": BULK})


def read_blocks(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        assert blocks(folder).find(path.stem, lambda file: torch.equal(file.tensors["values"], BULK))


def cache(folder: Path) -> FeatureCache:
    return FeatureCache(folder, torch.nn.Linear(1, 1), None)


def write_cache(folder: Path, number: int) -> None:
    cache(folder).keep(f"{number % 8}", BULK[None])


def read_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        assert cache(folder).find(path.stem, (1, len(BULK)), torch.float32) is not None


def write_recording(folder: Path, number: int) -> None:
    store = Store.begin(folder, HEADER)
    store.write(number % 8, {"outputs/x": torch.zeros(1, 2**16)}, None)


def read_recording(folder: Path) -> None:
    store = Store.open(folder)
    for number in set(range(8)) - set(store.missing()):
        store.check(number)


def write_swarm(folder: Path, number: int) -> None:
    if number % 4 == 0:
        (folder / "a").unlink(missing_ok=True)
    earlier.SWARM.maximise(earlier.hill, dimensions=200, checkpoint=folder / "a")


def read_swarm(folder: Path) -> None:
    if (folder / "a").exists():
        read_tensors(folder / "a", "swarm")


def model_folder(folder: Path) -> Path:
    """A model, and an edit beside it."""
    model = tiny("bert")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    site = spurge.find_sites(model)[0]
    spurge.NeuronEdit.build(model, spurge.NeuronSet({site.name: [1]}), 0.0).save(folder / "edit.safetensors")
    return folder


def folder_of(name: str, source: Path) -> tuple[Writer, Reader]:
    """What a command makes of the model and its edit: a checkpoint or an adapter."""

    def write(folder: Path, number: int) -> None:
        if (folder / "out").exists():
            os.rename(folder / "out", folder / f"out-{number}")
            shutil.rmtree(folder / f"out-{number}")
        given = ("--model", source / "model", "--edit", source / "edit.safetensors", "--out", folder / "out")
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            assert command([name, *map(str, given)]) == 0

    def read(folder: Path) -> None:
        for path in folder.glob("out-*"):  # of the child's own tidying
            shutil.rmtree(path)
        if (folder / "out").exists() and name == "apply":
            type(tiny("bert")).from_pretrained(folder / "out")
            assert {path.name for path in (folder / "out").iterdir()} >= {"config.json", "model.safetensors"}
        elif (folder / "out").exists():
            read_json(folder / "out" / "adapter_config.json")
            assert load_file(folder / "out" / "adapter_model.safetensors")

    return write, read


def writers(source: Path) -> dict[str, tuple[Writer, Reader]]:
    results = ((spurge.Located, "located"), (spurge.Features, "features"), (spurge.Removal, "removal-gap"))
    results += ((spurge.Tuned, "tuned"), (spurge.Effects, "effects"), (spurge.NeuronEdit, "neuron-edit"))
    results += ((spurge.WeightEdit, "weight-edit"), (WeightDeltas, "weight-deltas"))
    return {
        "scores": (write_scores, read_scores),
        **{name: of_result(kind, name) for kind, name in results},
        "numbers": (write_numbers, read_numbers),
        "results": (write_results, lambda folder: Results.load(folder / "a")),
        "blocks": (write_blocks, read_blocks),
        "cache": (write_cache, read_cache),
        "recording": (write_recording, read_recording),
        "swarm": (write_swarm, read_swarm),
        **{name: folder_of(name, source) for name in ("apply", "export")},
    }


# ---- the run ---------------------------------------------------------------------------------------------------------


def killed(write: Writer, folder: Path, delay: float) -> None:
    """Writes state after state in a child, which is killed ``delay`` seconds after the first of them."""
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(go, b".")
            for number in itertools.count(1):
                write(folder, number)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(go)
    os.read(ready, 1)
    os.close(ready)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"


def drafts(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


def once(write: Writer, read: Reader, folder: Path, delay: float) -> str:
    """What a kill left, once all of it was found to be as it has to be."""
    write(folder, 0)
    killed(write, folder, delay)
    left = len(drafts(folder))
    read(folder)
    write(folder, 4)
    read(folder)
    assert not drafts(folder), f"left behind: {drafts(folder)}"
    return f"{left} drafts" if left != 1 else "1 draft"


def cases(arguments: Any, source: Path) -> Iterator[tuple[str, Writer, Reader, float]]:
    dice, every = random.Random(arguments.seed), writers(source)
    for number in range(arguments.count):
        name = list(every)[number % len(every)]
        yield name, *every[name], dice.random() * LONGEST


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)  # a child that was forked has no others
    faults, counts = 0, Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as scratch:
        for name, write, read, delay in cases(parser.parse_args(), model_folder(Path(scratch))):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                try:
                    found = once(write, read, Path(folder), delay)
                except Exception as error:
                    faults, found = faults + 1, "FAULT"
                    print(f"{name}, killed after {delay:.3f} s: {type(error).__name__}: {error}", flush=True)
                counts[name, found] += 1
    for name in dict.fromkeys(name for name, _ in counts):
        print(f"{name:12}  " + ", ".join(f"{n} x {found}" for (own, found), n in sorted(counts.items()) if own == name))
    print(f"{counts.total()} kills, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
