"""``correct_interval``: for which rates of an edit each prediction is right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spurge import _core, reference
from spurge.ops._registry import check, check_device, register, run


def _correct_interval_fake(
    logits: Tensor, shifts: Tensor, rows: Tensor, labels: Tensor, low: float, high: float
) -> Tensor:
    for name, x, letters in (("logits", logits, "[N, O]"), ("shifts", shifts, "[N, E]")):
        check(
            x.dtype in (torch.float32, torch.float64),
            lambda: f"{name}: dtype must be float32 or float64, got {x.dtype}",  # noqa: B023
        )
        check(x.dim() == 2, lambda: f"{name}: must be {letters}, got shape {tuple(x.shape)}")  # noqa: B023
    samples, edited = logits.shape[0], shifts.shape[1]
    check(shifts.shape[0] == samples, lambda: f"shifts: need {samples} rows like logits, got {shifts.shape[0]}")
    for name, x, length in (("rows", rows, edited), ("labels", labels, samples)):
        check(x.dtype == torch.int64, lambda: f"{name}: dtype must be int64, got {x.dtype}")  # noqa: B023
        check(x.shape == (length,), lambda: f"{name}: shape must be ({length},), got {tuple(x.shape)}")  # noqa: B023
    for name, x in (("shifts", shifts), ("rows", rows), ("labels", labels)):
        check_device("logits", logits, name, x)
    check(math.isfinite(low), lambda: f"low: must be finite, got {low}")
    check(math.isfinite(high), lambda: f"high: must be finite, got {high}")
    check(low <= high, lambda: f"high: must be at least low, got {high} below {low}")
    return logits.new_empty((samples, 2), dtype=torch.float64)


def _correct_interval_kernel(
    logits: Tensor, shifts: Tensor, rows: Tensor, labels: Tensor, low: float, high: float
) -> Tensor:
    out = _correct_interval_fake(logits, shifts, rows, labels, low, high)
    run(_core.correct_interval, out, *(x.contiguous() for x in (logits, shifts, rows, labels)), low, high)
    return out


_correct_interval = register(
    "correct_interval(Tensor logits, Tensor shifts, Tensor rows, Tensor labels, float low, float high) -> Tensor",
    _correct_interval_fake,
    _correct_interval_kernel,
    reference.correct_interval,
)


def correct_interval(logits: Tensor, shifts: Tensor, rows: Tensor, labels: Tensor, low: float, high: float) -> Tensor:
    r"""The rates at which each sample's prediction is its label, for all rates at once (FCR Eq. 8).

    .. math:: z_j(r) = \mathrm{logit}_j + r\,\mathrm{shift}_e \;\; (j = \mathrm{rows}_e), \qquad
        z_j(r) = \mathrm{logit}_j \;\; \text{otherwise}

    Straight lines: the rates at which the label's one is highest (among equals, the smaller index, as
    ``torch.argmax``) form an interval, which takes one pass over the logits instead of one for each rate. It is
    closed; where a tie at its end is lost it ends one float64 before. Crossings are computed in float64: bitwise the
    same for any number of threads and on the GPU. Not differentiable.

    Args:
        logits: ``[N, O]``, float32 or float64.
        shifts: what rate 1 adds to the logits of ``rows``, ``[N, E]``, float32 or float64.
        rows: the edited outputs, int64 ``[E]``, distinct.
        labels: int64 ``[N]``.
        low, high: the rates to look at, both included.

    Returns:
        float64 ``[N, 2]``: lowest and highest rate; ``(inf, -inf)`` where the label never is the prediction, where
        the sample has a NaN, and where a shift is not finite.

    Raises:
        ValueError: a shape, dtype or range does not fit; on the CPU also for a row or label outside ``[0, O)`` and
            for a row named twice (a CUDA kernel cannot look before it runs; its intervals are empty for the former).

    >>> logits, shifts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-4.0], [4.0]])
    >>> correct_interval(logits, shifts, torch.tensor([0]), torch.tensor([0, 0]), 0.0, 1.0).tolist()
    [[0.0, 0.25], [0.25, 1.0]]
    """
    return _correct_interval(logits, shifts, rows, labels, low, high)
