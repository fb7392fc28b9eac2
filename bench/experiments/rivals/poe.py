"""Product of experts: Karimi Mahabadi et al. 2020, End-to-end bias mitigation by modelling biases in corpora, ACL.

The loss is the cross-entropy of :math:`\\operatorname{softmax}(z + \\log p^\\mathrm{expert})`: what the expert knows
already is not learned again, and at test the expert is left out. The expert here is a bag of words of the text, or of
the hypothesis alone where texts come in pairs; each training text is judged by an expert that has not seen it, since
softmax regression on so few texts is sure of those it has seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import data
from spurge.demo.train import Loss
from spurge.engine.data.examples import Example, Examples, Inputs
from spurge.engine.data.tfidf import BagOfWords

FOLDS = 5


def expert(rows: Examples, seed: int) -> dict[Example, Tensor]:
    """Of each row the expert's log-probabilities, ``[Y]``; the expert is fitted on the other folds."""
    seen = data.hypotheses(rows)
    order, found = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist(), {}
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        bag = BagOfWords(seen.subset(sorted({*order} - {*held})))
        found |= {rows[i]: torch.tensor(bag.probabilities(seen[i])).log() for i in held}
    return found


def product(rows: Examples, seed: int) -> Loss:
    """The loss, a scalar, beside such experts; for batches of these rows alone."""
    known = expert(rows, seed)

    def loss(model: nn.Module, inputs: Inputs, batch: Examples) -> Tensor:
        logits = model(**inputs).logits
        return F.cross_entropy(logits + torch.stack([known[row] for row in batch]).to(logits), batch.targets)

    return loss
