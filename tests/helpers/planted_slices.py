"""Features of two classes, one of which has a part that the head gets wrong."""

from __future__ import annotations

import torch

from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head

ODD = 30  # rows of the part, the first of class 0


def planted_slices(rows: int = 300) -> Features:
    """``[2 * rows, 6]``; in the odd part the second feature is large and the first one lies."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(rows)
    values = 0.3 * torch.randn(2 * rows, 6, generator=generator)
    values[:, 0] += 2.0 * labels - 1
    values[:ODD, 0] += 2.0
    values[:ODD, 1] += 3.0
    head = torch.nn.Linear(6, 2)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[1, 0], head.weight[0, 0] = 1.0, -1.0
        head.bias.zero_()
    return Features(values, labels, Head.of(head), names=("no", "yes"))
