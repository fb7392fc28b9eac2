"""What is read of a model: a classifier's logits, or a language model's at its last real tokens and nowhere else.

A language head is as wide as the vocabulary; on every token of every row it would cost as much as several layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.models.arguments import at, logits_of
from spurge.engine.models.hooks import hook_before


def language_head(model: nn.Module) -> nn.Module | None:
    """The projection to the vocabulary that the next token of a text is read from; None for models without one.

    A masked language model fills gaps, an encoder-decoder answers in another text: neither has such a head.
    """
    says_next = getattr(model, "can_generate", lambda: True)()
    if not says_next or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return head if isinstance(head, nn.Module) else None


class Readout:
    """The logits that targets see.

    Args:
        model: a classifier, or a causal language model.
        tokens: K, how many of the last real tokens a language model is read at.

    Raises:
        ValueError: ``tokens`` below 1, or above 1 for a classifier.
    """

    def __init__(self, model: nn.Module, tokens: int = 1):
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"read: expected a number of tokens of at least 1, got {tokens!r}")
        self.head, self.tokens = language_head(model), tokens
        if tokens > 1 and self.head is None:
            raise ValueError(f"read: {type(model).__name__} has one vector of logits for each text, got read={tokens}")

    def logits(self, run: Callable[[], Any], probed: Tensor) -> Tensor:
        """Logits of one pass, ``[R, Y]``; ``[R, K, V]`` where K tokens are read, in the order of the text.

        Args:
            run: the pass; returns the model's output.
            probed: each row's last token that is read, ``[R]``. A text with fewer than K tokens up to there repeats its
                first one.

        Raises:
            ValueError: an output without such logits.
        """
        if self.head is None:
            return logits_of(run())
        position = probed
        if self.tokens > 1:
            back = torch.arange(1 - self.tokens, 1, device=probed.device)
            position = (probed[:, None] + back).clamp_min(0)
        with hook_before(self.head, lambda module, args, kwargs: ((at(args[0], position), *args[1:]), kwargs)):
            output = run()
        logits = getattr(output, "logits", None)
        if torch.is_tensor(logits) and logits.dim() == 3 and logits.shape[1] == self.tokens:
            return logits[:, 0] if self.tokens == 1 else logits
        if self.tokens > 1:
            found = tuple(logits.shape) if torch.is_tensor(logits) else type(output).__name__
            raise ValueError(f"model: expected logits [rows, {self.tokens}, vocabulary] in its output, got {found}")
        return logits_of(output)
