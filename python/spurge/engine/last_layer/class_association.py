"""FCR's class association: H(G) over H(A), and where both vanish the ratio that they have for the smallest leaks."""

from __future__ import annotations

import torch
from torch import Tensor

from spurge.engine.last_layer.association_stream import BLOCK, Sums, rounding_of_entropy

_HALVINGS = 70  # of an interval of logarithms: to the last bit
_LEAST = -700.0  # logarithm of the smallest leak
_ROUNDING_OF_SUMS = 1e-5  # of G, beside the largest class's


def class_association(
    gradient_entropy: Tensor, activation_entropy: Tensor, sums: Sums, counts: Tensor, floor: float
) -> Tensor:
    r"""CA ``[R, M]``, of the type of ``gradient_entropy``.

    A unit that fires for one class has H(A) = H(G) = 0. Let it leak: a total of d, relative to its own class and spread
    evenly over the others, and in each as often as any. Then :math:`H(A) = h(d)`, and the gradient leaks by d times
    each class's mean residual :math:`r_c` beside G / A of the own class; let :math:`h_G(d)` be the entropy of that.

    .. math:: \Gamma_{CA} = \frac{\max(H(G),\, h_G(d_\epsilon))}{\epsilon \ln K} \text{ where }
        H(A) < \epsilon \ln K = h(d_\epsilon), \qquad \Gamma_{CA} = \frac{H(G)}{H(A)} \text{ elsewhere}

    Both are floored together: a floor of H(A) alone would take a leak of 1e-9 for a much smaller association than one
    of 1e-6, and no leak for none. What :func:`gradient_entropy` counts as rounding is :math:`h_G(h^{-1}(H(A)))` as far
    as it may be rounding. Units that never fire and edges without gradient score 0.

    Args:
        gradient_entropy: H(G) ``[R, M]``, 0 where it may be rounding alone.
        activation_entropy: H(A), float64 ``[M]``.
        sums: as :func:`stream` has them.
        counts: samples of each class, int64 ``[C]``.
        floor: epsilon, a share of the logarithm of K, the number of classes with samples.
    """
    rounding = rounding_of_entropy(gradient_entropy.dtype)
    present = counts > 0
    classes = int(present.sum())
    total, own = sums.activations.sum(0), sums.activations.argmax(0)
    residuals = sums.residuals / counts.clamp_min(1)[:, None]
    logs = torch.special.xlogy(residuals, residuals)
    least = floor * float(torch.tensor(classes, dtype=torch.float64).log())
    floored = activation_entropy.clamp_min(least)
    leaks = even_leak(floored, classes) / (classes - 1)  # into each of the other classes
    small = activation_entropy < least
    out = torch.empty_like(gradient_entropy)
    step = max(1, BLOCK // 64 // max(1, out.shape[1]))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        entropy, gradients = gradient_entropy[part].double(), sums.sums[part]
        row, unit = ((gradients > 0) & (total > 0) & (small | (entropy == 0))).nonzero(as_tuple=True)
        if len(row):
            found, size = entropy[row, unit], gradients[row, unit]
            others, logs_of_others = (x.sum(0)[start + row] - x[own[unit], start + row] for x in (residuals, logs))
            others, fired = others.clamp_min(0.0), sums.activations[own[unit], unit]
            leaked = others * (total[unit] - fired) / (classes - 1)
            alone = torch.maximum(size - leaked, _ROUNDING_OF_SUMS * size)  # G of the own class
            even = leaked_entropy(leaks[unit] * fired / alone, others, logs_of_others)
            noise = rounding * (1 + size.log().abs())
            known = found.where(found > 0, torch.minimum(even, noise))
            entropy[row, unit] = torch.maximum(known, even).where(small[unit], known)
        out[part] = (entropy / floored).where(total > 0, 0.0)
    return out


def even_leak(entropy: Tensor, classes: int) -> Tensor:
    """The total d of an even leak into the other classes, relative to the own, that has this entropy (float64)."""
    low, high = (torch.full_like(entropy, x) for x in (_LEAST, float(torch.tensor(classes - 1.0).log())))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        each = middle.exp() / (classes - 1)
        ones = torch.ones_like(each) * (classes - 1)
        below = leaked_entropy(each, ones, torch.zeros_like(each)) < entropy
        low, high = middle.where(below, low), high.where(below, middle)
    return high.exp()


def leaked_entropy(scale: Tensor, total: Tensor, logs: Tensor) -> Tensor:
    """Entropy of 1 beside ``scale * r_c``, from the sums of r_c and of r_c log r_c over the other classes c."""
    leak = scale * total
    return leak.log1p() - (torch.special.xlogy(scale, scale) * total + scale * logs) / (1 + leak)
