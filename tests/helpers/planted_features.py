"""Features with a planted shortcut, for the methods of the last layer: quick, and known in every detail."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spurge.engine.features.features import Features
from spurge.engine.last_layer.fitting import fit_head
from spurge.engine.models.heads import Head

CORE, SHORTCUT = (0, 1), (2, 3)  # units that fire for class 0, 1, and for shortcut 0, 1


def draw(rows: int, correlation: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[N, 8]``, classes and shortcuts: the shortcut is the class in this share of the rows, and clearer."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=generator)
    same = torch.rand(rows, generator=generator) < correlation
    shortcut = torch.where(same, labels, 1 - labels)
    values = 0.6 * torch.randn(rows, 8, generator=generator)
    values[torch.arange(rows), labels] += 1.2
    values[torch.arange(rows), 2 + shortcut] += 2.5
    return values.relu(), labels, shortcut


def shortcut_features(rows: int, correlation: float, seed: int, head: Head | None = None) -> tuple[Features, Tensor]:
    """Features in four groups (class, shortcut), and the shortcuts; without a head, one fitted on these rows."""
    values, labels, shortcut = draw(rows, correlation, seed)
    if head is None:
        layer = nn.Linear(8, 2)
        fitted = fit_head(values, labels, 2, weights=None, l2=1e-3)
        with torch.no_grad():
            layer.weight.copy_(fitted.weight)
            layer.bias.copy_(fitted.bias)  # type: ignore[arg-type]
        head = Head.of(layer)
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
