"""NFL, "doN't Forget your Language": Chew et al. 2024, Findings of EACL (arXiv 2305.13654), both penalties.

Cross-entropy plus a factor times how far the encoder has moved from the one before fine-tuning. NFL-CO constrains its
outputs, :math:`1 - \\cos(h_t, h_t^0)` averaged over the tokens of a text; NFL-CP its parameters,
:math:`\\sum \\|W - W^0\\|^2` over linear layers (embeddings are not trained here).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from spurge.demo.train import Loss, load_base
from spurge.engine.base.gradients import grad_mode
from spurge.engine.data.examples import Examples, Inputs

FACTORS = {"outputs": (1.0, 10.0), "parameters": (0.01, 0.1)}
"""Of each penalty; dev chooses. At these the penalty is of the size of the cross-entropy."""


def constrained_outputs(labels: tuple[str, ...], factor: float) -> Loss:
    """NFL-CO: the loss, a scalar, beside the outputs of the encoder before fine-tuning.

    Args:
        labels: of the model, by which the one before is loaded.
        factor: of the penalty.
    """
    base = load_base(labels)[0].bert.eval()

    def loss(model: Any, inputs: Inputs, batch: Examples) -> Tensor:
        states = model.bert(**inputs).last_hidden_state
        with grad_mode(False):
            before = base(**inputs).last_hidden_state
        mask = inputs["attention_mask"].to(states)
        moved = 1 - (mask * F.cosine_similarity(states, before, dim=2)).sum(1) / mask.sum(1)
        return F.cross_entropy(classified(model, states), batch.targets) + factor * moved.mean()

    return loss


def constrained_parameters(labels: tuple[str, ...], factor: float) -> Loss:
    """NFL-CP: the loss, a scalar, beside the parameters of the encoder before fine-tuning; arguments as above."""
    base = dict(load_base(labels)[0].bert.named_modules())
    names = [name for name, module in base.items() if isinstance(module, nn.Linear) and not name.startswith("pooler")]

    def loss(model: Any, inputs: Inputs, batch: Examples) -> Tensor:
        own = dict(model.bert.named_modules())
        moved = sum((own[name].weight - base[name].weight.detach()).square().sum() for name in names)
        return F.cross_entropy(model(**inputs).logits, batch.targets) + factor * moved

    return loss


def classified(model: Any, states: Tensor) -> Tensor:
    """Logits ``[B, Y]`` of a BERT classifier from the states of its last layer, ``[B, T, M]``."""
    return model.classifier(model.dropout(model.bert.pooler(states)))
