"""Scores of texts, such as the toxicity of what a model wrote: by a classifier, or by anything that can be called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spurge.engine.base.checks import first_not_finite, integer
from spurge.engine.base.gradients import grad_mode
from spurge.engine.data.examples import checked_texts
from spurge.engine.models.call_arguments import logits_of
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.text_pass import read_texts

Scorer = Callable[[list[str]], Any]


def score_texts(
    scorer: Scorer | nn.Module,
    texts: Sequence[str],
    *,
    label: int = 1,
    tokenizer: Any = None,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
) -> Tensor:
    r"""One number y for each of N texts, in their order.

    A callable gives the numbers itself. A classifier with logits s gives the probability of an output,

    .. math:: y = e^{s_\ell} / \textstyle\sum_k e^{s_k},

    or :math:`1 / (1 + e^{-s_\ell})` where its configuration says that several labels may hold at once
    (``problem_type="multi_label_classification"``).

    Args:
        scorer: from a list of n texts to n numbers, as a list, array or tensor ``[n]``; or a sequence classifier of
            ``transformers``.
        texts: empty ones are handed over as they are.
        label: number of the classifier's output.
        tokenizer: the classifier's; None for a callable.
        batch_size: texts of one call; of a classifier fewer where memory runs out.
        max_length: tokens the classifier reads of a text (default: the tokenizer's own limit, where it has one).
        progress: show a progress bar.

    Returns:
        float64 ``[N]`` on the CPU.

    Raises:
        TypeError: a scorer that is neither, a classifier without a tokenizer, a tokenizer for a function, texts that
            are no str, or scores that are no numbers.
        ValueError: no texts, no such output, another count of numbers than of texts, a text without a token, or a
            number that is not finite; the message has the row, from 0.
    """
    found = checked_texts("texts", texts)
    integer("batch_size", batch_size, 1)
    if isinstance(scorer, PreTrainedModel) or (isinstance(scorer, nn.Module) and tokenizer is not None):
        if tokenizer is None:
            raise TypeError(f"tokenizer: {type(scorer).__name__} needs its tokenizer, got None")
        probability = _Probability(scorer, integer("label", label, 0))
        settings: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
        return read_texts(Handle(scorer, tokenizer), scorer, found, probability, description="score", **settings)
    if not callable(scorer):
        raise TypeError(f"scorer: expected a callable or a sequence classifier, got {type(scorer).__name__}")
    if tokenizer is not None:
        raise TypeError(f"tokenizer: is for a sequence classifier, and scorer is {type(scorer).__name__}")
    parts: list[Tensor] = []
    with grad_mode(False), tqdm(total=len(found), desc="score", disable=not progress) as bar:
        for start in range(0, len(found), batch_size):
            batch = found[start : start + batch_size]
            parts.append(_numbers(scorer(list(batch)), start, len(batch)))
            bar.update(len(batch))
    return torch.cat(parts)


class _Probability:
    """The probability of one output, float64 ``[n]``."""

    def __init__(self, model: nn.Module, label: int) -> None:
        self.label = label
        self.several = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"

    def __call__(self, output: Any, mask: Tensor) -> Tensor:
        logits = logits_of(output).double()
        outputs = logits.shape[1]
        if outputs == 1 and not self.several:
            raise ValueError(
                "scorer: has one output, which may be a number as well as a logit; give a function that makes of it "
                "what is meant"
            )
        if self.label >= outputs:
            raise ValueError(f"label: must lie in 0 to {outputs - 1}, got {self.label}")
        bad = ~logits.isfinite().all(1, keepdim=True)  # softmax makes a probability even of an infinite logit
        chosen = logits.sigmoid() if self.several else logits.softmax(1)
        return chosen.masked_fill(bad, torch.nan)[:, self.label]


def _numbers(values: Any, start: int, count: int) -> Tensor:
    """What a callable gave for the texts from row ``start``, float64 ``[count]``."""
    rows = f"rows {start} to {start + count - 1}"
    found = values.detach().cpu() if isinstance(values, Tensor) else _tensor(values, rows)
    if found.is_complex():
        raise TypeError(f"scorer: expected real numbers for {rows}, got {found.dtype}")
    if found.shape != (count,):
        raise ValueError(f"scorer: expected {count} numbers for {rows}, got shape {tuple(found.shape)}")
    found = found.double()
    bad = first_not_finite(found)
    if bad is not None:
        raise ValueError(f"scorer: expected finite numbers, got {float(found[bad])} at row {start + bad}")
    return found


def _tensor(values: Any, rows: str) -> Tensor:
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different length
        raise TypeError(f"scorer: expected numbers for {rows}, got {values!r:.80}") from error
    if array.dtype.kind not in "biufc":
        raise TypeError(f"scorer: expected numbers for {rows}, got {array.flat[0] if array.size else values!r:.80}")
    return torch.as_tensor(array.astype(np.float64) if array.dtype.kind in "iuf" else array)
