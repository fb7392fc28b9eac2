"""Damages valid files of every kind in many ways and loads each: none may be taken for what it is not.

A file with a SHA-256 whose bytes changed is refused.
Where the SHA-256 was made anew over wrong content, and in files that people write, what loads must print and save.
Whatever is refused is refused with the errors that loaders document, within bounds of time and memory. Prints counts by
kind and outcome; ends with 1 where one of that does not hold.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import spurge
from helpers import earlier
from helpers.earlier import V1
from spurge.engine.base import tensor_files
from spurge.engine.base.files import FileError, fingerprint
from spurge.engine.base.files import canonical_json as canonical
from spurge.engine.base.resume import Blocks
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.tensor_files import Contents, read_tensors
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.features.cache import FeatureCache
from spurge.methods.macu.screening import Block
from spurge.methods.mediation.mediation import _block_of
from spurge.report.results import Results

MOST_SECONDS, MOST_BYTES = 5.0, 2**28  # of one load: processor time, and growth of the process
Load = Callable[[Path], object]

# ---- the kinds -------------------------------------------------------------------------------------------------------


def saved(kind: type[Saved]) -> Load:
    def load(path: Path) -> object:
        found = kind.load(path)
        found.save(path.with_name("again"))
        return found

    return load


def edit(path: Path) -> object:
    found = spurge.load_edit(path)
    found.save(path.with_name("again"))
    return found


def swarm(path: Path) -> object:
    return earlier.SWARM.maximise(earlier.hill, dimensions=2, checkpoint=path)


def block(kind: str, build: Callable[[Contents], Any]) -> Load:
    mark: dict[str, str] = {}

    def load(path: Path) -> object:
        if not mark:  # of the whole file, which comes first
            mark["made"] = read_tensors(path).texts["fingerprint"]
        return Blocks(path.parent, kind, f"a {kind}", mark["made"]).find(path.stem, build)

    return load


def recording(path: Path) -> object:
    folder = path.parent
    found = spurge.Recording.open(folder)
    everything = [found.outputs(site) for site in found.widths] + [found.neurons(site) for site in found.widths]
    return repr(found), found.info, found.continuations, found.prompts, everything


def cached(path: Path) -> object:
    cache = FeatureCache.__new__(FeatureCache)  # without the model, of which the key is known already
    cache.folder = path.parent
    found = cache.find(path.stem, (6, 32), torch.float32)
    if found is None:  # with a warning that names it
        raise FileError(f"{path}: made anew")
    return found.shape


def golden(path: Path) -> object:
    found = spurge.GoldenTokens.load(path)
    found.save(path.with_name("again"))
    return found


def verbalizer(path: Path) -> object:
    found = spurge.Verbalizer.load(path)
    found.save(path.with_name("again"))
    return found


def results(path: Path) -> object:
    found = Results.load(path)
    found.write(path.with_name("again"))
    return found


def table(path: Path) -> object:
    found = spurge.Examples.load(path)
    return found.fingerprint(), found.groups, repr(found)


HASHED: dict[str, Load] = {
    **dict.fromkeys(
        ("neuron-edit", "neuron-edit-bfloat16", "neuron-edit-experts", "macu-edit", "weight-edit", "weight-deltas"),
        edit,
    ),
    "scores": saved(NeuronScores),
    "located": saved(spurge.Located),
    "features": saved(spurge.Features),
    **dict.fromkeys(("removal-class", "removal-gap", "removal-independence"), saved(spurge.Removal)),
    "tuned": saved(spurge.Tuned),
    "effects": saved(spurge.Effects),
    "swarm": swarm,
    "locate/block-00000": block("locate block", lambda file: Block.of_parts(file.value("facts", dict), file.tensors)),
    "mediation/units-00000000-00000002": block("mediation block", _block_of),
    "recording/block-00000": recording,
    "cache/0a3093453d10fe63c32ae6589020740e1a2cc2213dd9d822c3efb28561c1005f": cached,
}
TEXTS = [{"text": f'a {word} film, "{word}"', "label": i % 2, "group": "g"} for i, word in enumerate("abcdefgh")]
JSONL = "".join(json.dumps(row) + "\n" for row in TEXTS).encode()
CSV = ("text,label,group\n" + "".join(f'"a {w} film, ""{w}""",{i % 2},g\n' for i, w in enumerate("abcdefgh"))).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PLAIN: dict[str, tuple[bytes, Load]] = {
    "golden.json": ((V1 / "golden.json").read_bytes(), golden),
    "review.tsv": ((V1 / "review.tsv").read_bytes(), lambda path: spurge.GoldenTokens.load(path)),
    "verbalizer.json": ((V1 / "verbalizer.json").read_bytes(), verbalizer),
    "results.json": ((V1 / "results.json").read_bytes(), results),
    "recording/recording.json": ((V1 / "recording" / "recording.json").read_bytes(), recording),
    "rows.jsonl": (JSONL, table),
    "rows.csv": (CSV, table),
    "rows.tsv": (CSV.replace(b",", b"\t"), table),
    **{f"rows.jsonl{ending}": (pack(JSONL), table) for ending, pack in PACKERS.items()},
    **{f"rows.csv{ending}": (pack(CSV), table) for ending, pack in PACKERS.items()},
}

# ---- mutations of bytes ----------------------------------------------------------------------------------------------


def flipped(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        changed[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def truncated(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def spliced(data: bytes, dice: random.Random) -> bytes:
    start, stop, at = (dice.randrange(len(data)) for _ in range(3))
    part = data[min(start, stop) : max(start, stop)]
    return data[:at] + part + data[at + dice.choice((0, len(part))) :]


def renumbered(data: bytes, dice: random.Random) -> bytes:
    """The length of the header, or digits somewhere, become other ones."""
    if dice.random() < 0.3:
        return dice.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(data))).to_bytes(8, "little") + data[8:]
    digits = [at for at, byte in enumerate(data) if 48 <= byte < 58]
    if not digits:
        return flipped(data, dice)
    at = dice.choice(digits)
    number = dice.choice((b"1e999", b"-1", b"9" * 25, b"9" * 5000, b"NaN", b"0.5", b"true", b"1e308", b"[]"))
    return data[:at] + number + data[at + 1 :]


def doubled(data: bytes, dice: random.Random) -> bytes:
    """A field of a JSON object is given twice."""
    starts = [at for at in range(len(data) - 1) if data[at : at + 2] in (b'{"', b',"')]
    if not starts:
        return spliced(data, dice)
    at = dice.choice(starts) + 1
    end = min((data.find(mark, at) for mark in (b",", b"}") if data.find(mark, at) > 0), default=at)
    return data[:at] + data[at:end] + b"," + data[at:]


def nested(data: bytes, dice: random.Random) -> bytes:
    depth, at = dice.choice((100, 5000, 100_000)), dice.randrange(len(data))
    return data[:at] + b"[" * depth + data[at:]


BYTES = (flipped, flipped, truncated, spliced, renumbered, doubled, nested)

# ---- mutations of content, under a SHA-256 that fits -----------------------------------------------------------------

ODD = (
    None,
    True,
    -1,
    0,
    3,
    0.5,
    -1e308,
    2**40,
    2**70,
    10**400,
    "",
    "x",
    "nan",
    "\u0000",
    [],
    {},
    [[]],
    {"a": 1},
    [1, "a"],
)


def disturbed(value: Any, dice: random.Random) -> Any:
    """A JSON value with one thing in it that is another, missing, or there twice."""
    if isinstance(value, (dict, list)) and value and dice.random() < 0.8:
        key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
        copied: Any = dict(value) if isinstance(value, dict) else list(value)
        what = dice.random()
        if what < 0.15:
            del copied[key]
        elif what < 0.25 and isinstance(copied, list):
            copied.append(copied[key])
        elif what < 0.25:
            copied[f"{key}2"] = copied[key]
        else:
            copied[key] = disturbed(value[key], dice)
        return copied
    if dice.random() < 0.05:
        deep: Any = 1
        for _ in range(dice.choice((50, 900))):
            deep = [deep]
        return deep
    return dice.choice(ODD)


def text_of(value: Any) -> str:
    """JSON, at times with numbers that are none."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def retensored(tensor: torch.Tensor, dice: random.Random) -> torch.Tensor:
    """Another tensor in its place: of another type, shape or values."""
    what = dice.randrange(6)
    if what == 0:
        return tensor.to(dice.choice((torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64)))
    if what == 1:
        return tensor.reshape(-1)[: dice.randrange(tensor.numel() + 1)]
    if what == 2:
        return tensor[None]
    if what == 3 and tensor.is_floating_point():
        return torch.full_like(tensor, dice.choice((torch.nan, torch.inf, -torch.inf)))
    if what == 4:
        return torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    return (tensor.double() * dice.choice((-1, 1000))).to(tensor.dtype)


def rehashed(data: bytes, folder: Path, dice: random.Random) -> bytes:
    """The file with other texts or tensors, and a SHA-256 that fits them."""
    source = folder / "source"
    source.write_bytes(data)
    tensors, texts = (dict(part) for part in read_tensors(source))
    own = [name for name in texts if name not in ("schema", "spurge", "sha256", "kind")]
    for _ in range(dice.choice((1, 1, 2))):
        names = list(tensors)
        if names and dice.random() < 0.4:
            name = dice.choice(names)
            if dice.random() < 0.2:
                tensor = tensors.pop(name)
                if dice.random() < 0.5:
                    tensors[dice.choice(("x", "", f"{name}/x"))] = tensor
            else:
                tensors[name] = retensored(tensors[name], dice)
        elif own:
            name = dice.choice(own)
            if dice.random() < 0.1:
                texts.pop(name, None)
            elif name in texts:
                try:
                    value = json.loads(texts[name])
                except ValueError:
                    value = texts[name]
                texts[name] = text_of(disturbed(value, dice))
                if dice.random() < 0.1:
                    texts[name] = texts[name].replace("0", dice.choice(("NaN", "1e999", "Infinity")), 1)
    if dice.random() < 0.05:
        texts["schema"] = dice.choice(("0", "99", "x", "9" * 5000, "١"))
    texts.pop("sha256")
    texts["sha256"] = tensor_files._digest(tensors, texts)
    return b"".join(bytes(part) for part in tensor_files.pack(tensors, texts))


def reheaded(data: bytes, dice: random.Random) -> bytes:
    """The header of a recording with something else in it, and a SHA-256 that fits."""
    header = json.loads(data)
    header.pop("sha256")
    header = disturbed(header, dice)
    with suppress(ValueError, RecursionError):  # what has no canonical form has no hash either
        if isinstance(header, dict):
            header["sha256"] = fingerprint(canonical(header))
    return json.dumps(header).encode()


# ---- the run ---------------------------------------------------------------------------------------------------------


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except (ValueError, RecursionError):
        return False


class Campaign:
    """Loads file after file, and counts what becomes of them."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.dice = scratch, random.Random(seed)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []

    def whole(self) -> None:
        """Every file loads as long as nothing is done to it."""
        for kind in (*HASHED, *PLAIN):
            path, data, load = self.file(kind)
            path.write_bytes(data)
            str(load(path))

    def file(self, kind: str) -> tuple[Path, bytes, Load]:
        """Where the file of a kind is to be put, its bytes, and what loads it; beside it is what belongs to it."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        name = f"{kind}.safetensors" if kind in HASHED else kind
        if "/" in kind:
            shutil.copytree(V1 / name.partition("/")[0], self.scratch / name.partition("/")[0])
        data, load = PLAIN[kind] if kind in PLAIN else ((V1 / name).read_bytes(), HASHED[kind])
        return self.scratch / name, data, load

    def step(self, number: int) -> None:
        kinds = (*HASHED, *PLAIN)
        kind = kinds[number % len(kinds)]
        path, data, load = self.file(kind)
        again, header = kind in HASHED and self.dice.random() < 0.5, kind.endswith("recording.json")
        if again:
            changed, how = rehashed(data, self.scratch, self.dice), "rehashed"
        elif header and self.dice.random() < 0.5:
            changed, how = reheaded(data, self.dice), "rehashed"
        else:
            mutation = self.dice.choice(BYTES)
            changed, how = mutation(data, self.dice), mutation.__name__
        path.write_bytes(changed)
        outcome = self.outcome(path, load)
        untouched = how == "rehashed" or changed == data or (header and same_json(changed, data))
        if outcome == "accepted" and (kind in HASHED or header) and not untouched:
            outcome = "FAULT: taken though its bytes changed"
        self.counts[kind, outcome.partition(":")[0]] += 1
        if outcome.startswith("FAULT"):
            self.faults.append(f"{number} {kind} ({how}): {outcome}")
            if len(self.faults) <= 20:
                print(self.faults[-1], flush=True)

    def outcome(self, path: Path, load: Load) -> str:
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = load(path)
            str(found), repr(found)
            outcome = "accepted"
        except FileError as error:
            known = str(path.parent if path.name.startswith(("block-", "recording")) else path)
            outcome = "refused" if known in str(error) else f"FAULT: does not name the file: {error}"
        except ValueError as error:  # of a table: a label, for one, or another job's settings
            documented = str(error).startswith(("label", "resume: ", "checkpoint: ", "causal", "rows", str(path)))
            outcome = "refused as unfit" if documented else f"FAULT: {self.place(error)}"
        except Exception as error:
            outcome = f"FAULT: {self.place(error)}"
        if time.process_time() - start > MOST_SECONDS:
            outcome = f"FAULT: took {time.process_time() - start:.0f} s"
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        return f"FAULT: took {grown} bytes" if grown > MOST_BYTES else outcome

    @staticmethod
    def place(error: Exception) -> str:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:200]}"

    def report(self) -> None:
        outcomes = sorted({outcome for _, outcome in self.counts})
        for kind in (*HASHED, *PLAIN):
            numbers = ", ".join(f"{self.counts[kind, outcome]} {outcome}" for outcome in outcomes)
            print(f"{kind[:40]:40}  {numbers}")
        totals = Counter[str]()
        for (_, outcome), count in self.counts.items():
            totals[outcome] += count
        print(f"{sum(totals.values())} files: " + ", ".join(f"{totals[outcome]} {outcome}" for outcome in outcomes))
        print(f"{len(self.faults)} faults")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder) / "scratch", arguments.seed)
        campaign.whole()
        for number in range(arguments.count):
            campaign.step(number)
    campaign.report()
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main())
