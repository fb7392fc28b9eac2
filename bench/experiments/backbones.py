"""Features of the experiments' networks, each extracted once; the usual head on them; and how heads are judged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from experiments import data, models
from experiments.data import Images
from spurge.engine.evaluation import groups
from spurge.engine.evaluation.groups import Accuracies
from spurge.engine.features.extraction import extract
from spurge.engine.features.features import Features
from spurge.engine.last_layer.fitting import Sgd, fit_head
from spurge.engine.models.heads import Head

QUICK = 400  # images of each part of a set


def image_features(model: nn.Module, images: Images, cache: Path | None, device: str) -> Features:
    """What the head of `model` reads for every image."""
    rows = (images.pixels, images.labels, images.groups)
    folder = None if cache is None else cache / "features"
    return extract(
        model,
        rows,
        cache=folder,
        device=device,
        progress=sys.stderr.isatty(),
        names=images.names,
        group_names=images.group_names,
    )


Backbone = Literal["fine-tuned", "frozen"]
EPOCHS, RATE = 4, 0.01  # of fine-tuning, batches of 32


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option that says which of the two."""
    parser.add_argument("--backbone", choices=get_args(Backbone), default="fine-tuned")


def case(args: argparse.Namespace) -> str:
    """What the rows of one of them are about."""
    return "waterbirds" if args.backbone == "frozen" else f"waterbirds, {args.backbone}"


def waterbirds(args: argparse.Namespace) -> Callable[[int], list[Features]]:
    """Training, validation and test features of Waterbirds by seed, with the head of ERM.

    Of EfficientNet-Lite0, fine-tuned end to end with each seed or, by ``args.backbone``, as it was trained on
    ImageNet, with a head fitted with each seed.
    """
    parts = [part.sample(QUICK) if args.quick else part for part in data.waterbirds(args.data)]
    if args.backbone == "frozen":
        frozen = models.efficientnet_lite0(outputs=2)
        features = [image_features(frozen, part, args.cache, args.device) for part in parts]
        return lambda seed: _with_head(features, erm(features[0], seed, quick=args.quick))

    def tuned(seed: int) -> list[Features]:
        how: dict[str, Any] = {"epochs": 1 if args.quick else EPOCHS, "rate": RATE, "batch_size": 32, "augment": True}
        how |= {"optimizer": "sgd", "seed": seed, "cache": args.cache, "device": args.device}
        model = models.trained("lite0", parts[0], **how)
        return [image_features(model, part, args.cache, args.device) for part in parts]

    return tuned


def _with_head(parts: Sequence[Features], head: Head) -> list[Features]:
    return [part.with_head(head) for part in parts]


def erm(train: Features, seed: int, *, quick: bool) -> Head:
    """The usual training of a last layer: minibatches of all rows alike, no balance of classes or groups."""
    settings = Sgd(epochs=5 if quick else 50, rate=1e-2)
    classes = len(train.names)
    return fit_head(train.values, train.labels, classes, weights=None, solver="sgd", sgd=settings, seed=seed)


def judged(features: Features, answer: Head | Callable[[Features], Tensor] | None = None) -> Accuracies:
    """Accuracies of a head, of another way to classify features, or of the features' own head."""
    if answer is None or isinstance(answer, Head):
        answers = (answer or features.head).logits(features.values)
    else:
        answers = answer(features)
    return groups.accuracies(answers, features.labels, features.groups, classes=len(features.names))


def robustness(features: Features, answer: Head | Callable[[Features], Tensor] | None = None) -> dict[str, float]:
    """Average over all rows, worst group, the gap between them, and what the worst group gains over the own head's."""
    found, own = judged(features, answer), judged(features)
    values = {"average_accuracy": found.average, "worst_group_accuracy": found.worst_group, "gap": found.gap}
    return values | {"gain": found.worst_group - own.worst_group}
