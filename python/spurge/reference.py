"""What each op means, in plain torch and float64. Slow, obvious, and the oracle of every test.

The same names as in :mod:`spurge.ops`; in-place ops (trailing underscore there) return a new tensor here.
Letters: B examples, T tokens, H hidden, F neurons of a site, S nodes, R rows, P particles, n columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# ---- gate ----------------------------------------------------------------------------------------


def open_rows(x: Tensor, u: Tensor, alphas: Sequence[float]) -> Tensor:
    """x, u ``[B, ...]`` -> ``[S*B, ...]``, node-major: ``out[s*B+b] = x[b] + (alphas[s] - 1) * u[b]``."""
    rows = [x.double() + (alpha - 1) * u.double() for alpha in alphas]
    return torch.cat(rows) if rows else x.double()[:0]


def gate_columns(z: Tensor, columns: Tensor, gates: Tensor) -> Tensor:
    """z ``[P*B, T, F]``, columns ``[n]``, gates ``[P, n]`` -> z with ``z[p*B+b, t, columns[j]] *= gates[p, j]``."""
    full = torch.ones(gates.shape[0], z.shape[2], dtype=torch.float64, device=z.device)
    full[:, columns] = gates.double()
    return z.double() * full.repeat_interleave(z.shape[0] // gates.shape[0], 0)[:, None, :]


# ---- ig ------------------------------------------------------------------------------------------


def node_sum(grads: Tensor, weights: Sequence[float]) -> Tensor:
    """grads ``[S*B, ...]``, node-major -> ``[B, ...]``: ``out[b] = sum_s weights[s] * grads[s*B+b]``."""
    w = torch.tensor(list(weights), dtype=torch.float64, device=grads.device)
    return torch.einsum("s,sb...->b...", w, grads.double().unflatten(0, (len(weights), -1)))


def multiply_sum(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    """p, z ``[B, T, F]``, mask ``[B, T]`` -> ``[B, F]``: ``out[b, k] = sum_t mask[b, t] * p[b, t, k] * z[b, t, k]``.

    A token that the mask drops does not count, even where it holds NaN.
    """
    product = p.double() * z.double()
    if mask is not None:
        product = product.masked_fill((mask == 0)[..., None], 0.0)
    return product.sum(1)
