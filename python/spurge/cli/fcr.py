"""``spurge fcr``: a class or a feature removed from a classifier by single weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from spurge.cli.arguments import given
from spurge.cli.arguments_last_layer import FCR_SETTINGS
from spurge.cli.inputs import named_files, prepare, read_features, write_results
from spurge.engine.evaluation.groups import compare
from spurge.engine.evaluation.random_edits import random_heads
from spurge.engine.features.features import Features
from spurge.methods.fcr.fcr import FCR
from spurge.methods.fcr.removal import Removal
from spurge.report.results import Results
from spurge.report.tables import seconds


def run(arguments: argparse.Namespace) -> int:
    """Removes, prints the edges and, on test sets, the accuracies before and after; writes the edit of ``--out``."""
    prepare(arguments, "out", "removal")
    features = read_features(arguments, arguments.features)
    if not features.head.prints:
        raise ValueError(f"features: the head of {arguments.features!r} belongs to no model that could be edited")
    select = read_features(arguments, arguments.select) if arguments.select else None
    if arguments.criterion and select is None and features.groups is not None:
        features, select = features.split(seed=arguments.seed, by="group")
    if select is not None and select.groups is not None:
        select = select.crossed()
    tests = {name: read_features(arguments, source) for name, source in named_files(arguments.test).items()}
    preset = FCR.paper if arguments.preset == "paper" else FCR.best
    method = preset(**given(arguments, FCR_SETTINGS), progress=not arguments.quiet)
    start = time.perf_counter()
    removal = _remove(method, arguments, features, select)
    elapsed = time.perf_counter() - start
    edit = removal.edit()
    edit.save(arguments.out)
    if arguments.removal:
        removal.save(arguments.removal)
    print(f"{removal}\n{edit}, in {seconds(elapsed)}: {arguments.out}")
    results = Results("fcr", {"features": str(arguments.features), **removal.info})
    results.extend(removal.rows())
    results.add("all", "FCR", "seconds", elapsed, unit="s", n=1)
    if tests:
        heads: dict[str, Any] = {"none": removal.original, "FCR": removal.head}
        labels_used = {"none": "none", "FCR": removal.labels}
        if not arguments.no_controls:
            heads["random"] = random_heads(removal.original, removal.head, arguments.draws, arguments.seed)
            labels_used["random"] = removal.labels
        how: dict[str, Any] = {"bootstrap": arguments.bootstrap, "seed": arguments.seed}
        report = compare(tests, heads, labels_used=labels_used, controls=not arguments.no_controls, **how)
        print(f"\n{report}")
        results.extend(report.rows())
    write_results(arguments, results)
    return 0


def _remove(method: FCR, arguments: argparse.Namespace, features: Features, select: Features | None) -> Removal:
    extent = given(arguments, ("rate", "angle"))
    if arguments.remove_class is not None:
        if arguments.criterion:
            raise ValueError("criterion: a class is removed at a given --rate or --angle; default is rate 1")
        return method.remove_class(features, _index("remove-class", arguments.remove_class, features.names), **extent)
    if features.groups is None:
        raise ValueError(f"remove-feature: {arguments.features!r} has no groups that tell the feature")
    feature = None
    if arguments.remove_feature != "all":
        names = arguments.remove_feature.split(",")
        feature = [_index("remove-feature", name, features.group_names) for name in names]
    return method.remove_feature(
        features, features.groups, feature=feature, select=select, criterion=arguments.criterion, **extent
    )


def _index(argument: str, name: str, names: Sequence[str]) -> int:
    """The index of a name, or the index itself where no name is like it."""
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    raise ValueError(f"{argument}: expected one of {', '.join(names[:20])}, got {name!r}")
