"""Hard and soft proximity (MacU Eq. 6) as people write them in torch, and leave their gradient to autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def members(ids: Tensor, bitmap: Tensor, labels: Tensor) -> Tensor:
    """Which units ``[B, U]`` are in each golden set ``[G, Y, words]`` of their label, ``[B, G, U]`` as 0 and 1."""
    word = ids.long() >> 5
    known = (ids >= 0) & (word < bitmap.shape[2])
    bits = bitmap[:, labels].gather(2, word.where(known, 0).expand(bitmap.shape[0], -1, -1))  # [G, B, U]
    return (((bits >> (ids & 31)) & 1) * known).transpose(0, 1).float()


def soft_proximity(scores: Tensor, real: Tensor, inside: Tensor, k: int, sharpness: float) -> Tensor:
    """Soft proximity ``[R, G]`` of scores ``[R, U]``, through threshold and temperature.

    Args:
        real: which columns are units, ``[R, U]``.
        inside: membership in each golden set, ``[R, G, U]`` as 0 and 1.
        k: units that count as best.
        sharpness: temperature in standard deviations of a row's scores.
    """
    count = real.sum(1, keepdim=True)
    some = count.clamp_min(1)
    mean = (scores * real).sum(1, keepdim=True) / some
    # The square root's derivative at 0 is infinite; a row of equal scores takes the floor below instead.
    deviation = ((scores - mean) ** 2 * real).sum(1, keepdim=True).div(some).clamp_min(1e-20).sqrt()
    floor = 1e-3 * (scores.abs() * real).sum(1, keepdim=True) / some
    temperature = torch.maximum(sharpness * deviation, floor).clamp_min(1e-12)
    ranked = scores.masked_fill(~real, -torch.inf).sort(dim=1, descending=True).values
    more = count > k
    last = ranked.gather(1, (count - 1).clamp_min(0))
    if scores.shape[1] > k:
        middle = ranked[:, k - 1 : k + 1].masked_fill(~more, 0).mean(1, keepdim=True)
    else:
        middle = torch.zeros_like(last)
    threshold = torch.where(more, middle, last.masked_fill(count == 0, 0) - temperature)
    best = ((scores - threshold) / temperature).sigmoid() * real
    shared = inside * best[:, None]
    share = shared.sum(2) / best.sum(1, keepdim=True).clamp_min(1e-12)
    return share + (shared * scores[:, None]).sum(2) / (shared.sum(2) + 1e-6)


def hard_proximity(scores: Tensor, real: Tensor, inside: Tensor, k: int) -> Tensor:
    """Hard proximity ``[R, G]``; arguments as for :func:`soft_proximity`. Only its second term has a gradient."""
    order = scores.detach().masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    best = torch.zeros_like(scores).scatter_(1, order[:, :k], 1.0) * real
    shared = inside * best[:, None]
    hits = shared.sum(2)
    return hits / best.sum(1, keepdim=True).clamp_min(1) + (shared * scores[:, None]).sum(2) / hits.clamp_min(1)


def eager(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float
) -> tuple[Tensor, Tensor]:
    """In the place of `spurge.ops.proximity`: hard and soft, with whole gradients."""
    times = len(scores) // max(1, len(ids))
    real = (ids >= 0).repeat(times, 1)
    inside = members(ids, bitmap, labels).repeat(times, 1, 1).to(scores.dtype)
    return hard_proximity(scores, real, inside, k), soft_proximity(scores, real, inside, k, sharpness)
