"""The loop of the knowledge-neurons code (Dai et al. 2022; EleutherAI/knowledge-neurons), for all tokens of a
classifier or a language model.

For each layer: one forward pass of the whole model to read the activations, then passes of the whole model with
the activations replaced by ``k/m`` of themselves. The public package scales one position and takes one sentence
per call; this form, with all positions and the sentences and steps batched, is a little faster than the package
and computes the same quantity as the other methods here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peers.anatomy import downs, logits


def knowledge_neurons_loop(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor,
    nodes: Sequence[float],
    weights: Sequence[float],
    *,
    layers: Sequence[int] | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Scores ``[B, F]`` of the neurons of each layer; ``chunk`` steps at a time, all at once by default."""
    places, scores = list(downs(model).items()), {}
    for i in range(len(places)) if layers is None else layers:
        (name, down), seen = places[i], []
        handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: B023
        with torch.no_grad():
            logits(model, ids)
        handle.remove()
        z = seen[0]
        total, size = torch.zeros_like(z), chunk or len(nodes)
        for start in range(0, len(nodes), size):
            alpha = torch.tensor(nodes[start : start + size], dtype=z.dtype, device=z.device)
            weight = torch.tensor(weights[start : start + size], dtype=z.dtype, device=z.device)
            scaled = (alpha.view(-1, 1, 1, 1) * z).flatten(0, 1).requires_grad_()
            handle = down.register_forward_pre_hook(lambda module, args: (scaled,))  # noqa: B023
            try:
                answers = logits(model, ids.repeat(len(alpha), 1))
            finally:
                handle.remove()
            picked = answers.gather(1, labels.repeat(len(alpha)).view(-1, 1))
            (gradient,) = torch.autograd.grad(picked.sum(), scaled)
            total += torch.einsum("s,sbtf->btf", weight, gradient.view(len(alpha), *z.shape))
        scores[name] = (total * z).sum(1)
    return scores
