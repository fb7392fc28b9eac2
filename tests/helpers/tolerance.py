"""How far a result may be from its float64 reference: one rule, one table.

A sum of ``terms`` roundings of relative size ``eps`` ends up about ``eps * sqrt(terms)`` away (a random walk);
4 times that leaves room for the tail. Any other number in a test needs a comment.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def tolerance(dtype: torch.dtype, terms: int = 1) -> float:
    """Random-walk bound on a sum of ``terms`` roundings in ``dtype``, relative to the size of the terms."""
    return 4 * EPS[dtype] * max(1.0, terms**0.5)


def assert_near(actual: Tensor, want: Tensor, *, terms: int = 1, size: Tensor | float | None = None) -> None:
    """``|actual - want| <= tolerance(actual.dtype, terms) * size``; NaN and infinity have to agree.

    ``size`` is how large the numbers were that were added (the sum of their magnitudes); without it, the
    larger of 1 and ``|want|``.
    """
    assert actual.shape == want.shape, f"shape {tuple(actual.shape)}, want {tuple(want.shape)}"
    got, want = actual.detach().double().cpu(), want.detach().double().cpu()
    limit = torch.finfo(actual.dtype).max
    overflow = want.abs() > limit * (1 - EPS[actual.dtype] / 2)
    want = torch.where(overflow, torch.sign(want) * torch.inf, want)
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    scale = want.abs().clamp_min(1.0) if size is None else torch.as_tensor(size, dtype=torch.float64).cpu()
    error = ((got - want).abs() / scale.expand_as(want).clamp_min(torch.finfo(actual.dtype).tiny))[finite]
    worst = error.max().item() if error.numel() else 0.0
    bound = tolerance(actual.dtype, terms)
    assert worst <= bound, f"error {worst:.3g} of the size of the terms, allowed {bound:.3g}"
