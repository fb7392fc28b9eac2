"""Figure 5: the best fitness that the paper's swarm reaches, by inertia, pull, iterations and particles."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from experiments import command
from experiments.subjects import PLAIN, Subject
from experiments.tasks import TASKS
from spurge.report.results import Results

TEXTS = 8  # of the fitness
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    **{f"w = {w}": {"inertia": w} for w in (0.1, 0.3, 0.7, 0.9)},
    **{f"c = {c}": {"cognitive": c, "social": c} for c in (0.5, 1.0, 2.0)},
    **{f"{count} particles": {"particles": count} for count in (5, 10, 40)},
}
"""What differs from the paper's w = 0.5, c1 = c2 = 1.5, 40 iterations, and from 20 particles, not given there."""


def run(args: argparse.Namespace, results: Results) -> None:
    """The swarm's best fitness (Eq. 7) on 8 training texts of SST-2, by setting and iteration."""
    task = TASKS["sa"](args.data).cut(64 if args.quick else args.rows, 1 if args.quick else args.epochs, None)
    chosen = list(SETTINGS)[:2] if args.quick else list(SETTINGS)
    with command.cache(args) as folder:
        for seed in args.seeds:
            subject = Subject(task, seed, folder, args.quick, {})
            handle, macu = subject.handle(PLAIN), subject.macu("macu-paper")
            macu = replace(macu, edit_texts=min(TEXTS, macu.edit_texts))
            for name in chosen:
                edit = subject.gates(PLAIN, handle, replace(macu, swarm=replace(macu.swarm, **SETTINGS[name])))
                best = edit.info.get("history", {}).get("best", [])
                print(f"sweep {seed}: {name}: {best[-1] if best else 'nothing to search'}", flush=True)
                for count in sorted({1, 5, 10, 20, 30, len(best)} & {*range(1, len(best) + 1)}):
                    case, facts = f"sweep, {count} iterations", {"n": edit.info["searched"], "labels": "none"}
                    results.add(case, name, "fitness", best[count - 1], seed=seed, note="n: neurons moved", **facts)
            if args.json is not None:
                results.write(args.json)
