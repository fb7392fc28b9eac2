"""C2L, causally contrastive learning: Choi et al. 2022, AAAI 36, 10526-10534, and the code that goes with it.

Cross-entropy plus a triplet loss (margin 1) on the pooled states of a text, of the text without a word that is no
cause (near) and of the text without its causal word (far). The causal word of a text is that of the highest gradient,
averaged over all places of the word in the training set, by a model that was fine-tuned before. The paper also asks a
masked language model whether the word decides, which is left out here; and triplets are formed of a quarter of each
batch.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from spurge.demo.train import Loss
from spurge.engine.data.examples import Example, Examples, Inputs, encode
from spurge.engine.data.words import CorrelationTokens, Vocabulary, unit_scores, word_spans
from spurge.engine.models.handle import Handle
from spurge.engine.models.probes import token_scores
from spurge.methods.macu.objectives import length_of

SHARE = 0.25  # of a batch


def importance(handle: Handle, rows: Examples, max_length: int) -> dict[str, float]:
    """Of each word its mean share of a text's gradient times input."""
    vocabulary, found = Vocabulary(), defaultdict(list)
    ordered = Examples(sorted(rows, key=length_of), rows.labels)
    for batch in ordered.batches(32):
        inputs = handle.encode(batch, max_length)
        units = CorrelationTokens().units(handle.tokenizer, inputs, batch.texts, vocabulary)
        scores = unit_scores(token_scores(handle, inputs, kind="gradient_x_input"), units)
        for ids, own in zip(units.ids.tolist(), scores.tolist(), strict=True):
            for number, score in zip(ids, own, strict=True):
                if number >= 0:
                    found[vocabulary.word(number)].append(score)
    return {word: fmean(scores) for word, scores in found.items()}


def triplets(rows: Examples, weights: dict[str, float], mask: str, seed: int) -> dict[Example, tuple[Example, Example]]:
    """Of each row of two words or more: without a word that is no cause, and without its causal word."""
    draw, found = random.Random(seed), {}
    for row in rows:
        text = row.segments[-1]
        spans = word_spans(text, {})
        if len(spans) < 2:
            continue
        cause = max(spans, key=lambda span: weights.get(span[2], 0.0))
        other = draw.choice([span for span in spans if span[2] != cause[2]] or [spans[0]])
        near, far = (f"{text[:start]}{mask}{text[end:]}" for start, end, _ in (other, cause))
        found[row] = (_with(row, near), _with(row, far))
    return found


def contrastive(handle: Handle, rows: Examples, max_length: int, seed: int) -> Loss:
    """The loss, a scalar.

    Args:
        handle: of the model that says what is causal; its tokenizer has a mask token.
        rows: training texts; rows of a batch that are none of them get no triplet.
        max_length: tokens that a text is cut to.
        seed: of the words that are no cause.
    """
    tokenizer = handle.tokenizer
    known = triplets(rows, importance(handle, rows, max_length), tokenizer.mask_token, seed)

    def loss(model: Any, inputs: Inputs, batch: Examples) -> Tensor:
        pooled = model.bert(**inputs).pooler_output
        value = F.cross_entropy(model.classifier(pooled), batch.targets)
        places = [i for i, row in enumerate(batch) if row in known][:: round(1 / SHARE)]
        if not places:
            return value
        beside = [known[batch[i]][side] for side in (0, 1) for i in places]
        near, far = model.bert(**encode(tokenizer, beside, max_length=max_length)).pooler_output.chunk(2)
        return value + F.triplet_margin_loss(pooled[places], near, far)

    return loss


def _with(row: Example, text: str) -> Example:
    return replace(row, text=text) if row.pair is None else replace(row, pair=text)
