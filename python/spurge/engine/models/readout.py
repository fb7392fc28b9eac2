"""What is read of a model, and at which token: a classifier's logits, or a language model's at its last real tokens.

A language head is as wide as the vocabulary; on every token of every row it would cost as much as several layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.device_checks import require
from spurge.engine.models.call_arguments import at, logits_of, main_input
from spurge.engine.models.hooks import hook_before
from spurge.engine.models.sites import Site


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


def is_decoder(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether tokens of ``model`` see only what came before them (GPT-2, LLaMA).

    Its last layer's attention says so, or the configuration, or that it generates without an encoder (Bloom).
    """
    attention, config = sites[-1].attention if sites else None, getattr(model, "config", None)
    if any(bool(getattr(part, flag, False)) for part in (attention, config) for flag in ("is_causal", "is_decoder")):
        return True
    generates: Callable[[], bool] = getattr(model, "can_generate", lambda: False)
    return generates() and not getattr(config, "is_encoder_decoder", False)


def first_token(inputs: Mapping[str, Any]) -> Tensor:
    """Zeros, ``[B]`` int64."""
    main = main_input(inputs)
    return torch.zeros(len(main), dtype=torch.int64, device=main.device)


def last_real_token(inputs: Mapping[str, Any], padding: int | None = None) -> Tensor:
    """The last token of each example that ``attention_mask`` keeps and that is not ``padding``, ``[B]`` int64.

    Raises:
        ValueError: no main input, a mask that is not ``[B, T]``, or an example without a real token.
    """
    main, mask = main_input(inputs), token_mask(inputs)
    real = torch.ones(main.shape[:2], dtype=torch.bool, device=main.device)
    if mask is not None:
        real &= mask
    if padding is not None and torch.is_tensor(inputs.get("input_ids")):
        real &= inputs["input_ids"] != padding
    some = real.any(1)
    require(some.all(), lambda: _tokenless(some))
    return (real * torch.arange(real.shape[1], device=real.device)).argmax(1)


def _tokenless(some: Tensor) -> str:
    without = (~some).nonzero()  # none, where the check is looked at late and its memory was used again
    return f"inputs: {f'example {int(without[0])}' if len(without) else 'an example'} has no real token: an empty text?"


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Real positions ``[B, T]`` by ``attention_mask``, or None without one.

    Raises:
        ValueError: a mask of another shape.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    main = main_input(inputs)
    if not torch.is_tensor(mask) or mask.shape != main.shape[:2]:
        found = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(f"inputs: attention_mask: expected shape {tuple(main.shape[:2])}, got {found}")
    return mask != 0


class Readout:
    """The logits that targets see.

    Args:
        head: the projection to the vocabulary of a causal language model; None for a classifier.
        tokens: K, how many of the last real tokens a language model is read at.

    Raises:
        ValueError: ``tokens`` below 1, or above 1 for a classifier.
    """

    def __init__(self, head: nn.Module | None, tokens: int = 1):
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"read: expected a number of tokens of at least 1, got {tokens!r}")
        self.head, self.tokens = head, tokens
        if tokens > 1 and head is None:
            raise ValueError(f"read: a classifier has one vector of logits for each text, got read={tokens}")

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
