"""Figures 3 and 4: in which layers the located causal and spurious neurons lie, and how many are both."""

from __future__ import annotations

import argparse
from typing import Any

from experiments import command
from experiments.subjects import PLAIN, Subject, depths
from experiments.tasks import TASKS
from spurge.report import plots
from spurge.report.results import Results


def run(args: argparse.Namespace, results: Results) -> None:
    """Neurons that the paper's procedure locates in a model fine-tuned on SST-2, counted by layer."""
    task = TASKS["sa"](args.data).cut(64 if args.quick else args.rows, 1 if args.quick else args.epochs, None)
    with command.cache(args) as folder:
        for seed in args.seeds:
            subject = Subject(task, seed, folder, args.quick, {})
            handle = subject.handle(PLAIN)
            located = subject.located(PLAIN, handle, subject.macu("macu-paper"))
            own: dict[str, Any] = {"seed": seed, "labels": "none"}
            sets = {"causal": located.causal_set, "spurious": located.spurious_set, "both": located.overlap}
            sets["either"] = located.causal_set | located.spurious_set
            for name, neurons in sets.items():
                layers = depths(handle, neurons)
                print(f"maps {seed}: {name} {len(layers)} neurons", flush=True)
                for layer, site in enumerate(handle.sites, 1):
                    count = layers.count(layer)
                    results.add(f"map, layer {layer}", name, "neurons", count, n=site.width, note="n: all", **own)
            if args.plot is not None:
                figure = plots.scores({"causal": located.causal, "spurious": located.spurious})
                command.save(figure, args.plot, f"macu-map-{seed}")
            if args.json is not None:
                results.write(args.json)
