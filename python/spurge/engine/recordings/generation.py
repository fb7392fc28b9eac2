"""What a causal language model writes after a prompt, by greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import nn
from transformers import GenerationConfig

from spurge.engine.base.checks import integer
from spurge.engine.base.temporary import temporary
from spurge.engine.data.examples import checked_texts
from spurge.engine.models.call_arguments import main_input
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.recordings.padding import padded


def check_generates(model: nn.Module) -> None:
    """Refuses a model without a head that gives the next token.

    Raises:
        ValueError: a classifier, a bare model, or no model of ``transformers``.
    """
    can: Any = getattr(model, "can_generate", None)
    if can is None or not can():
        raise ValueError(
            f"generate: {type(model).__name__} has no head that gives the next token; load a causal language model "
            "(AutoModelForCausalLM), or generate nothing (0)"
        )


def continuations(
    handle: Handle,
    prompts: Sequence[str],
    generate: int,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> list[str]:
    """Greedy continuations of N prompts: the most likely token each time, up to the model's end token.

    Sampling and penalties of the model's own generation settings do not count. Model and tokenizer come back as they
    were.

    Args:
        handle: of a causal language model of ``transformers``, with its tokenizer.
        prompts: the texts.
        generate: new tokens, at most.
        batch_size: prompts that run at once.
        max_length: tokens a prompt is cut to (default: the tokenizer's own limit, where it has one).

    Returns:
        What follows each prompt, without the prompt and without special tokens; empty where the model ended at once.

    Raises:
        TypeError: prompts that are no str.
        ValueError: no prompts, a number below 1, or a model that cannot generate.
    """
    texts = checked_texts("prompts", prompts)
    integer("generate", generate, 1)
    integer("batch_size", batch_size, 1)
    check_generates(handle.model)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    found = [""] * len(texts)
    with (
        frozen(handle.model, gradients=False),
        padded(handle.tokenizer, "left"),
        _greedy(handle, generate) as settings,
    ):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = handle.encode([texts[row] for row in rows], max_length)
            handle.limits.check_length(main_input(inputs).shape[1], generate)
            # generate() refuses arguments that the model does not use, such as segment ids.
            taken = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
            tokens = handle.model.generate(**taken, generation_config=settings)  # type: ignore[operator]
            new = tokens[:, main_input(inputs).shape[1] :]
            written = handle.tokenizer.batch_decode(new, skip_special_tokens=True)
            for row, text in zip(rows, written, strict=True):
                found[row] = text
    return found


@temporary
def _greedy(handle: Handle, generate: int) -> Iterator[GenerationConfig]:
    """Settings of greedy decoding, also in place of the model's own, whose values would fill what is left open."""
    model, tokenizer = cast("Any", handle.model), handle.tokenizer
    before = model.generation_config
    end = before.eos_token_id if before.eos_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=generate, do_sample=False, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    model.generation_config = settings
    yield settings
    model.generation_config = before
