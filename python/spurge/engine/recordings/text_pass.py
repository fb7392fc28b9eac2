"""One pass of a model over plain texts: batches of like length, a result per text, a model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spurge.engine.base.budgets import in_parts
from spurge.engine.base.checks import first_not_finite, integer
from spurge.engine.data.examples import Inputs
from spurge.engine.models.call_arguments import main_input, take
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen

Read = Callable[[Any, Tensor], Tensor]
"""From the model's output for n texts and their mask ``[n, T]``, 1 at a token and 0 at padding, to n rows."""


def read_texts(
    handle: Handle,
    part: nn.Module,
    texts: list[str],
    read: Read,
    *,
    batch_size: int,
    max_length: int | None,
    progress: bool,
    description: str,
) -> Tensor:
    """What ``read`` takes from each text's output, on the CPU, in the order of the texts.

    Args:
        handle: of a model that is kept in evaluation mode and without gradients meanwhile.
        part: what is called: the model, or a module inside it.
        texts: N of them, see :func:`checked_texts`.
        batch_size: texts that run at once; halved where memory runs out.
        max_length: tokens a text is cut to (default: the tokenizer's own limit, where it has one).
        description: of the progress bar.

    Returns:
        Tensor ``[N, ...]``, of the type that ``read`` gives.

    Raises:
        ValueError: a text without a token, results that are not finite, or what :func:`encode` refuses.
    """
    rows = min(integer("batch_size", batch_size, 1), len(texts))
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    found: list[Tensor] = []
    with frozen(handle.model, gradients=False), tqdm(total=len(texts), desc=description, disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            inputs = handle.encode([texts[row] for row in numbers], max_length)
            mask = _mask(inputs)
            if not bool(mask.any(1).all()):
                row = numbers[int((~mask.bool().any(1)).nonzero()[0])]
                raise ValueError(f"texts: row {row} has no token, got {texts[row]!r}")

            def run(cut: slice, inputs: Inputs = inputs, mask: Tensor = mask) -> Tensor:
                return read(part(**take(inputs, cut)), mask[cut])

            values, rows = in_parts(len(numbers), rows, run)
            bad = first_not_finite(values)
            if bad is not None:
                raise ValueError(f"model: gives numbers that are not finite for the text at row {numbers[bad]}")
            found.append(values.cpu())
            bar.update(len(numbers))
    return torch.cat(found)[torch.tensor(order).argsort()]


def _mask(inputs: Inputs) -> Tensor:
    """int64 ``[n, T]``."""
    main = main_input(inputs)
    mask = inputs.get("attention_mask")
    return torch.ones(main.shape[:2], dtype=torch.int64, device=main.device) if mask is None else mask
