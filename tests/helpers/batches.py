"""Batches for the models of `helpers.tiny_models`, and what is asked of them."""

from __future__ import annotations

import torch
from torch import Tensor

from spurge.engine.cascade.cascade import Rows, predicted_logit


def batch_for(family: str, examples: int = 4, tokens: int = 9) -> dict[str, Tensor]:
    """A batch with padding on the right (images: none)."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(examples, 3, 16, 16, generator=generator)}
    ids = torch.randint(5, 60, (examples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, examples):
        mask[row, tokens - row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def two_targets(rows: Rows) -> Tensor:
    """The predicted logit, and a smooth function of all logits."""
    return torch.stack([predicted_logit(rows), rows.logits.softmax(1)[:, 0]], 1)
