"""What a careful user writes today in plain torch for a BERT classifier, in two strengths.

``suffix_loop`` keeps the hidden state in front of each layer (the prefix) and runs, for each layer, only what
follows its neurons, with the steps batched. ``collapsed_loop`` adds all the algebra there is: scaling a layer's
activations by a scales its output ``u = W2 z`` by a, so the path starts behind the down projection; the
gradients of all nodes are summed in the model's width before one product with ``W2``; the last layer computes
the first token only, because the classifier reads no other. With 4 Gauss-Legendre nodes this is the strongest
hand-written form known: faster than it is what a library must be.

Both know BERT's module names and need inputs without padding, which is what keeps them short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _attended(layer: nn.Module, hidden: Tensor, *, first_token: bool = False) -> Tensor:
    """Output of the layer's attention block, the FFN's input: ``[R, T, H]``, or the first token's ``[R, 1, H]``."""
    if not first_token:
        return _first(layer.attention(hidden))
    attention, query_rows = layer.attention.self, hidden[:, :1]
    rows, heads = hidden.shape[0], attention.num_attention_heads
    query, key, value = (
        projection(x).view(rows, x.shape[1], heads, -1).transpose(1, 2)
        for projection, x in ((attention.query, query_rows), (attention.key, hidden), (attention.value, hidden))
    )
    context = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows, 1, -1)
    return layer.attention.output(context, query_rows)


def _logit(model: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Logit of each row's label, ``[R]``; rows are node-major copies of the ``B`` examples."""
    logits = model.classifier(model.bert.pooler(hidden))
    return logits.gather(1, labels.repeat(logits.shape[0] // len(labels), 1).view(-1, 1)).squeeze(1)


def _chunks(nodes: Sequence[float], weights: Sequence[float], chunk: int | None, like: Tensor):  # type: ignore[no-untyped-def]
    size = chunk or len(nodes)
    for start in range(0, len(nodes), size):
        part = slice(start, start + size)
        yield (torch.tensor(values[part], dtype=like.dtype, device=like.device) for values in (nodes, weights))


def suffix_loop(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor,
    nodes: Sequence[float],
    weights: Sequence[float],
    *,
    layers: Sequence[int] | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Scores ``[B, F]`` of the neurons of each layer; ``chunk`` nodes at a time, all at once by default."""
    blocks, scores = model.bert.encoder.layer, {}
    with torch.no_grad():
        hidden = model.bert.embeddings(ids)
        prefix = [hidden := _first(block(hidden)) for block in blocks[:-1]]
        prefix.insert(0, model.bert.embeddings(ids))
    for i in range(len(blocks)) if layers is None else layers:
        with torch.no_grad():
            attended = _attended(blocks[i], prefix[i])
            z = blocks[i].intermediate(attended)
        total = torch.zeros_like(z)
        for alpha, weight in _chunks(nodes, weights, chunk, z):
            scaled = (alpha.view(-1, 1, 1, 1) * z).flatten(0, 1).requires_grad_()
            hidden = blocks[i].output(scaled, attended.repeat(len(alpha), 1, 1))
            for block in blocks[i + 1 :]:
                hidden = _first(block(hidden))
            (gradient,) = torch.autograd.grad(_logit(model, hidden, labels).sum(), scaled)
            total += torch.einsum("s,sbtf->btf", weight, gradient.view(len(alpha), *z.shape))
        scores[f"bert.encoder.layer.{i}.output.dense"] = (total * z).sum(1)
    return scores


def collapsed_loop(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor,
    nodes: Sequence[float],
    weights: Sequence[float],
    *,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """The same scores: the path behind ``W2``, one product with ``W2`` a layer, the last layer's first token only."""
    blocks, scores = model.bert.encoder.layer, {}
    last = len(blocks) - 1
    with torch.no_grad():
        prefix = [model.bert.embeddings(ids)]
        for block in blocks[:-1]:
            prefix.append(_first(block(prefix[-1])))
    for i, block in enumerate(blocks):
        down, norm = block.output.dense, block.output.LayerNorm
        with torch.no_grad():
            attended = _attended(block, prefix[i], first_token=i == last)
            z = block.intermediate(attended)
            u = functional.linear(z, down.weight)
            rest = attended + down.bias
        summed = torch.zeros_like(u)
        for alpha, weight in _chunks(nodes, weights, chunk, u):
            scaled = (alpha.view(-1, 1, 1, 1) * u).flatten(0, 1).requires_grad_()
            hidden = norm(scaled + rest.repeat(len(alpha), 1, 1))
            for j in range(i + 1, len(blocks)):
                attended = _attended(blocks[j], hidden, first_token=j == last)
                hidden = blocks[j].output(blocks[j].intermediate(attended), attended)
            (gradient,) = torch.autograd.grad(_logit(model, hidden, labels).sum(), scaled)
            summed += torch.einsum("s,sbth->bth", weight, gradient.view(len(alpha), *u.shape))
        scores[f"bert.encoder.layer.{i}.output.dense"] = ((summed @ down.weight) * z).sum(1)
    return scores
