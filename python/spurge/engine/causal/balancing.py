r"""Entropy balancing: the weights closest to given ones under which covariates have wanted means.

.. math:: \min_w \sum_i w_i \log\frac{w_i}{b_i} \;\text{ s.t. }\; \sum_i w_i c_i = t,\ \sum_i w_i = 1
    \qquad\Rightarrow\qquad w_i \propto b_i e^{c_i \lambda},\quad
    \lambda = \arg\min \log \sum_i b_i e^{(c_i - t) \lambda}

Hainmueller, Political Analysis 2012. The dual is convex. No ridge is ever added to it: where the means cannot be had,
that is proved, and an error. For any :math:`\lambda`, some mixture of the numbers :math:`(c_i - t)\lambda` is 0 if the
target lies within the rows' convex hull; if all of them are negative, it does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.base.checks import integer, number
from spurge.engine.causal.balance_dual import Dual, moments

NEWTON_WIDTH = 32
"""Covariates up to which Newton's method is faster than L-BFGS: a Hessian costs their square for each row."""

NEWTON_NUMBERS = 1 << 23
"""Covariates in all up to which one problem is left to the batch kernel, which works on a float64 copy of them."""

CONVERGED, INFEASIBLE, UNFINISHED, INVALID = range(4)
"""Status of a problem, as `spurge.ops.balance_batch` gives it."""

_NEWTON_STEPS = 100


class Unbalanced(ValueError):
    """No weights give the wanted means, or none were found.

    Attributes:
        proved: the target was shown to lie outside the convex hull of the rows.
        worst: greatest standardised difference that was reached; NaN where proved.
    """

    def __init__(self, text: str, *, proved: bool, worst: float = math.nan) -> None:
        super().__init__(text)
        self.proved, self.worst = proved, worst


@dataclass(frozen=True, eq=False, repr=False)
class Balance:
    """Weights of one problem, and how well they balance.

    Attributes:
        weights: float64 ``[N]``, sum 1.
        dual: :math:`\\lambda`, float64 ``[K]``, in the covariates' own units.
        before, after: standardised differences ``(mean - target) / sd`` of each covariate, under the base weights and
            under ``weights``, float64 ``[K]``; sd is that under the base weights.
        evaluations: passes over the covariates by L-BFGS; 0 where Newton solved it inside a kernel.
        steps: of the solver.
        method: ``"newton"`` or ``"l-bfgs"``.
    """

    weights: Tensor
    dual: Tensor
    before: Tensor
    after: Tensor
    evaluations: int
    steps: int
    method: str

    @property
    def worst(self) -> float:
        """Greatest magnitude of ``after``."""
        return float(self.after.abs().amax()) if self.after.numel() else 0.0

    @property
    def ess(self) -> float:
        """Effective sample size (Kish), ``1 / sum w²``: between 1 and N."""
        return float(1 / self.weights.square().sum())

    def __repr__(self) -> str:
        before = float(self.before.abs().amax()) if self.before.numel() else 0.0
        return (
            f"Balance({len(self.weights)} rows, {len(self.dual)} covariates: worst standardised difference "
            f"{before:.3g} -> {self.worst:.1e}, effective sample size {self.ess:.1f}; {self.method})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Balances:
    """Solutions of P problems; see `spurge.ops.balance_batch`.

    Attributes:
        dual: float64 ``[P, K]``.
        means: weighted means of the outcomes, float64 ``[P, V]``.
        worst: greatest standardised difference of each, ``[P]``.
        ess: effective sample sizes, ``[P]``.
        steps: Newton steps, ``[P]``.
        status: int32 ``[P]``: 0 converged, 1 infeasible (proved; numbers are NaN), 2 not converged, 3 not finite.
    """

    dual: Tensor
    means: Tensor
    worst: Tensor
    ess: Tensor
    steps: Tensor
    status: Tensor

    def __len__(self) -> int:
        return len(self.status)

    def __repr__(self) -> str:
        counts = [int((self.status == code).sum()) for code in range(4)]
        return (
            f"Balances({len(self)} problems: {counts[CONVERGED]} converged, {counts[INFEASIBLE]} infeasible, "
            f"{counts[UNFINISHED]} not converged, {counts[INVALID]} not finite)"
        )


def balance(
    covariates: Tensor,
    target: Tensor | Sequence[float],
    base: Tensor | None = None,
    *,
    tolerance: float = 1e-8,
    evaluations: int = 500,
    names: Sequence[str] | None = None,
) -> Balance:
    """Entropy-balancing weights of one problem: Newton for few covariates, L-BFGS for many.

    Covariates may have any scales; constant and collinear ones do no harm where the target agrees with them. Arithmetic
    is float64 whatever the covariates are stored in, so the solution is that of the numbers as given. Memory beyond the
    covariates is ``O(N)``.

    Args:
        covariates: ``[N, K]``, float32, bfloat16, float16 or float64, on any device.
        target: wanted weighted means ``[K]``.
        base: weights to stay close to, ``[N]``, at least 0; by default all equal.
        tolerance: greatest standardised difference of a weighted mean from its target.
        evaluations: passes over the covariates to give up after.
        names: of the covariates, for errors.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that do not fit, no rows, numbers that are not finite, weights below 0 or all 0.
        Unbalanced: no weights give these means (then ``proved``), or none did within ``evaluations``: the target is on
            the edge of what the rows can reach.

    >>> found = balance(torch.tensor([[0.0], [1.0], [2.0]]), [1.5])
    >>> [round(w, 3) for w in found.weights.tolist()]
    [0.116, 0.268, 0.616]
    """
    covariates = _covariates(covariates)
    rows, width = covariates.shape
    wanted = _vector("target", target, width, covariates.device)
    weights = _base(base, (rows,), covariates.device)
    tolerance = number("tolerance", tolerance, 0)
    integer("evaluations", evaluations, 1)
    names = [f"covariate {k}" for k in range(width)] if names is None else list(names)
    if len(names) != width:
        raise ValueError(f"names: expected {width}, got {len(names)}")
    mean, deviation = moments(covariates, weights, wanted)
    _check_constant(mean, deviation, wanted, names)
    dual = Dual(covariates, weights, wanted, mean, deviation, tolerance)
    before = dual.differences()
    method, steps = _solve(dual, covariates, wanted, weights, tolerance, evaluations)
    if dual.proved:
        k = int((dual.point.abs() * deviation).argmax())
        raise Unbalanced(
            f"target: no weights give these means: in the direction led by {names[k]} (wanted "
            f"{float(wanted[k]):.6g}, mean of the rows {float(mean[k]):.6g}) the target lies beyond every row",
            proved=True,
        )
    after = dual.differences()
    used = 0 if method == "newton" else dual.evaluations
    found = Balance(dual.weights(), dual.point, before, after, used, steps, method)
    if not dual.balanced():
        k = int((after.abs() - dual.limit).argmax())
        raise Unbalanced(
            f"target: not reached in {steps} steps: {names[k]} is still {float(after[k]):.2g} standard deviations off, "
            f"with an effective sample size of {found.ess:.1f}; it lies on the edge of what the rows can reach",
            proved=False,
            worst=found.worst,
        )
    return found


def _covariates(covariates: Any) -> Tensor:
    """Covariates ``[N, K]``, contiguous, once they are floating and there are some."""
    if not isinstance(covariates, Tensor) or not covariates.is_floating_point():
        kind = covariates.dtype if isinstance(covariates, Tensor) else type(covariates).__name__
        raise TypeError(f"covariates: expected a floating tensor, got {kind}")
    if covariates.dim() != 2 or not covariates.numel():
        raise ValueError(f"covariates: expected shape [N, K], got {tuple(covariates.shape)}")
    return covariates.detach().contiguous()


def _check_constant(mean: Tensor, deviation: Tensor, wanted: Tensor, names: Sequence[str]) -> None:
    """Refuses a target that a constant covariate does not have."""
    tiny = torch.finfo(torch.float64).tiny
    apart = (deviation == 0) & ((mean - wanted).abs() > 1e-7 * wanted.abs().clamp_min(tiny))
    if bool(apart.any()):
        k = int(apart.nonzero()[0])
        raise Unbalanced(
            f"target: {names[k]} is {float(mean[k]):.6g} in every row, {float(wanted[k]):.6g} is asked for", proved=True
        )


def _solve(
    dual: Dual, covariates: Tensor, target: Tensor, base: Tensor, tolerance: float, evaluations: int
) -> tuple[str, int]:
    """Moves the dual to its minimum, or to where it is proved that there is none; the method that did, and its steps.

    L-BFGS is for many covariates, and for a target out of reach: it ends in a direction that shows it.
    """
    small = covariates.shape[1] <= NEWTON_WIDTH and covariates.numel() <= NEWTON_NUMBERS
    if small and covariates.device.type == "cpu" and not dual.balanced():
        point, steps, converged = _newton(covariates, target, base, tolerance)
        if converged:
            dual.at(point)
            return "newton", steps
    dual.descend(evaluations)
    return "l-bfgs", dual.evaluations


def balance_batch(
    covariates: Tensor,
    targets: Tensor,
    base: Tensor | None = None,
    *,
    outcomes: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-8,
    steps: int = 50,
) -> Balances:
    """Entropy balancing of many small problems at once, each by Newton's method inside one kernel.

    Problems that cannot be solved do not stop the others: see ``status`` of the result.

    Args:
        covariates: ``[P, N, K]``, floating.
        targets: wanted means ``[P, K]``.
        base: ``[N]`` or ``[P, N]``, at least 0; by default all equal.
        outcomes: ``[N, V]``, whose weighted means are wanted.
        start: dual to begin at ``[P, K]``, as of a similar problem.
        tolerance: greatest standardised difference.
        steps: of Newton's method.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that do not fit.
    """
    if not isinstance(covariates, Tensor) or not covariates.is_floating_point() or covariates.dim() != 3:
        found = tuple(covariates.shape) if isinstance(covariates, Tensor) else type(covariates).__name__
        raise ValueError(f"covariates: expected a floating tensor [P, N, K], got {found}")
    problems, rows, width = covariates.shape
    device = covariates.device
    if base is None:
        base = torch.ones(rows, dtype=torch.float64, device=device)
    if outcomes is None:
        outcomes = torch.zeros(rows, 0, dtype=torch.float64, device=device)
    if start is None:
        start = torch.zeros(problems, width, dtype=torch.float64, device=device)
    dual, means, report, status = ops.balance_batch(
        covariates,
        *(torch.as_tensor(x, dtype=torch.float64, device=device) for x in (base, targets, outcomes, start)),
        tolerance=number("tolerance", tolerance, 0),
        steps=integer("steps", steps, 0),
    )
    return Balances(dual, means, report[:, 0], report[:, 1], report[:, 3], status)


def _newton(covariates: Tensor, target: Tensor, base: Tensor, tolerance: float) -> tuple[Tensor, int, bool]:
    """Dual, steps, and whether it got there."""
    outcomes, start = base.new_zeros(len(base), 0), target.new_zeros(1, len(target))
    dual, _, report, status = ops.balance_batch(
        covariates[None],
        base,
        target[None],
        outcomes,
        start,
        tolerance=max(tolerance, 1e-13),
        steps=_NEWTON_STEPS,
    )
    return dual[0], int(report[0, 3]), int(status) == CONVERGED


def _vector(name: str, values: Any, length: int, device: torch.device) -> Tensor:
    try:
        vector = torch.as_tensor(values, dtype=torch.float64, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected {length} numbers, got {type(values).__name__}") from error
    if vector.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), got {tuple(vector.shape)}")
    if not bool(vector.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got {float(vector[~vector.isfinite()][0])}")
    return vector


def _base(base: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if base is None:
        return torch.ones(shape, dtype=torch.float64, device=device)
    weights = _vector("base", base, shape[0], device)
    if bool((weights < 0).any()):
        row = int((weights < 0).nonzero()[0])
        raise ValueError(f"base: expected weights of at least 0, got {float(weights[row])} at row {row}")
    if not float(weights.sum()) > 0:
        raise ValueError("base: all weights are 0")
    return weights
