"""What localisation asks of each batch of training texts, for either objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spurge.engine.cascade.cascade import Rows
from spurge.engine.data.examples import encode
from spurge.engine.data.words import Vocabulary, split_units
from spurge.engine.models.probes import Score
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.objectives import CounterfactualSet, Weights
from spurge.methods.macu.proximity import Form, Proximity, attention_scale
from spurge.methods.macu.screening import Question
from spurge.methods.macu.weighted_examples import Weighed

Ask = Callable[[], Question]


def proximity_questions(
    model: nn.Module,
    tokenizer: Any,
    texts: Weighed,
    golden: GoldenTokens,
    *,
    form: Form,
    token_score: Score,
    top_k: int,
    merge: Literal["sum", "max"],
    sharpness: float,
    batch_size: int,
    device: torch.device,
    max_length: int | None = None,
) -> list[Ask]:
    """MacU Eq. 5 and 6: proximity to the causal and to the spurious sets, each a weighted sum over the texts.

    Both forms of proximity are certified, whichever is integrated.
    """
    settings: dict[str, Any] = {"top_k": top_k, "merge": merge, "sharpness": sharpness}

    def question(part: Weighed) -> Question:
        vocabulary, batch = Vocabulary(), part.examples
        inputs = encode(tokenizer, batch, max_length=max_length, device=device)
        units = split_units(tokenizer, inputs, batch.texts, vocabulary, golden.phrases())
        bitmap = golden.bitmap(vocabulary).to(device)
        scale = attention_scale(model, inputs, token_score)
        soft = Proximity(units, bitmap, form="soft", scale=scale, **settings)
        hard = Proximity(units, bitmap, form="hard", scale=scale, **settings)

        def both(rows: Rows) -> Tensor:
            return torch.cat([soft(rows), hard(rows)], 1)

        return Question(
            inputs=dict(inputs),
            target=hard if form == "hard" else soft,
            mix=_each(2, part.weights, device),
            exact=both,
            exact_mix=_each(4, part.weights, device),
            names=("causal soft", "spurious soft", "causal hard", "spurious hard"),
        )

    return [lambda p=part: question(p) for part in texts.batches(batch_size)]  # type: ignore[misc]


def counterfactual_questions(
    made: CounterfactualSet,
    tokenizer: Any,
    *,
    weights: Weights,
    sources: Tensor,
    batch_size: int,
    device: torch.device,
    max_length: int | None = None,
) -> list[Ask]:
    """Agreement with the wanted answers: on kept texts causal, on swapped and neutral texts, negated, spurious.

    A neuron with a high spurious score pulls changed texts away from the answer that their causal words give. A row
    counts as much as its kind, ``weights``, times the text it was made from, ``sources``.
    """

    def question(part: CounterfactualSet) -> Question:
        job = part.job(tokenizer, device=device, weights=weights, sources=sources, max_length=max_length)
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

    return [lambda p=part: question(p) for part in made.batches(batch_size)]  # type: ignore[misc]


def _each(targets: int, weights: Tensor, device: torch.device) -> Tensor:
    """``[Q, B, Q]``: target q of text b belongs to score q, as much as the text counts."""
    return torch.eye(targets, device=device)[:, None] * weights.to(device, torch.float32)[:, None]
