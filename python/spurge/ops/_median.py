"""``segment_medians``: the medians of columns over segments of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from spurge import _core, reference
from spurge.ops._registry import check, check_device, check_floating, register, run, sum_dtype

TRANSFORMS = ("raw", "magnitude", "positive", "negative")


def _segment_medians_fake(features: Tensor, order: Tensor, starts: Tensor, transform: str) -> Tensor:
    check_floating("features", features)
    check(features.dim() == 2, lambda: f"features: must be [N, M], got shape {tuple(features.shape)}")
    for name, x, letters in (("order", order, "[n]"), ("starts", starts, "[S + 1]")):
        check(x.dtype == torch.int64, lambda: f"{name}: dtype must be int64, got {x.dtype}")  # noqa: B023
        check(x.dim() == 1, lambda: f"{name}: must be {letters}, got shape {tuple(x.shape)}")  # noqa: B023
        check_device("features", features, name, x)
    check(starts.shape[0] >= 1, lambda: "starts: must have at least 1 element, got 0")
    check(transform in TRANSFORMS, lambda: f"transform: must be one of {', '.join(TRANSFORMS)}, got {transform!r}")
    return features.new_empty((starts.shape[0] - 1, features.shape[1]), dtype=sum_dtype(features.dtype))


def _segment_medians_kernel(features: Tensor, order: Tensor, starts: Tensor, transform: str) -> Tensor:
    out = _segment_medians_fake(features, order, starts, transform)
    run(_core.segment_medians, out, features.contiguous(), order.contiguous(), starts.contiguous(), transform)
    return out


_segment_medians = register(
    "segment_medians(Tensor features, Tensor order, Tensor starts, str transform) -> Tensor",
    _segment_medians_fake,
    _segment_medians_kernel,
    lambda features, *rest: reference.segment_medians(features, *rest).to(sum_dtype(features.dtype)),
)


def segment_medians(features: Tensor, order: Tensor, starts: Tensor, transform: str = "raw") -> Tensor:
    r"""Median of every column over segments of rows (NeuronTune, score).

    .. math:: \mathrm{out}_{sm} = \mathrm{Med}\,\{\,t(x_{o_i m}) : a_s \le i < a_{s+1}\,\}

    with the rows' numbers :math:`o` in ``order``, the segments' borders :math:`a` in ``starts``, and :math:`t` the
    value itself (``"raw"``), its magnitude, its positive part or its negative part, :math:`\max(-v, 0)`. An even
    number of rows gives the mean of the middle two, as ``numpy.median`` does and ``torch.median`` does not. A
    selection, not a sort: about one read of the matrix. Bitwise the same for any number of threads, any
    instruction set, and on the GPU. Not differentiable.

    Args:
        features: ``[N, M]``; float32, bfloat16, float16 or float64.
        order: rows in the sequence of the segments, int64 ``[n]``; may leave rows out, or name them again.
        starts: int64 ``[S + 1]``, ascending: segment ``s`` is ``order[starts[s]:starts[s + 1]]``.
        transform: ``"raw"``, ``"magnitude"``, ``"positive"`` or ``"negative"``.

    Returns:
        ``[S, M]``, float32 (float64 for float64). NaN for a segment without rows, and where a value is NaN.

    Raises:
        ValueError: a shape, dtype or ``transform`` does not fit; on the CPU also for a row outside ``[0, N)`` or
            borders that do not ascend within ``[0, n]`` (a CUDA kernel cannot look before it runs, and gives NaN).

    >>> x = torch.tensor([[1.0, -4.0], [3.0, -2.0], [8.0, 0.0]])
    >>> segment_medians(x, torch.tensor([2, 0, 1]), torch.tensor([0, 1, 3])).tolist()
    [[8.0, 0.0], [2.0, -3.0]]
    """
    return _segment_medians(features, order, starts, transform)
