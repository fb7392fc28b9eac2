"""How localised an effect is: whether few units carry most of it, or all carry a little."""

from __future__ import annotations

import torch
from torch import Tensor

MEASURES = ("participation", "gini", "entropy", "units_50", "units_90")
"""Names of the measures, in the order of :func:`localisation`."""


def localisation(effects: Tensor) -> Tensor:
    r"""Measures of how few units carry the total :math:`\sum_u |a_u|` of effects :math:`a`.

    * ``participation``: :math:`(\sum |a_u|)^2 / \sum a_u^2`, as many equal units would do the same: 1 to U;
    * ``gini``: 0 if all are equal, :math:`1 - 1/U` if one has everything;
    * ``entropy``: of the shares, over :math:`\log U`: 1 if all are equal, 0 if one has everything;
    * ``units_50``, ``units_90``: the fewest units that have half, and nine tenths, of the total.

    Args:
        effects: ``[..., U]``, floating; NaN: a unit without an estimate, which counts as no unit.

    Returns:
        float64 ``[..., 5]``, NaN where no unit has an effect.

    Raises:
        ValueError: no units.

    >>> localisation(torch.tensor([1.0, 1.0, 0.0, 0.0])).tolist()
    [2.0, 0.5, 0.5, 1.0, 2.0]
    """
    if not effects.dim() or not effects.shape[-1]:
        raise ValueError(f"effects: need at least 1 unit, got shape {tuple(effects.shape)}")
    known = ~effects.isnan()
    sizes = effects.double().abs().where(known, 0.0).sort(-1, descending=True).values
    count = known.sum(-1, dtype=torch.float64)
    total = sizes.sum(-1)
    share = sizes / total[..., None]
    rank = torch.arange(1, sizes.shape[-1] + 1, dtype=torch.float64, device=sizes.device)
    entropy = (torch.special.entr(share).sum(-1) + 0.0) / count.log()
    reached = share.cumsum(-1)
    return torch.stack(
        [
            total.square() / sizes.square().sum(-1),
            (count + 1 - 2 * (rank * share).sum(-1)) / count,
            torch.where(count > 1, entropy, torch.where(total > 0, 1.0, torch.nan)),
            *((reached < part - 1e-12).sum(-1) + torch.where(total > 0, 1.0, torch.nan) for part in (0.5, 0.9)),
        ],
        -1,
    )
