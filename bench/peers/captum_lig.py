"""captum's LayerIntegratedGradients, one layer after the other, as its users call it.

captum's baseline of a layer is what goes into the layer for a baseline *input*. The path from zero that
knowledge neurons are defined by starts at no such value of any input, so it cannot be asked for: with the usual
baseline, a sentence of [PAD], captum answers another question, and its error against the path from zero is not
a matter of steps. ``zero_baseline=True`` is a way round for those who want the same question answered: a hook
makes the layer's neurons zero for a sentence of one reserved id, which then is the baseline. It costs the same,
and captum's own rule, Gauss-Legendre, then shows what it can do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn

from peers.anatomy import downs, logits

PAD = 0
RESERVED = 1  # an unused or special id of every vocabulary here; no text of the benchmarks holds it


def captum_layers(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor,
    steps: int,
    *,
    layers: Sequence[int] | None = None,
    rows: int | None = None,
    zero_baseline: bool = False,
) -> dict[str, Tensor]:
    """Scores ``[B, F]`` of each layer; ``rows`` is captum's ``internal_batch_size``, all at once by default."""
    places, scores, handles = list(downs(model).items()), {}, []
    is_baseline: list[Tensor] = []

    def forward(token_ids: Tensor) -> Tensor:
        is_baseline[:] = [(token_ids == RESERVED).all(1)]
        return logits(model, token_ids)

    def zero(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].masked_fill(is_baseline[0].view(-1, 1, 1), 0.0),)

    try:
        for i in range(len(places)) if layers is None else layers:
            name, down = places[i]
            if zero_baseline:
                handles.append(down.register_forward_pre_hook(zero))
            attribution = LayerIntegratedGradients(forward, down).attribute(
                ids,
                baselines=torch.full_like(ids, RESERVED if zero_baseline else PAD),
                target=labels,
                n_steps=steps,
                internal_batch_size=rows,
                attribute_to_layer_input=True,
            )
            scores[name] = attribution.detach().sum(1)
    finally:
        for handle in handles:
            handle.remove()
    return scores
