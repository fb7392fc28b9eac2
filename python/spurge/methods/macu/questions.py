"""What localisation asks of each batch of training texts, for either objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from spurge.engine.cascade.cascade import Rows
from spurge.engine.data.examples import Examples
from spurge.engine.data.words import Vocabulary
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.objectives import CounterfactualSet, counterfactual_set
from spurge.methods.macu.proximity import Proximity
from spurge.methods.macu.screening import Question
from spurge.methods.macu.settings import Settings
from spurge.methods.macu.weighted_examples import WeightedExamples


class Questions:
    """One question for each batch, made when its turn comes.

    Attributes:
        facts: what there is to say about how the questions came about, JSON-able.
    """

    def __init__(
        self, handle: Handle, train: Examples, chosen: WeightedExamples, golden: GoldenTokens, settings: Settings
    ):
        self.handle, self.golden, self.settings, self.sources = handle, golden, settings, chosen.weights
        self.facts: dict[str, Any] = {}
        if settings.objective == "proximity":
            self._parts: Sequence[Any] = list(chosen.batches(settings.batch_size))
            return
        size: dict[str, Any] = {"batch_size": settings.batch_size, "max_length": settings.max_length}
        made = counterfactual_set(handle, train, golden, chosen.examples, seed=settings.seed, **size)
        self._parts = made.batches(settings.batch_size)
        phrases = [asdict(phrase) | {"label": golden.labels[phrase.label]} for phrase in made.phrases]
        self.facts = {"counterfactual": made.counts(), "phrases": phrases}

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> Question:
        part = self._parts[number]
        with frozen(self.handle.model):
            return self._proximity(part) if self.settings.objective == "proximity" else self._counterfactual(part)

    def _proximity(self, part: WeightedExamples) -> Question:
        """MacU Eq. 5 and 6: proximity to the causal and to the spurious sets, each a weighted sum over the texts.

        Both forms of proximity are certified, whichever is integrated.
        """
        settings, vocabulary, device = self.settings, Vocabulary(), self.handle.device
        inputs = self.handle.encode(part.examples, settings.max_length)
        tokens = settings.correlation_tokens
        units = tokens.units(self.handle.tokenizer, inputs, part.examples.texts, vocabulary, self.golden.phrases())
        bitmap = self.golden.bitmap(vocabulary).to(device)
        reading: dict[str, Any] = {"top_k": tokens.top_k, "merge": tokens.merge, "sharpness": settings.sharpness}
        proximity = Proximity(units, bitmap, form=settings.proximity, **reading)

        def both(rows: Rows) -> Tensor:
            hard, soft = proximity.both(rows)
            return torch.cat([soft, hard], 1)

        return Question(
            inputs=dict(inputs),
            target=proximity,
            mix=_each(2, part.weights, device),
            exact=both,
            exact_mix=_each(4, part.weights, device),
            names=("causal soft", "spurious soft", "causal hard", "spurious hard"),
        )

    def _counterfactual(self, part: CounterfactualSet) -> Question:
        """Agreement with the wanted answers: on kept texts causal, on swapped and neutral texts, negated, spurious.

        A neuron with a high spurious score pulls changed texts away from the answer that their causal words give. A
        row counts as much as its kind, ``kind_weights``, times the text it was made from.
        """
        settings = self.settings
        job = part.job(self.handle, weights=settings.kind_weights, sources=self.sources, max_length=settings.max_length)
        kept = (job.labels >= 0).to(job.weights)
        mix = torch.stack([kept * job.weights, (kept - 1) * job.weights], 1)[None]  # [1, B, 2]
        return Question(
            inputs=job.inputs,
            target=job.target,
            mix=mix,
            exact=job.target,
            exact_mix=mix,
            names=("causal", "spurious"),
        )


def _each(targets: int, weights: Tensor, device: torch.device) -> Tensor:
    """``[Q, B, Q]``: target q of text b belongs to score q, as much as the text counts."""
    return torch.eye(targets, device=device)[:, None] * weights.to(device, torch.float32)[:, None]
