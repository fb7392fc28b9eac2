"""Accuracies of an edited last layer at many rates, one rate after the other, as people write it in torch.

The edit adds ``r * shifts`` ``[N, E]`` to the logits of ``rows`` ``[E]``. Every form returns average ``[R]`` and worst
group's accuracy ``[R]`` in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Edit(NamedTuple):
    """One weight of each of ``rows`` ``[E]``, in the columns ``columns`` ``[E]``, moved by ``r * steps`` ``[E]``."""

    features: Tensor  # [N, M]
    weight: Tensor  # [O, M]
    bias: Tensor  # [O]
    logits: Tensor  # [N, O]
    shifts: Tensor  # [N, E]: steps times the columns of the features
    rows: Tensor
    columns: Tensor
    steps: Tensor
    labels: Tensor  # [N]
    groups: Tensor  # [N]


Predict = Callable[[float], Tensor]


def _accuracies(edit: Edit, rates: Sequence[float], predict: Predict) -> tuple[Tensor, Tensor]:
    sizes = edit.groups.bincount()
    average, worst = torch.zeros(2, len(rates), dtype=torch.float64, device=edit.rows.device)
    for i, rate in enumerate(rates):
        right = predict(rate) == edit.labels
        average[i] = 100 * right.sum().double() / len(right)
        hits = edit.groups[right].bincount(minlength=len(sizes))
        worst[i] = (100 * hits.double() / sizes)[sizes > 0].min()
    return average, worst


def cached_logits(edit: Edit, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A copy of the logits, the edit added, the largest of each row."""

    def predict(rate: float) -> Tensor:
        logits = edit.logits.clone()
        logits[:, edit.rows] += rate * edit.shifts
        return logits.argmax(1)

    return _accuracies(edit, rates, predict)


def cached_logits_tuned(edit: Edit, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The largest of the logits that stay is found once; for each rate there are only the edited ones to look at."""
    stays = torch.ones(edit.logits.shape[1], dtype=torch.bool, device=edit.rows.device)
    stays[edit.rows] = False
    moving = edit.logits[:, edit.rows].contiguous()
    moved = torch.empty_like(moving)
    if bool(stays.any()):
        rest, best = edit.logits[:, stays].max(1)
        best = stays.nonzero().flatten()[best]

    def predict(rate: float) -> Tensor:
        torch.add(moving, edit.shifts, alpha=rate, out=moved)
        if moved.shape[1] == 1:
            return torch.where(moved[:, 0] > rest, edit.rows, best)
        top, where = moved.max(1)
        if not bool(stays.any()):
            return edit.rows[where]
        return torch.where(top > rest, edit.rows[where], best)

    return _accuracies(edit, rates, predict)


def forward(edit: Edit, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The head itself, with the edited weight, on the cached features."""

    def predict(rate: float) -> Tensor:
        weight = edit.weight.clone()
        weight[edit.rows, edit.columns] += rate * edit.steps
        return F.linear(edit.features, weight, edit.bias).argmax(1)

    return _accuracies(edit, rates, predict)
