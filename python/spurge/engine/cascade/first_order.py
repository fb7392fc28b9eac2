r"""Every neuron switched off, to first order: gradient times activation, from one backward pass of the unedited model.

.. math:: F(1) - F(\text{unit } k \text{ off}) \approx \sum_t z_{t,k} \frac{\partial F}{\partial z_{t,k}}

MacU Eq. 5 moves one gate; its integral is the left side, and a layer's path, on which all units move together, is a
longer way round than the gradient at its end. The right side errs where the unit's part in the residual stream is large
beside the stream r: there its gradient turns on the way. *Stake* says by how much, from the same pass, v being the
gradient at the projection's output:

.. math:: \mathrm{stake}_k = \sum_t |z_{t,k}\, g_{t,k}| \cdot \max_t \rho_{t,k}
          + \tfrac15 \max_t \rho_{t,k}^2\, \lVert v_t \rVert\, \lVert r_t \rVert, \qquad
          \rho_{t,k} = \frac{|z_{t,k}|\, \lVert W_{2,k} \rVert}{\lVert r_t \rVert}

The first part ranks the few units that hold most of the error, the second those of saturated texts, whose gradients are
small. r is the residual stream behind the layer, in post-norm layers the sum in front of the norm, and the projection's
own output where a norm stands right behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spurge.engine.base.gradients import grad_mode
from spurge.engine.cascade.attribution import check_differentiable, target_values
from spurge.engine.passes.activation_gradients import FirstOrder
from spurge.engine.passes.trace import Graded, Rows, Target


def first_order(graded: Graded, target: Target, *, keep: bool, room: int) -> list[FirstOrder]:
    """The estimates of each of a target's Q values.

    A target that reads logits alone and says so (``reads = "logits"``) is evaluated at the logits that the gradient of
    each of them predicts: so it is estimated where its own gradient vanishes, at an optimum, or where it saturates.

    Args:
        graded: the unedited pass.
        keep: leave its graph as it is, for another target.
        room: bytes that the estimates may take.

    Raises:
        ValueError: a target that is not differentiable, not finite or of another shape, or has too many values.
    """
    gradients, rows = graded.gradients, graded.rows
    if getattr(target, "reads", None) == "logits":
        logits = rows.logits.flatten(1)
        _check_count(logits.shape[1], graded, room)
        last = logits.shape[1] - 1
        found = [gradients.read(logits[:, y], keep=keep or y < last) for y in range(last + 1)]
        with grad_mode(False):
            return _through_logits(target, rows, found)
    with grad_mode(True):
        value = target_values(target, rows)
    if not value.requires_grad:
        check_differentiable(target, rows)
    _check_count(value.shape[1], graded, room)
    last = value.shape[1] - 1
    return [gradients.read(value[:, q], keep=keep or q < last) for q in range(last + 1)]


def _check_count(values: int, graded: Graded, room: int) -> None:
    """Refuses more values of a target, a backward pass each, than there is memory for their estimates."""
    sites, batch = graded.gradients.sites, len(graded.rows.logits)
    need = 4 * values * batch * sum(site.width for site in sites) * (2 if graded.gradients.stakes else 1)
    if need > room:
        raise ValueError(
            f"target: gives {values:,} values for each example, whose estimates take {need / 2**20:,.0f} MiB of "
            f"{room / 2**20:,.0f} MiB, and a backward pass each; ask for fewer at once, or give more memory="
        )


def _through_logits(target: Target, rows: Rows, logits: Sequence[FirstOrder]) -> list[FirstOrder]:
    """What a target of B rows loses where each unit moves the logits as estimated; stakes are moved in the same way."""
    full = target_values(target, rows)  # [B, Q]
    found = [FirstOrder([], []) for _ in range(full.shape[1])]
    for i in range(len(logits[0].estimate)):
        moved = torch.stack([one.estimate[i] for one in logits], 2).to(rows.logits.device)  # [B, F, Y]
        effect = _lost(target, rows, full, moved)
        for q, own in enumerate(found):
            own.estimate.append(effect[..., q])
        if logits[0].stake:
            half = torch.stack([one.stake[i] for one in logits], 2).to(moved) / 2
            doubt = (_lost(target, rows, full, moved + half) - _lost(target, rows, full, moved - half)).abs()
            for q, own in enumerate(found):
                own.stake.append(doubt[..., q])
    return found


def _lost(target: Target, rows: Rows, full: Tensor, moved: Tensor) -> Tensor:
    """``[B, F, Q]``: what the target loses where its Y logits fall by ``moved`` ``[B, F, Y]``."""
    (batch, units), shape = moved.shape[:2], rows.logits.shape[1:]
    logits = (rows.logits.detach().flatten(1)[:, None] - moved).transpose(0, 1)  # rows in the order of examples
    logits = logits.reshape(batch * units, *shape)
    fallen = replace(rows, logits=logits, example=rows.example.repeat(units), predicted=rows.predicted.repeat(units))
    return (full - target_values(target, fallen).unflatten(0, (units, batch))).transpose(0, 1)
