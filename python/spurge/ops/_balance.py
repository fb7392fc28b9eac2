"""``balance_sweep``, ``balance_batch`` and ``balance_strata``: weights that balance covariates (entropy balancing)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spurge import _core, reference
from spurge.ops._registry import check, check_device, check_floating, register, run, workspace

_F64 = torch.float64


def _check_all(first: str, lead: Tensor, others: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (x, shape) in others.items():
        check(tuple(x.shape) == shape, lambda: f"{name}: shape must be {shape}, got {tuple(x.shape)}")  # noqa: B023
        check(x.dtype == _F64, lambda: f"{name}: dtype must be float64, got {str(x.dtype)[6:]}")  # noqa: B023
        check_device(first, lead, name, x)


def _check_dims(name: str, x: Tensor, letters: str) -> None:
    dims = letters.count(",") + 1
    check(x.dim() == dims, lambda: f"{name}: must have {dims} dimensions {letters}, got shape {tuple(x.shape)}")


def _check_newton(tolerance: float, steps: int) -> None:
    check(0 < tolerance < float("inf"), lambda: f"tolerance: must be positive and finite, got {tolerance}")
    check(0 <= steps < 2**31, lambda: f"steps: must lie in [0, 2^31), got {steps}")


# ---- one large problem ---------------------------------------------------------------------------


def _sweep_fake(covariates: Tensor, base: Tensor, dual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_floating("covariates", covariates)
    _check_dims("covariates", covariates, "[N, K]")
    rows, columns = covariates.shape
    _check_all("covariates", covariates, {"base": (base, (rows,)), "dual": (dual, (columns,))})
    return tuple(covariates.new_empty(n, dtype=_F64) for n in (rows, columns, 2))  # type: ignore[return-value]


def _sweep_kernel(covariates: Tensor, base: Tensor, dual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores, mean, value = _sweep_fake(covariates, base, dual)
    room = workspace(covariates, _core.balance_sweep_workspace, *covariates.shape)
    run(_core.balance_sweep, scores, mean, value, room, *(x.contiguous() for x in (covariates, base, dual)))
    return scores, mean, value


_balance_sweep = register(
    "balance_sweep(Tensor covariates, Tensor base, Tensor dual) -> (Tensor, Tensor, Tensor)",
    _sweep_fake,
    _sweep_kernel,
    reference.balance_sweep,
)


def balance_sweep(covariates: Tensor, base: Tensor, dual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Value and gradient of one large entropy balancing problem, in one read of the covariates.

    .. math::
        z = C\lambda, \qquad w_i = \frac{b_i e^{z_i}}{\sum_r b_r e^{z_r}}, \qquad
        \mathrm{mean} = C^\top w, \qquad \mathrm{value} = \Big(\log \sum_i b_i e^{z_i},\; \max_{b_i > 0} z_i\Big)

    With targets t, the dual :math:`f(\lambda) = \mathrm{value}_0 - t \cdot \lambda` has the gradient mean - t
    (Hainmueller 2012, Eq. 6). Where the largest score lies below :math:`t \cdot \lambda`, t is no weighted mean of
    rows: infeasible.

    All arithmetic is float64. Bitwise the same for any number of threads; instruction sets and the GPU differ in last
    bits, as multiplications are fused with additions. Not differentiable.

    Args:
        covariates: C, ``[N, K]``; float32, bfloat16, float16 or float64.
        base: b, float64 ``[N]``, not negative.
        dual: lambda, float64 ``[K]``.

    Returns:
        Scores z ``[N]``, mean ``[K]`` and value ``[2]``, float64. Rows of weight 0 do not count, whatever they hold.
        Without a row of weight above 0 the mean is NaN and the value minus infinity; where a number is NaN, mean and
        value are, and where a score is infinite, the mean and the logarithm.

    Raises:
        ValueError: a shape, dtype or device does not fit, or on the CPU a base is negative.

    >>> c = torch.tensor([[0.0], [1.0]])
    >>> scores, mean, value = balance_sweep(c, torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    >>> mean.item(), value.exp().tolist()
    (0.5, [2.0, 1.0])
    """
    return _balance_sweep(covariates, base, dual)


# ---- many small problems -------------------------------------------------------------------------


def _batch_fake(
    covariates: Tensor, base: Tensor, targets: Tensor, outcomes: Tensor, start: Tensor, tolerance: float, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_floating("covariates", covariates)
    _check_dims("covariates", covariates, "[P, N, K]")
    problems, rows, columns = covariates.shape
    _check_dims("outcomes", outcomes, "[N, V]")
    one = (rows,) if base.dim() == 1 else (problems, rows)
    _check_all(
        "covariates",
        covariates,
        {
            "base": (base, one),
            "targets": (targets, (problems, columns)),
            "outcomes": (outcomes, (rows, outcomes.shape[1])),
            "start": (start, (problems, columns)),
        },
    )
    _check_newton(tolerance, steps)
    shapes = ((problems, columns), (problems, outcomes.shape[1]), (problems, 4))
    dual, means, report = (covariates.new_empty(shape, dtype=_F64) for shape in shapes)
    return dual, means, report, covariates.new_empty(problems, dtype=torch.int32)


def _batch_kernel(
    covariates: Tensor, base: Tensor, targets: Tensor, outcomes: Tensor, start: Tensor, tolerance: float, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _batch_fake(covariates, base, targets, outcomes, start, tolerance, steps)
    room = workspace(covariates, _core.balance_batch_workspace, *covariates.shape)
    given = (x.contiguous() for x in (covariates, base, targets, outcomes, start))
    run(_core.balance_batch, *out, room, *given, tolerance, steps)
    return out


_balance_batch = register(
    "balance_batch(Tensor covariates, Tensor base, Tensor targets, Tensor outcomes, Tensor start, float tolerance,"
    " int steps) -> (Tensor, Tensor, Tensor, Tensor)",
    _batch_fake,
    _batch_kernel,
    reference.balance_batch,
)


def balance_batch(
    covariates: Tensor,
    base: Tensor,
    targets: Tensor,
    outcomes: Tensor,
    start: Tensor,
    *,
    tolerance: float = 1e-8,
    steps: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Balance many small problems, each to its end, and average outcomes under the weights.

    .. math::
        w_i = \frac{b_i e^{c_i \cdot \lambda}}{\sum_r b_r e^{c_r \cdot \lambda}}, \qquad
        \lambda = \arg\min\, f, \quad f(\lambda) = \log \sum_i b_i e^{(c_i - t) \cdot \lambda}
        \quad\Rightarrow\quad \sum_i w_i c_i = t

    Newton's method with backtracking (Hainmueller 2012, Eq. 6), in the units of each column's standard deviation, so
    scales do not matter. A tiny ridge in the direction, none in f: collinear columns whose targets agree do no harm.
    :math:`\max_i (c_i - t) \cdot \lambda < 0` proves that t is outside the convex hull of the rows. A constant column
    is left out where its target agrees, and makes the problem infeasible otherwise.

    All arithmetic is float64. Each problem is computed by one thread: bitwise the same for any number of threads;
    instruction sets and the GPU differ in last bits. Not differentiable.

    Args:
        covariates: c, ``[P, N, K]``; float32, bfloat16, float16 or float64.
        base: b, float64 ``[N]`` or ``[P, N]``, not negative; rows of base 0 are not looked at.
        targets: t, float64 ``[P, K]``.
        outcomes: float64 ``[N, V]``; V may be 0.
        start: where lambda starts, float64 ``[P, K]``.
        tolerance: the worst standardised difference that counts as balanced.
        steps: the most Newton steps of a problem.

    Returns:
        dual: lambda in the covariates' units, ``[P, K]``.
        means: :math:`\sum_i w_i\,\mathrm{outcomes}_i`, ``[P, V]``.
        report: ``[P, 4]``: worst standardised difference :math:`\max_k |\sum_i w_i c_{ik} - t_k| / \mathrm{sd}_k` with
            the standard deviation under base, effective sample size :math:`1 / \sum w^2`, f, Newton steps.
        status: int32 ``[P]``: 0 converged, 1 infeasible (proved), 2 not converged in ``steps``, 3 input not finite.
            With 1 and 3 all but the number of steps is NaN.

    Raises:
        ValueError: a shape, dtype, device or number does not fit, or on the CPU a base is negative.

    >>> c, one = torch.tensor([[[0.0], [1.0]]]), torch.ones(2, dtype=torch.float64)
    >>> t, y = torch.tensor([[0.75]], dtype=torch.float64), torch.tensor([[0.0], [8.0]], dtype=torch.float64)
    >>> dual, means, report, status = balance_batch(c, one, t, y, torch.zeros_like(t))
    >>> round(dual.exp().item(), 6), round(means.item(), 6), status.item()
    (3.0, 6.0, 0)
    """
    return _balance_batch(covariates, base, targets, outcomes, start, tolerance, steps)


# ---- one value in strata, for many units ---------------------------------------------------------


def _strata_fake(
    values: Tensor,
    starts: Tensor,
    base: Tensor,
    masses: Tensor,
    means: Tensor,
    squares: Tensor | None,
    outcomes: Tensor,
    start: Tensor,
    interact: bool,
    tolerance: float,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_floating("values", values)
    _check_dims("values", values, "[U, N]")
    _check_dims("outcomes", outcomes, "[N, V]")
    _check_dims("masses", masses, "[S]")
    (units, rows), strata = values.shape, masses.shape[0]
    check(strata >= 1, lambda: "masses: must have at least 1 element, got 0")
    check(starts.shape == (strata + 1,), lambda: f"starts: shape must be {(strata + 1,)}, got {tuple(starts.shape)}")
    check(starts.dtype == torch.int64, lambda: f"starts: dtype must be int64, got {str(starts.dtype)[6:]}")
    check_device("values", values, "starts", starts)
    _check_all(
        "values",
        values,
        {
            "base": (base, (rows,)),
            "masses": (masses, (strata,)),
            "means": (means, (units, strata)),
            **({} if squares is None else {"squares": (squares, (units,))}),
            "outcomes": (outcomes, (rows, outcomes.shape[1])),
            "start": (start, (units, strata + 1)),
        },
    )
    _check_newton(tolerance, steps)
    shapes = ((units, strata + 1), (units, outcomes.shape[1]), (units, 4))
    dual, averages, report = (values.new_empty(shape, dtype=_F64) for shape in shapes)
    return dual, averages, report, values.new_empty(units, dtype=torch.int32)


def _strata_kernel(values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _strata_fake(values, *rest)
    masses = rest[2]
    room = workspace(values, _core.balance_strata_workspace, *values.shape, len(masses))
    dense = (x.contiguous() if isinstance(x, Tensor) else x for x in (values, *rest))
    run(_core.balance_strata, *out, room, *dense)
    return out


_balance_strata = register(
    "balance_strata(Tensor values, Tensor starts, Tensor base, Tensor masses, Tensor means, Tensor? squares,"
    " Tensor outcomes, Tensor start, bool interact, float tolerance, int steps) -> (Tensor, Tensor, Tensor, Tensor)",
    _strata_fake,
    _strata_kernel,
    reference.balance_strata,
)


def balance_strata(
    values: Tensor,
    starts: Tensor,
    base: Tensor,
    masses: Tensor,
    means: Tensor,
    squares: Tensor | None,
    outcomes: Tensor,
    start: Tensor,
    *,
    interact: bool = True,
    tolerance: float = 1e-8,
    steps: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Balance one value in strata, for many units, and average outcomes under the weights.

    The rows are sorted into strata. Each stratum j gets the total weight :math:`m_j`; the mean of the value v becomes
    :math:`\mu_j` in each, and the mean of its square over all becomes s:

    .. math::
        w_i = m_j \frac{b_i e^{\beta_j v_i + \gamma v_i^2}}{\sum_{r \in j} b_r e^{\beta_j v_r + \gamma v_r^2}}, \qquad
        f(\beta, \gamma) = \sum_j m_j \Big(\log \sum_{i \in j} b_i e^{\beta_j v_i + \gamma v_i^2} - \mu_j \beta_j\Big)
        - s \gamma

    the profiled dual of entropy balancing on indicators of the strata, the value inside each, and its square. Its
    Hessian is an arrow, solved in O(S); nothing of the size rows times covariates is built: one read of the values,
    then an exponential and five sums per row and step.
    :math:`\sum_j m_j \max_{i \in j, b_i > 0} (\beta_j v_i + \gamma v_i^2) < \sum_j m_j \mu_j \beta_j + s \gamma`
    proves that no weights balance. Where the value is constant in a stratum, its slope is left out if the target is
    that value, else the unit is infeasible.

    All arithmetic is float64. Each unit is computed by one thread: bitwise the same for any number of threads;
    instruction sets and the GPU differ in last bits. Not differentiable.

    Args:
        values: v, ``[U, N]``; float32, bfloat16, float16 or float64.
        starts: int64 ``[S + 1]``, ascending from 0 to N: stratum j is rows ``starts[j]`` to ``starts[j + 1] - 1``.
        base: b, float64 ``[N]``, not negative; rows of base 0 are not looked at.
        masses: m, float64 ``[S]``, not negative, of sum 1; a stratum of mass 0 is left out.
        means: the means of the value wanted in each stratum, float64 ``[U, S]``.
        squares: s, the mean of the square wanted over all, float64 ``[U]``; None: the square is not balanced.
        outcomes: float64 ``[N, V]``; V may be 0.
        start: where the slopes and the curvature start, float64 ``[U, S + 1]``.
        interact: a slope for each stratum; False: one slope, and only the mean over all, ``masses @ means[u]``, is
            balanced.
        tolerance: the worst standardised difference that counts as balanced.
        steps: the most Newton steps of a unit.

    Returns:
        dual: slopes and curvature in the values' units, ``[U, S + 1]``; with ``interact=False`` one slope S times.
        averages: :math:`\sum_i w_i\,\mathrm{outcomes}_i`, ``[U, V]``.
        report: ``[U, 4]``: worst standardised difference (of the means by the value's standard deviation under base,
            of the square by its own), effective sample size :math:`1 / \sum w^2`, f, Newton steps.
        status: int32 ``[U]``: 0 converged, 1 infeasible (proved), 2 not converged in ``steps``, 3 input not finite.
            With 1 and 3 all but the number of steps is NaN.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; on the CPU also for borders that do not ascend from 0
            to N (a CUDA kernel cannot look before it runs, and gives status 3) and for negative base or masses.

    >>> f64 = {"dtype": torch.float64}
    >>> v, starts = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([0, 2, 4])
    >>> dual, averages, report, status = balance_strata(
    ...     v, starts, torch.ones(4, **f64), torch.tensor([0.5, 0.5], **f64), torch.tensor([[0.75, 2.5]], **f64), None,
    ...     torch.tensor([[0.0], [8.0], [0.0], [0.0]], **f64), torch.zeros(1, 3, **f64))
    >>> [round(x, 6) for x in dual.exp().flatten().tolist()], round(averages.item(), 6), status.item()
    ([3.0, 1.0, 1.0], 3.0, 0)
    """
    return _balance_strata(
        values, starts, base, masses, means, squares, outcomes, start, interact, tolerance, steps
    )  # fmt: skip
