"""The tail of what fine-tuning changed, dropped: spectral truncation of W_tuned - W_base (arXiv 2606.07596).

Of each linear layer's change the r largest singular values stay; dev chooses r.
"""

from __future__ import annotations

import torch
from torch import nn

from experiments.rivals import wise_ft
from spurge.engine.edits.weight_deltas import Delta, Dense, WeightDeltas

RANKS = (1, 2, 4, 8, 16, 32, 64)


def truncations(model: nn.Module) -> dict[int, WeightDeltas]:
    """By rank, the edit of a fine-tuned MiniLM that takes the tail away."""
    deltas: dict[int, dict[str, Delta]] = {rank: {} for rank in RANKS}
    for name, delta in wise_ft.to_base(model).deltas.items():
        assert isinstance(delta, Dense)
        if delta.values.dim() < 2 or "embeddings" in name:
            continue
        left, values, right = torch.linalg.svd(delta.values, full_matrices=False)
        for rank in RANKS:
            deltas[rank][name] = Dense((left[:, rank:] * values[rank:]) @ right[rank:])
    return {rank: WeightDeltas.build(model, own, {"method": "SVD tail", "rank": rank}) for rank, own in deltas.items()}
