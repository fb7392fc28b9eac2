"""How strongly words, or whatever else some texts have, go with a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spurge.engine.base.statistics import two_sided


@dataclass(frozen=True, eq=False)
class Association:
    """C candidates and the label that each goes with most, float64 ``[C]`` but for the labels.

    Attributes:
        label: int64.
        log_odds: of the label, with the candidate against without it.
        variance: of the log-odds.
        p: two-sided, times the number of labels where there are more than two.
        share: of the texts with the candidate, those of its label.
    """

    label: np.ndarray
    log_odds: np.ndarray
    variance: np.ndarray
    p: np.ndarray
    share: np.ndarray

    @property
    def z(self) -> np.ndarray:
        """Log-odds over their standard error."""
        return self.log_odds / np.sqrt(self.variance)

    @property
    def excess(self) -> np.ndarray:
        """Squared log-odds less what chance alone adds, at least 0."""
        return np.maximum(0, self.log_odds**2 - self.variance)


def associate(rows: Sequence[np.ndarray], labels: np.ndarray, classes: int) -> Association:
    r"""Association of each set of texts with the label of its largest z.

    .. math:: \delta = \log\frac{a + .5}{b + .5} - \log\frac{c + .5}{d + .5}, \qquad
              v = \tfrac{1}{a+.5} + \tfrac{1}{b+.5} + \tfrac{1}{c+.5} + \tfrac{1}{d+.5}

    as `spurge.methods.golden.corpus_words.statistics` has it: a of the label's texts have the candidate and b do not;
    c of the other texts have it and d do not.

    Args:
        rows: numbers of the texts that have each of C candidates.
        labels: int64 ``[N]``.
        classes: Y.
    """
    counts = label_counts(rows, labels, classes).astype(float)  # [C, Y]
    of_label = np.bincount(labels, minlength=classes).astype(float)
    return of_counts(counts, np.broadcast_to(of_label, counts.shape))


def of_counts(counts: np.ndarray, of_label: np.ndarray) -> Association:
    """Association from texts with the candidate by label ``[C, Y]``, and all texts by label ``[C, Y]``."""
    having, total = counts.sum(1, keepdims=True), of_label.sum(1, keepdims=True)
    a, b = counts + 0.5, of_label - counts + 0.5
    c, d = having - counts + 0.5, total - of_label - having + counts + 0.5
    log_odds, variance = np.log(a / b) - np.log(c / d), 1 / a + 1 / b + 1 / c + 1 / d
    label = (log_odds / np.sqrt(variance)).argmax(1)
    own = np.arange(len(counts)), label
    classes = counts.shape[1]
    p = p_of(log_odds[own] / np.sqrt(variance[own])) * (classes if classes > 2 else 1)
    share = counts[own] / np.maximum(1, having[:, 0])
    return Association(label, log_odds[own], variance[own], np.minimum(1, p), share)


def label_counts(rows: Sequence[np.ndarray], labels: np.ndarray, classes: int) -> np.ndarray:
    """Texts of each set by label, int64 ``[C, Y]``."""
    if not len(rows):
        return np.zeros((0, classes), dtype=np.int64)
    return np.stack([np.bincount(labels[own], minlength=classes) for own in rows])


def p_of(z: np.ndarray) -> np.ndarray:
    """Two-sided p of z-scores."""
    values = torch.as_tensor(z, dtype=torch.float64)
    return two_sided(values, torch.ones_like(values)).numpy()
