"""Sentence embeddings of a bare encoder, for topics and for small classifiers on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.data.examples import checked_texts
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.text_pass import read_texts


def embed(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    progress: bool = True,
) -> Tensor:
    r"""Embeddings of N texts: the mean of the last hidden states over a text's tokens, at unit length.

    .. math:: e = \bar{h} / \lVert \bar{h} \rVert, \qquad \bar{h} = \sum_t m_t h_t / \sum_t m_t

    with the mask m: padding does not count, the tokenizer's own tokens ([CLS], [SEP]) do. This is how
    sentence-transformers pools MiniLM (Reimers and Gurevych 2019, arXiv 1908.10084, section 3). The model runs in
    evaluation mode and comes back as it was.

    Args:
        model: an encoder of ``transformers``, or a model with a head, of which the part below the head is run.
        tokenizer: the model's.
        batch_size: texts that run at once; fewer where memory runs out.
        max_length: tokens a text is cut to (default: the tokenizer's own limit, where it has one).
        progress: show a progress bar.

    Returns:
        float32 ``[N, D]`` on the CPU, D the model's hidden size.

    Raises:
        TypeError: texts that are no str.
        ValueError: no texts, a text without a token, a model without hidden states, or states that are zero or not
            finite.
    """
    found = checked_texts("texts", texts)
    model = getattr(model, "_orig_mod", model)
    below = getattr(model, "base_model", model)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
    means = read_texts(Handle(model, tokenizer), below, found, _mean, description="embed", **settings)
    lengths = means.norm(dim=1, keepdim=True)
    zero = (lengths[:, 0] == 0).nonzero()[:, 0]
    if len(zero):
        raise ValueError(f"model: the mean of the hidden states is zero at row {int(zero[0])}")
    return means / lengths


def _mean(output: Any, mask: Tensor) -> Tensor:
    """Mean over the tokens, float32 ``[n, D]``."""
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.shape[:2] != mask.shape:
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(output).__name__
        raise ValueError(f"model: expected last hidden states {(*mask.shape, 'D')} in its output, got {got}")
    # where, not a product: what stands at padding need not be finite.
    kept = torch.where(mask[..., None] != 0, hidden.float(), 0.0)
    return kept.sum(1) / mask.sum(1, keepdim=True)
