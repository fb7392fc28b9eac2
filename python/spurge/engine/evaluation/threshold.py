r"""A moved threshold: the control that asks whether an edit does more than prefer one label.

A constant :math:`b \in \mathbb{R}^Y` is added to the unedited model's logits, the same for all rows of all sets, so
that each label is answered as often as the edited model answers it. No label of the data is used, and nothing is tuned:
the control has what the edit has on average, and no more. Of the answers that the edit changes it explains

.. math:: 1 - \frac{|\{i : \hat y_i^b \ne \hat y_i^\mathrm{edit}\}|}{|\{i : \hat y_i \ne \hat y_i^\mathrm{edit}\}|}

which is 1 where the edit is such a shift, 0 where it leaves as many answers apart as no edit does, and may be negative.
Whether the edit itself is one, the change :math:`d_i` of a row's logits (less its mean over labels) tells: a constant
explains :math:`\|\frac1N \sum_i d_i\|^2 / \frac1N \sum_i \|d_i\|^2` of it, which is 1 of a moved threshold, and of an
edit that acts on some texts alone about their share of all.
"""

from __future__ import annotations

import numpy as np

MOSTLY = 50.0  # percent of the changed answers above which a constant is said to explain them
EVENLY = 75.0  # percent of the change of logits above which the edit is said to be such a constant

_SHARPNESS = (1.0, 0.3, 0.1, 0.03, 0.01)  # of the softened answers, in standard deviations of the logits
_STEPS = 40  # at each sharpness
_MOST = 2_000_000  # logits from which a shift is computed


def matched_shift(logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The constant that makes labels as frequent as wanted.

    For two labels exact, up to rows of equal margin. For more, the shifts are those under which softened answers have
    these frequencies, softened less and less: the dual of transporting rows to labels (Cuturi, 2013), whose answers
    miss the counts by few rows. Beyond two million logits evenly spaced rows stand for all.

    Args:
        logits: ``[N, Y]``.
        wanted: how many rows each label is to get, ``[Y]``, N together.

    Returns:
        float64 ``[Y]``, finite.
    """
    shift = np.zeros(logits.shape[1])
    labels = np.flatnonzero(wanted)
    if len(labels) == 2:
        margins = np.sort((logits[:, labels[1]] - logits[:, labels[0]]).astype(np.float64))
        cut = int(wanted[labels[0]])  # so many rows of the smallest margins are to answer the first label
        shift[labels[1]] = -(margins[cut - 1] + margins[cut]) / 2
    elif len(labels) > 2:
        step = -(-logits[:, labels].size // _MOST)
        shift[labels] = _transported(logits[::step, labels].astype(np.float64), wanted[labels] / len(logits))
    own = moved(logits, shift)
    best = own[:, labels].max(1)
    for label in np.flatnonzero(wanted == 0):
        shift[label] = min(0.0, float((best - own[:, label]).min()) - 1)  # just enough that no row answers it
    return shift


def _transported(logits: np.ndarray, shares: np.ndarray) -> np.ndarray:
    scale = float(logits.std()) or 1.0
    shift = np.zeros(len(shares))
    for sharpness in _SHARPNESS:
        softness = scale * sharpness
        for _ in range(_STEPS):
            exponents = (logits + shift) / softness
            soft = np.exp(exponents - exponents.max(1, keepdims=True))
            found = (soft / soft.sum(1, keepdims=True)).mean(0)
            shift += softness * (np.log(shares) - np.log(np.maximum(found, 1e-12)))
    return shift - shift.mean()


def moved(logits: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Shifted logits, float64 ``[N, Y]``."""
    return logits.astype(np.float64) + shift
