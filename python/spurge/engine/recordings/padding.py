"""The side that prompts are padded on: the right for a pass over them, the left to generate behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from spurge.engine.base.temporary import Temporaries, temporary


@temporary
def padded(tokenizer: Any, side: Literal["left", "right"] = "right") -> Iterator[None]:
    """The tokenizer pads on ``side``, and with its end token where it has no padding token; both are put back.

    A pass over whole texts wants the right: positions then count from a text's first token in every model. Generation
    wants the left, so that new tokens follow the prompt. Other threads that use the tokenizer meanwhile see this, too.
    """
    before, token = tokenizer.padding_side, tokenizer.pad_token
    with Temporaries() as changes:
        changes.callback(setattr, tokenizer, "padding_side", before)
        tokenizer.padding_side = side
        if token is None and tokenizer.eos_token is not None:
            changes.callback(setattr, tokenizer, "pad_token", None)
            tokenizer.pad_token = tokenizer.eos_token
        yield
