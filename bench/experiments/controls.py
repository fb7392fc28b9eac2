"""Other ways to choose the weights that FCR edits: at random, by trying all, and no weight at all."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np
import torch
from torch import Tensor

from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head
from spurge.methods.fcr.edges import Edge, tilt, usable
from spurge.methods.fcr.fcr import FCR
from spurge.methods.fcr.rates import Chooser, Criterion

DRAWS = 20


def usable_columns(head: Head, row: int) -> list[int]:
    """Units whose weight in a row could be edited: FCR's own rule."""
    return usable(head.weight[row], FCR().least_weight, "positive").nonzero()[:, 0].tolist()


def random_columns(head: Head, row: int, seed: int) -> list[int]:
    """At most DRAWS of them."""
    return np.random.default_rng(seed).permutation(usable_columns(head, row))[:DRAWS].tolist()


def orthogonal(head: Head, row: int, column: int) -> Head:
    """The head with one weight edited by Eq. 7."""
    return tilt(head, [Edge(row, column, row, nan, nan)], rate=1.0, angle=None, choice=None, most=1.0)[1]


def chosen(head: Head, columns: Sequence[Sequence[int]], select: Features, criterion: Criterion) -> Head:
    """The head with one of the `columns` of each row edited, weights and rates by the criterion."""
    slots = [[Edge(row, column, row, nan, nan) for column in among] for row, among in enumerate(columns)]
    found = Chooser(select, criterion, None, high=1.0, each=True).choose(head, slots)
    choice = list(zip(found.edges, found.rates, strict=True))
    return tilt(head, found.edges, rate=None, angle=None, choice=lambda *_: choice, most=1.0)[1]


def moved_threshold(select: Features, parts: Tensor) -> Head:
    """The head of two classes with the bias at which the worst of the rows' parts ``[N]`` is best.

    Tried are no change, and all biases halfway between two margins of these rows.
    """
    head = select.head
    assert head.bias is not None
    logits = head.logits(select.values).double()
    margins = (logits[:, 0] - logits[:, 1]).unique()
    tried = torch.cat([torch.zeros(1, dtype=torch.float64), (margins[1:] + margins[:-1]) / 2])
    answers = (logits[:, 1:] + tried > logits[:, :1]).long()  # [N, T]
    right = (answers == select.labels[:, None]).double()
    each = torch.stack([right[parts == part].mean(0) for part in parts.unique()])
    best = tried[int(each.min(0).values.argmax())]
    return head.with_(bias=head.bias + torch.tensor([0.0, float(best)]).to(head.bias))


def switched_off(head: Head, label: int) -> Head:
    """The trivial removal: a bias that no input outweighs."""
    assert head.bias is not None
    bias = head.bias.clone()
    bias[label] = -1e6
    return head.with_(bias=bias)
