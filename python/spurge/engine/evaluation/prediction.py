"""Forward passes over labelled texts: tokenized once, run as often as there are edits to compare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spurge import ops
from spurge.engine.base.budgets import parse_bytes
from spurge.engine.base.checks import first_not_finite, integer
from spurge.engine.cascade.cascade import Cascade, Rows
from spurge.engine.data.examples import Examples, Inputs
from spurge.engine.data.words import CorrelationTokens, Units, Vocabulary, unit_scores
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.call_arguments import take
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet

SPURIOUS = 1  # position of the spurious sets in a golden bitmap


class Golden(Protocol):
    """What evaluation needs of golden token sets."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the labels, Y."""

    def phrases(self) -> Collection[tuple[str, ...]]:
        """Units of several words."""

    def bitmap(self, vocabulary: Vocabulary) -> Tensor:
        """int32 ``[2, Y, ceil(V/32)]``: bit v is set where unit v is causal (0) or spurious (1) for a label."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """One pass over a set: logits float32 ``[N, Y]``, and each example's spurious proximity ``[N]`` if asked for."""

    logits: Tensor
    proximity: Tensor | None


@dataclass(frozen=True, eq=False)
class _Batch:
    indices: list[int]
    inputs: Inputs
    probed: tuple[Tensor, Units] | None  # position of the probed token [B], and the units; for proximity


class _Proximity:
    """Hard proximity (MacU Eq. 6) of each example's top units to the spurious set of the label it is given."""

    def __init__(self, handle: Handle, golden: Golden, tokens: CorrelationTokens) -> None:
        site = handle.sites[-1]
        if site.attention is None:
            raise ValueError(f"golden: the attention of {site.block_name} was not found, needed for proximity")
        self.attention, self.golden, self.tokens = site.attention, golden, tokens
        self.vocabulary, self.phrases = Vocabulary(), golden.phrases()
        self._bitmap: Tensor | None = None

    def prepare(self, handle: Handle, inputs: Inputs, texts: Any) -> tuple[Tensor, Units]:
        units = self.tokens.units(handle.tokenizer, inputs, texts, self.vocabulary, self.phrases)
        return handle.probed(inputs), units

    def measure(self, row: Tensor, units: Units, predicted: Tensor) -> Tensor:
        """``[B]`` from token scores ``[B, T]`` and predicted labels ``[B]``; all batches are prepared by now."""
        if self._bitmap is None:
            self._bitmap = self.golden.bitmap(self.vocabulary).to(row.device)
        scores = unit_scores(row, units, self.tokens.merge)
        hard, _ = ops.proximity(scores, units.ids, self._bitmap, predicted, self.tokens.top_k)
        return hard[:, SPURIOUS].cpu()

    def check(self, name: str, labels: Sequence[str], outputs: int) -> None:
        names = tuple(self.golden.labels)
        if len(names) != outputs:
            raise ValueError(f"golden: has labels {names}, the model {outputs} outputs")
        if sorted(names) == sorted(labels) and names != tuple(labels):
            raise ValueError(f"golden: labels {names} are in another order than those of set {name!r}, {labels}")


class Prepared:
    """A set of examples, tokenized for one model: texts of like length share a batch.

    Args:
        name: the set's name, for errors.
        batch_size: rows of a batch; halved while the device runs out of memory.
        golden: with it, passes also measure proximity to its spurious sets, of the correlation tokens.
        correlation_tokens: the units of a text that the last layer's attention ranks highest.
        memory: bytes that a batch's activations may take; None asks only for ``batch_size``.

    Raises:
        TypeError: ``examples`` is no :class:`Examples`.
        ValueError: labels in another order than the model's outputs, or what `Handle.encode` refuses.
    """

    def __init__(
        self,
        name: str,
        handle: Handle,
        examples: Examples,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        golden: Golden | None = None,
        correlation_tokens: CorrelationTokens | None = None,
        memory: str | int | None = None,
    ) -> None:
        if not isinstance(examples, Examples):
            raise TypeError(f"examples: expected Examples (see Examples.load), got {type(examples).__name__}")
        self.name, self.handle, self.examples = name, handle, examples
        handle.check_labels(f"set {name!r}", examples.labels)
        self.rows = integer("batch_size", batch_size, 1)
        self.proximity = None
        if golden is not None:
            self.proximity = _Proximity(handle, golden, correlation_tokens or CorrelationTokens())
        texts = examples.texts
        order = sorted(range(len(texts)), key=lambda i: len("".join(texts[i])))
        self.batches = []
        for start in range(0, len(order), self.rows):
            indices = order[start : start + self.rows]
            chosen = examples.subset(indices)
            inputs = handle.encode(chosen, max_length)
            probed = None
            if self.proximity is not None:
                probed = self.proximity.prepare(handle, inputs, chosen.texts)
            self.batches.append(_Batch(indices, inputs, probed))
        if memory is not None:
            longest = max(batch.inputs["input_ids"].shape[1] for batch in self.batches)
            self.rows = max(1, min(self.rows, parse_bytes(memory) // _row_bytes(handle, longest)))

    def run(self, step: Callable[[], Any] | None = None) -> Outcome:
        """One pass of the model as it now is; ``step`` is called after each batch.

        Raises:
            ValueError: logits that are not finite, a label the model has no output for, or golden sets of another
                number of labels.
        """
        logits: list[Tensor] = []
        proximity: list[Tensor] = []
        with frozen(self.handle.model, gradients=False):
            for batch in self.batches:
                found, near = self._batch(batch)
                logits.append(found)
                proximity.extend(near)
                if step is not None:
                    step()
        return self._outcome(logits, proximity)

    def run_gated(
        self, cascade: Cascade, neurons: NeuronSet, gates: Tensor, step: Callable[[], Any] | None = None
    ) -> list[Outcome]:
        """P passes at once, each under its own gates ``[P, n]`` of ``neurons``; equal to P passes up to rounding.

        Args:
            cascade: of the same model, with attention if proximity is measured.

        Raises:
            ValueError: as :meth:`run`.
        """
        settings = range(len(gates))
        logits: list[list[Tensor]] = [[] for _ in settings]
        proximity: list[list[Tensor]] = [[] for _ in settings]

        def seen(rows: Rows) -> Tensor:
            return rows.logits if rows.attention is None else torch.cat([rows.attention, rows.logits], 1)

        for batch in self.batches:
            try:
                values = cascade.gated(batch.inputs, seen, neurons, gates)  # [P, B, (T +) Y]
            except ValueError as error:
                raise ValueError(f"set {self.name!r}: {error}") from error
            tokens = 0 if self.proximity is None else batch.inputs["input_ids"].shape[1]
            for p in settings:
                found = values[p, :, tokens:]
                logits[p].append(found.cpu())
                if self.proximity is not None and batch.probed is not None:
                    near = self.proximity.measure(values[p, :, :tokens], batch.probed[1], found.argmax(1))
                    proximity[p].append(near)
            if step is not None:
                step()
        return [self._outcome(logits[p], proximity[p]) for p in settings]

    def _outcome(self, logits: list[Tensor], proximity: list[Tensor]) -> Outcome:
        """The batches' results in the order of the examples."""
        back = torch.tensor([i for batch in self.batches for i in batch.indices]).argsort()
        return Outcome(torch.cat(logits)[back], torch.cat(proximity)[back] if proximity else None)

    def _batch(self, batch: _Batch) -> tuple[Tensor, list[Tensor]]:
        while True:
            try:
                starts = range(0, len(batch.indices), self.rows)
                parts = [self._rows(batch, slice(start, start + self.rows)) for start in starts]
                break
            except (torch.cuda.OutOfMemoryError, MemoryError):
                if self.rows == 1:
                    raise
                self.rows //= 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        logits = torch.cat([part for part, _ in parts])
        bad = first_not_finite(logits)
        if bad is not None:
            raise ValueError(
                f"set {self.name!r}: the model gives logits that are not finite for example {batch.indices[bad]} "
                f"(from 0): {logits[bad].tolist()}"
            )
        return logits, [near for _, near in parts if near is not None]

    def _rows(self, batch: _Batch, rows: slice) -> tuple[Tensor, Tensor | None]:
        inputs = take(batch.inputs, rows)
        if self.proximity is None or batch.probed is None:
            logits = self.handle.logits(inputs).float()
            self._check(logits.shape[1])
            return logits.cpu(), None
        position, units = batch.probed[0][rows], Units(batch.probed[1].ids[rows], batch.probed[1].token_unit[rows])
        with AttentionRow(self.proximity.attention, lambda _: position) as row:
            logits = self.handle.logits(inputs).float()
        self._check(logits.shape[1])
        return logits.cpu(), self.proximity.measure(row.row().to(logits.device), units, logits.argmax(1))

    def _check(self, outputs: int) -> None:
        labels, most = self.examples.labels, int(self.examples.targets.max())
        if most >= outputs:
            raise ValueError(
                f"set {self.name!r}: has label {most} ({labels[most]!r}), the model only {outputs} outputs"
            )
        if self.proximity is not None:
            self.proximity.check(self.name, labels, outputs)


def predict(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    memory: str | int | None = None,
    progress: bool = False,
) -> Tensor:
    """Logits of a classifier in evaluation mode, float32 ``[N, Y]`` on the CPU, in the order of the examples.

    Raises:
        TypeError: ``examples`` is no :class:`Examples`.
        ValueError: logits that are not finite, or a label the model has no output for.
    """
    prepared = Prepared(
        "examples", Handle(model, tokenizer), examples, batch_size=batch_size, max_length=max_length, memory=memory
    )
    with tqdm(total=len(prepared.batches), desc="predict", disable=not progress) as bar:
        return prepared.run(bar.update).logits


def accuracy(model: nn.Module, tokenizer: Any, examples: Examples, **settings: Any) -> float:
    """Percent of examples whose largest logit is their label's (the first of equal ones); settings of `predict`.

    Raises:
        TypeError, ValueError: as `predict`, or a model of one output, or of several labels at once.
    """
    Handle(model).check_single_label("model")
    logits = predict(model, tokenizer, examples, **settings)
    return 100 * float((logits.argmax(1) == examples.targets).double().mean())


def _row_bytes(handle: Handle, tokens: int) -> int:
    """A generous count of what one row of ``tokens`` holds while it passes a layer."""
    site = max(handle.sites, key=lambda site: site.width)
    heads = int(getattr(getattr(handle.model, "config", None), "num_attention_heads", 1))
    numbers = tokens * (12 * site.hidden + 4 * site.width + 3 * heads * tokens)
    return numbers * site.parameter.element_size()
