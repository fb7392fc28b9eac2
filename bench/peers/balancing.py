"""Entropy balancing as people do it in Python: SciPy, numpy and torch by hand, and the two packages that offer it.

Wanted are weights ``w_i = exp(c_i l) / sum exp(c_j l)`` of N rows ``c`` ``[N, K]`` whose weighted mean is a target
``t`` ``[K]``; the dual ``log sum exp((c_i - t) l)`` is minimised over l. The forms by hand work in units of the
columns' standard deviations, which a first pass finds, so that any scales will do; they stop where the greatest
difference from the target is ``tolerance`` standard deviations. Packages are asked as their documentation asks them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import empirical_calibration
import numpy as np
import torch
from ebal import ebal_bin
from empirical_calibration.core import ConvergenceError
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

BLOCK = 1 << 16  # numbers of a block of rows that stays in a core's own cache
MOST = 500  # evaluations
CHUNK, GPU_CHUNK = 1 << 18, 1 << 28  # numbers of the problems that are solved at once

Array = NDArray[Any]
Function = Callable[[Array], tuple[float, Array]]


@dataclass(frozen=True)
class Answer:
    """Weights ``[N]`` of sum 1 and their dual ``[K]``, None where a method has none.

    ``evaluations`` of the dual's value or gradient, where a method reports them; ``balanced``, ``infeasible`` and
    ``message`` are the method's own verdict.
    """

    weights: Array | None
    dual: Array | None = None
    evaluations: int | None = None
    balanced: bool = False
    infeasible: bool = False
    message: str = ""


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Run the body with ``count`` threads in numpy's and SciPy's libraries, which do not ask torch."""
    with threadpool_limits(count):
        yield


# ------------------------------------------------------------------------------------------------------------ by hand


def _spreads(rows: Array) -> tuple[Array, Array]:
    """Means and standard deviations of the columns, float64."""
    mean, square = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    step = max(64, BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        mean += part.sum(0)
        square += np.einsum("nk,nk->k", part, part)
    mean /= len(rows)
    return mean, np.sqrt(np.maximum(square / len(rows) - mean**2, 0))


def _two_passes(rows: Array, target: Array) -> Function:
    """Value (less log N) and gradient with a matrix-vector product each way."""
    scores = np.empty(len(rows), rows.dtype)

    def dual(place: Array) -> tuple[float, Array]:
        shift = place @ target
        np.dot(rows, place.astype(rows.dtype), out=scores)
        np.exp(np.subtract(scores, rows.dtype.type(shift), out=scores), out=scores)
        return _value_and_gradient(scores.sum(dtype=np.float64), scores @ rows, len(rows), target)

    return dual


def _one_pass(rows: Array, target: Array) -> Function:
    """The same block by block: the second product finds the rows where the first one left them, in the cache."""
    step = max(64, BLOCK // rows.shape[1])

    def dual(place: Array) -> tuple[float, Array]:
        shift, narrow = rows.dtype.type(place @ target), place.astype(rows.dtype)
        total, sums = 0.0, np.zeros(len(target))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            scores = part @ narrow
            np.exp(np.subtract(scores, shift, out=scores), out=scores)
            total += float(scores.sum(dtype=np.float64))
            sums += scores @ part
        return _value_and_gradient(total, sums, len(rows), target)

    return dual


def _value_and_gradient(total: float, sums: Array, count: int, target: Array) -> tuple[float, Array]:
    """Scores are taken relative to the target's: no need for their largest, and a value near 0 is exact."""
    return float(np.log(total / count)), sums / total - target


def _weights(rows: Array, dual: Array) -> Array:
    scores = rows @ dual.astype(rows.dtype)
    weights = np.exp(scores - scores.max(), dtype=np.float64)
    return weights / weights.sum()


def scipy_lbfgs(rows: Array, target: Array, *, blocks: bool = True, tolerance: float = 1e-8) -> Answer:
    """SciPy's L-BFGS-B on the dual; ``rows`` in float64, or in float32 with sums in float32.

    Unknowns are scaled so that its first step, of length 1, is a whole one.
    """
    mean, spread = _spreads(rows)
    unit = float(np.linalg.norm((mean - target) / spread)) or 1.0
    scale = unit / spread
    function = (_one_pass if blocks else _two_passes)(rows, target)

    def scaled(place: Array) -> tuple[float, Array]:
        value, gradient = function(place * scale)
        return value, gradient * scale

    options = {"gtol": tolerance * unit, "ftol": 0, "maxcor": 20, "maxiter": MOST, "maxfun": MOST}
    with np.errstate(all="ignore"):
        found = minimize(scaled, np.zeros(len(target)), jac=True, method="L-BFGS-B", options=options)
        weights = _weights(rows, found.x * scale)
    return Answer(weights, found.x * scale, found.nfev, bool(found.success), message=found.message)


def torch_lbfgs(rows: Tensor, target: Tensor, *, tolerance: float = 1e-8) -> Answer:
    """The same with torch's products, for covariates on a GPU; SciPy decides, and sees K numbers of each pass."""
    wide, wanted = rows.double(), target.cpu().numpy()
    spread, mean = (of.cpu().numpy() for of in torch.std_mean(wide, 0, correction=0))
    unit = float(np.linalg.norm((mean - wanted) / spread)) or 1.0
    scale = unit / spread

    def scores_of(place: Array) -> Tensor:
        return (wide @ torch.from_numpy(place * scale).to(wide.device)).sub_(float(place * scale @ wanted))

    def scaled(place: Array) -> tuple[float, Array]:
        raised = scores_of(place).exp_()
        both = torch.cat([raised.sum()[None], raised @ wide]).cpu().numpy()
        value, gradient = _value_and_gradient(both[0], both[1:], len(wide), wanted)
        return value, gradient * scale

    options = {"gtol": tolerance * unit, "ftol": 0, "maxcor": 20, "maxiter": MOST, "maxfun": MOST}
    with np.errstate(all="ignore"):
        found = minimize(scaled, np.zeros(len(wanted)), jac=True, method="L-BFGS-B", options=options)
    weights = torch.softmax(scores_of(found.x), 0).cpu().numpy()
    return Answer(weights, found.x * scale, found.nfev, bool(found.success), message=found.message)


def numpy_newton(rows: Array, target: Array, *, tolerance: float = 1e-8, steps: int = 100) -> Answer:
    """Newton's method with backtracking, float64; the Hessian in blocks that stay in the cache."""
    count, width = rows.shape
    mean, spread = _spreads(rows)
    place, value, weights = np.zeros(width), float(np.log(count)), np.full(count, 1 / count)
    size = max(64, BLOCK // width)
    scratch = np.empty((size, width))
    evaluations, message = 1, ""
    with np.errstate(all="ignore"):
        for _ in range(steps):
            gradient = mean - target
            if np.abs(gradient / spread).max() <= tolerance:
                break
            hessian, roots = np.zeros((width, width)), np.sqrt(weights)
            for start in range(0, count, size):
                part = rows[start : start + size]
                weighed = np.multiply(part, roots[start : start + size, None], out=scratch[: len(part)])
                hessian += weighed.T @ weighed
            hessian -= np.outer(mean, mean)
            try:
                move = -np.linalg.solve(hessian / np.outer(spread, spread), gradient / spread) / spread
            except np.linalg.LinAlgError as error:
                message = str(error)
                break
            slope, step = float(gradient @ move), 1.0
            while step > 1e-6:
                trial = place + step * move
                scores = rows @ trial
                top = scores.max()
                raised = np.exp(np.subtract(scores, top, out=scores), out=scores)
                total = raised.sum()
                reached = float(top + np.log(total) - trial @ target)
                evaluations += 1
                if reached <= value + 1e-4 * step * slope + 1e-13 * (1 + abs(value)):
                    break
                step /= 2
            else:
                message = "no step lowers the dual"
                break
            place, value, weights = trial, reached, raised / total
            mean = weights @ rows
    balanced = bool(np.abs((mean - target) / spread).max() <= tolerance)
    return Answer(weights, place, evaluations, balanced, message=message or ("" if balanced else f"{steps} steps"))


def numpy_batch_newton(
    covariates: Array, targets: Array, outcome: Array, *, tolerance: float = 1e-8, steps: int = 50
) -> tuple[Tensor, Tensor]:
    """Newton's method for a few problems at once: dual ``[P, K]`` and weighted means of ``outcome`` ``[P]``.

    The products of the columns are formed once; one product with the weights then gives gradient and Hessian.
    """
    problems, count, width = covariates.shape
    first, second = np.triu_indices(width)
    pair = np.zeros((width, width), dtype=np.int64)
    pair[first, second] = pair[second, first] = width + np.arange(len(first))
    duals, means = [], []
    size = max(1, CHUNK // (count * (width + len(first))))
    for start in range(0, problems, size):
        wanted = targets[start : start + size]
        moments = np.empty((len(wanted), width + len(first), count))
        rows = moments[:, :width]
        np.subtract(covariates[start : start + size].transpose(0, 2, 1), wanted[:, :, None], out=rows)
        for i, (left, right) in enumerate(zip(first, second, strict=True)):
            np.multiply(rows[:, left], rows[:, right], out=moments[:, width + i])
        weights = np.full((len(wanted), count), 1 / count)
        place, move = np.zeros_like(wanted), np.zeros_like(wanted)
        value, step, better = np.zeros((len(wanted), 1)), np.ones((len(wanted), 1)), np.ones((len(wanted), 1), bool)
        spread = None
        for _ in range(steps):
            mean = np.matmul(moments, weights[:, :, None])[:, :, 0]
            gradient = mean[:, :width]
            hessian = mean[:, pair] - gradient[:, :, None] * gradient[:, None]
            spread = np.sqrt(np.diagonal(hessian, axis1=1, axis2=2)) if spread is None else spread
            if np.abs(gradient / spread).max() <= tolerance:
                break
            move = np.where(better, -np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0], move)
            step = np.where(better, 1.0, step / 2)
            trial = place + step * move
            raised = np.exp(np.matmul(trial[:, None], rows)[:, 0])
            total = raised.sum(1, keepdims=True)
            reached = np.log(total / count)
            better = reached <= value + 1e-4 * step * (gradient * move).sum(1, keepdims=True) + 1e-13
            value, place = np.where(better, reached, value), np.where(better, trial, place)
            weights = np.where(better, raised / total, weights)
        duals.append(place)
        means.append(weights @ outcome)
    return torch.from_numpy(np.concatenate(duals)), torch.from_numpy(np.concatenate(means))


def torch_batch_newton(
    covariates: Tensor, targets: Tensor, outcome: Tensor, *, tolerance: float = 1e-8, steps: int = 50
) -> tuple[Tensor, Tensor]:
    """The same in batched torch products of float64, for GPUs too; the Hessian from the weighed rows."""
    problems, count, width = covariates.shape
    duals, means = [], []
    size = max(1, (GPU_CHUNK if covariates.is_cuda else CHUNK) // (count * width))
    for start in range(0, problems, size):
        rows = covariates[start : start + size].double().transpose(1, 2).contiguous()
        rows -= targets[start : start + size, :, None]
        spread = rows.std(2, correction=0)
        rows /= spread[:, :, None]
        weighed, weights = torch.empty_like(rows), torch.full_like(rows[:, 0], 1 / count)
        place, move = torch.zeros_like(spread), torch.zeros_like(spread)
        value, step = torch.zeros_like(spread[:, :1]), torch.ones_like(spread[:, :1])
        better = torch.ones_like(step, dtype=torch.bool)
        for _ in range(steps):
            gradient = torch.bmm(weights[:, None], rows.transpose(1, 2))[:, 0]
            if float(gradient.abs().amax()) <= tolerance:
                break
            torch.mul(rows, weights[:, None], out=weighed)
            hessian = torch.bmm(weighed, rows.transpose(1, 2)) - gradient[:, :, None] * gradient[:, None]
            move = torch.where(better, -torch.linalg.solve(hessian, gradient), move)
            step = torch.where(better, 1.0, step / 2)
            trial = place + step * move
            raised = torch.bmm(trial[:, None], rows)[:, 0].exp_()
            total = raised.sum(1, keepdim=True)
            reached = (total / count).log()
            better = reached <= value + 1e-4 * step * (gradient * move).sum(1, keepdim=True) + 1e-13
            value, place = torch.where(better, reached, value), torch.where(better, trial, place)
            weights = torch.where(better, raised / total, weights)
        duals.append(place / spread)
        means.append(weights @ outcome)
    return torch.cat(duals), torch.cat(means)


# ----------------------------------------------------------------------------------------------------------- packages


def ebal_default(rows: Array, treatment: Array, outcome: Array) -> Answer:
    """``ebal_bin().ebalance``: principal components of all rows, weights of those whose ``treatment`` is 0, and the
    weighted regression that it always runs."""
    solver = ebal_bin(print_level=-1)
    try:
        with np.errstate(all="ignore"):
            found = solver.ebalance(treatment, rows, outcome)
    except (ValueError, np.linalg.LinAlgError) as error:
        return Answer(None, message=f"{type(error).__name__}: {error}")
    return _of_ebal(found["w"][treatment == 0], found["converged"], found["maxdiff"], None)


def ebal_solver(rows: Array, target: Array) -> Answer:
    """Its solver alone, without the components, the rank of the covariates and the regression."""
    solver = ebal_bin(print_level=-1, PCA=False)
    solver.coefs = np.zeros(rows.shape[1] + 1)
    try:
        with np.errstate(all="ignore"):
            weights = solver._eb(np.insert(target, 0, 1.0), np.column_stack((np.ones(len(rows)), rows)), 1.0)
    except (ValueError, np.linalg.LinAlgError) as error:
        return Answer(None, message=f"{type(error).__name__}: {error}")
    return _of_ebal(weights, solver.converged, solver.maxdiff, solver.coefs[1:])


def _of_ebal(weights: Array, converged: bool, difference: float, dual: Array | None) -> Answer:
    with np.errstate(all="ignore"):
        weights = weights / weights.sum()
    message = f"converged={converged}, maxdiff={difference:.3g}"
    return Answer(weights, dual, balanced=bool(converged), message=message)


def calibrate(rows: Array, target: Array) -> Answer:
    """``empirical_calibration.calibrate`` for entropy: SciPy's fsolve with a Jacobian of differences."""
    with np.errstate(all="ignore"):
        weights, success = empirical_calibration.calibrate(
            rows, target[None], objective=empirical_calibration.Objective.ENTROPY
        )
        return Answer(weights / weights.sum(), balanced=bool(success), message=f"success={success}")


def maybe_exact_calibrate(rows: Array, target: Array) -> Answer:
    """``empirical_calibration.maybe_exact_calibrate`` for entropy: the norm of the differences that it may leave grows
    until fsolve gets there."""
    try:
        with np.errstate(all="ignore"):
            weights, norm = empirical_calibration.maybe_exact_calibrate(
                rows, target[None], objective=empirical_calibration.Objective.ENTROPY
            )
    except ConvergenceError as error:
        return Answer(None, message=f"ConvergenceError: {error}")
    return Answer(weights / weights.sum(), balanced=norm == 0, infeasible=norm > 0, message=f"l2_norm={norm:.3g}")


# --------------------------------------------------------------------------------------------------------------- loops


def loop(form: Callable[..., Answer], covariates: Array, targets: Array, outcome: Array) -> tuple[Tensor, Tensor]:
    """One problem after the other: dual ``[P, K]`` and weighted means of ``outcome`` ``[P]``."""
    answers = [form(rows, target) for rows, target in zip(covariates, targets, strict=True)]
    duals = np.stack([answer.dual for answer in answers])
    return torch.from_numpy(duals), torch.from_numpy(np.array([answer.weights @ outcome for answer in answers]))
