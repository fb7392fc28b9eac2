"""Example weights that part labels from confounders: for localisation, training or evaluation alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spurge.engine.base.checks import checked_labels, warn
from spurge.engine.causal.balancing import balance
from spurge.engine.causal.confounders import Confounders


def confounder_weights(labels: Any, confounders: Confounders | Any, *, tolerance: float = 1e-8) -> Tensor:
    r"""Weights under which every label has the confounders of all examples: label and confounder are uncorrelated.

    Entropy balancing of each label's examples to the means of all. In ``MacU.locate(..., weights=...)`` neurons of a
    topic that happens to go with a label are then not taken for neurons of the label.

    Args:
        labels: whole numbers from 0, ``[N]``; each one that occurs is balanced.
        confounders: of the same examples: `Confounders`, or topics (`spurge.find_topics`, numbers or names). Examples
            of a topic that some label lacks get weight 0, with a warning.
        tolerance: greatest standardised difference left.

    Returns:
        float64 ``[N]``, mean 1; each label keeps its share of the total.

    Raises:
        TypeError, ValueError: labels or confounders that do not fit together.
        Unbalanced: a label's examples cannot reach the means of all, or every topic lacks some label.

    >>> confounder_weights(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 0, 1, 1])).tolist()
    [0.75, 0.75, 1.5, 1.5, 0.75, 0.75]
    """
    if not isinstance(confounders, Confounders):
        confounders = Confounders.of(confounders)
    found = labels if isinstance(labels, Tensor) else torch.as_tensor(labels)
    numbers = checked_labels("labels", found, len(confounders)).cpu()
    kept = _common(numbers, confounders)
    numbers, inside = numbers[kept], confounders.subset(kept)
    design = inside.design()
    weights = torch.zeros(len(confounders), dtype=torch.float64)
    if not design.shape[1]:
        weights[kept] = len(weights) / len(kept)
        return weights
    target = design.mean(0)
    for label in numbers.unique().tolist():
        own = numbers == label
        balanced = balance(design[own], target, tolerance=tolerance, names=inside.design_names()).weights
        weights[kept[own]] = balanced * int(own.sum()) * len(weights) / len(kept)
    return weights


def _common(labels: Tensor, confounders: Confounders) -> Tensor:
    """Rows of the topics that occur with every label."""
    if confounders.topics is None:
        return torch.arange(len(labels))
    known, index = labels.unique(return_inverse=True)
    table = torch.zeros(len(confounders.names), len(known), dtype=torch.int64)
    table.index_put_((confounders.topics, index), torch.ones_like(index), accumulate=True)
    shared, used = (table > 0).all(1), table.sum(1) > 0
    if not bool(shared.any()):
        raise ValueError("confounders: every topic lacks some label, and nothing can be balanced")
    missing = (used & ~shared).nonzero()[:, 0].tolist()
    if missing:
        names = ", ".join(confounders.names[topic] for topic in missing[:3])
        warn(
            f"confounders: {len(missing)} topics lack some label ({names}{', ...' if len(missing) > 3 else ''}); their "
            f"{int(table[missing].sum())} examples get weight 0"
        )
    return shared[confounders.topics].nonzero()[:, 0]
