"""The whole job on a toxicity model, from what it leans on to a page that can be shown: docs/how-to/toxicity.md.

python bench/experiments/walk.py make FOLDER --out walk          the model and the tables that the page begins with
python bench/experiments/walk.py all  FOLDER --out walk --json FILE      every command of the page, and its numbers

FOLDER holds civil_comments_short_15k.jsonl.xz. Nine in ten toxic comments to train on name one group, and one in ten of
the others; of the dev and test comments half do, whatever their label.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import command, data, models
from experiments.command import Clock
from spurge.engine.base import files
from spurge.engine.data.examples import Examples
from spurge.engine.edits.new_folders import check_new, new_folder
from spurge.report.results import Results

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "toxicity.md"
GROUP = "black"
DEV, TEST = 100, 150  # rows of each label in each group
WORDS = 24  # of a comment, at most, so that the walk is short
EPOCHS = 2
METRICS = ("accuracy", "worst_group", "mean_group_auc", "auc", "by_threshold", "by_constant", "agreement", "divergence")


def make(args: argparse.Namespace, results: Results) -> None:
    """Writes the model and its tables to a new folder."""
    clock = Clock()
    dev, test = (20, 20) if args.quick else (DEV, TEST)
    tables = data.named_group_splits(args.data, GROUP, dev=dev, test=test, words=WORDS)
    if args.quick:
        tables["train"] = tables["train"][:160]
    write_walk(args.out, tables, data.TOXIC, epochs=EPOCHS, seed=args.seeds[0])
    clock(f"{', '.join(f'{len(rows)} rows of {name}' for name, rows in tables.items())}, and a model: {args.out}")


def write_walk(
    folder: Path,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    labels: tuple[str, ...],
    *,
    epochs: int,
    seed: int,
) -> None:
    """A new folder with ``NAME.jsonl`` of each table, and ``model``: MiniLM-L6, fine-tuned on ``train``.

    Raises:
        ValueError: the folder exists.
    """
    check_new("out", folder)
    train = Examples.load(tables["train"], labels=labels)
    tuned = models.fine_tuned(train, epochs=epochs, seed=seed)
    with new_folder("out", folder) as draft:
        for name, rows in tables.items():
            lines = "".join(f"{files.canonical_json(dict(row))}\n" for row in rows)
            files.write_bytes(draft / f"{name}.jsonl", lines.encode())
        tuned.model.save_pretrained(draft / "model")
        tuned.tokenizer.save_pretrained(draft / "model")


def page_commands(page: str) -> list[str]:
    """The commands of a page's ``bash`` blocks, a line each; that of ``make`` among them."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def every(args: argparse.Namespace, results: Results) -> None:
    """Runs the page, a process for each command, and gathers what it measured."""
    clock = Clock()
    first, *rest = page_commands(PAGE.read_text(encoding="utf-8"))
    given = shlex.split(first.split("&&")[0].replace("FOLDER", shlex.quote(str(args.data.resolve()))))
    given = [str(args.out) if word == "walk" else word for word in given] + (["--quick"] if args.quick else [])
    script = Path(__file__).resolve()
    took = {"1 make": _run([sys.executable, str(script), *given[2:]], Path.cwd(), args.threads)}
    clock("1 make")
    for number, line in enumerate(rest, 2):
        words = shlex.split(line, comments=True)
        name = f"{number} {words[1]}"
        took[name] = _run([sys.executable, "-m", *words], args.out, args.threads)
        clock(name)
    measured = Results.load(args.out / "evaluate.json")
    wanted = {f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")} | {"change", "change_p"}
    results.extend(row for row in measured.rows if row["metric"] in wanted)
    for name, seconds in took.items():
        note = "user and system time of the process, beside other work"
        results.add("walk", name, "cpu_seconds", seconds, unit="s", n=1, note=note)
    results.add("walk", "all commands", "cpu_seconds", sum(took.values()), unit="s", n=len(took))
    for row in results.rows:
        if row["metric"] == "cpu_seconds":
            print(f"{row['method']:<16} {row['value']:7.1f} s")


def _run(words: Sequence[str], folder: Path, threads: int) -> float:
    """CPU seconds that a process took, its children's included; what it says goes where this process's does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part; 2 for a wrong argument or file."""
    commands = {"make": make, "all": every}
    parser, parsers = command.parser(__doc__, commands)
    for own in parsers.values():
        own.add_argument("--out", type=Path, required=True, help="new folder")
    args = parser.parse_args(argv)
    return command.main("walk", args, commands[args.command])


if __name__ == "__main__":
    sys.exit(main())
