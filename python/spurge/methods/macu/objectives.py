"""What a neuron is judged by, and the answers to counterfactual texts as one such objective.

An objective becomes *targets*, functions of the rows of a forward pass (`Target` of the cascade), so that
localisation by integrated gradients, exact ablation, particle swarms and gradient search all read the same number.
The paper's objective is in `spurge.methods.macu.proximity`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spurge.engine.base.gradients import without_gradients
from spurge.engine.cascade.cascade import Rows, Target
from spurge.engine.data.examples import Example, Examples
from spurge.engine.models.handle import Handle
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.golden.phrases import TellingPhrase, telling_phrases
from spurge.methods.macu.counterfactual import Counterfactuals, Kind, Row, nearest_words

_SEARCHED = 20_000  # texts in which telling phrases are looked for: enough to see one, and a few seconds
_POOL = 8  # batches whose rows are sorted by length together


@dataclass(frozen=True, eq=False)
class Job:
    """One batch of B texts and what is asked of it.

    Attributes:
        inputs: what the model is called with, tensors ``[B, T]``.
        target: rows -> ``[R]``, higher is better.
        labels: the label each text should get, ``[B]``; -1 where accuracy does not ask.
        weights: how much each text counts, ``[B]``.
    """

    inputs: dict[str, Tensor]
    target: Target
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Likelihood:
    r"""Agreement of each row with the distribution q wanted of its text.

    .. math:: -\mathrm{KL}(q \| p) = \sum_y q_y \log p_y - \sum_y q_y \log q_y

    0 at best; for a single wanted label the log-likelihood of that label. Computed in float64: near 0 it is a
    difference of numbers that float32 holds too coarsely.

    Attributes:
        wanted: q, ``[B, Y]``.
        reads: it is a function of the logits alone. At its best, where kept texts are without an edit, its gradient
            vanishes, and what a neuron moves is told by the gradients of the logits.
    """

    wanted: Tensor
    reads: ClassVar[str] = "logits"

    def __call__(self, rows: Rows) -> Tensor:
        wanted = self.wanted[rows.example].to(rows.logits.device, torch.float64)
        return (wanted * rows.logits.double().log_softmax(1)).sum(1) + torch.special.entr(wanted).sum(1)


@dataclass(frozen=True, kw_only=True)
class KindWeights:
    """How much each kind of counterfactual row counts."""

    kept: float = 1.0
    swapped: float = 0.5
    neutral: float = 1.0

    def __post_init__(self) -> None:
        for name in ("kept", "swapped", "neutral"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}: a weight must be a number of at least 0, got {value!r}")
        if not self.swapped + self.neutral:
            raise ValueError("swapped, neutral: one of the two weights must be above 0")


@dataclass(frozen=True, eq=False)
class CounterfactualSet:
    """Counterfactual rows with the distribution over labels wanted of each.

    Attributes:
        rows: N rows.
        wanted: ``[N, Y]`` float64 on the CPU.
        phrases: the telling phrases that neutral rows play with.
    """

    rows: tuple[Row, ...]
    wanted: Tensor
    phrases: tuple[TellingPhrase, ...]

    def of(self, kinds: Sequence[Kind]) -> CounterfactualSet:
        """The rows of some kinds."""
        return self.take([i for i, row in enumerate(self.rows) if row.kind in kinds])

    def take(self, indices: Sequence[int]) -> CounterfactualSet:
        return CounterfactualSet(
            tuple(self.rows[i] for i in indices), self.wanted[torch.tensor(indices, dtype=torch.long)], self.phrases
        )

    def counts(self) -> dict[str, int]:
        return {kind: sum(row.kind == kind for row in self.rows) for kind in ("kept", "swapped", "neutral")}

    def jobs(
        self,
        handle: Handle,
        *,
        batch_size: int,
        weights: KindWeights | None = None,
        sources: Tensor | None = None,
        max_length: int | None = None,
    ) -> list[Job]:
        """Jobs of rows of similar length, so that little is padded, each with rows of all kinds.

        Args:
            weights: how much a row of each kind counts.
            sources: how much each of the texts that rows were made from counts, by `Row.source`; None: all alike.
        """
        parts = self.batches(batch_size)
        return [part.job(handle, weights=weights, sources=sources, max_length=max_length) for part in parts]

    def batches(self, batch_size: int) -> list[CounterfactualSet]:
        """The rows of each of :meth:`jobs`."""
        order: list[int] = []
        pool = (
            _POOL * batch_size
        )  # shuffled rows are sorted within a pool: by length over all, batches would sort kinds
        shuffled = random.Random(len(self.rows)).sample(range(len(self.rows)), len(self.rows))
        for start in range(0, len(shuffled), pool):
            order += sorted(shuffled[start : start + pool], key=lambda i: (length_of(self.rows[i].example), i))
        return [self.take(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]

    def job(
        self,
        handle: Handle,
        *,
        weights: KindWeights | None = None,
        sources: Tensor | None = None,
        max_length: int | None = None,
    ) -> Job:
        """All rows as one job; arguments as for :meth:`jobs`."""
        kinds = weights or KindWeights()
        device, inputs = handle.device, handle.encode([row.example for row in self.rows], max_length)
        labels = [row.example.label if row.kind == "kept" else -1 for row in self.rows]
        counts = [
            getattr(kinds, row.kind) * (1.0 if sources is None else float(sources[row.source])) for row in self.rows
        ]
        return Job(
            dict(inputs),
            Likelihood(self.wanted.to(device)),
            torch.tensor(labels, device=device),
            torch.tensor(counts, dtype=torch.float32, device=device),
        )


def counterfactual_set(
    handle: Handle,
    train: Examples,
    golden: GoldenTokens,
    chosen: Examples,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
) -> CounterfactualSet:
    """The counterfactual rows of ``chosen`` texts and the unedited model's word on them.

    A neutral row is left out where the unedited model, shown the text without telling phrases, does not predict the
    text's label: then its prediction is no guide.

    Args:
        train: the whole training set, where telling phrases are looked for.
        golden: causal words of each label and irrelevant words.
        chosen: the texts to make rows of, usually a sample of ``train``.
        seed: of the rows.

    Raises:
        ValueError: no text can be changed: no golden word and no telling phrase occurs in ``chosen``.
    """
    causal = [list(golden.causal[label]) for label in golden.labels]
    searched = train if len(train) <= _SEARCHED else train.sample(_SEARCHED, seed)
    segments = [row.segments for row in searched]
    phrases = telling_phrases(segments, searched.targets.tolist(), golden.irrelevant)
    maker = Counterfactuals(nearest_words(handle, causal), causal, phrases, seed=seed)
    rows = [row for index, example in enumerate(chosen) for row in maker.rows(index, example)]
    if all(row.kind == "kept" for row in rows):
        raise ValueError(
            f"golden: nothing to change in {len(chosen)} texts: they hold no causal word of their own label, and no "
            "irrelevant phrase goes with a label"
        )
    references = [row.reference for row in rows if row.reference is not None]
    found = iter(answers(handle, references, batch_size, max_length))
    kept: list[Row] = []
    wanted: list[Tensor] = []
    for row in rows:
        if row.reference is None:
            wanted.append(torch.nn.functional.one_hot(torch.tensor(row.example.label), len(causal)).double())
        else:
            answer = next(found)
            if row.kind == "neutral" and int(answer.argmax()) != row.example.label:
                continue
            wanted.append(answer)
        kept.append(row)
    if len({len(answer) for answer in wanted}) > 1:
        raise ValueError(f"golden: has {len(causal)} labels, the model predicts {len(wanted[0])}")
    return CounterfactualSet(tuple(kept), torch.stack(wanted), tuple(phrases))


def length_of(example: Example) -> int:
    """Characters of a text, or of both of a pair: what passes are sorted by."""
    return sum(map(len, example.segments))


@without_gradients
def answers(handle: Handle, examples: Sequence[Example], batch_size: int, max_length: int | None) -> list[Tensor]:
    """The unedited model's distribution over labels for each text, ``[Y]`` float64 on the CPU."""
    order = sorted(range(len(examples)), key=lambda i: length_of(examples[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        logits = handle.logits(handle.encode([examples[i] for i in batch], max_length))
        found.update(zip(batch, logits.double().softmax(1).cpu(), strict=True))
    return [found[i] for i in range(len(examples))]
