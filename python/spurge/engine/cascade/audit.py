r"""How good estimates of effects are, from a random sample of them that was measured exactly.

Values, of an example's unit each, are drawn with replacement, value k with probability :math:`p_k`;
:math:`w = 1/(m p_k)` turns sums over the m draws into sums over all of them (Hansen and Hurwitz, 1943). The estimates e
are known for all, so only what they miss has to be sampled: of effects :math:`x = e + d`,
:math:`\sum x^2 = \sum e^2 + 2 \sum e d + \sum d^2`.

Ranks are shares of all, ties sharing theirs, and the rank correlation follows from the mean square of what separates a
unit's two ranks and from the variances of both. What share of the effects lies below one of them is the share of the
estimates below it, which is known, and what the sample says that the two differ by.

Errors sit in few units, so what a draw adds to a loss is far from normal: intervals are those of the bootstrap-t on the
logarithm of the loss (Efron and Tibshirani, 1993, section 12.5), widened by what coverage was short of in repetitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
WIDER, WIDER_BOUND = 1.3, 1.5  # of intervals and of one-sided bounds, in standard errors
FLOOR = 1e-6  # of losses: what is smaller is rounding, and one draw of it says nothing of the next
_RESAMPLES = 1000
_TELLING = 10.0  # of bounds of a relative error: larger ones say nothing


def _number(value: Any) -> Any:
    return np.nan if value is None else value


class Range(NamedTuple):
    """A number as the audit estimates it, and its two-sided 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """How well the values of one target agree with the effects of switching each unit off.

    Values of all B examples and units are compared at once.

    Attributes:
        spearman, pearson: correlations.
        error: relative error, 2-norm.
        error_bound: which the error is below, one-sided at 95 %.
        missed: share of the true top 1 % that is not among the top 1 % of the values.
        missed_bound: which that is below, one-sided at 95 %.
        drawn: values that were measured for it.
    """

    spearman: Range
    pearson: Range
    error: float
    error_bound: float
    missed: float
    missed_bound: float
    drawn: int

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Agreement:
        """From what `dataclasses.asdict` and JSON made of one; None where a number was not finite."""
        read = {name: _number(value) for name, value in facts.items()}
        return cls(**read | {name: Range(*map(_number, facts[name])) for name in ("spearman", "pearson")})

    def __str__(self) -> str:
        rank, line = self.spearman, self.pearson
        return (
            f"rank correlation {rank.value:.3f} [{rank.low:.3f}, {rank.high:.3f}], "
            f"correlation {line.value:.3f} [{line.low:.3f}, {line.high:.3f}], "
            f"relative error {self.error:.2g} ({self._bounded()}), "
            f"top 1 % missed {100 * self.missed:.0f} % (below {100 * self.missed_bound:.0f} %)"
        )

    def _bounded(self) -> str:
        if self.error_bound > _TELLING:
            return f"{self.drawn} draws bound it by nothing of use"
        return f"below {self.error_bound:.2g}"


@dataclass(frozen=True, eq=False)
class Sample:
    """What an audit drew of a block of examples, m values.

    Attributes:
        weights: w of each draw, float64 ``[m]``.
        estimates: ``[Q, m]`` float64 on the CPU.
        exact: the same units' effects.
        typical: w of a value that crosses into the top or out of it.
    """

    weights: Tensor
    estimates: Tensor
    exact: Tensor
    typical: float


def draw(stakes: Tensor, crossing: Tensor, rest: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """``count`` of the values ``rest``, their weights, float64, and that which one has that crosses into the top.

    A quarter of the draws is uniform, which ranks need, a quarter each in proportion to stakes and to their squares,
    where errors are, and a quarter where a value may rise into the top 1 % or fall from it.

    Args:
        stakes: of all values, ``[n]`` on the CPU.
        crossing: how likely each crosses into or out of the top, as :func:`likely_crossing` gives it.
        rest: those that may be drawn, int64.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    stake, cross = stakes[rest].double(), crossing[rest].double()
    stake = stake / stake.max().clamp_min(torch.finfo(stake.dtype).tiny)
    p = torch.zeros_like(stake)
    for share in (torch.ones_like(stake), stake, stake.square(), cross):
        total = share.sum()
        p += share / total if total > 0 else 1 / len(share)
    p /= p.sum()
    drawn = torch.multinomial(p, count, replacement=True, generator=generator)
    typical = float((cross / (count * p)).sum() / cross.sum()) if cross.sum() > 0 else len(rest) / count
    return rest[drawn], 1 / (count * p[drawn]), typical


def likely_crossing(values: Tensor, stakes: Tensor) -> Tensor:
    """How likely each value crosses into or out of the top 1 %, up to a factor, ``[n]``.

    Args:
        values, stakes: ``[Q, n]``.
    """
    k = max(1, round(values.shape[1] / 100))
    threshold = values.topk(k, 1).values[:, -1:]
    return (stakes / (values - threshold).abs().clamp_min(1e-30)).clamp_max(1).square().sum(0)


def agreements(values: Tensor, samples: Sequence[Sample]) -> list[Agreement]:
    """Of each target, how well its values agree with what the samples measured.

    Args:
        values: ``[Q, n]``, float64 on the CPU: of all examples and units.
        samples: of each block of examples.
    """
    return [_agreement(values[q].numpy(), [_Draws.of(sample, q) for sample in samples]) for q in range(len(values))]


class _Draws(NamedTuple):
    """A sample for one target, ``[m]`` each."""

    weights: np.ndarray
    estimates: np.ndarray
    exact: np.ndarray
    typical: float

    @classmethod
    def of(cls, sample: Sample, q: int) -> _Draws:
        return cls(sample.weights.numpy(), sample.estimates[q].numpy(), sample.exact[q].numpy(), sample.typical)


def _agreement(values: np.ndarray, blocks: Sequence[_Draws]) -> Agreement:
    n, total, squares = values.size, values.sum(), np.square(values).sum()
    ranked, nothing = np.sort(values), Range(np.nan, np.nan, np.nan)

    # What each draw adds, [m of all blocks]; their sums are estimates of sums over all values.
    gap = np.concatenate([(own.exact - own.estimates) * own.weights for own in blocks])
    cross = np.concatenate([own.estimates * (own.exact - own.estimates) * own.weights for own in blocks])
    missed_squares = np.concatenate([np.square(own.exact - own.estimates) * own.weights for own in blocks])

    mean, second, product = total + gap.sum(), squares + 2 * cross.sum() + missed_squares.sum(), squares + cross.sum()
    if not second > 0:
        return Agreement(nothing, nothing, np.nan, np.nan, np.nan, np.nan, len(gap))
    # Losses are sums of what draws add, linearised where they are ratios.
    spearman = pearson = nothing
    spread_e, spread_x = n * squares - total**2, n * second - mean**2
    if spread_e > 0 and spread_x > 0:
        scale = np.sqrt(spread_e * spread_x)
        correlation = (n * product - total * mean) / scale
        slope = -correlation / (2 * spread_x)
        by_gap = -total / scale - 2 * slope * -mean
        by_cross = n / scale + 2 * n * slope
        by_square = n * slope
        lost = _linear(1 - correlation, [(-by_gap, gap), (-by_cross, cross), (-by_square, missed_squares)])
        spearman, pearson = _correlation(_loss(_rank_lost(blocks, ranked))), _correlation(_loss(lost))
    share = missed_squares.sum() / second
    error = _linear(share, [((1 - share) / second, missed_squares), (-2 * share / second, cross)])
    k = max(1, round(n / 100))
    # The true top k lacks at most the larger of the two: those that rise above the k-th value, and those that fall.
    risen, fallen = (np.concatenate(part) for part in zip(*(_crossed(own, ranked[-k]) for own in blocks), strict=True))
    most = max(own.typical for own in blocks)
    return Agreement(
        spearman,
        pearson,
        float(np.sqrt(share)),
        float(np.sqrt(_loss(error).bound)),
        min(1.0, float(max(risen.sum(), fallen.sum())) / k),
        min(1.0, max(_count_bound(part, most) for part in (risen, fallen)) / k),
        len(gap),
    )


def _rank_lost(blocks: Sequence[_Draws], ranked: np.ndarray) -> np.ndarray:
    """What each draw adds to the loss of rank correlation: squares of what separates a unit's two ranks, less what
    the variances of the ranks, which ties make smaller, differ by.

    Args:
        ranked: all estimates in ascending order, ``[n]``.
    """
    n = len(ranked)
    effects, estimates = (np.concatenate([getattr(own, k) for own in blocks]) for k in ("exact", "estimates"))
    share = np.concatenate([own.weights for own in blocks]) / n
    whole = np.full(n, 1 / n)

    def rank(values: np.ndarray) -> np.ndarray:
        moved = _share_below(effects, share, values) - _share_below(estimates, share, values)
        return np.clip(_share_below(ranked, whole, values) + moved, 0, 1)

    moved = np.square(_share_below(ranked, whole, estimates) - rank(effects)) * share * n
    deviations = [np.sqrt(_rank_variance(*of)) for of in ((ranked, whole), (effects, share / share.sum()))]
    if not min(deviations) > 0:
        return np.full(len(moved), np.nan)
    spread = 2 * deviations[0] * deviations[1]
    return (moved / n - (deviations[0] - deviations[1]) ** 2 / len(moved)) / spread


def _share_below(sample: np.ndarray, share: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The share of ``sample`` that lies below each value; of what equals it, half."""
    order = np.argsort(sample, kind="stable")
    ordered, below = sample[order], np.concatenate([[0.0], np.cumsum(share[order])])
    left, right = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (below[left] + below[right]) / 2


def _rank_variance(sample: np.ndarray, share: np.ndarray) -> float:
    """Variance of ranks as shares of all, a twelfth without ties."""
    tied = np.bincount(np.unique(sample, return_inverse=True)[1].ravel(), share)
    return (1 - float((tied**3).sum())) / 12


def _crossed(own: _Draws, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each draw, how many values belong above a threshold and are below, and the other way round."""
    above, belongs = own.estimates >= threshold, own.exact >= threshold
    return (belongs & ~above) * own.weights, (above & ~belongs) * own.weights


def _linear(value: float, parts: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    """What each of m draws adds to a loss: its own share of ``value``, moved by how its parts differ from the mean."""
    count = len(parts[0][1])
    return value / count + sum(slope * (part - part.mean()) for slope, part in parts)


class _Loss(NamedTuple):
    value: float
    low: float
    high: float
    bound: float


def _correlation(loss: _Loss) -> Range:
    return Range(*(max(1 - part, -1.0) for part in (loss.value, loss.high, loss.low)))


def _loss(added: np.ndarray) -> _Loss:
    """A loss, the sum of what m draws add, with its interval and upper bound: bootstrap-t on its logarithm.

    Losses are shares of 1: of squares (an error), or what a correlation lacks.
    """
    m, value = len(added), float(added.sum())
    if np.isnan(value):
        return _Loss(value, value, value, value)
    if not value > 0 or m < 2:
        return _Loss(max(value, 0.0), 0.0, max(value, 0.0), max(value, 0.0))
    raised = value + FLOOR
    error = np.hypot(added.std(ddof=1) * np.sqrt(m), FLOOR) / raised
    times = np.random.default_rng(0).multinomial(m, np.full(m, 1 / m), size=_RESAMPLES)
    sums, squares = times @ added, times @ np.square(added)
    spread = np.sqrt(np.maximum(squares * m - np.square(sums), 0) / (m - 1))
    usable = (sums > 0) & (spread > 0)
    resampled = sums[usable] + FLOOR
    t = np.log(resampled / raised) / (np.hypot(spread[usable], FLOOR) / resampled)
    if not usable.any():
        return _Loss(value, value, value, value)
    tail = (1 - LEVEL) / 2
    low, high, one = np.quantile(t, [tail, 1 - tail, 1 - LEVEL])

    def at(quantile: float, wider: float) -> float:
        return max(0.0, raised * float(np.exp(np.clip(-quantile * wider * error, -50, 50))) - FLOOR)

    return _Loss(value, at(high, WIDER), at(low, WIDER), at(one, WIDER_BOUND))


def _count_bound(added: np.ndarray, most: float) -> float:
    """Upper bound of a weighted count, by the gamma interval of Fay and Feuer (1997).

    Args:
        added: what each draw adds.
        most: what one more could have added.
    """
    count, variance = added.sum() + most, np.square(added).sum() + most**2
    shape = torch.tensor(count**2 / variance, dtype=torch.float64)
    low, high = torch.zeros_like(shape), 20 + 4 * shape
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.special.gammainc(shape, middle) < LEVEL else (low, middle)
    return float(high * variance / count)
