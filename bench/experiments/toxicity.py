"""A toxicity scorer for texts of any origin: logistic regression on MiniLM's sentence embeddings, from Civil Comments.

It is no part of spurge and no product: the mediation experiments need numbers for what a language model wrote.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score, train_test_split
from torch import Tensor, nn

from experiments import data
from experiments.data import kept
from spurge.engine.base import files
from spurge.engine.data.examples import Examples
from spurge.engine.models.fingerprint import model_print
from spurge.engine.recordings.embedding import embed

HELD_OUT = 0.2  # of the comments
STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # C, the inverse of the penalty on weights of unit-length features
FOLDS = 5  # of the training part, to choose C by log-loss
QUICK = 600  # comments


@dataclass(frozen=True, eq=False)
class ToxicityScorer:
    """The probability that a text is toxic, for :func:`spurge.score_texts`.

    Attributes:
        weight: float64 ``[D]``, for the encoder's embeddings.
        strength: C, chosen inside the training part.
        held_out_accuracy: percent of the comments that neither the weights nor C have seen.
        held_out_auc: probability that a toxic one of them scores above another one.
    """

    encoder: nn.Module
    tokenizer: Any
    weight: Tensor
    bias: float
    strength: float
    held_out_accuracy: float
    held_out_auc: float

    def __call__(self, texts: list[str]) -> Tensor:
        """float64 ``[n]``."""
        features = embed(self.encoder, self.tokenizer, texts, progress=False).double()
        return (features @ self.weight + self.bias).sigmoid()


def toxicity_scorer(folder: Path, *, seed: int = 0, cache: Path | None = None, quick: bool = False) -> ToxicityScorer:
    """A scorer trained on the comments in `folder`; embeddings and weights are kept in `cache`.

    Of comments with the same text only the first counts, or some would stand on both sides of the split.

    Args:
        seed: of the split, of the folds, and of the comments of a quick run.
        quick: some of the comments.
    """
    parts = data.civil_comments(folder)
    first = {row.text: row for part in reversed(parts) for row in reversed(part)}
    comments = Examples(first.values(), parts[0].labels)
    if quick:
        comments = comments.sample(min(QUICK, len(comments)), seed)
    encoder, tokenizer = minilm()
    return trained(comments, encoder, tokenizer, seed=seed, cache=cache)


def minilm() -> tuple[nn.Module, Any]:
    """MiniLM-L6 without a head, and its tokenizer."""
    from spurge.demo import train

    model, tokenizer = train.load_base(data.TOXIC)
    return model.base_model.eval(), tokenizer


def trained(
    comments: Examples, encoder: nn.Module, tokenizer: Any, *, seed: int, cache: Path | None = None
) -> ToxicityScorer:
    """A scorer of an encoder's embeddings; loaded from `cache` where the same one was trained before."""
    texts = [row.text for row in comments]
    source = files.canonical_json([comments.fingerprint(), model_print(encoder), torch.__version__])
    settings = [seed, HELD_OUT, STRENGTHS, FOLDS, sklearn.__version__]

    def embeddings() -> dict[str, Tensor]:
        return {"values": embed(encoder, tokenizer, texts, progress=sys.stderr.isatty())}

    def train() -> dict[str, Tensor]:
        features = kept(cache, "embeddings", source, embeddings)["values"]
        return _train(features.double().numpy(), comments.targets.numpy(), seed)

    found = kept(cache, "toxicity", files.canonical_json([source, settings]), train)
    bias, strength, accuracy, auc = found["numbers"].tolist()
    return ToxicityScorer(encoder, tokenizer, found["weight"], bias, strength, accuracy, auc)


def _train(features: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, Tensor]:
    """Weights, and bias, C, accuracy and AUC in this order."""
    rows = np.arange(len(labels))
    train, held = train_test_split(rows, test_size=HELD_OUT, stratify=labels, random_state=seed)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)

    def loss(strength: float) -> float:
        model = _regression(strength)
        return -float(cross_val_score(model, features[train], labels[train], cv=folds, scoring="neg_log_loss").mean())

    strength = min(STRENGTHS, key=loss)
    model = _regression(strength).fit(features[train], labels[train])
    logits = model.decision_function(features[held])
    accuracy = 100 * float(((logits > 0) == labels[held]).mean())
    numbers = [float(model.intercept_[0]), strength, accuracy, float(roc_auc_score(labels[held], logits))]
    return {"weight": torch.from_numpy(model.coef_[0]), "numbers": torch.tensor(numbers, dtype=torch.float64)}


def _regression(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=2000)
