"""``spurge fcr``: a class or a feature removed from a classifier by single weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from spurge.cli.arguments import given
from spurge.cli.evaluate import named_files
from spurge.cli.inputs import prepare, write_results
from spurge.engine.evaluation.groups import compare
from spurge.engine.features.features import Features
from spurge.methods.fcr.fcr import FCR
from spurge.methods.fcr.removal import Removal
from spurge.report.results import Results
from spurge.report.tables import seconds

_SETTINGS = ("score", "reduction", "activation", "sign", "weights", "row", "rates", "candidates", "most", "memory")


def run(arguments: argparse.Namespace) -> int:
    """Removes, prints the edges and, on test sets, the accuracies before and after; writes the edit of ``--out``."""
    prepare(arguments, "out", "removal")
    features = Features.load(arguments.features)
    if not features.head.prints:
        raise ValueError(f"features: the head of {arguments.features!r} belongs to no model that could be edited")
    select = Features.load(arguments.select) if arguments.select else None
    tests = {name: Features.load(source) for name, source in named_files(arguments.test).items()}
    start_from = FCR.paper if arguments.preset == "paper" else FCR.best
    method = start_from(**given(arguments, _SETTINGS), progress=not arguments.quiet)
    start = time.perf_counter()
    removal = _remove(method, arguments, features, select)
    took = time.perf_counter() - start
    edit = removal.edit()
    edit.save(arguments.out)
    if arguments.removal:
        removal.save(arguments.removal)
    print(f"{removal}\n{edit}, in {seconds(took)}: {arguments.out}")
    results = Results("fcr", {"features": str(arguments.features), **removal.info})
    results.extend(removal.rows())
    results.add("all", "FCR", "seconds", took, unit="s", n=1)
    if tests:
        heads = {"none": removal.original, "FCR": removal.head}
        used = {"none": "none", "FCR": removal.labels}
        report = compare(tests, heads, labels_used=used, bootstrap=arguments.bootstrap, seed=arguments.seed)
        print(f"\n{report}")
        results.extend(report.rows())
    write_results(arguments, results)
    return 0


def _remove(method: FCR, arguments: argparse.Namespace, features: Features, select: Features | None) -> Removal:
    tilt = given(arguments, ("rate", "angle"))
    if arguments.remove_class is not None:
        if arguments.criterion:
            raise ValueError("criterion: a class is removed at a given --rate or --angle; default is rate 1")
        return method.remove_class(features, _number("remove-class", arguments.remove_class, features.names), **tilt)
    if features.groups is None:
        raise ValueError(f"remove-feature: {arguments.features!r} has no groups that tell the feature")
    chosen = None
    if arguments.remove_feature != "all":
        names = arguments.remove_feature.split(",")
        chosen = [_number("remove-feature", name, features.group_names) for name in names]
    return method.remove_feature(
        features, features.groups, feature=chosen, select=select, criterion=arguments.criterion, **tilt
    )


def _number(argument: str, name: str, names: Sequence[str]) -> int:
    """The place of a name, or a number that is none."""
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    raise ValueError(f"{argument}: expected one of {', '.join(names[:20])}, got {name!r}")
