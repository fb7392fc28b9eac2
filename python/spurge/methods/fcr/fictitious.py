"""Fictitious classes: how many there are, which are to be removed, and from which output of the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spurge.engine.base.checks import integer
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head

Row = Literal["predicted", "labelled", "weight"]


def count_kinds(features: Features, labels: Any, fictitious: Head | None) -> int:
    """How many fictitious classes there are: by their labels, int64 ``[N]``, or by the outputs of their head.

    Raises:
        TypeError: labels of another type.
        ValueError: another shape, a label out of range, or fewer than two classes.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"feature_labels: expected an int64 tensor, got {found}")
    if labels.shape != (len(features),) or int(labels.min()) < 0:
        raise ValueError(f"feature_labels: expected shape ({len(features)},) from 0, got {tuple(labels.shape)}")
    kinds = int(labels.max()) + 1 if fictitious is None else fictitious.outputs
    if kinds < 2 or int(labels.max()) >= kinds:
        raise ValueError(f"feature_labels: expected at least 2 classes, and those of the head, got {kinds}")
    return kinds


def features_and_rows(
    features: Features, labels: Tensor, kinds: int, feature: int | Sequence[int] | None, row: int | None, how: Row
) -> list[tuple[int, int | None]]:
    """Each feature to remove with the output it is taken from; None where the chosen unit decides.

    Args:
        features, labels, kinds: samples with their fictitious classes, and how many of these there are.
        feature: which to remove; None: for each output the one that goes with it most.
        row: the output; None: by ``how``.
        how: ``"predicted"`` or ``"labelled"``: the class that goes with the feature most; ``"weight"``: open.

    Raises:
        ValueError: a feature or row out of range, or nothing that the row follows from.
    """
    outputs = features.head.outputs
    if row is not None and integer("row", row, 0) >= outputs:
        raise ValueError(f"row: expected an output below {outputs}, got {row}")
    chosen = None
    if feature is not None:
        chosen = [integer("feature", f, 0) for f in (feature if isinstance(feature, Sequence) else [feature])]
        if not chosen or max(chosen) >= kinds or len(set(chosen)) != len(chosen):
            raise ValueError(f"feature: expected different fictitious classes below {kinds}, got {chosen}")
    if row is not None or how == "weight":
        if chosen is None:
            raise ValueError("feature: name those to remove where the row does not follow from the predictions")
        return [(f, row) for f in chosen]
    found = lift(labels, features.labels if how == "labelled" else features.predictions(), kinds, outputs)
    if chosen is None:
        best = [(int(found[:, y].argmax()), y) for y in range(outputs) if float(found[:, y].max()) > 0]
    else:
        best = [(f, int(found[f].argmax())) for f in chosen if float(found[f].max()) > 0]
    if len(best) < len(chosen or [0]):
        raise ValueError("feature: the classifier predicts no class more often where it is; give its row")
    return [*best]


def lift(features: Tensor, classes: Tensor, kinds: int, outputs: int) -> Tensor:
    """How much more often each class goes with a feature than with features on average, float64 ``[kinds, outputs]``.

    Both are int64 ``[N]``; a feature that does not occur has no lift.
    """
    table = (features * outputs + classes).bincount(minlength=kinds * outputs).view(kinds, outputs).double()
    present = table.sum(1, keepdim=True) > 0
    shares = table / table.sum(1, keepdim=True).clamp_min(1)
    return (shares - shares.sum(0) / present.sum()).where(present, 0.0).cpu()
