"""``spurge neurontune``: a last layer retrained without the features that go with wrong predictions."""

from __future__ import annotations

import argparse
import time
from typing import Any

from spurge.cli.arguments import given
from spurge.cli.evaluate import named_files
from spurge.cli.inputs import prepare, write_results
from spurge.engine.evaluation.groups import compare
from spurge.engine.features.features import Features
from spurge.methods.neurontune.controls import dfr, random_masks, without_mask
from spurge.methods.neurontune.neurontune import NeuronTune
from spurge.methods.neurontune.tuned import Tuned
from spurge.report.results import Results
from spurge.report.tables import seconds

_SETTINGS = (
    *("threshold", "classes", "signs", "least_wrong", "keep", "solver", "start", "l2", "select", "memory"),
    "seed",
)


def run(arguments: argparse.Namespace) -> int:
    """Tunes, compares on test sets, and writes the edit of ``--out`` and the result of ``--tuned``."""
    prepare(arguments, "out", "tuned")
    if not arguments.out and not arguments.tuned:
        raise ValueError("out, tuned: give at least one of them, to keep the result")
    train = Features.load(arguments.features)
    if arguments.out and not train.head.prints:
        raise ValueError(
            f"out: the head of {arguments.features!r} belongs to no model that could be edited; use --tuned"
        )
    validation = Features.load(arguments.identify) if arguments.identify else train
    if arguments.dfr and validation.groups is None:
        raise ValueError("dfr: needs groups, and the validation set has none")
    tests = {name: Features.load(source) for name, source in named_files(arguments.test).items()}
    settings = NeuronTune(**given(arguments, _SETTINGS), progress=not arguments.quiet)
    start = time.perf_counter()
    if arguments.identify:
        identify = validation
    else:
        identify, train = settings.parts(validation)
    tuned = settings.tune(identify, train)
    took = time.perf_counter() - start
    print(f"{tuned.scores}\n{tuned}, in {seconds(took)}")
    if arguments.tuned:
        tuned.save(arguments.tuned)
        print(f"all of it: {arguments.tuned}")
    if arguments.out:
        edit = tuned.edit()
        edit.save(arguments.out)
        print(f"{edit}: {arguments.out}")
    results = Results("neurontune", {"features": str(arguments.features), **tuned.info})
    results.add("all", "NeuronTune", "suppressed", 100 * tuned.suppressed, unit="percent", labels=tuned.labels)
    results.add("all", "none", "sfit", tuned.scores.sfit)
    results.add("all", "NeuronTune", "seconds", took, unit="s", n=1)
    if tests:
        methods: dict[str, Any] = {"none": validation.head, "NeuronTune": tuned}
        used = {"none": "none", "NeuronTune": tuned.labels}
        if not arguments.no_controls:
            methods |= _controls(arguments, tuned, settings, identify, train)
            used |= {"no mask": "class", "random mask": "class"}
        if arguments.dfr:
            methods["DFR"] = dfr(validation, seed=arguments.seed, progress=not arguments.quiet)
            used["DFR"] = "group"
        report = compare(tests, methods, labels_used=used, bootstrap=arguments.bootstrap, seed=arguments.seed)
        print(f"\n{report}")
        results.extend(report.rows())
    write_results(arguments, results)
    return 0


def _controls(
    arguments: argparse.Namespace, tuned: Tuned, settings: NeuronTune, identify: Features, train: Features
) -> dict[str, Any]:
    random = random_masks(tuned, settings, identify, train, draws=arguments.draws, seed=arguments.seed)
    return {"no mask": without_mask(tuned, settings, identify, train), "random mask": random}
