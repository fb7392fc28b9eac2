"""Other ways to retrain a last layer on fixed features without group labels.

Each begins at the head of ERM or anew, and leaves the encoder alone. Their papers choose by groups of a validation set;
here the lowest accuracy of a class on its second half chooses, of EVaLS that of an environment which it infers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.backbones import robustness
from experiments.tables import Table
from spurge.engine.evaluation.groups import accuracies
from spurge.engine.features.features import Features
from spurge.engine.last_layer.fitting import Sgd, fit_head
from spurge.engine.models.heads import Head

L2 = (1e-3, 1e-2, 1e-1)
GAMMAS = (4.0, 8.0, 12.0, 16.0, 20.0)
PULLS = (0.0, 0.1, 0.5)
UPWEIGHTS = (5.0, 20.0, 50.0)
COUNTS = (20, 50, 100, 200)
STEPS, RATE = 500, 1e-2  # of AFR's descent
Worth = Callable[[Head], float]


def class_balanced(train: Features, reweigh: Features, select: Features, seed: int) -> Head:
    """The last layer retrained on the training set with balanced classes."""
    return best((fit_head(train.values, train.labels, _classes(train), l2=l2) for l2 in L2), by_class(select))


def retrained(train: Features, reweigh: Features, select: Features, seed: int) -> Head:
    """The same on the first half of the validation set."""
    return class_balanced(reweigh, reweigh, select, seed)


def jtt(train: Features, reweigh: Features, select: Features, seed: int) -> Head:
    """JTT (Liu et al. 2021, arXiv 2107.09044): rows that a head of one epoch gets wrong count several times."""
    wrong = early(train, seed).predictions(train.values) != train.labels
    weights = [torch.ones(len(train), dtype=torch.float64).masked_fill(wrong.cpu(), times) for times in UPWEIGHTS]
    settings = [(weight, l2) for weight in weights for l2 in L2]
    heads = (fit_head(train.values, train.labels, _classes(train), weights=w, l2=l2) for w, l2 in settings)
    return best(heads, by_class(select))


def afr(train: Features, reweigh: Features, select: Features, seed: int) -> Head:
    r"""AFR (Qiu et al. 2023, arXiv 2306.11074): weights :math:`\beta_y e^{-\gamma p_y}`, a pull to the head of ERM.

    Full-batch descent of 500 steps, its gradient clipped to a norm of 1. The paper reweighs a part of the training
    set which the encoder has not seen; there is none here, and the whole of it is taken.
    """
    settings = [(gamma, pull) for gamma in GAMMAS for pull in PULLS]
    return best((descend(train, afr_weights(train, gamma), pull) for gamma, pull in settings), by_class(select))


def afr_unseen(train: Features, reweigh: Features, select: Features, seed: int) -> Head:
    """The same on rows that the encoder has not seen: the first half of the validation set."""
    return afr(reweigh, reweigh, select, seed)


def afr_weights(rows: Features, gamma: float) -> Tensor:
    """Of each row, float64 ``[N]``; they sum to 1."""
    own = rows.logits().double().softmax(1).gather(1, rows.labels[:, None])[:, 0]
    weights = torch.exp(-gamma * own) / rows.labels.bincount()[rows.labels]
    return weights / weights.sum()


def descend(rows: Features, weights: Tensor, pull: float) -> Head:
    """From the head of ERM, by weighted cross-entropy and ``pull`` times the squared way from it."""
    head, values = rows.head, rows.values.float()
    start = [head.weight.float(), torch.zeros(head.outputs) if head.bias is None else head.bias.float()]
    now = [part.clone().requires_grad_() for part in start]
    optimizer = torch.optim.SGD(now, lr=RATE)
    with torch.enable_grad():
        for _ in range(STEPS):
            losses = F.cross_entropy(F.linear(values, *now), rows.labels, reduction="none")
            away = sum((a - b).square().sum() for a, b in zip(now, start, strict=True))
            optimizer.zero_grad()
            ((weights.float() * losses).sum() + pull * away).backward()
            torch.nn.utils.clip_grad_norm_(now, 1.0)
            optimizer.step()
    weight, bias = (part.detach() for part in now)
    return head.with_(weight=weight, bias=None if head.bias is None else bias)


def self_(train: Features, reweigh: Features, select: Features, seed: int) -> Head:
    """SELF (LaBonte et al. 2023, arXiv 2309.08534): retrained where an early head disagrees most with ERM's.

    Disagreement is the divergence of the two heads' answers on the first half of the validation set; as many rows of
    either class, chosen in its order.
    """
    apart = F.kl_div(
        early(train, seed).logits(reweigh.values).double().log_softmax(1),
        reweigh.logits().double().log_softmax(1),
        reduction="none",
        log_target=True,
    ).sum(1)
    return best(_fitted(reweigh, [_first(apart, reweigh.labels, count) for count in COUNTS]), by_class(select))


def evals(train: Features, reweigh: Features, select: Features, seed: int) -> Head:
    """EVaLS (Ghaznavi et al. 2024, arXiv 2410.05345): as many rows of highest as of lowest loss in each class.

    The worst of classes by inferred environments chooses: those of `environments` on the second half.
    """
    losses = F.cross_entropy(reweigh.logits().double(), reweigh.labels, reduction="none")
    ends = [torch.cat([_first(sign * losses, reweigh.labels, count) for sign in (1, -1)]).unique() for count in COUNTS]
    parts = 2 * select.labels + environments(select)
    return best(_fitted(reweigh, ends), lambda head: _worst(head, select, parts))


def environments(rows: Features) -> Tensor:
    """Two environments of which the model's answers are worth the least alike (EIIL, Creager et al. 2021): 0 or 1.

    EIIL maximises the squared slopes of the two environments' risks by a scale on the logits. Their sum over all rows
    is fixed, so the maximum has the rows of positive slope in one and all others in the other: no descent is needed.
    """
    logits = rows.logits().double()
    slopes = ((logits.softmax(1) - F.one_hot(rows.labels, logits.shape[1])) * logits).sum(1)
    return (slopes > 0).long()


RIVALS = {
    "class-balanced ERM": class_balanced,
    "retrained on half of validation": retrained,
    "JTT on features": jtt,
    "AFR": afr,
    "AFR on half of validation": afr_unseen,
    "SELF": self_,
    "EVaLS": evals,
}


def add_rivals(table: Table, train: Features, validation: Features, test: Features, *, seed: int) -> None:
    """Judges each on the test set."""
    reweigh, select = validation.split(seed=seed)
    for name, rival in RIVALS.items():
        chooser = "worst class by inferred environment" if rival is evals else "worst class"
        note = f"class labels; settings by {chooser} on {len(select)} validation rows"
        table.add(name, robustness(test, rival(train, reweigh, select, seed)), labels="class", note=note)


def early(train: Features, seed: int) -> Head:
    """A head after one epoch of minibatches from zero knowledge."""
    sgd = Sgd(epochs=1, rate=1e-3)
    return fit_head(train.values, train.labels, _classes(train), weights=None, solver="sgd", sgd=sgd, seed=seed)


def by_class(select: Features) -> Worth:
    """The lowest accuracy of a class."""
    return lambda head: _worst(head, select, select.labels)


def best(heads: Iterable[Head], worth: Worth) -> Head:
    """The head that is worth most, the first of equals."""
    return max(heads, key=worth)


def _worst(head: Head, rows: Features, parts: Tensor) -> float:
    return accuracies(head.logits(rows.values), rows.labels, parts).worst_group


def _fitted(rows: Features, chosen: Iterable[Tensor]) -> Iterable[Head]:
    """Heads on some rows with balanced classes, for each penalty, from the head of ERM."""
    for index in chosen:
        own = rows.subset(index)
        for l2 in L2:
            yield fit_head(own.values, own.labels, _classes(rows), l2=l2, start=rows.head)


def _first(order: Tensor, labels: Tensor, count: int) -> Tensor:
    """Of each class the rows of largest ``order``, at most so many."""
    found = []
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        found.append(own[order[own].topk(min(count, len(own))).indices])
    return torch.cat(found)


def _classes(rows: Features) -> int:
    return rows.head.outputs
