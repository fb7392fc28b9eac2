"""How strongly candidates go with a model's answers to the texts as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def leaning(rows: Sequence[np.ndarray], margins: np.ndarray) -> np.ndarray:
    """Welch's t of the model's answers with each candidate against without it; its largest size over labels, ``[C]``.

    Args:
        rows: numbers of the texts that have each candidate.
        margins: log-odds of each label by the model, ``[N, Y]``.
    """
    count, total, squares = len(margins), margins.sum(0), (margins**2).sum(0)
    found = np.zeros(len(rows))
    for number, own in enumerate(rows):
        inside, outside = len(own), count - len(own)
        if min(inside, outside) < 2:
            continue
        some, power = margins[own].sum(0), (margins[own] ** 2).sum(0)
        with_it, without = some / inside, (total - some) / outside
        error = _mean_error(power, with_it, inside) + _mean_error(squares - power, without, outside)
        found[number] = np.max(np.abs(with_it - without) / np.sqrt(np.maximum(error, 1e-12)))
    return found


def _mean_error(squares: np.ndarray, mean: np.ndarray, count: int) -> np.ndarray:
    """Squared standard error of a mean."""
    return np.maximum(0, squares / count - mean**2) / (count - 1)


def margins_of(logits: torch.Tensor) -> np.ndarray:
    """Log-odds of each label against all others, float64 ``[N, Y]``, from logits ``[N, Y]``."""
    values = logits.double()
    rest = values[:, None, :].expand(-1, values.shape[1], -1).clone()
    rest.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return (values - rest.logsumexp(2)).numpy()
