"""Several classes removed at once (FCR, Fig. 7): accuracy of those removed and of the others, over random sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
import torch

from experiments.backbones import judged
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head

COUNTS = tuple(range(1, 9))  # of ten classes
SETS = 10  # of each size

Removals = Mapping[str, Sequence[Sequence[Head]]]
"""By method, for each class the heads without it: one, or one for each draw."""


def sets(classes: int, count: int, seed: int) -> list[list[int]]:
    """Random sets of so many classes; the smaller ones of a seed lie inside the larger ones."""
    orders = (np.random.default_rng([seed, number]).permutation(classes) for number in range(SETS))
    return [sorted(order[:count].tolist()) for order in orders]


def together(head: Head, removals: Sequence[Sequence[Head]], classes: Sequence[int]) -> list[Head]:
    """The head with the output of each of the classes as its own removal leaves it; one for each draw they all have."""
    assert head.bias is not None
    found = []
    for own in zip(*(removals[label] for label in classes), strict=False):
        weight, bias = head.weight.clone(), head.bias.clone()
        for label, without in zip(classes, own, strict=True):
            assert without.bias is not None
            weight[label], bias[label] = without.weight[label], without.bias[label]
        found.append(head.with_(weight=weight, bias=bias))
    return found


def removed(test: Features, removals: Removals, count: int, seed: int) -> dict[str, dict[str, float]]:
    """By method and ``before``: percent right of the removed classes and of the others, and what the others gain."""
    before = judged(test).classes
    nothing: Removals = {"before": [[test.head]] * len(before)}
    out = {}
    for method, heads in {**nothing, **removals}.items():
        found = []
        for chosen in sets(len(before), count, seed):
            tried = together(test.head, heads, chosen)
            after = torch.stack([judged(test, head).classes for head in tried]).mean(0)
            gone = torch.zeros(len(before), dtype=torch.bool)
            gone[chosen] = True
            found.append((after[gone].mean(), after[~gone].mean(), (after - before)[~gone].mean()))
        means = (fmean(map(float, values)) for values in zip(*found, strict=True))
        out[method] = dict(zip(("removed_accuracy", "retained_accuracy", "change_of_others"), means, strict=True))
    return out
