"""L-BFGS for smooth convex functions whose value and gradient come from one pass over much data.

Unlike ``torch.optim.LBFGS`` and SciPy's it takes a full first step (the caller scales its unknowns so that the Hessian
is about 1), and keeps to the device of the unknowns.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_SUFFICIENT = 1e-4  # Armijo


class InverseHessian:
    """What L-BFGS knows of the second derivatives from its last moves; a diagonal where it knows nothing yet.

    Args:
        most: moves that it remembers.
        diagonal: ``[K]``, a guess of the Hessian's, above 0; by default 1.
    """

    def __init__(self, most: int = 20, diagonal: Tensor | None = None) -> None:
        self._most, self._diagonal = most, diagonal
        self._pairs: list[tuple[Tensor, Tensor, float]] = []

    def learn(self, move: Tensor, change: Tensor) -> None:
        """Takes in by how much the gradient changed along a move, both ``[K]``, unless rounding hides the curvature."""
        product = float(move @ change)
        if product > 1e-12 * float(change @ change) ** 0.5 * float(move @ move) ** 0.5:
            self._pairs.append((move, change, product))
            del self._pairs[: -self._most]

    def forget(self) -> None:
        """Goes back to the diagonal."""
        self._pairs.clear()

    def times(self, gradient: Tensor) -> Tensor:
        """The product with a gradient ``[K]``, by the two-loop recursion (Nocedal 1980)."""
        result, shares = gradient.clone(), []
        for move, change, product in reversed(self._pairs):
            shares.append(float(move @ result) / product)
            result -= shares[-1] * change
        result = self._diagonally(result)
        if self._pairs:
            _, change, product = self._pairs[-1]
            result *= product / float(change @ self._diagonally(change))
        for (move, change, product), share in zip(self._pairs, reversed(shares), strict=True):
            result += (share - float(result @ change) / product) * move
        return result

    def _diagonally(self, vector: Tensor) -> Tensor:
        return vector if self._diagonal is None else vector / self._diagonal


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
    inverse = InverseHessian()
    while used < evaluations and not finished(gradient):
        direction = -inverse.times(gradient)
        slope = float(gradient @ direction)
        if not slope < 0:
            direction, slope = -gradient, -float(gradient @ gradient)
            inverse.forget()
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
        inverse.learn(trial - place, trial_gradient - gradient)
        place, value, gradient = trial, trial_value, trial_gradient
    return place, used
