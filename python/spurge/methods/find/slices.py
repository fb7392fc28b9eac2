"""Slices of a class on which the last layer errs more: of the features of any model, of texts or images.

Without words there is nothing to take out of an input. What there is, is where the errors lie: each class is cut into
clusters of its features and of how surely they are classified, as Domino does (Eyuboglu and others, arXiv 2203.14960),
and the clusters with more errors than the rest of their class are the slices to look at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.checks import instance, integer
from spurge.engine.base.statistics import NORMAL, benjamini_hochberg, two_sided
from spurge.engine.base.tables import folded
from spurge.engine.causal.topics import k_means, one_thread
from spurge.engine.features.features import Features
from spurge.methods.find.leaning import margins_of

_DIMENSIONS = 32  # principal components of the features
_SURE = 2.0  # weight of the margin, in standard deviations of a component
_LEAST_ROWS = 5  # of a slice


@dataclass(frozen=True)
class Slice:
    """A part of a class.

    Attributes:
        name: label and number.
        label: name of the class.
        count: rows.
        errors: percent of them that are classified wrongly.
        low, high: 95 % Wilson interval of ``errors``.
        rest: percent of errors in the rest of the class.
        q: false discovery rate of erring more, or less, than the rest.
    """

    name: str
    label: str
    count: int
    errors: float
    low: float
    high: float
    rest: float
    q: float


@dataclass(frozen=True, eq=False, repr=False)
class Slices:
    """The slices of N rows, those with the most errors beyond their class first. Made by :func:`find_slices`.

    Attributes:
        rows: the slices.
        numbers: slice of each of the N inputs, as a place in ``rows``; int64 ``[N]``.
        info: how they were found, JSON-able.
    """

    rows: tuple[Slice, ...]
    numbers: Tensor
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Slices({len(self)} of {len(self.numbers)} rows)"

    def __str__(self) -> str:
        head = ["slice", "rows", "errors, %", "95 %", "rest, %", "q"]
        lines = [
            [
                one.name[:30],
                str(one.count),
                f"{one.errors:.1f}",
                f"[{one.low:.1f}, {one.high:.1f}]",
                f"{one.rest:.1f}",
                f"{one.q:.3f}",
            ]
            for one in self.rows
        ]
        return "\n".join(folded([head, *lines], rule=True))

    def groups(self, features: Features) -> Features:
        """The features in groups of their slices, for worst groups, FCR and NeuronTune.

        Raises:
            ValueError: features of another number of rows.
        """
        if len(features) != len(self.numbers):
            raise ValueError(f"features: expected {len(self.numbers)} rows, got {len(features)}")
        return features.with_groups(self.numbers, [one.name for one in self.rows])


def find_slices(features: Features, *, clusters: int = 5, seed: int = 0) -> Slices:
    """Cuts every class into clusters and ranks them by their errors.

    Args:
        features: of any model, with labels and the head (`spurge.extract`).
        clusters: of each class, at most; fewer where it has fewer than ten rows for each.
        seed: of the clusters.

    Raises:
        TypeError: no :class:`Features`.
        ValueError: a number out of range, or no class with 20 rows.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    instance("features", features, Features)
    clusters, seed = integer("clusters", clusters, 2), integer("seed", seed, 0)
    labels = features.labels.cpu().numpy()
    wrong = ~features.right().cpu().numpy()
    margins = margins_of(features.logits().detach().cpu())
    numbers = np.full(len(labels), -1)
    parts: list[tuple[int, int, np.ndarray]] = []
    with one_thread():
        for label in np.unique(labels).tolist():
            rows = np.flatnonzero(labels == label)
            count = min(clusters, len(rows) // (2 * _LEAST_ROWS))
            if count < 2:
                parts.append((label, 0, rows))
                continue
            points = _points(features.values[torch.from_numpy(rows).to(features.values.device)], margins[rows, label])
            found, _ = k_means(points, count, seed)
            parts += [(label, number, rows[found == number]) for number in range(count)]
    if not any(number for _, number, _ in parts):
        raise ValueError(f"features: need a class with at least {4 * _LEAST_ROWS} rows")
    slices = _judged(parts, wrong, labels, features.names)
    order = sorted(range(len(slices)), key=lambda i: (-slices[i].count * (slices[i].errors - slices[i].rest), i))
    for place, number in enumerate(order):
        numbers[parts[number][2]] = place
    info = {"method": "find_slices", "clusters": clusters, "seed": seed, "features": features.fingerprint()}
    return Slices(tuple(slices[number] for number in order), torch.from_numpy(numbers), info)


def _points(values: Tensor, margins: np.ndarray) -> np.ndarray:
    """Leading principal components at their own scale, and the margin of the class; float64 ``[n, d + 1]``."""
    centred = (values.double() - values.double().mean(0)).cpu()
    directions, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    leading = (directions * sizes)[:, :_DIMENSIONS].numpy()
    scale = max(float(leading.std(0).max()), 1e-12)
    sure = (margins - margins.mean()) / max(float(margins.std()), 1e-12)
    return np.concatenate([leading / scale, _SURE * np.clip(sure, -3, 3)[:, None] / math.sqrt(2)], 1)


def _judged(
    parts: Sequence[tuple[int, int, np.ndarray]], wrong: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> list[Slice]:
    found, effects, errors = [], [], []
    for label, number, rows in parts:
        others = np.setdiff1d(np.flatnonzero(labels == label), rows, assume_unique=True)
        own, rest = float(wrong[rows].mean()), float(wrong[others].mean()) if len(others) else float("nan")
        share = float(wrong[labels == label].mean())
        effects.append(own - rest)
        errors.append(math.sqrt(share * (1 - share) * (1 / len(rows) + 1 / max(1, len(others)))))
        low, high = wilson(int(wrong[rows].sum()), len(rows))
        numbers = 100 * own, 100 * low, 100 * high, 100 * rest
        found.append((f"{names[label]} {number}", names[label], len(rows), *numbers))
    p = two_sided(torch.tensor(effects, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64))
    q = benjamini_hochberg(p.nan_to_num(1.0)).tolist()  # a class in one piece has no rest
    return [Slice(*one, q=own) for one, own in zip(found, q, strict=True)]


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927).

    >>> tuple(round(end, 3) for end in wilson(5, 10))
    (0.237, 0.763)
    """
    share, square = count / total, NORMAL**2 / total
    centre, half = share + square / 2, NORMAL * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))
