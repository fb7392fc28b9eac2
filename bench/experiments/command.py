"""What the experiments' command lines share: options, threads, the results file, elapsed times."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from common import provenance
from spurge.report import plots
from spurge.report.results import Results

Run = Callable[[argparse.Namespace, Results], None]


def parser(
    description: str | None, commands: Mapping[str, Run]
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """A command line with a sub-command for each experiment, all with the common options; and the sub-commands."""
    top = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("data", type=Path, help="folder of the data set's file")
    common.add_argument("--seeds", type=_seeds, default=[0, 1, 2, 3, 4], help="such as 0,1,2")
    common.add_argument("--json", type=Path, help="write the results here")
    common.add_argument("--quick", action="store_true", help="less data and fewer epochs: to see that it runs")
    common.add_argument("--threads", type=positive, default=torch.get_num_threads())
    common.add_argument("--cache", type=Path, help="folder to keep trained networks and features in")
    common.add_argument("--plot", type=Path, help="folder to write figures to")
    common.add_argument("--device", default="cpu", help="cpu or cuda")
    subcommands = top.add_subparsers(dest="command", required=True)
    parsers = {name: subcommands.add_parser(name, parents=[common], help=run.__doc__) for name, run in commands.items()}
    return top, parsers


def main(experiment: str, args: argparse.Namespace, run: Run) -> int:
    """Runs one experiment and writes what it found; 2 where an argument or a file is wrong."""
    torch.set_num_threads(args.threads)
    asked = {key: value for key, value in vars(args).items() if key not in ("json", "cache", "plot", "data", "out")}
    results = Results(f"{experiment} {args.command}", asked)
    if args.json is not None and (warning := provenance.warning(results.head["commit"])):
        print(f"{experiment} {args.command}: {warning}", file=sys.stderr)
    start = time.perf_counter()
    try:
        for folder in (args.cache, args.plot):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        run(args, results)
        seconds = time.perf_counter() - start
        results.add(args.command, "all", "seconds", seconds, unit="s", note="whole command; cached parts count as read")
        if args.json is not None:
            results.write(args.json)
            print(f"written: {args.json}")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{experiment} {args.command}: {error}", file=sys.stderr)
        return 2
    print(f"all in {seconds:.0f} s")
    return 0


@contextmanager
def cache(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of ``--cache``, or one that is gone after the run."""
    with nullcontext(args.cache) if args.cache is not None else tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


class Clock:
    """Says what is being done, and how long the part before took."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def __call__(self, what: str) -> None:
        now = time.perf_counter()
        print(f"[{now - self.start:6.0f} s, +{now - self.last:.0f} s] {what}", flush=True)
        self.last = now


def save(figure: Any, folder: Path | None, name: str) -> None:
    """Writes a figure as ``name.png``, where there is a folder to write to."""
    if folder is not None:
        plots.save(figure, folder / f"{name}.png", dpi=150, bbox_inches="tight")


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Some of these names with commas between them, as an argument's type."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown, expected some of {','.join(known)}")
        return found

    return names


def _seeds(text: str) -> list[int]:
    seeds = [int(seed) for seed in text.split(",")]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"expected different numbers from 0, such as 0,1,2, got {text!r}")
    return seeds
