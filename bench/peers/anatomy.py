"""Where the peers find a model's neurons and its answer, as their users look them up by hand."""

from __future__ import annotations

from torch import Tensor, nn


def downs(model: nn.Module) -> dict[str, nn.Module]:
    """Name and module of each layer's down projection; its input holds the layer's neurons."""
    if hasattr(model, "bert"):
        layers, place = model.bert.encoder.layer, "bert.encoder.layer.{}.output.dense"
    else:
        layers, place = model.model.layers, "model.layers.{}.mlp.down_proj"
    return {(name := place.format(i)): model.get_submodule(name) for i in range(len(layers))}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """``[R, Y]``: a classifier's logits, or a language model's after the last token.

    The language head is asked for the last token only, which most code for language models does not do: at 32 tokens
    it saves the peers a fifth of SmolLM2's work.
    """
    if hasattr(model, "bert"):
        return model(input_ids=ids).logits
    return model(input_ids=ids, logits_to_keep=1).logits[:, -1]
