"""Interpolation of weights: Wortsman et al. 2022, Robust fine-tuning of zero-shot models (WiSE-FT, arXiv 2109.01903).

Weights become :math:`(1 - s) W_\\mathrm{tuned} + s W_\\mathrm{base}`. The head has no base and stays.
"""

from __future__ import annotations

from torch import nn

from spurge.demo.train import base_folder
from spurge.engine.edits.weight_deltas import Dense, WeightDeltas

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


def to_base(model: nn.Module) -> WeightDeltas:
    """The edit of a fine-tuned MiniLM that gives its encoder the weights from before; its pooler stays."""
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(base_folder(), local_files_only=True, trust_remote_code=False)
    base = dict(encoder.named_parameters())
    own = {f"bert.{name}": weight for name, weight in base.items() if not name.startswith("pooler")}
    deltas = {
        name: Dense(own[name].detach() - weight.detach()) for name, weight in model.named_parameters() if name in own
    }
    return WeightDeltas.build(model, deltas, {"method": "WiSE-FT"})
