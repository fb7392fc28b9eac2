"""Bootstrap, tests of many units at once, and rank correlation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

NORMAL = 1.96  # standard errors on either side of an effect that is normal: 95 %
_BLOCK = 4_000_000  # resampling counts held at once


def bootstrap_counts(rows: int, resamples: int, seed: int) -> Tensor:
    """How often each of ``rows`` is drawn in each of ``resamples`` draws with replacement, float64 ``[R, N]``."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(resamples, rows, dtype=torch.float64)
    for own in counts:
        own += torch.bincount(torch.randint(rows, (rows,), generator=generator), minlength=rows)
    return counts


def resample_counts(rows: int, bootstrap: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each row counts, float64 ``[R, N]`` in blocks: once in the first line, then as it was drawn.

    The same generator gives the same resamples to whoever asks.
    """
    yield np.ones((1, rows))
    block = max(1, _BLOCK // rows)
    for start in range(0, bootstrap, block):
        resamples = min(block, bootstrap - start)
        drawn = rng.integers(rows, size=(resamples, rows)) + rows * np.arange(resamples)[:, None]
        yield np.bincount(drawn.ravel(), minlength=resamples * rows).reshape(resamples, rows).astype(np.float64)


def resampled_sums(values: np.ndarray, bootstrap: int, rng: np.random.Generator) -> np.ndarray:
    """Sums over examples of ``[N, M]``, then over each bootstrap resample of the examples: ``[1 + bootstrap, M]``.

    A resample is how often each example was drawn, so all its sums are one matrix product.
    """
    counts = resample_counts(len(values), bootstrap, rng)
    next(counts)
    return np.concatenate([values.sum(0, keepdims=True), *(block @ values for block in counts)])


def area_under_curve(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    r"""How often a positive row scores above a negative one, equal scores counting half (Mann and Whitney, 1947).

    Args:
        scores: ``[N]``.
        positive: which rows are positive, bool ``[N]``.
        counts: how often each row counts, ``[R, N]``.

    Returns:
        0 to 1, ``[R]``; NaN where positive or negative rows are missing.

    >>> area_under_curve(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]), np.ones((1, 4)))
    array([0.875])
    """
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))  # of runs of equal scores
    drawn = counts[:, order]
    above = np.add.reduceat(drawn * positive[order], starts, axis=1)
    below = np.add.reduceat(drawn * ~positive[order], starts, axis=1)
    wins = (above * (below.cumsum(1) - below / 2)).sum(1)
    with np.errstate(invalid="ignore"):
        return wins / (above.sum(1) * below.sum(1))


def paired_p(differences: np.ndarray) -> float | None:
    """Two-sided p of the hypothesis that a difference is 0, from its bootstrap resamples ``[R]``; None without any.

    Twice the share of resamples on the rarer side of 0, with one more on each side (Davison and Hinkley, 1997, 4.2).

    >>> paired_p(np.array([0.5, 1.0, 2.0]))
    0.5
    """
    known = differences[~np.isnan(differences)]
    if not len(known):
        return None
    rarer = min((known <= 0).sum(), (known >= 0).sum())
    return min(1.0, 2 * (1 + int(rarer)) / (1 + len(known)))


def holm(p: np.ndarray) -> np.ndarray:
    """p adjusted so that the chance of any false rejection among these tests stays at the level (Holm, 1979).

    >>> holm(np.array([0.01, 0.04, 0.03])).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    scaled = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    found = np.empty_like(scaled)
    found[order] = scaled
    return found


def interval(draws: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Percentile interval over resamples ``[R, ...]``; NaN draws are left out, and none left gives NaN."""
    if not len(draws):
        none = draws.new_full(draws.shape[1:], torch.nan)
        return none, none
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=draws.dtype, device=draws.device)
    low, high = draws.nanquantile(ends, 0)
    return low, high


def spread(draws: Tensor) -> Tensor:
    """Standard deviation over resamples ``[R, ...]``; NaN draws are left out, and fewer than two left give NaN."""
    known = ~draws.isnan()
    count = known.sum(0)
    mean = draws.nansum(0) / count
    squares = (draws - mean).square().nansum(0)
    return torch.where(count > 1, (squares / (count - 1).clamp_min(1)).sqrt(), torch.nan)


def two_sided(effects: Tensor, errors: Tensor) -> Tensor:
    """p of the hypothesis that an effect is 0, normal with these standard errors; NaN where either is unknown.

    An effect of 0 without error, as of a unit that is constant, has p = 1.
    """
    z = torch.where((effects == 0) & (errors == 0), 0.0, effects / errors)
    return torch.special.erfc(z.abs() / 2**0.5)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """q: the false discovery rate at which each test would be rejected (Benjamini and Hochberg, 1995); NaN stays NaN.

    >>> benjamini_hochberg(torch.tensor([0.01, 0.04, 0.03, 0.5])).round(decimals=4).tolist()
    [0.04, 0.0533, 0.0533, 0.5]
    """
    found = torch.full_like(p, torch.nan)
    known = (~p.isnan()).nonzero()[:, 0]
    values, order = p[known].sort()
    scaled = values * len(values) / torch.arange(1, len(values) + 1, dtype=p.dtype, device=p.device)
    found[known[order]] = scaled.flip(0).cummin(0).values.flip(0).clamp_max(1) if len(values) else scaled
    return found


def spearman(a: Any, b: Any) -> float | None:
    """Spearman's rank correlation of two vectors, equal values sharing their mean rank; None where one is constant.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    if len(a) < 2:
        return None
    ranks = []
    for values in (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)):
        _, inverse, times = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(times) - (times + 1) / 2)[inverse])
    x, y = (rank - rank.mean() for rank in ranks)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None
