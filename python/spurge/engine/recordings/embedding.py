"""Embeddings of texts by a bare encoder, for topics and small classifiers on top of them; and of words on their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.tensor_parallel import whole
from spurge.engine.data.examples import checked_texts
from spurge.engine.models.handle import Handle
from spurge.engine.models.prompt_template import Prompted
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


def word_pieces(handle: Handle, units: Sequence[str]) -> list[list[int]]:
    """Tokens of each unit on its own, without special tokens and without the template of a prompt."""
    plain = handle.tokenizer.tokenizer if isinstance(handle.tokenizer, Prompted) else handle.tokenizer
    # A leading blank: byte-level tokenizers know a word inside a sentence by it.
    return [list(ids) for ids in plain([f" {unit}" for unit in units], add_special_tokens=False)["input_ids"]]


def word_vectors(handle: Handle, units: Sequence[str]) -> Tensor:
    """Mean input embeddings of the sub-words of each unit at unit length, ``[units, H]`` float32 on the CPU.

    Args:
        handle: of a ``transformers`` model with input embeddings, and its tokenizer.
        units: words, or words joined by blanks.
    """
    table = whole(handle.model.get_input_embeddings().weight.detach())  # type: ignore[operator]
    if not units:
        return torch.zeros(0, table.shape[1])
    pieces = word_pieces(handle, units)
    rows = [table[torch.tensor(ids, dtype=torch.long, device=table.device)].float().sum(0) for ids in pieces]
    return nn.functional.normalize(torch.stack(rows), dim=1).cpu()


def _mean(output: Any, mask: Tensor) -> Tensor:
    """Mean over the tokens, float32 ``[n, D]``."""
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.shape[:2] != mask.shape:
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(output).__name__
        raise ValueError(f"model: expected last hidden states {(*mask.shape, 'D')} in its output, got {got}")
    # where, not a product: what stands at padding need not be finite.
    kept = torch.where(mask[..., None] != 0, hidden.float(), 0.0)
    return kept.sum(1) / mask.sum(1, keepdim=True)
