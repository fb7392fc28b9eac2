"""L-BFGS for smooth convex functions whose value and gradient come from one pass over much data.

Unlike ``torch.optim.LBFGS`` and SciPy's it takes a full first step (the caller scales its unknowns so that the Hessian
is about 1), and keeps to the device of the unknowns.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_SUFFICIENT = 1e-4  # Armijo
_MEMORY = 20


def minimise(
    function: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    *,
    finished: Callable[[Tensor], bool],
    evaluations: int,
    known: tuple[float, Tensor] | None = None,
) -> tuple[Tensor, int]:
    """The place ``[K]`` where ``finished(gradient)`` first holds, or the best one found, and the evaluations it took.

    Args:
        function: place -> value and gradient ``[K]``; convex.
        start: where to begin.
        known: value and gradient there, which then cost no evaluation.
        finished: stops the search; asked after every evaluation.
        evaluations: at most.
    """
    place = start.clone()
    value, gradient = function(place) if known is None else known
    used = 1 if known is None else 0
    moves: list[Tensor] = []
    changes: list[Tensor] = []
    while used < evaluations and not finished(gradient):
        direction = -_inverse_hessian(gradient, moves, changes)
        slope = float(gradient @ direction)
        if not slope < 0:
            direction, slope = -gradient, -float(gradient @ gradient)
            moves.clear()
            changes.clear()
        step = 1.0
        while True:
            trial = place + step * direction
            trial_value, trial_gradient = function(trial)
            used += 1
            if finished(trial_gradient):
                return trial, used
            along = float(trial_gradient @ direction)
            # Close to the minimum values agree to rounding, and the gradient along the way is the better judge.
            rounding = 1e-14 * (1 + abs(value))
            fell = trial_value <= value + _SUFFICIENT * step * slope or (
                trial_value <= value + rounding and abs(along) <= abs(slope)
            )
            if fell or used >= evaluations:
                break
            # Where the parabola through both slopes turns; of a trial far off, a tenth.
            step *= min(0.5, max(0.1, slope / (slope - along))) if along == along else 0.1
            if step < 1e-12:
                return place, used
        if not fell:
            break
        move, change = trial - place, trial_gradient - gradient
        if float(move @ change) > 1e-12 * float(change @ change) ** 0.5 * float(move @ move) ** 0.5:
            moves.append(move)
            changes.append(change)
            del moves[:-_MEMORY], changes[:-_MEMORY]
        place, value, gradient = trial, trial_value, trial_gradient
    return place, used


def _inverse_hessian(gradient: Tensor, moves: list[Tensor], changes: list[Tensor]) -> Tensor:
    """The two-loop recursion (Nocedal 1980); the identity where nothing is known yet."""
    if not moves:
        return gradient.clone()
    result = gradient.clone()
    shares = []
    for move, change in zip(reversed(moves), reversed(changes), strict=True):
        share = (move @ result) / (move @ change)
        result -= share * change
        shares.append(share)
    result *= (moves[-1] @ changes[-1]) / (changes[-1] @ changes[-1])
    for move, change, share in zip(moves, changes, reversed(shares), strict=True):
        result += (share - (change @ result) / (move @ change)) * move
    return result
