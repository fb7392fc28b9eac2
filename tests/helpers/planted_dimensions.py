"""A shortcut planted in features: many weak dimensions say the class, fewer strong ones what goes with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spurge.engine.features.features import Features
from spurge.engine.last_layer.fitting import fit_head
from spurge.engine.models.heads import Head

CORE, SPURIOUS, WIDTH = range(48), range(48, 72), 96


def planted(
    n: int, agree: float, seed: int, head: Head | None = None, *, signed: bool = False, core: float = 0.3
) -> Features:
    """``n`` rows whose attribute is the class with chance ``agree``; groups are 2 * class + attribute.

    Behind a ReLU unless ``signed``. Without a head, one is fitted that relies on the shortcut: a strong penalty prefers
    few strong features.
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=g)
    attribute = torch.where(torch.rand(n, generator=g) < agree, labels, 1 - labels)
    means = torch.zeros(2, WIDTH)
    means[0, list(CORE)], means[1, list(SPURIOUS)] = core, 1.0
    means *= 1 - 2 * (torch.arange(WIDTH) % 2)  # half of them fall with the class
    values = torch.stack([2 * labels - 1, 2 * attribute - 1], 1).float() @ means
    values += torch.randn(n, WIDTH, generator=g)
    values = values if signed else values.relu()
    if head is None:
        head = fit_head(values, labels, 2, weights=None, l2=1.0)
    return Features(
        values, labels, head, groups=2 * labels + attribute, names=("a", "b"), group_names=("aa", "ab", "ba", "bb")
    )


@dataclass(frozen=True)
class Sets:
    train: Features
    validation: Features
    test: Features


def shortcut(seed: int = 0, *, validation: float = 0.95, signed: bool = False, core: float = 0.3) -> Sets:
    """Training rows with a shortcut of 95 %, a validation set with the given one, a test set without."""
    train = planted(2000, 0.95, seed, signed=signed, core=core)
    rest = [
        planted(n, agree, seed + far, train.head, signed=signed, core=core)
        for n, agree, far in ((1200, validation, 50), (2000, 0.5, 90))
    ]
    return Sets(train, *rest)
