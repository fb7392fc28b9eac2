"""Medians of columns over segments of rows, as people write them in numpy and torch.

Every form takes features ``[N, M]`` and the rows of each segment, and returns ``[S, M]`` float32. The median of an even
number of values is the mean of the middle two but in ``torch_median``, which takes the lower.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

QUANTILE_MOST = 16_000_000  # torch.quantile refuses more numbers at once


def numpy_median(features: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """``np.median`` of each segment."""
    values = features.numpy()
    return torch.stack([torch.from_numpy(np.median(values[of.numpy()], axis=0)) for of in rows]).float()


def torch_median(features: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """``torch.median`` of each segment: the lower of the middle two."""
    return torch.stack([features[of].median(0).values for of in rows]).float()


def torch_sort(features: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """A sort of each segment's columns, laid out one after the other, and the middle of it."""
    found = []
    for of in rows:
        ordered = features[of].T.contiguous().sort(1).values
        middle = len(of) // 2
        found.append((ordered[:, (len(of) - 1) // 2].float() + ordered[:, middle].float()) / 2)
    return torch.stack(found)


def torch_kthvalue(features: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """A selection: ``torch.kthvalue`` of each segment's columns, laid out one after the other, for both middle ranks.

    For an even number the second is the least of those above the first, unless the first stands there twice.
    """
    found = []
    for of in rows:
        columns = features[of].T.contiguous()
        lower = columns.kthvalue((len(of) + 1) // 2, dim=1).values
        if len(of) % 2 == 0:
            above = columns > lower[:, None]
            upper = columns.masked_fill_(~above, torch.inf).amin(1)
            twice = above.sum(1) < len(of) // 2
            lower = (lower.float() + torch.where(twice, lower, upper).float()) / 2
        found.append(lower.float())
    return torch.stack(found)


def torch_quantile(features: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """``torch.quantile`` at 0.5, over as many columns at once as it takes; it takes float32 only."""
    found = []
    for of in rows:
        columns = max(1, QUANTILE_MOST // max(1, len(of)))
        found.append(torch.cat([part.float().quantile(0.5, 0) for part in features[of].split(columns, 1)]))
    return torch.stack(found)
