"""Features with a planted shortcut, in two designs that are known in every detail.

*Units*: one clear unit for each class and each value of the shortcut, for methods that edit single weights.
*Dimensions*: many weak dimensions follow the class and fewer strong ones the shortcut, for methods that suppress some.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spurge.engine.features.features import Features
from spurge.engine.last_layer.fitting import fit_head
from spurge.engine.models.heads import Head

CORE_UNITS, SHORTCUT_UNITS = (0, 1), (2, 3)  # fire for class 0, 1, and for shortcut 0, 1
CORE_DIMENSIONS, SHORTCUT_DIMENSIONS, WIDTH = range(48), range(48, 72), 96


def labels_and_shortcuts(rows: int, correlation: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Classes and shortcuts ``[N]`` of 0 and 1: the shortcut is the class in this share of the rows."""
    labels = torch.randint(2, (rows,), generator=generator)
    same = torch.rand(rows, generator=generator) < correlation
    return labels, torch.where(same, labels, 1 - labels)


def layer_of(head: Head) -> nn.Linear:
    """A layer with the weights and the bias of a head, float32."""
    layer = nn.Linear(head.width, head.outputs)
    layer.load_state_dict({"weight": head.weight, "bias": head.bias})
    return layer


# ---- units ---------------------------------------------------------------------------------------------------------


def unit_features(rows: int, correlation: float, seed: int, head: Head | None = None) -> tuple[Features, Tensor]:
    """Features ``[N, 8]`` in four groups (class, shortcut), and the shortcuts, which are clearer than the class.

    Without a head, one is fitted on these rows.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, shortcut = labels_and_shortcuts(rows, correlation, generator)
    values = 0.6 * torch.randn(rows, 8, generator=generator)
    values[torch.arange(rows), labels] += 1.2
    values[torch.arange(rows), 2 + shortcut] += 2.5
    values = values.relu()
    if head is None:
        head = Head.of(layer_of(fit_head(values, labels, 2, weights=None, l2=1e-3)))
    groups = 2 * labels + shortcut
    return Features(values, labels, head, groups=groups, group_names=("00", "01", "10", "11")), shortcut


def class_accuracies(features: Features, head: Head) -> list[float]:
    """Percent of each class."""
    right = head.predictions(features.values) == features.labels
    return [100 * float(right[features.labels == c].double().mean()) for c in range(head.outputs)]


def group_accuracies(features: Features, head: Head) -> list[float]:
    """Percent of each group."""
    assert features.groups is not None
    right = head.predictions(features.values) == features.labels
    return [100 * float(right[features.groups == g].double().mean()) for g in range(int(features.groups.max()) + 1)]


# ---- dimensions ----------------------------------------------------------------------------------------------------


def dimension_features(
    rows: int, correlation: float, seed: int, head: Head | None = None, *, signed: bool = False, core: float = 0.3
) -> Features:
    """Features ``[N, 96]`` in four groups (class, shortcut), behind a ReLU unless ``signed``.

    Without a head, one is fitted that relies on the shortcut: a strong penalty prefers few strong features.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, shortcut = labels_and_shortcuts(rows, correlation, generator)
    means = torch.zeros(2, WIDTH)
    means[0, list(CORE_DIMENSIONS)], means[1, list(SHORTCUT_DIMENSIONS)] = core, 1.0
    means *= 1 - 2 * (torch.arange(WIDTH) % 2)  # half of them fall with the class
    values = torch.stack([2 * labels - 1, 2 * shortcut - 1], 1).float() @ means
    values += torch.randn(rows, WIDTH, generator=generator)
    values = values if signed else values.relu()
    if head is None:
        head = fit_head(values, labels, 2, weights=None, l2=1.0)
    return Features(
        values, labels, head, groups=2 * labels + shortcut, names=("a", "b"), group_names=("aa", "ab", "ba", "bb")
    )


@dataclass(frozen=True)
class Sets:
    train: Features
    validation: Features
    test: Features


def dimension_sets(seed: int = 0, *, validation: float = 0.95, signed: bool = False, core: float = 0.3) -> Sets:
    """Training rows with a shortcut of 95 %, a validation set with the given one, a test set without."""
    train = dimension_features(2000, 0.95, seed, signed=signed, core=core)
    rest = [
        dimension_features(n, correlation, seed + far, train.head, signed=signed, core=core)
        for n, correlation, far in ((1200, validation, 50), (2000, 0.5, 90))
    ]
    return Sets(train, *rest)
