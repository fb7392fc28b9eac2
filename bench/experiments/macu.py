"""MacU's tables on real data, beside rivals and controls.

python bench/experiments/macu.py sa FOLDER --json FILE --cache FOLDER      sentiment/, lexicons/: table 6, parts of 8-17
python bench/experiments/macu.py nli FOLDER --json FILE --cache FOLDER     nli/, lexicons/: table 7, likewise
python bench/experiments/macu.py sweep FOLDER --json FILE --cache FOLDER   as sa: figure 5
python bench/experiments/macu.py maps FOLDER --cache FOLDER                as sa: figures 3 and 4
python bench/experiments/macu.py decoders FOLDER --json FILE --cache FOLDER    as sa, or nli: tables 9 and 10

MiniLM-L6 is fine-tuned on texts drawn from the training set, plainly and as each rival does; then edited. A seed draws
the texts, the head, the swaps and the neurons. Every setting is chosen on dev; what is finished is kept in the cache,
and the results are written after each part, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import command, decoders, maps, sweep
from experiments.methods import COMPARED, CORE, HYPOTHESIS, METHODS, Bench, labels_used
from experiments.outcomes import Record
from experiments.subjects import EDIT_TEXTS, PLAIN
from experiments.tasks import TASKS
from spurge.report.results import Results


def schedule(methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Methods and seeds in the order in which they matter: MacU and its controls at all seeds, then rivals by seed."""
    core = [(method, seed) for seed in seeds for method in methods if method in CORE]
    return core + [(method, seed) for seed in seeds for method in methods if method not in CORE]


def add_misled(results: Results, record: Record) -> None:
    """Table 16: accuracy on the counterfactuals that the plain model gets wrong by the hypothesis alone."""
    for seed, alone in record.parts.get(("", HYPOTHESIS), {}).items():
        misled = alone.right["cad"] == 0
        for (_, method), seeds in record.parts.items():
            if seed in seeds and bool(misled.any()) and method != HYPOTHESIS:
                value = 100 * float(seeds[seed].right["cad"][misled].double().mean())
                own: dict[str, Any] = {"n": int(misled.sum()), "seed": seed, "labels": labels_used(method)}
                results.add("cad, wrong by hypothesis", method, "accuracy", value, unit="percent", **own)


def run(args: argparse.Namespace, results: Results) -> None:
    """Accuracies of all methods, proximity, located neurons, and the seconds of each."""
    texts = 16 if args.quick else args.texts
    task = TASKS[args.command](args.data).cut(64 if args.quick else args.rows, 1 if args.quick else args.epochs, texts)
    size = {"rows": task.rows, "epochs": task.epochs, "max_length": task.max_length, "edit_texts": EDIT_TEXTS}
    results.head["settings"] |= size
    known = [method for method in METHODS if method != HYPOTHESIS or task.train[0].pair is not None]
    methods = known if args.methods is None else args.methods.split(",")
    if unknown := {*methods} - {*known}:
        raise ValueError(f"methods: {sorted(unknown)[0]!r} is unknown, expected some of {', '.join(known)}")
    with command.cache(args) as folder:
        record = Record(folder, "macu outcomes", task.outside)
        bench = Bench(task, record, args.seeds, args.quick)
        for method, seed in schedule(methods, args.seeds):
            bench.part(method, seed)
            record.write(results, PLAIN, labels_used, also=COMPARED)
            add_misled(results, record)
            if args.json is not None:
                results.write(args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one experiment; 2 for a wrong argument or file."""
    runs: dict[str, command.Run] = {
        **dict.fromkeys(TASKS, run),
        "sweep": sweep.run,
        "maps": maps.run,
        "decoders": decoders.run,
    }
    parser, commands = command.parser(__doc__, runs)
    for name, one in commands.items():
        one.add_argument("--rows", type=command.positive, help="texts that are trained on; default: the task's")
        one.add_argument("--epochs", type=command.positive, help="default: the task's")
        if name in (*TASKS, "decoders"):
            one.add_argument("--texts", type=command.positive, help="at most so many of dev and each test set, drawn")
        if name in TASKS:
            one.add_argument("--methods", help="default: all of the task")
    decoders.add_arguments(commands["decoders"])
    args = parser.parse_args(argv)
    return command.main("macu", args, runs[args.command])


if __name__ == "__main__":
    sys.exit(main())
