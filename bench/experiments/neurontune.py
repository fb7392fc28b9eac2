"""NeuronTune's experiments: both of its protocols beside the same retraining without the mask, random masks and DFR.

python bench/experiments/neurontune.py waterbirds    FOLDER    EfficientNet-Lite0, fine-tuned or frozen
python bench/experiments/neurontune.py civilcomments FOLDER    MiniLM fine-tuned on comments

NeuronTune identifies on the validation set and retrains on the training set; NeuronTune† identifies on one half of the
validation set and retrains on the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from experiments import backbones, command, data, models
from experiments.backbones import judged, robustness
from experiments.command import Clock
from experiments.rivals import last_layers
from experiments.tables import Table
from spurge.engine.data.examples import Examples
from spurge.engine.features.extraction import extract
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head
from spurge.methods.neurontune.controls import dfr, random_masks, without_mask
from spurge.methods.neurontune.neurontune import NeuronTune
from spurge.methods.neurontune.tuned import Tuned
from spurge.report import plots
from spurge.report.results import Results

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the retrained layer; selection chooses
SELECT = {"sfit": "SFit", "worst_class": "worst class", "class_difference": "class difference"}
KEPT = (0.2, 0.4, 0.6, 0.8)  # of what is suppressed
DRAWS = 5  # random masks
WORST_IDENTITY = "worst_identity_accuracy"  # of each identity with each label

Judge = Callable[..., dict[str, float]]
"""From a test set, and a layer in the place of its own, to what it is worth: `robustness`, or that and more."""


def waterbirds(args: argparse.Namespace, results: Results) -> None:
    """Landbirds and waterbirds on land and water; the validation set has equal places in each class."""
    clock = Clock()
    features = backbones.waterbirds(args)
    table = Table(backbones.case(args))
    for seed in args.seeds:
        own = features(seed)
        tuned = _all_methods(table, *own, seed=seed, settings=[NeuronTune(l2=PENALTIES, seed=seed)])
        _partly_suppressed(table, *own, seed=seed)
        last_layers.add_rivals(table, *own, seed=seed)
        clock(f"seed {seed}: {tuned}")
    _finish(table, tuned, args, results)


def civilcomments(args: argparse.Namespace, results: Results) -> None:
    """Toxic or not, identity named or not; a validation set as balanced as the test set, and one like the training set.

    One encoder, fine-tuned with the first seed; the seeds are those of the halves, the masks and DFR. The worst group
    is that of these four, and in a metric of its own that of each identity with each label, as in WILDS.
    """
    clock = Clock()
    parts = data.civil_comments(args.data)
    train, validation, test = (part.sample(min(len(part), 800)) if args.quick else part for part in parts)
    identities = data.civil_comments(args.data, wilds=True)[-1]
    identities = identities.sample(len(test)) if args.quick else identities
    judge = partial(by_identity, members(identities))
    clock(f"groups of WILDS in the test set: {_sizes(identities)}")
    like_test, like_train = validation, data.correlate(validation, args.share)
    if args.train == "correlated":
        train = data.correlate(train, args.share)
    clock(f"{len(train)} comments to train on: {_sizes(train)}")
    model, tokenizer, _ = models.fine_tuned(train, epochs=args.epochs, seed=args.seeds[0], cache=args.cache)
    clock("fine-tuned")
    cache = None if args.cache is None else args.cache / "features"
    how = {
        "tokenizer": tokenizer,
        "max_length": 64,
        "cache": cache,
        "device": args.device,
        "progress": sys.stderr.isatty(),
    }
    features = {
        name: extract(model, rows, group_names=test.groups, **how)
        for name, rows in (("train", train), ("test", test), ("like test", like_test), ("like training", like_train))
    }
    clock("features read")
    for case in ("like test", "like training"):
        table = Table(f"civilcomments, {args.train} training, validation {case}")
        for seed in args.seeds:
            settings = [NeuronTune(l2=PENALTIES, signs=signs, seed=seed) for signs in ("magnitude", "relu", "split")]
            own = (features["train"], features[case], features["test"])
            again = seed != args.seeds[0]
            tuned = _all_methods(table, *own, seed=seed, settings=settings, halves_only=again, judge=judge)
            clock(f"{case}, seed {seed}: {tuned}")
        _finish(table, tuned, args, results)


def _all_methods(
    table: Table,
    train: Features,
    validation: Features,
    test: Features,
    *,
    seed: int,
    settings: Sequence[NeuronTune],
    halves_only: bool = False,
    judge: Judge = robustness,
) -> Tuned | None:
    """Every method once, judged on the test set; gives the first result of the halves.

    `halves_only` leaves out what the same encoder and the whole sets gave for another seed already.
    """
    table.add("ERM", judge(test), labels="none", note="the model as trained")
    first, second = validation.split(seed=seed)
    out = None
    for method in settings:
        name = "" if method.signs == "magnitude" else f", {method.signs}"
        if not halves_only:
            _beside_controls(table, f"NeuronTune{name}", method, validation, train, test, seed, judge)
        tuned = _beside_controls(table, f"NeuronTune†{name}", method, first, second, test, seed, judge)
        out = out or tuned
    by_class = NeuronTune(l2=PENALTIES, seed=seed, select="worst_class")
    _beside_controls(table, "NeuronTune†, by worst class", by_class, first, second, test, seed, judge)
    oracle = dfr(validation, train=train, seed=seed)
    table.add("DFR (oracle)", judge(test, oracle), labels="group", note="group labels of the validation set")
    return out


def _partly_suppressed(table: Table, train: Features, validation: Features, test: Features, *, seed: int) -> None:
    """NeuronTune† that leaves a part of what it suppresses; and both steps on the training set alone."""
    first, second = validation.split(seed=seed)
    for name, keep, identify, retrain in (
        *((f"NeuronTune†, keeps {keep:g}", keep, first, second) for keep in KEPT),
        ("NeuronTune, identified on training data", 0.0, train, train),
    ):
        method = NeuronTune(l2=PENALTIES, keep=keep, seed=seed)
        try:
            tuned = method.tune(identify, retrain)
        except ValueError as error:  # too few wrong predictions of rows that were trained on
            print(f"{name}, seed {seed}: {error}", flush=True)
            continue
        note = f"class labels; penalty by SFit on {len(identify)} rows"
        table.add(name, robustness(test, tuned) | {"suppressed": 100 * tuned.suppressed}, labels="class", note=note)


def _beside_controls(
    table: Table,
    name: str,
    method: NeuronTune,
    identify: Features,
    train: Features,
    test: Features,
    seed: int,
    judge: Judge,
) -> Tuned | None:
    """NeuronTune, then the same retraining and selection without a mask and behind random ones of the same size."""
    try:
        tuned = method.tune(identify, train)
    except ValueError as error:  # too few wrong predictions, or everything would be suppressed: a result as well
        print(f"{name}, seed {seed}: {error}", flush=True)
        return None
    note = f"class labels; signs {method.signs}; penalty by {SELECT[method.select]} on {len(identify)} rows"
    shares = {"suppressed": 100 * tuned.suppressed}
    table.add(name, judge(test, tuned) | shares, labels="class", note=note)
    plain = without_mask(tuned, method, identify, train)
    table.add(f"{name}: no mask", judge(test, plain) | {"suppressed": 0.0}, labels="class", note=note)
    drawn = random_masks(tuned, method, identify, train, draws=DRAWS, seed=seed)
    found = [judge(test, one) for one in drawn]
    mean = {metric: fmean(one[metric] for one in found) for metric in found[0]}
    table.add(f"{name}: random mask", mean | shares, labels="class", note=f"{note}; mean of {DRAWS} masks")
    return tuned


def members(rows: Examples) -> Tensor:
    """Which rows are in which of their groups, bool ``[N, G]``."""
    names = rows.groups
    return torch.tensor([[name in row.groups for name in names] for row in rows])


def by_identity(
    groups: Tensor, test: Features, answer: Head | Callable[[Features], Tensor] | None = None
) -> dict[str, float]:
    """As `robustness`, and the worst of groups that overlap, bool ``[N, G]``: a row counts in each that it is in."""
    found = [judged(test.subset(rows), answer).average for rows in groups.T]
    return robustness(test, answer) | {WORST_IDENTITY: min(found)}


def _finish(table: Table, tuned: Tuned | None, args: argparse.Namespace, results: Results) -> None:
    table.show()
    table.write(results, args.seeds)
    if args.plot is not None and tuned is not None:
        figure = plots.distribution(tuned.scores.deltas, names=tuned.scores.names)
        command.save(figure, args.plot, f"neurontune-{table.case.replace(', ', '-').replace(' ', '-')}")


def _sizes(rows: Examples) -> str:
    return ", ".join(f"{name}: {len(rows.in_group(name))}" for name in rows.groups)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one experiment; 2 for a wrong argument or file."""
    commands = {"waterbirds": waterbirds, "civilcomments": civilcomments}
    parser, parsers = command.parser(__doc__, commands)
    backbones.add_argument(parsers["waterbirds"])
    comments = parsers["civilcomments"]
    comments.add_argument("--train", choices=["correlated", "natural"], default="correlated")
    comments.add_argument("--share", type=float, default=0.9, help="of toxic training comments that name an identity")
    comments.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    args = parser.parse_args(argv)
    return command.main("neurontune", args, commands[args.command])


if __name__ == "__main__":
    sys.exit(main())
