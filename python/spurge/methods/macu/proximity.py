"""Proximity of a text's correlation tokens to golden words, as a target (MacU Eq. 6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.base.gradients import grad_mode
from spurge.engine.cascade.cascade import Rows
from spurge.engine.data.examples import Examples
from spurge.engine.data.words import CorrelationTokens, Units, Vocabulary, unit_scores
from spurge.engine.models.handle import Handle
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.objectives import Job

Form = Literal["soft", "hard"]


@dataclass(eq=False)
class Proximity:
    r"""Proximity of each row's correlation tokens to the causal and to the spurious golden set, ``[R, 2]``.

    .. math:: \mathrm{prox}(C, G) = \frac{|C \cap G|}{|C|} + \frac{1}{|C \cap G|} \sum_{t \in C \cap G} a_t

    MacU Eq. 6: C holds the ``top_k`` units of highest score a, the last layer's head-mean attention of the probed
    token, merged to units and scaled to sum 1; G is that of the label the *unedited* model predicts. ``"soft"`` puts a
    sigmoid in the place of membership in C; ``"hard"`` is the equation itself, whose gradient knows only the second
    term, with C and G held: what automatic differentiation makes of it. Both, and their derivatives, are
    :func:`spurge.ops.proximity`.

    Attributes:
        units: of the B texts.
        bitmap: int32 ``[2, Y, W]``, causal and spurious sets by label.
        labels: int64 ``[B]``, what the unedited model predicts; None: the rows say it.
    """

    units: Units
    bitmap: Tensor
    top_k: int = 5
    form: Form = "soft"
    merge: Literal["sum", "max"] = "sum"
    sharpness: float = 0.25
    labels: Tensor | None = None
    _blocks: dict[tuple[int, int], Units] = field(default_factory=dict, repr=False)

    def __call__(self, rows: Rows) -> Tensor:
        hard, soft = self.both(rows)
        return hard if self.form == "hard" else soft

    def both(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The hard and the soft proximity, ``[R, 2]`` each."""
        if self.labels is None and rows.logits.shape[1:] != self.bitmap.shape[1:2]:
            raise ValueError(
                f"model: expected logits [rows, {self.bitmap.shape[1]}] in its output, got {tuple(rows.logits.shape)}; "
                "a language model classifies by label words: see spurge.Verbalizer"
            )
        units, device = self._units(rows), self.units.ids.device  # attention may be read on another one
        predicted = rows.predicted.to(device) if self.labels is None else self.labels[rows.example]
        scores = unit_scores(_attention(rows).to(device), units, self.merge)
        labels = predicted[: len(units.ids)]
        return ops.proximity(scores, units.ids, self.bitmap, labels, self.top_k, self.sharpness)

    def _units(self, rows: Rows) -> Units:
        """The units of the texts a block of rows is about; row r of the block belongs to the r-th of them, in turn."""
        example = rows.example
        if not rows.in_turn:
            return Units(self.units.ids[example], self.units.token_unit[example])
        first, count = int(example[0]), int(example.max() - example[0]) + 1
        if (first, count) not in self._blocks:
            expected = torch.arange(first, first + count, device=example.device).repeat(len(example) // max(1, count))
            if not torch.equal(example, expected):
                return Units(self.units.ids[example], self.units.token_unit[example])
            chosen = slice(first, first + count)
            self._blocks[first, count] = Units(self.units.ids[chosen], self.units.token_unit[chosen])
        return self._blocks[first, count]


@dataclass(frozen=True, eq=False)
class ProximityGap:
    """Causal minus spurious proximity of each row, ``[R]``: MacU Eq. 7."""

    proximity: Proximity

    def __call__(self, rows: Rows) -> Tensor:
        causal, spurious = self.proximity(rows).unbind(1)
        return causal - spurious


def _attention(rows: Rows) -> Tensor:
    if rows.attention is None:
        raise ValueError("attention: proximity reads the attention row of the probed token, but none was captured")
    return rows.attention


def proximity_jobs(
    handle: Handle,
    examples: Examples,
    golden: GoldenTokens,
    *,
    correlation_tokens: CorrelationTokens,
    batch_size: int,
    max_length: int | None = None,
    **settings: Any,
) -> list[Job]:
    """Jobs whose target is :class:`ProximityGap` on ``examples``; ``settings`` go to :class:`Proximity`.

    The model says now what it predicts, so that a search cannot win by turning predictions.
    """
    jobs: list[tuple[Any, Units, Tensor, Tensor]] = []
    vocabulary = Vocabulary()
    for batch in examples.batches(batch_size):
        inputs = handle.encode(batch, max_length)
        units = correlation_tokens.units(handle.tokenizer, inputs, batch.texts, vocabulary, golden.phrases())
        with grad_mode(False):
            predicted = handle.logits(inputs).argmax(1)
        jobs.append((inputs, units.to(handle.device), predicted, batch.targets.to(handle.device)))
    bitmap = golden.bitmap(vocabulary).to(handle.device)  # once all words are known
    settings |= {"top_k": correlation_tokens.top_k, "merge": correlation_tokens.merge}
    return [
        Job(
            dict(inputs),
            ProximityGap(Proximity(units, bitmap, labels=predicted, **settings)),
            labels,
            torch.ones(len(labels), device=labels.device),
        )
        for inputs, units, predicted, labels in jobs
    ]
