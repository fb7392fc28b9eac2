"""The side that prompts are padded on: the right for a pass over them, the left to generate behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal


@contextmanager
def padded(tokenizer: Any, side: Literal["left", "right"] = "right") -> Iterator[None]:
    """The tokenizer pads on ``side``, and with its end token where it has no padding token; both are put back.

    A pass over whole texts wants the right: positions then count from a text's first token in every model. Generation
    wants the left, so that new tokens follow the prompt.
    """
    before, token = tokenizer.padding_side, tokenizer.pad_token
    try:
        tokenizer.padding_side = side
        if token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        yield
    finally:
        tokenizer.padding_side = before
        if token is None:
            tokenizer.pad_token = None
