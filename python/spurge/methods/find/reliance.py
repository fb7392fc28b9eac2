"""How much a model relies on a candidate: the change of its answer, measured by exact forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spurge.engine.base.statistics import NORMAL
from spurge.engine.data.bound import p_of
from spurge.methods.find.changes import Change, Pair

_LEAST_ERROR = 1e-6  # of a mean: texts that all answer alike leave no error to measure


@dataclass(frozen=True)
class Effect:
    """Mean rise of a label's log-odds by a candidate, in nats.

    Attributes:
        mean: over the pairs of texts; NaN without any.
        error: its standard error.
        count: pairs of texts.
    """

    mean: float
    error: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, normal."""
        return self.mean - NORMAL * self.error, self.mean + NORMAL * self.error

    @property
    def p(self) -> float:
        """Two-sided, of no effect; 1 where nothing was measured."""
        return 1.0 if not self.count or np.isnan(self.mean) else float(p_of(np.array([self.mean / self.error]))[0])

    @classmethod
    def of(cls, values: np.ndarray) -> Effect:
        """Of the differences of pairs ``[n]``; fewer than two tell nothing."""
        if len(values) < 2:
            return cls(float("nan"), float("nan"), 0)
        error = float(values.std(ddof=1)) / len(values) ** 0.5
        return cls(float(values.mean()), max(error, _LEAST_ERROR), len(values))


@dataclass(frozen=True)
class Reliance:
    """What a candidate does to the model's answers.

    Attributes:
        effects: of each change that was possible.
        lean: the mean of the effects of swaps (deletions where there are none) and of insertions.
        flips: percent of the texts with the candidate whose answer changes without it.
        measured: by changed texts; False: from texts as they are, with their label held fixed.
    """

    effects: Mapping[Change, Effect]
    lean: Effect
    flips: float
    measured: bool = True


def of_pairs(pairs: Sequence[Pair], with_it: np.ndarray, without: np.ndarray, label: int) -> Reliance:
    """Reliance from the margins ``[n, Y]`` of the texts of n pairs; of a label's log-odds."""
    difference = with_it[:, label] - without[:, label]
    changes: dict[Change, np.ndarray] = {
        change: np.array([i for i, pair in enumerate(pairs) if pair.change == change], dtype=int)
        for change in ("delete", "swap", "insert")
    }
    effects = {change: Effect.of(difference[at]) for change, at in changes.items()}
    out: Change = "swap" if effects["swap"].count else "delete"
    parts = [effects[change] for change in (out, "insert") if effects[change].count]
    turned = (with_it.argmax(1) != without.argmax(1))[changes[out]]
    flips = 100 * float(turned.mean()) if len(turned) else float("nan")
    return Reliance({change: effect for change, effect in effects.items() if effect.count}, _mean(parts), flips)


def _mean(parts: Sequence[Effect]) -> Effect:
    """The mean of effects on different texts."""
    if not parts:
        return Effect(float("nan"), float("nan"), 0)
    error = sum(part.error**2 for part in parts) ** 0.5 / len(parts)
    return Effect(sum(part.mean for part in parts) / len(parts), error, sum(part.count for part in parts))


def observed(rows: np.ndarray, margins: np.ndarray, labels: np.ndarray, label: int) -> Reliance:
    r"""Reliance on what no change of a text takes out: texts with it against texts without, their label held fixed.

    .. math:: \sum_y w_y (\bar f_{y,\text{with}} - \bar f_{y,\text{without}}), \qquad w_y \propto n_{y,\text{with}}

    f is the log-odds of ``label``. What else differs between these texts counts, too: it is no proof.

    Args:
        rows: numbers of the texts that have the candidate.
        margins: log-odds of each label by the model, ``[N, Y]``.
        labels: int64 ``[N]``.
        label: that the candidate goes with.
    """
    having = np.zeros(len(labels), dtype=bool)
    having[rows] = True
    parts = []
    for own in np.unique(labels):
        inside, outside = (margins[(labels == own) & side, label] for side in (having, ~having))
        if len(inside) > 1 and len(outside) > 1:
            error = (inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside)) ** 0.5
            parts.append((len(inside), float(inside.mean() - outside.mean()), float(error)))
    if not parts:
        return Reliance({}, Effect(float("nan"), float("nan"), 0), float("nan"), measured=False)
    total = sum(count for count, _, _ in parts)
    mean = sum(count * difference for count, difference, _ in parts) / total
    error = sum((count * part) ** 2 for count, _, part in parts) ** 0.5 / total
    return Reliance({}, Effect(mean, max(error, _LEAST_ERROR), total), float("nan"), measured=False)
