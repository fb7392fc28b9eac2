"""FCR's experiments: classes and features removed by single weights, beside a random weight and other ways to pick one.

python bench/experiments/fcr.py mnist-parity FOLDER    ten digits inside two parities (Fig. 8)
python bench/experiments/fcr.py cifar10      FOLDER    each class by 1 to 3 weights (Fig. 6), several at once (Fig. 7)
python bench/experiments/fcr.py waterbirds   FOLDER    the place in the picture (Fig. 9, Table 1)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path
from statistics import fmean
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from experiments import backbones, command, controls, data, models, several
from experiments.backbones import image_features, judged, robustness
from experiments.command import Clock
from experiments.tables import Table
from spurge.engine.features.features import Features
from spurge.engine.last_layer.fitting import fit_head
from spurge.engine.last_layer.rate_sweep import sweep
from spurge.engine.models.heads import Head
from spurge.methods.fcr.edges import Edge, shifts
from spurge.methods.fcr.fcr import FCR, Score
from spurge.methods.fcr.rates import Criterion
from spurge.methods.neurontune.controls import dfr
from spurge.report import plots
from spurge.report.results import Results
from spurge.report.tables import grid

RATES = (0.0, *(round(m * 10.0**e, 6) for e in (-3, -2, -1) for m in (1, 1.5, 2, 3, 5, 7)), 1.0)
SHOWN = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SCORES: dict[str, Score] = {"SCA": "sca", "activation x gradient": "product"}
FIG6 = ("before_accuracy", "removed_accuracy")
OFF = "output switched off"
RANDOM = "random weight of the row"
RANDOM_PAIR = "random weights, r for each"
BEST = "best weight (tries all)"
BY_CLASS = {"labels": "class", "note": "class labels of the training set for the weight; r = 1"}
NOTHING = {"labels": "none", "note": "nothing edited"}
PRICE = 2  # percent points of the retained digits
CURVES = ("removed_accuracy", "retained_accuracy", "same_parity_accuracy")


# ------------------------------------------------------------------------------------------ digits inside two parities


def mnist_parity(args: argparse.Namespace, results: Results) -> None:
    """Fig. 8: a digit's accuracy falls with the rate, the other digits' stays; SCA against the plain product."""
    images, test_images = data.mnist_parity(args.data)
    if args.quick:
        images, test_images = images.sample(6000), test_images.sample(2000)
    clock = Clock()
    curves: dict[str, list[Tensor]] = {}  # method to one [R, 3] for each seed
    table = Table("mnist-parity, r by digit")
    for seed in args.seeds:
        parts = *images.hold_out(len(images) // 6, seed), test_images
        how = {"epochs": 1 if args.quick else 3, "seed": seed, "cache": args.cache, "device": args.device}
        model = models.trained("conv2net", parts[0], **how)
        clock(f"seed {seed}: trained")
        train, held, test = (image_features(model, part, args.cache, args.device) for part in parts)
        assert train.groups is not None  # digits
        assert test.groups is not None
        digit_head = fit_head(train.values, train.groups, 10, l2=1e-3)  # M' of Algorithm 2
        known = judged(replace(test, labels=test.groups, head=digit_head, names=train.group_names)).average
        clock(f"seed {seed}: parity {judged(test).average:.1f} %, digits by M' {known:.1f} %")
        table.add("before", {"retained_accuracy": judged(test).average}, labels="none", note="nothing edited")
        for method, columns in _digit_columns(train, held, digit_head, seed).items():
            on_held, on_test = (
                torch.stack([_digit_curve(part, digit, columns[digit]) for digit in range(10)]) for part in (held, test)
            )
            curves.setdefault(method, []).append(on_test.mean(0))
            for rule, picked in _picked_rates(on_held).items():
                values = dict(zip(CURVES, on_test[torch.arange(10), picked].mean(0).tolist(), strict=True))
                values["median_rate"] = float(torch.tensor(RATES)[picked].median())
                note = f"digit labels for the weight and for r: {rule}, in a sixth of the training set"
                table.add(f"{method}; {rule}", values, labels="group", note=note)
        clock(f"seed {seed}: removed")
    table.show()
    table.write(results, args.seeds)
    _digit_tables(curves, args, results)


def _picked_rates(curves: Tensor) -> dict[str, Tensor]:
    """Place in RATES for each digit, of curves ``[10, R, 3]``: what removes best, and what does at a price."""
    removed, retained = curves[:, :, 0], curves[:, :, 1]
    cheap = retained >= retained[:, :1] - PRICE
    return {
        "most apart": (retained - removed).argmax(1),
        f"within {PRICE} points": removed.where(cheap, torch.inf).argmin(1),
    }


def _digit_columns(train: Features, held: Features, digit_head: Head, seed: int) -> dict[str, list[list[int]]]:
    """For each method and digit the units whose weight in the row of the digit's parity is edited, one at a time."""
    out = {}
    assert train.groups is not None  # digits
    for name, score in SCORES.items():
        remove = partial(FCR(score=score).remove_feature, train, train.groups, fictitious=digit_head, rate=1.0)
        out[name] = [[remove(feature=digit, row=digit % 2).edges[0].column] for digit in range(10)]
    out[RANDOM] = [controls.random_columns(train.head, digit % 2, seed * 10 + digit) for digit in range(10)]
    out[BEST] = []
    for digit in range(10):
        tried = {
            column: _digit_curve(held, digit, [column]) for column in controls.usable_columns(train.head, digit % 2)
        }
        out[BEST].append([max(tried, key=lambda column: float((tried[column][:, 1] - tried[column][:, 0]).max()))])
    return out


def _digit_curve(features: Features, digit: int, columns: Sequence[int]) -> Tensor:
    """Accuracy of the digit, of the other nine and of the four of its parity for every rate ``[R, 3]``.

    Mean over edits of one of the `columns`.
    """
    row, logits = torch.tensor([digit % 2]), features.logits()
    found = []
    for column in columns:
        moves = shifts(features.head, [Edge(digit % 2, column, digit, nan, nan)], features.values)
        found.append(sweep(logits, moves, row, features.labels, features.groups).at(RATES)[1])
    by_digit = torch.stack(found).mean(0)
    others = [other for other in range(10) if other != digit]
    same = [other for other in others if other % 2 == digit % 2]
    return torch.stack([by_digit[:, part].mean(1) for part in ([digit], others, same)], 1)


def _digit_tables(curves: Mapping[str, list[Tensor]], args: argparse.Namespace, results: Results) -> None:
    """The curves of Fig. 8, as rows and as figures."""
    note = "one r for all digits; digit labels for the weight"
    for at, rate in enumerate(RATES):
        table = Table(f"mnist-parity, r = {rate:g}")
        for method, seeds in curves.items():
            for found in seeds:
                table.add(method, dict(zip(CURVES, found[at].tolist(), strict=True)), labels="group", note=note)
        table.write(results, args.seeds)
    lines = [["removed / retained, percent", *(f"r = {rate:g}" for rate in SHOWN)]]
    for method, seeds in curves.items():
        mean = torch.stack(seeds).mean(0)
        shown = [mean[RATES.index(rate)].tolist() for rate in SHOWN]
        lines.append([method, *(f"{removed:.1f} / {retained:.1f}" for removed, retained, _ in shown)])
    print(f"{grid(lines)}\n", flush=True)
    if args.plot is not None:
        drawn = {
            f"{method}, {name}": (RATES, torch.stack(curves[method])[:, :, part])
            for method in SCORES
            for part, name in enumerate(("removed", "retained"))
        }
        command.save(plots.rates(drawn, log=True), args.plot, "mnist-parity")


# --------------------------------------------------------------------------------------------------- classes of images


def cifar10(args: argparse.Namespace, results: Results) -> None:
    """Fig. 6, 7: each class, and several at once, removed at r = 1; what happens to them and to the others."""
    clock = Clock()
    images, test_images = data.cifar10(args.data, args.cache)
    if args.quick:
        images, test_images = images.sample(3000), test_images.sample(1000)
    clock("CIFAR-10 read")
    table = Table("cifar10")
    by_class = {name: Table(f"cifar10, {name}") for name in images.names}
    at_once = {count: Table(f"cifar10, {count} at once") for count in several.COUNTS}
    for seed in args.seeds:
        how = {"epochs": 2 if args.quick else args.epochs, "seed": seed, "cache": args.cache, "device": args.device}
        model = models.trained(args.network, images, augment=True, **how)
        train, test = (image_features(model, part, args.cache, args.device) for part in (images, test_images))
        before = judged(test).classes
        clock(f"seed {seed}: trained, {before.mean():.1f} % right")
        table.add("before", {"removed_accuracy": before.mean()}, labels="none", note="nothing edited, all classes")
        removals = _class_removals(train, seed)
        for method, heads in removals.items():
            after = torch.stack([torch.stack([judged(test, h).classes for h in tried]).mean(0) for tried in heads])
            change = after - before  # [removed class, class]
            others = (change.sum(1) - change.diagonal()) / (len(before) - 1)
            worst = (change - torch.diag(change.diagonal())).abs().max()
            values = {"removed_accuracy": after.diagonal().mean(), "worst_removed_accuracy": after.diagonal().max()}
            values |= {"change_of_others": others.mean(), "largest_change_of_another": worst}
            table.add(method, values, **BY_CLASS)
            for label, name in enumerate(images.names):
                values = {"before_accuracy": before[label], "removed_accuracy": after[label, label]}
                by_class[name].add(method, {**values, "change_of_others": others[label]}, **BY_CLASS)
        clock(f"seed {seed}: removed")
        for count, each in at_once.items():
            for method, found in several.removed(test, removals, count, seed).items():
                each.add(method, found, **(NOTHING if method == "before" else BY_CLASS))
        clock(f"seed {seed}: removed several at once")
    table.show()
    for each in (table, *by_class.values(), *at_once.values()):
        each.write(results, args.seeds)
    lines = [["removed by one weight (SCA), percent", "before", "after", "mean change of the others"]]
    for name, each in by_class.items():
        lines.append([name, *(f"{each.mean('SCA', metric):.1f}" for metric in (*FIG6, "change_of_others"))])
    print(f"{grid(lines)}\n", flush=True)
    _several_shown(at_once)
    if args.plot is not None:
        means = [[each.mean("SCA", metric) for each in by_class.values()] for metric in FIG6]
        command.save(plots.classes(means[0], means[1], images.names), args.plot, "cifar10-removed")


def _several_shown(tables: Mapping[int, Table]) -> None:
    """Fig. 7 as a table: a line for each method, a column for each number of classes."""
    lines = [["removed at once: percent of them / of the others", *map(str, tables)]]
    metrics = ("removed_accuracy", "retained_accuracy")
    for method in tables[1].lines:
        cells = ([each.mean(method, metric) for metric in metrics] for each in tables.values())
        lines.append([method, *(f"{gone:.1f} / {left:.1f}" for gone, left in cells)])
    print(f"{grid(lines)}\n", flush=True)


def _class_removals(train: Features, seed: int) -> dict[str, list[list[Head]]]:
    """For each method and class the edited heads."""
    methods = {"SCA": FCR(), "SCA, 2 weights": FCR(weights=2), "SCA, 3 weights": FCR(weights=3)}
    methods["activation x gradient"] = FCR(score="product")
    classes = range(len(train.names))
    out = {name: [[fcr.remove_class(train, label).head] for label in classes] for name, fcr in methods.items()}
    out[RANDOM] = [
        [
            controls.orthogonal(train.head, label, column)
            for column in controls.random_columns(train.head, label, seed * 10 + label)
        ]
        for label in classes
    ]
    out[OFF] = [[controls.switched_off(train.head, label)] for label in classes]
    return out


# ------------------------------------------------------------------------------------------------- place in the picture


CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
PLACES = {
    "SCA": FCR(),
    "activation x gradient": FCR(score="product"),
    "SCA, r for each weight": FCR(rates="each"),
    "activation x gradient, r for each": FCR(score="product", rates="each"),
    "SCA, r for each, best of 5": FCR.best(),
    "SCA by sums": FCR.paper(),
    "SCA by sums, r for each": FCR.paper(rates="each"),
}


def waterbirds(args: argparse.Namespace, results: Results) -> None:
    """Table 1, Fig. 9: the place as a fictitious class, one weight for each kind of bird, r by every criterion.

    All lines but ERM and DFR need place labels for the weights (half the validation set). For r, on the other half, gap
    and worst group need group labels, worst class needs class labels, independence none.
    """
    clock = Clock()
    features = backbones.waterbirds(args)
    table = Table(backbones.case(args))
    for seed in args.seeds:
        train, validation, test = features(seed)
        erm = test.head
        edit, select = validation.split(seed=seed)
        assert edit.groups is not None  # birds have places
        place = edit.groups % 2
        place_head = fit_head(edit.values, place, 2, l2=FCR().l2)
        table.add("ERM", robustness(test), labels="none", note="nothing edited")
        for name, fcr in PLACES.items():
            for criterion in CRITERIA:
                removal = fcr.remove_feature(edit, place, fictitious=place_head, select=select, criterion=criterion)
                note = f"place labels of {len(edit)} rows for the weights; r by {criterion} on {len(select)} others"
                table.add(f"{name}, by {criterion}", robustness(test, removal.head), labels="group", note=note)
        for criterion in CRITERIA[:2]:  # those of groups
            pairs = zip(*(controls.random_columns(erm, row, seed * 10 + row) for row in range(2)), strict=False)
            drawn = [robustness(test, controls.chosen(erm, [[a], [b]], select, criterion)) for a, b in pairs]
            values = {metric: fmean(found[metric] for found in drawn) for metric in drawn[0]}
            note = f"of {len(drawn)} draws; r for each weight by {criterion}"
            table.add(f"{RANDOM_PAIR}, by {criterion}", values, labels="group", note=f"mean {note}")
            luckiest = max(drawn, key=lambda found: found["worst_group_accuracy"])
            note = f"the best worst group on the test set {note}"
            table.add(f"{RANDOM_PAIR}, by {criterion}: luckiest", luckiest, labels="group", note=note)
        for parts, by in (("group", "worst group"), ("class", "worst class")):
            own = select.groups if parts == "group" else select.labels
            threshold = robustness(test, controls.moved_threshold(select, own))
            table.add(f"moved threshold, by {by}", threshold, labels=parts, note=f"a bias by {by}")
        most = controls.chosen(erm, [controls.usable_columns(erm, row) for row in range(2)], select, "worst_group")
        table.add(BEST, robustness(test, most), labels="group", note="weights and r by the worst group")
        oracle = dfr(validation, train=train, seed=seed)
        table.add("DFR (oracle)", robustness(test, oracle), labels="group", note="all weights, validation groups")
        clock(f"seed {seed}: {removal!r}")
    table.show()
    table.write(results, args.seeds)
    if args.plot is not None:
        line = FCR().remove_feature(edit, place, fictitious=place_head, rate=1.0).sweep(test)
        command.save(plots.rates({"one r for both": line}, log=True), args.plot, f"{table.case}-rates")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one experiment; 2 for a wrong argument or file."""
    commands = {"mnist-parity": mnist_parity, "cifar10": cifar10, "waterbirds": waterbirds}
    parser, parsers = command.parser(__doc__, commands)
    backbones.add_argument(parsers["waterbirds"])
    parsers["cifar10"].add_argument("--network", choices=["conv2net", "resnet18"], default="conv2net")
    parsers["cifar10"].add_argument("--epochs", type=int, default=8, help="of the network's training")
    args = parser.parse_args(argv)
    return command.main("fcr", args, commands[args.command])


if __name__ == "__main__":
    sys.exit(main())
