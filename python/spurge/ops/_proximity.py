"""``proximity``: how many of the leading words are golden, and its derivative."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spurge import _core, reference
from spurge.ops._registry import check, check_device, register, run


def _check(scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float) -> None:
    check(
        scores.dtype in (torch.float32, torch.float64),
        lambda: f"scores: dtype must be float32 or float64, got {scores.dtype}",
    )
    for name, x, dtype, letters in (
        ("scores", scores, scores.dtype, "[R, U]"),
        ("ids", ids, torch.int32, "[B, U]"),
        ("bitmap", bitmap, torch.int32, "[G, Y, words]"),
        ("labels", labels, torch.int64, "[B]"),
    ):
        rank = letters.count(",") + 1
        check(x.dim() == rank, lambda: f"{name}: must be {letters}, got shape {tuple(x.shape)}")  # noqa: B023
        check(x.dtype == dtype, lambda: f"{name}: dtype must be {dtype}, got {x.dtype}")  # noqa: B023
        check_device("scores", scores, name, x)
    rows, units = scores.shape
    examples = ids.shape[0]
    check(ids.shape[1] == units, lambda: f"ids: need {units} columns like scores, got {ids.shape[1]}")
    check(labels.shape[0] == examples, lambda: f"labels: need {examples}, one per row of ids, got {labels.shape[0]}")
    check(
        rows % examples == 0 if examples else rows == 0,
        lambda: f"scores: its {rows} rows must be a multiple of the {examples} rows of ids",
    )
    check(k >= 1, lambda: f"k: must be at least 1, got {k}")
    check(
        math.isfinite(sharpness) and sharpness > 0, lambda: f"sharpness: must be positive and finite, got {sharpness}"
    )


def _proximity_fake(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float
) -> tuple[Tensor, Tensor]:
    _check(scores, ids, bitmap, labels, k, sharpness)
    shape = (scores.shape[0], bitmap.shape[0])
    return scores.new_empty(shape), scores.new_empty(shape)


def _proximity_kernel(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float
) -> tuple[Tensor, Tensor]:
    out = _proximity_fake(scores, ids, bitmap, labels, k, sharpness)
    run(_core.proximity, *out, *(x.contiguous() for x in (scores, ids, bitmap, labels)), k, sharpness)
    return out


def _proximity_twin(scores: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.to(scores.dtype) for x in reference.proximity(scores, *rest))


def _gradient_fake(
    by_hard: Tensor,
    by_soft: Tensor,
    scores: Tensor,
    ids: Tensor,
    bitmap: Tensor,
    labels: Tensor,
    k: int,
    sharpness: float,
) -> Tensor:
    _check(scores, ids, bitmap, labels, k, sharpness)
    shape = (scores.shape[0], bitmap.shape[0])
    for name, x in (("by_hard", by_hard), ("by_soft", by_soft)):
        check(x.shape == shape, lambda: f"{name}: must be {list(shape)}, got shape {tuple(x.shape)}")  # noqa: B023
        check(x.dtype == scores.dtype, lambda: f"{name}: dtype must be {scores.dtype}, got {x.dtype}")  # noqa: B023
        check_device("scores", scores, name, x)
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _gradient_kernel(
    by_hard: Tensor,
    by_soft: Tensor,
    scores: Tensor,
    ids: Tensor,
    bitmap: Tensor,
    labels: Tensor,
    k: int,
    sharpness: float,
) -> Tensor:
    out = _gradient_fake(by_hard, by_soft, scores, ids, bitmap, labels, k, sharpness)
    tensors = (x.contiguous() for x in (by_hard, by_soft, scores, ids, bitmap, labels))
    run(_core.proximity_gradient, out, *tensors, k, sharpness)
    return out


def _gradient_twin(by_hard: Tensor, by_soft: Tensor, scores: Tensor, *rest: Any) -> Tensor:
    return reference.proximity_gradient(by_hard, by_soft, scores, *rest).to(scores.dtype)


_gradient = register(
    "proximity_gradient(Tensor by_hard, Tensor by_soft, Tensor scores, Tensor ids, Tensor bitmap, Tensor labels, int k,"
    " float sharpness) -> Tensor",
    _gradient_fake,
    _gradient_kernel,
    _gradient_twin,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, by_hard: Tensor | None, by_soft: Tensor | None) -> tuple[Tensor | None, ...]:
    given = by_soft if by_hard is None else by_hard
    if given is None:
        return (None,) * 6
    outer = (torch.zeros_like(given) if x is None else x for x in (by_hard, by_soft))
    return _gradient(*outer, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


_proximity = register(
    "proximity(Tensor scores, Tensor ids, Tensor bitmap, Tensor labels, int k, float sharpness) -> (Tensor, Tensor)",
    _proximity_fake,
    _proximity_kernel,
    _proximity_twin,
    backward=_backward,
    setup_context=_save,
)


def proximity(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float = 0.25
) -> tuple[Tensor, Tensor]:
    r"""How near the best-scored units of each row are to golden sets (MacU Eq. 6), hard and soft.

    .. math::
        \mathrm{hard} = \frac{|C\cap G|}{|C|} + \frac{1}{|C\cap G|}\sum_{t\in C\cap G} a_t, \qquad
        \mathrm{soft} = \frac{\sum_t m_t g_t}{\sum_t m_t} + \frac{\sum_t m_t g_t a_t}{\sum_t m_t g_t + 10^{-6}}

    ``C`` holds the ``k`` best units (all where there are no more; equals by the smaller index), and the hard
    second term is 0 where the intersection is empty. ``g_t`` is 1 for units in the set, and

    .. math::
        m_t = \sigma\big((a_t - \tau)/T\big), \qquad T = \max\big(\mathrm{sharpness}\cdot\mathrm{std}(a),\;
        10^{-3}\,\mathrm{mean}|a|\big)

    with :math:`\tau` midway between the k-th and the (k+1)-th score, or :math:`\min a - T` in rows of at most
    ``k`` units. Standard deviation and means are over the row's units, not its padding. A unit counts as often
    as it occurs. Computed in float64; bitwise the same for any number of threads and any instruction set, and
    from run to run on a GPU.

    Differentiable once by the scores: ``soft`` wholly, through memberships, threshold and temperature, so that its
    integral along a path is F(1) - F(0); ``hard`` with C held, which is what automatic differentiation makes of it:
    :math:`1/|C\cap G|` in :math:`C\cap G`.

    Args:
        scores: token scores of the units, ``[R, U]``, float32 or float64. Row ``r`` belongs to example ``r % B``.
        ids: the units' vocabulary numbers, int32 ``[B, U]``; -1 is padding, whatever its score.
        bitmap: the golden sets, int32 ``[G, Y, ceil(V/32)]``: unit ``v`` is in set ``g`` of label ``y`` if bit
            ``v % 32`` of ``bitmap[g, y, v // 32]`` is set. Units beyond the bitmap are in no set.
        labels: int64 ``[B]``, the label whose sets count for an example.
        k: units that count as best, at least 1.
        sharpness: how soft the soft one is; the smaller, the nearer to the hard one.

    Returns:
        ``hard [R, G]`` and ``soft [R, G]``, both in [0, 2] for scores that sum to 1. A row without units gives 0; a
        row with a score that is NaN or infinite gives NaN.

    Raises:
        ValueError: a shape, dtype, ``k`` or ``sharpness`` does not fit; on the CPU also for a label outside
            ``[0, Y)`` (a CUDA kernel cannot look before it runs, and gives NaN).

    >>> scores, ids = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[4, 0, 1]], dtype=torch.int32)
    >>> bitmap = torch.tensor([[[0b10011]]], dtype=torch.int32)  # one set, one label: units 0, 1 and 4
    >>> hard, soft = proximity(scores, ids, bitmap, torch.tensor([0]), k=2)
    >>> hard.tolist()  # both of the best two are in the set: 1 + mean(0.5, 0.3)
    [[1.399999976158142]]
    """
    return _proximity(scores, ids, bitmap, labels, k, sharpness)


def proximity_gradient(
    by_hard: Tensor,
    by_soft: Tensor,
    scores: Tensor,
    ids: Tensor,
    bitmap: Tensor,
    labels: Tensor,
    k: int,
    sharpness: float = 0.25,
) -> Tensor:
    """What derivatives by :func:`proximity`'s results make by its scores: its backward pass, by itself.

    Where two scores share the k-th place, the threshold moves with the units that the order of C puts there; where
    ``sharpness * std(a)`` does not exceed the least temperature, T moves with that.

    Args:
        by_hard, by_soft: ``[R, G]`` of the scores' dtype.
        scores, ids, bitmap, labels, k, sharpness: as there.

    Returns:
        ``[R, U]``; 0 at padding, NaN at the units of a row with a score that is NaN or infinite.

    Raises:
        ValueError: as there.

    >>> scores, ids = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[4, 0, 1]], dtype=torch.int32)
    >>> bitmap, none, one = torch.tensor([[[16]]], dtype=torch.int32), torch.zeros(1, 1), torch.ones(1, 1)
    >>> grad = proximity_gradient(none, one, scores, ids, bitmap, torch.tensor([0]), k=1)
    >>> bool(grad[0, 0] > 0 and grad[0, 1] < 0)  # unit 4 is in the set, unit 0 pushes it out
    True
    """
    return _gradient(by_hard, by_soft, scores, ids, bitmap, labels, k, sharpness)
