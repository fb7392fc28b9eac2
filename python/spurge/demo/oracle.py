"""Made-up prompts whose effects are known: a topic moves the treatment, two units and the outcome."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NIE, TE = 0.5, 0.8
"""Of the mediating unit, and in all; the other unit follows the topic alone and has no effect."""


@dataclass(frozen=True)
class Oracle:
    """treatment bool ``[N]``; units ``[2, N]``, the mediator and the topic's; outcome ``[N]``; topics int64 ``[N]``."""

    treatment: Tensor
    units: Tensor
    outcome: Tensor
    topics: Tensor


def oracle(seed: int, rows: int = 4000, topics: int = 6) -> Oracle:
    """q -> n (1), n -> y (0.5), q -> y (0.3), and topics of six levels -> q, n and y."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(rows, generator=generator, dtype=torch.float64)

    topic = torch.randint(topics, (rows,), generator=generator)
    level = torch.linspace(-1.46, 1.46, topics, dtype=torch.float64)[topic]
    treatment = torch.rand(rows, generator=generator, dtype=torch.float64) < torch.sigmoid(0.85 * level)
    mediator = treatment + level + noise()
    follower = level + 0.7 * noise()
    outcome = 0.3 * treatment + 0.5 * mediator + 1.4 * level + 0.5 * noise()
    return Oracle(treatment, torch.stack([mediator, follower]), outcome, topic)
