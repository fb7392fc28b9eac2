"""``spurge neurontune``: a last layer retrained without the features that go with wrong predictions."""

from __future__ import annotations

import argparse
import time
from typing import Any

from spurge.cli.arguments import given
from spurge.cli.arguments_last_layer import NEURONTUNE_SETTINGS
from spurge.cli.inputs import named_files, prepare, read_features, write_results
from spurge.engine.base.tables import wrapped
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.evaluation.groups import compare
from spurge.methods.neurontune.controls import dfr, random_masks, without_mask
from spurge.methods.neurontune.neurontune import NeuronTune
from spurge.report.results import Results
from spurge.report.tables import seconds


def run(arguments: argparse.Namespace) -> int:
    """Tunes, compares on test sets, and writes the edit of ``--out`` and the result of ``--tuned``."""
    prepare(arguments, "out", "tuned", "no_mask_out", "dfr_out")
    if not arguments.out and not arguments.tuned:
        raise ValueError("out, tuned: give at least one of them, to keep the result")
    train = read_features(arguments, arguments.features)
    for option in ("out", "no_mask_out", "dfr_out"):
        if getattr(arguments, option) and not train.head.prints:
            raise ValueError(
                f"{option}: the head of {arguments.features!r} belongs to no model that could be edited; use --tuned"
            )
    validation = read_features(arguments, arguments.identify) if arguments.identify else train
    wants_dfr = arguments.dfr or arguments.dfr_out
    if wants_dfr and validation.groups is None:
        raise ValueError("dfr: needs groups, and the validation set has none")
    tests = {name: read_features(arguments, source) for name, source in named_files(arguments.test).items()}
    method = NeuronTune(**given(arguments, NEURONTUNE_SETTINGS), progress=not arguments.quiet)
    start = time.perf_counter()
    if arguments.identify:
        identify = validation
    else:
        identify, train = method.parts(validation)
    tuned = method.tune(identify, train)
    elapsed = time.perf_counter() - start
    print(wrapped(f"{tuned.scores}\n{tuned}, in {seconds(elapsed)}"))
    if arguments.tuned:
        tuned.save(arguments.tuned)
        print(f"all of it: {arguments.tuned}")
    if arguments.out:
        _save(arguments.out, tuned.edit())
    plain = oracle = None
    if arguments.no_mask_out or (tests and not arguments.no_controls):
        plain = without_mask(tuned, method, identify, train)
    if wants_dfr:
        oracle = dfr(validation.crossed(), seed=arguments.seed, progress=not arguments.quiet)
    if arguments.no_mask_out and plain is not None:
        _save(arguments.no_mask_out, plain.edit())
    if arguments.dfr_out and oracle is not None:
        info = {"method": "DFR", "labels": "group", "data": validation.fingerprint(), "seed": arguments.seed}
        _save(arguments.dfr_out, WeightEdit.for_head(validation.head, oracle.weight, oracle.bias, info))
    results = Results("neurontune", {"features": str(arguments.features), **tuned.info})
    results.add("all", "NeuronTune", "suppressed", 100 * tuned.suppressed, unit="percent", labels=tuned.labels)
    results.add("all", "none", "sfit", tuned.scores.sfit)
    results.add("all", "NeuronTune", "seconds", elapsed, unit="s", n=1)
    if tests:
        methods: dict[str, Any] = {"none": validation.head, "NeuronTune": tuned}
        labels_used = {"none": "none", "NeuronTune": tuned.labels}
        if not arguments.no_controls:
            random = random_masks(tuned, method, identify, train, draws=arguments.draws, seed=arguments.seed)
            methods |= {"no mask": plain, "random mask": random}
            labels_used |= {"no mask": "class", "random mask": "class"}
        if oracle is not None:
            methods["DFR"] = oracle
            labels_used["DFR"] = "group"
        report = compare(tests, methods, labels_used=labels_used, bootstrap=arguments.bootstrap, seed=arguments.seed)
        print(f"\n{report}")
        results.extend(report.rows())
    write_results(arguments, results)
    return 0


def _save(path: str, edit: WeightEdit) -> None:
    edit.save(path)
    print(f"{edit}: {path}")
