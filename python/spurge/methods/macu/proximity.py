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
    term, with C and G held: what automatic differentiation makes of it.

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
        if self.labels is None and rows.logits.shape[1:] != self.bitmap.shape[1:2]:
            raise ValueError(
                f"model: expected logits [rows, {self.bitmap.shape[1]}] in its output, got {tuple(rows.logits.shape)}; "
                "a language model classifies by label words: see spurge.Verbalizer"
            )
        units, device = self._units(rows.example), self.units.ids.device  # attention may be read on another one
        predicted = rows.predicted.to(device) if self.labels is None else self.labels[rows.example]
        scores = unit_scores(_attention(rows).to(device), units, self.merge)
        labels = predicted[: len(units.ids)]
        hard, soft, _ = ops.proximity(scores.detach(), units.ids, self.bitmap, labels, self.top_k, self.sharpness)
        if not scores.requires_grad:
            return hard if self.form == "hard" else soft
        times = len(scores) // max(1, len(units.ids))
        real = (units.ids >= 0).repeat(times, 1)
        inside = self._members(units.ids, labels).repeat(times, 1, 1)
        if self.form == "hard":
            shared = inside * _top(scores.detach(), real, self.top_k)[:, None]
            mean = (shared * scores[:, None]).sum(2) / shared.sum(2).clamp_min(1)
            return hard + (mean - mean.detach())
        return soft_proximity(scores, real, inside, self.top_k, self.sharpness)

    def _units(self, example: Tensor) -> Units:
        """The units of the texts a block of rows is about; row r of the block belongs to the r-th of them, in turn."""
        first, count = int(example[0]), int(example.max() - example[0]) + 1
        if (first, count) not in self._blocks:
            expected = torch.arange(first, first + count, device=example.device).repeat(len(example) // max(1, count))
            if not torch.equal(example, expected):
                return Units(self.units.ids[example], self.units.token_unit[example])
            chosen = slice(first, first + count)
            self._blocks[first, count] = Units(self.units.ids[chosen], self.units.token_unit[chosen])
        return self._blocks[first, count]

    def _members(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Which units are in the causal and in the spurious set of their text's label, ``[B, 2, U]`` as 0 and 1."""
        word = ids.long() >> 5
        known = (ids >= 0) & (word < self.bitmap.shape[2])
        bits = self.bitmap[:, labels].gather(2, word.where(known, 0).expand(2, -1, -1))  # [2, B, U]
        return (((bits >> (ids & 31)) & 1) * known).transpose(0, 1).float()


def _top(scores: Tensor, real: Tensor, k: int) -> Tensor:
    """1 for the ``k`` best units of each row, ``[R, U]``; ties by the smaller index."""
    order = scores.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores).scatter_(1, order[:, :k], 1.0) * real


def soft_proximity(scores: Tensor, real: Tensor, inside: Tensor, k: int, sharpness: float) -> Tensor:
    """The soft proximity of :func:`spurge.ops.proximity`, ``[R, G]``, as a function of the scores alone.

    Differentiable through the threshold and the temperature too, where the kernel's derivative holds them: the integral
    of this one is F(1) - F(0).

    Args:
        scores: ``[R, U]``.
        real: which columns are units, ``[R, U]``.
        inside: membership in each golden set, ``[R, G, U]`` as 0 and 1.
        k: units that count as best.
        sharpness: temperature in standard deviations of a row's scores.
    """
    count = real.sum(1, keepdim=True)
    some = count.clamp_min(1)
    mean = (scores * real).sum(1, keepdim=True) / some
    # The square root's derivative at 0 is infinite; a row of equal scores takes the floor below instead.
    deviation = ((scores - mean) ** 2 * real).sum(1, keepdim=True).div(some).clamp_min(1e-20).sqrt()
    floor = 1e-3 * (scores.abs() * real).sum(1, keepdim=True) / some
    temperature = torch.maximum(sharpness * deviation, floor).clamp_min(1e-12)
    ranked = scores.masked_fill(~real, -torch.inf).sort(dim=1, descending=True).values
    more = count > k
    last = ranked.gather(1, (count - 1).clamp_min(0))
    if scores.shape[1] > k:
        middle = ranked[:, k - 1 : k + 1].masked_fill(~more, 0).mean(1, keepdim=True)
    else:
        middle = torch.zeros_like(last)
    threshold = torch.where(more, middle, last.masked_fill(count == 0, 0) - temperature)
    best = ((scores - threshold) / temperature).sigmoid() * real
    shared = inside * best[:, None]
    share = shared.sum(2) / best.sum(1, keepdim=True).clamp_min(1e-12)
    return share + (shared * scores[:, None]).sum(2) / (shared.sum(2) + 1e-6)


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
