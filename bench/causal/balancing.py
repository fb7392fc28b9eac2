"""``run.py balance``: entropy-balancing weights, one problem or ten thousand, beside what people use in Python.

Some rows are treated, the others are controls; wanted are the controls' weights under which their covariates have the
treated rows' means. Covariates are float32 numbers, so that every method answers the same question, in whatever type it
works; the peers are given theirs as float64 arrays, made before the clock starts. The limit is the bytes of the
covariates, as often as the library reads them, at the rate at which they can be read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.comparison import Case, Method, measure
from common.harness import compare, peak_of_call, threads
from common.limits import copy_bandwidth
from peers import balancing as peers
from peers.balancing import Answer, Array

ATT = [(10_000, 10), (10_000, 100), (100_000, 10), (100_000, 50), (100_000, 100), (100_000, 500)]  # rows, covariates
SHAPES: dict[str, list[tuple[int, int]]] = {
    "att": ATT,
    "correlated": [(100_000, 100)],
    "hard": [(10_000, 100)],
    "scaled": [(10_000, 20)],
    "infeasible": [(2_000, 200)],
    "beyond": [(2_000, 20)],
}
QUICK_SHAPES: dict[str, list[tuple[int, int]]] = {
    "att": [(1_000, 5), (2_000, 40)],
    "correlated": [(1_000, 20)],
    "hard": [(1_000, 10)],
    "scaled": [(1_000, 20)],
    "infeasible": [(400, 40)],
    "beyond": [(400, 10)],
}
BATCH, QUICK_BATCH = (10_000, 2_000, 6), (200, 500, 4)  # problems, rows, covariates
WORDS = {
    "att": "balance",
    "correlated": "balance, correlated covariates",
    "hard": "balance, treated 2 SD away",
    "scaled": "balance, scales from 1 to 1.6e-4",
    "infeasible": "balance, infeasible: treated 1 SD away in every covariate",
    "beyond": "balance, infeasible: 1 % beyond a row",
}
PARTS = (*SHAPES, "batch")
IMPOSSIBLE = ("infeasible", "beyond")
PEAKS = [(100_000, 100), (100_000, 500)]
TIGHT = 1e-12  # standard deviations: of the solution that others are compared with
LOOPED = 100  # problems of the batch that the loops solve, and whose weights are compared
SLOW = 1 << 30  # rows x covariates² from which on the packages run once


@dataclass(frozen=True, eq=False)
class Problem:
    """Controls come first.

    ``rows`` ``[R, K]`` float32, of which ``controls`` are to be weighed; ``outcome`` ``[R]`` float64.
    """

    rows: Tensor
    controls: int
    outcome: Tensor

    @property
    def covariates(self) -> Tensor:
        """``[N, K]`` of the controls."""
        return self.rows[: self.controls]

    @property
    def target(self) -> Tensor:
        """Means of the treated, float64 ``[K]``."""
        return self.rows[self.controls :].double().mean(0)


def make_problem(kind: str, rows: int, width: int) -> Problem:
    """A problem of one of the kinds in ``WORDS``; about half of its rows are treated.

    Who is treated depends on all covariates through a logit of standard deviation 1, but in the kinds that move the
    treated rows to where they are wanted.
    """
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(rows, width, generator=generator)
    if kind == "correlated":
        found += torch.randn(rows, 10, generator=generator) @ torch.randn(10, width, generator=generator).mul_(0.5)
    direction = torch.randn(width, generator=generator)
    along = found @ direction
    along /= along.std()
    outcome = along.double() + torch.randn(rows, generator=generator, dtype=torch.float64)
    logit = along if kind in ("att", "correlated", "scaled") else torch.zeros(rows)
    treated = torch.rand(rows, generator=generator) < logit.sigmoid()
    controls = found[~treated]
    moved = found[treated]
    if kind == "hard":
        moved += 2 * direction / direction.norm()
    elif kind == "infeasible":
        moved += 1
    elif kind == "beyond":  # no row of the controls is as far in its direction
        moved += 1.01 * controls[(controls @ direction).argmax()] - moved.mean(0)
    found = torch.cat([controls, moved])
    if kind == "scaled":
        found *= torch.logspace(0, np.log10(1.6e-4), width)
    return Problem(found, len(controls), torch.cat([outcome[~treated], outcome[treated]]))


def make_batch(problems: int, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Covariates ``[P, N, K]`` float32, targets ``[P, K]`` about a quarter of a standard deviation away, an outcome."""
    generator = torch.Generator().manual_seed(0)
    covariates = torch.randn(problems, rows, width, generator=generator)
    targets = 0.25 * torch.randn(problems, width, generator=generator, dtype=torch.float64)
    return covariates, targets, torch.randn(rows, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------- ours


def spurge_balance(covariates: Tensor, target: Tensor, tolerance: float = 1e-8) -> Answer:
    """The library's."""
    from spurge.engine.causal.balancing import Unbalanced, balance

    try:
        found = balance(covariates, target, tolerance=tolerance)
    except Unbalanced as error:
        return Answer(None, infeasible=error.proved, message=str(error))
    weights = found.weights.cpu().numpy()
    return Answer(weights, found.dual.cpu().numpy(), found.evaluations or found.steps, True, message=found.method)


def spurge_batch(covariates: Tensor, targets: Tensor, outcome: Tensor) -> tuple[Tensor, Tensor]:
    """The library's: dual ``[P, K]`` and weighted means of the outcome ``[P]``."""
    from spurge.engine.causal.balancing import balance_batch

    found = balance_batch(covariates, targets, outcomes=outcome[:, None])
    return found.dual, found.means[:, 0]


# --------------------------------------------------------------------------------------------------------- one problem


def methods(problem: Problem, *, impossible: bool = False, device: str = "cpu") -> dict[str, Method]:
    """Every method; numpy and the packages work on the CPU only, torch's products are slower there than numpy's."""
    covariates, target = problem.covariates.to(device), problem.target.to(device)
    found = {
        "spurge": Method(partial(spurge_balance, covariates, target)),
        "spurge-1e-4": Method(partial(spurge_balance, covariates, target, 1e-4), note="to 1e-4 SD"),
        "spurge-float64": Method(partial(spurge_balance, covariates.double(), target), note="covariates in float64"),
    }
    if torch.device(device).type != "cpu":
        return found | {"torch-lbfgs": Method(partial(peers.torch_lbfgs, covariates, target))}
    narrow, wanted = problem.covariates.numpy(), problem.target.numpy()
    wide = problem.rows.double().numpy()
    rows = wide[: problem.controls]
    treatment = (np.arange(len(wide)) >= problem.controls).astype(np.float64)
    once = rows.size * rows.shape[1] > SLOW
    found |= {
        "scipy-lbfgs": Method(partial(peers.scipy_lbfgs, rows, wanted)),
        "scipy-lbfgs-two-pass": Method(partial(peers.scipy_lbfgs, rows, wanted, blocks=False)),
        "scipy-lbfgs-float32": Method(partial(peers.scipy_lbfgs, narrow, wanted, tolerance=1e-4), note="to 1e-4 SD"),
        "numpy-newton": Method(partial(peers.numpy_newton, rows, wanted)),
        "ebal": Method(partial(peers.ebal_default, wide, treatment, problem.outcome.numpy()), once=once),
        "ebal-solver": Method(partial(peers.ebal_solver, rows, wanted), once=once),
        "empirical-calibration": Method(partial(peers.calibrate, rows, wanted), once=once),
    }
    if impossible:
        relaxed = partial(peers.maybe_exact_calibrate, rows, wanted)
        found["empirical-calibration-relaxed"] = Method(relaxed, once=True)
    return found


def exact(problem: Problem) -> Array:
    """The weights, to ``TIGHT``."""
    found = peers.numpy_newton(problem.covariates.double().numpy(), problem.target.numpy(), tolerance=TIGHT)
    if not found.balanced or found.weights is None:
        raise RuntimeError(f"no solution to {TIGHT} standard deviations to compare with: {found.message}")
    return found.weights


def agreement(problem: Problem, best: Array | None, answer: Answer) -> Mapping[str, Any]:
    """How far the weights are from the best, and the covariates' means from the target; what the method says of it."""
    outcome = problem.outcome[: problem.controls].numpy()
    found: dict[str, Any] = {"says_balanced": (int(answer.balanced), "", answer.message)}
    if best is None:
        found["says_infeasible"] = (int(answer.infeasible), "", answer.message)
    if answer.evaluations is not None:
        found["evaluations"] = (answer.evaluations, "")
    if answer.weights is None:
        return found
    rows = problem.covariates.double().numpy()
    weights = answer.weights
    if best is not None:
        found["difference"] = (float(np.abs(weights / best - 1).max()), "relative")
        found["outcome_difference"] = (float(abs((weights - best) @ outcome) / outcome.std()), "SD")
    worst = np.abs((weights @ rows - problem.target.numpy()) / rows.std(0)).max()
    return found | {"worst_difference": (float(worst), "SD"), "ess": (float(1 / np.square(weights).sum()), "rows")}


def limits(problem: Problem, device: str) -> dict[str, tuple[float, str]]:
    """Seconds that reading the covariates takes, as often as the library's method goes through them."""
    covariates = problem.covariates.to(device)
    found = spurge_balance(covariates, problem.target.to(device))
    read = compare({"read": covariates.sum}, repeats=7, sample_seconds=0.02, device=device)["read"].seconds
    rate = covariates.nbytes / read / 1e9
    sweeps = found.evaluations or 1
    steps = "Newton steps" if found.message == "newton" else "sweeps"
    return {"limit": (sweeps * read, f"{sweeps} {steps}, {covariates.nbytes:,} bytes each at {rate:.1f} GB/s")}


def cases(kind: str, *, quick: bool, device: str) -> Iterator[Case]:
    """The shapes of a kind, one after the other."""
    for rows, width in (QUICK_SHAPES if quick else SHAPES)[kind]:
        problem = make_problem(kind, rows, width)
        impossible = kind in IMPOSSIBLE
        found = methods(problem, impossible=impossible, device=device)
        yield Case(
            f"{WORDS[kind]}, {rows:,} rows ({problem.controls:,} controls) x {width}",
            found,
            partial(agreement, problem, None if impossible else exact(problem)),
            {} if impossible else limits(problem, device),
            (kind, str(rows), str(width)),
            tuple(found) if not quick and kind == "att" and (rows, width) in PEAKS else (),
            "balance",
        )


# ----------------------------------------------------------------------------------------------------------- the batch


def batch_methods(covariates: Tensor, targets: Tensor, outcome: Tensor) -> dict[str, Method]:
    """Every method; the loops for some of the problems."""
    found = {
        "spurge": Method(partial(spurge_batch, covariates, targets, outcome)),
        "torch-batch-newton": Method(partial(peers.torch_batch_newton, covariates, targets, outcome)),
    }
    if covariates.is_cuda:
        return found
    found["numpy-batch-newton"] = Method(
        partial(peers.numpy_batch_newton, covariates.numpy(), targets.numpy(), outcome.numpy())
    )
    part = min(len(covariates), LOOPED)
    few = (covariates[:part].double().numpy(), targets[:part].numpy(), outcome.numpy())
    scale = len(covariates) / part
    note = "" if scale == 1 else f"extrapolated from {part} of {len(covariates):,} problems"
    for name, form in (
        ("scipy-lbfgs", partial(peers.scipy_lbfgs, blocks=False)),
        ("numpy-newton", peers.numpy_newton),
        ("ebal-solver", peers.ebal_solver),
    ):
        found[name] = Method(partial(peers.loop, form, *few), scale=scale, note=note)
    return found


def batch_agreement(
    problems: tuple[Tensor, Tensor, Tensor], best: tuple[Tensor, Tensor], answer: tuple[Tensor, Tensor]
) -> Mapping[str, Any]:
    """The same of the batch: of all problems that were solved, against the best of the first ones."""
    covariates, targets, outcome = problems
    dual, means = (of.to(covariates.device) for of in answer)
    worst = torch.zeros((), dtype=torch.float64, device=covariates.device)
    for part, wanted, of in zip(covariates.split(64), targets.split(64), dual.split(64), strict=False):
        rows = part[: len(of)].double()
        weights = torch.softmax((rows @ of[:, :, None])[:, :, 0], 1)
        mean = (weights[:, None] @ rows)[:, 0]
        apart = ((mean - wanted[: len(of)]) / rows.std(1, correction=0)).abs().amax()
        worst = torch.maximum(worst, apart)  # NaN stays
    few = min(len(best[0]), len(dual))
    rows = covariates[:few].double()
    logits = [torch.log_softmax((rows @ of[:few, :, None])[:, :, 0], 1) for of in (dual, best[0])]
    return {
        "difference": (float((logits[0] - logits[1]).expm1().abs().max()), "relative"),
        "outcome_difference": (float((means[:few] - best[1][:few]).abs().max() / outcome.std()), "SD"),
        "worst_difference": (float(worst), "SD"),
    }


def batch_limits(covariates: Tensor, targets: Tensor, device: str) -> dict[str, tuple[float, str]]:
    """Seconds that moving the covariates takes at the rate of a copy, once and with every Newton step."""
    from spurge.engine.causal.balancing import balance_batch

    steps = float(balance_batch(covariates, targets).steps.nanmean())
    rate = copy_bandwidth(covariates.nbytes, device=device)
    once = covariates.nbytes / rate / 1e9
    note = f"{covariates.nbytes:,} bytes once at {rate:.1f} GB/s, the rate of a copy"
    return {"limit": (once, note), "limit x steps": (steps * once, f"{steps:.2f} Newton steps on average")}


def batch_cases(*, quick: bool, device: str) -> Iterator[Case]:
    """The one batch."""
    shape = QUICK_BATCH if quick else BATCH
    problems = tuple(of.to(device) for of in make_batch(*shape))
    covariates, targets, outcome = problems
    few = (covariates[:LOOPED].cpu().double().numpy(), targets[:LOOPED].cpu().numpy(), outcome.cpu().numpy())
    best = peers.loop(partial(peers.numpy_newton, tolerance=TIGHT), *few)
    found = batch_methods(covariates, targets, outcome)
    yield Case(
        f"balance, {shape[0]:,} problems of {shape[1]:,} x {shape[2]}",
        found,
        partial(batch_agreement, problems, tuple(of.to(device) for of in best)),
        batch_limits(covariates, targets, device),
        ("batch", *map(str, shape)),
        () if quick else tuple(found),
        "balance",
        parts=True,
    )


# -------------------------------------------------------------------------------------------------------------- running


def child(rest: list[str]) -> dict[str, Any]:
    """What ``run.py child balance`` prints: bytes beyond the inputs at the peak of one call."""
    count, kind, *shape, name = rest
    torch.set_num_threads(int(count))
    with peers.blas_threads(int(count)):
        if kind == "batch":
            batch_methods(*make_batch(3, 50, 3))[name].call()  # libraries in memory before the measured call
            return {"peak_bytes": peak_of_call(batch_methods(*make_batch(*map(int, shape)))[name].call)}
        impossible = kind in IMPOSSIBLE
        methods(make_problem("att", 200, 4), impossible=impossible)[name].call()
        problem = make_problem(kind, *map(int, shape))
        return {"peak_bytes": peak_of_call(methods(problem, impossible=impossible)[name].call)}


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """The kinds that ``args.only`` names, one case after the other; every case is saved when it is done."""
    from spurge.engine.base.budgets import free_bytes

    chosen = [name for name in PARTS if any(fnmatch(name, pattern) for pattern in args.only)]
    if not chosen:
        raise ValueError(f"only: expected patterns of {', '.join(PARTS)}, got {','.join(args.only)}")
    settings = {"repeats": 2 if args.quick else 5, "budget": 2.0 if args.quick else 20.0, "device": args.device}
    with threads(args.threads), peers.blas_threads(args.threads):
        for name in chosen:
            form = batch_cases if name == "batch" else partial(cases, name)
            for case in form(quick=args.quick, device=args.device):
                print(case.name, flush=True)
                measure(case, results, free=free_bytes(args.device), threads=args.threads, **settings)
                save()
