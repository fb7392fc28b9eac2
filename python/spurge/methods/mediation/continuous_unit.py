"""The third estimator of indirect effects: a slope times a shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.causal.balancing import CONVERGED
from spurge.methods.mediation.estimators import STEPS, BalancedColumns, Estimate, missing


class ContinuousUnit:
    r"""The unit itself as a continuous treatment (Bahadori, Tchetgen and Heckerman, 2107.13068, fitted to this use).

    .. math:: \mathrm{AIE} = b\, \big(E_{w_1}[n \mid q=1] - E_{w_0}[n \mid q=0]\big)

    The slope b of y on n is taken within arms: under weights that leave n, x and q their means and n uncorrelated with
    x and with q, since q moves both n and y. The shift of n is taken between arms: under weights w1 and w0 that give x
    its mean over all prompts.

    Right for an outcome that is linear in n, q and x, without an interaction of n and q: then NIE(1) and NIE(0) are the
    same number, b times the shift. `BalancedStrata` and `BalancedColumns` need no line.

    Args:
        treatment, outcome: as `BalancedColumns`.
        columns: float64 ``[N, s]`` (none for the unadjusted estimate, whose slope is within arms too).
        tolerance: greatest standardised difference.
    """

    def __init__(self, treatment: Tensor, outcome: Tensor, columns: Tensor, *, tolerance: float) -> None:
        self.treatment, self.outcome, self.columns, self.tolerance = treatment, outcome, columns, tolerance
        self.between = BalancedColumns(treatment, outcome, columns, interact=False, square=False, tolerance=tolerance)

    def unit_bytes(self) -> int:
        return 24 * len(self.treatment) * (3 + 2 * self.columns.shape[1])

    def total(self, counts: Tensor) -> tuple[float, float]:
        return self.between.total(counts)

    def prepare(self, values: Tensor) -> Tensor:
        moved = values.double() - values.double().mean(1, keepdim=True)
        moved /= moved.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        return moved

    def estimate(self, prepared: Tensor, counts: Tensor, warm: Any = None) -> Estimate:
        try:
            shift = self._shift(prepared, counts)
        except ValueError:  # a resample in which an arm is empty, or X out of reach
            return missing(prepared)
        causes = torch.cat([self.columns, self.treatment[:, None].double()], 1)
        share = counts / counts.sum()
        moved, causes = prepared - (prepared @ share)[:, None], causes - share @ causes
        covariates = torch.cat([causes.expand(len(prepared), -1, -1), moved[..., None], moved[..., None] * causes], -1)
        targets = prepared.new_zeros(len(prepared), covariates.shape[-1])
        dual, _, report, status = ops.balance_batch(
            covariates,
            counts,
            targets,
            counts.new_zeros(len(counts), 0),
            targets if warm is None else warm,
            tolerance=self.tolerance,
            steps=STEPS,
        )
        weights = torch.einsum("unk,uk->un", covariates, dual).add_(counts.log()).softmax(1)
        varied = (weights * moved.square()).sum(1)
        together = (weights * moved) @ self.outcome - (weights * moved).sum(1) * (weights @ self.outcome)
        slope = torch.where(varied > 0, together / varied, 0.0)  # a constant unit has no effect
        aie = torch.where(status == CONVERGED, slope * shift, torch.nan)
        nan = torch.full_like(aie, torch.nan)
        return Estimate(nan, nan, aie, report[:, 1] / counts.sum(), report[:, 0], status, dual.nan_to_num())

    def _shift(self, prepared: Tensor, counts: Tensor) -> Tensor:
        """What q adds to the mean of n, x balanced between the arms, ``[U]``."""
        treated, control = (
            prepared[:, rows] @ weights
            for rows, weights in zip(self.between.arms, self.between.weights(counts), strict=True)
        )
        return treated - control
