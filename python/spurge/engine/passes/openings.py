"""Rows that open in the middle of a model: what the unedited pass leaves there, with some activations changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.models.hooks import hook
from spurge.engine.models.projections import RowGates, by_unit, coordinates
from spurge.engine.models.sites import Site
from spurge.engine.passes.trace import Off, Owners, Share, Trace
from spurge.engine.passes.whole_pass import by_rows


class Kept:
    """What the unedited pass leaves at each site.

    Args:
        copies: of all of it, where the model writes into its own tensors.
        differentiable: as for `PartialForward.trace`.
    """

    def __init__(self, sites: int, batch: int, *, copies: bool, differentiable: bool) -> None:
        self.seen: list[dict[str, Tensor]] = [{} for _ in range(sites)]
        self.calls, self.outputs = [0] * sites, dict[int, Tensor]()
        self._batch, self._copies, self._differentiable = batch, copies, differentiable
        self._held: list[tuple[Tensor, int]] = []

    @property
    def changed(self) -> bool:
        """Whether anything kept was written into."""
        return any(tensor._version != version for tensor, version in self._held)

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor as it is now."""
        still = tensor.detach().clone() if self._copies else tensor.detach()
        self._held.append((still, still._version))
        return still

    def keep(self, i: int, **tensors: Tensor) -> None:
        self.seen[i].update({name: self.of(tensor) for name, tensor in tensors.items()})

    def watch(self, i: int, z: Tensor, o: Tensor, rest: Tensor | None) -> Tensor | None:
        """A `Look` at a down projection."""
        self.calls[i] += 1
        rows = by_rows(o, self._batch)
        self.keep(i, z=by_rows(z, self._batch), o=rows)
        still = self.seen[i]["o"]
        self.seen[i]["u"] = still if rest is None else by_rows(still.view_as(o) - rest.detach(), self._batch)
        if not self._differentiable:
            return None
        self.outputs[i] = rows if rows.requires_grad else rows.requires_grad_()
        return rows.view_as(o).clone() if self._copies else rows.view_as(o)


class Openings:
    """Rows that open at single sites with all activations scaled: ``z`` is the same for all, so that gradients are
    summed in the model's width before one product with W2.

    Args:
        alphas: site -> what scales each of its groups of rows, ``[m]``.

    Attributes:
        rows: that open, by site.
    """

    def __init__(self, sites: Sequence[Site], trace: Trace, alphas: Mapping[int, Tensor]) -> None:
        self._sites, self._trace = sites, trace
        self.rows = {i: ops.open_rows(trace.sites[i].anchor, trace.sites[i].u, alphas[i]) for i in sorted(alphas)}
        if torch.is_grad_enabled():
            self.rows = {i: rows.requires_grad_() for i, rows in self.rows.items()}

    @property
    def leaves(self) -> list[Tensor]:
        return list(self.rows.values())

    def scores(
        self, grads: Sequence[Tensor | None], shares: Mapping[int, Sequence[Share]]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """As `Opened.scores`."""
        for i, grad in zip(self.rows, grads, strict=True):
            own = shares[i]
            parts = [None] * len(own) if grad is None else grad.chunk(len(own))
            yield i, [self._score(i, part, share) for part, share in zip(parts, own, strict=True)]

    def _score(self, i: int, part: Tensor | None, share: Share) -> Tensor:
        """``[B, F]`` from gradients ``[S * B, T, H]``: their weighted sum through W2, times z, summed over tokens."""
        whole = ops.node_sum(part, share.weights) if part is not None else None
        if share.last is not None:
            whole = share.end * share.last.float() if whole is None else whole.add_(share.last, alpha=share.end)
        z = self._trace.sites[i].z
        if whole is None:  # the target does not read this layer
            return z.new_zeros(z.shape[0], self._sites[i].width, dtype=torch.float32)
        projection = self._sites[i].projection
        pulled = projection.pull(whole.to(z.dtype))
        return by_unit(ops.multiply_sum(pulled, z, self._trace.mask(z)).float(), projection.size)


def placed(
    batch: int, openings: Mapping[int, Tensor], owners: Mapping[int, Tensor] | None
) -> tuple[dict[int, slice], Owners]:
    """Where the rows of each site stand among all rows, those of earlier sites first, and whose all rows are.

    Args:
        owners: of the rows of each site; None: the batch's examples in turn.
    """
    places, total = {}, 0
    for i in sorted(openings):
        places[i] = slice(total, total + len(openings[i]))
        total = places[i].stop
    return places, Owners(batch, total, None if owners is None else torch.cat([owners[i] for i in places]))


def emerge(
    trace: Trace,
    sites: Sequence[Site],
    i: int,
    rows: Tensor,
    of_rows: Callable[[Tensor], Tensor],
    step: Callable[[Tensor], Tensor],
) -> Tensor:
    """Carry rows from their site's anchor to the output of its block.

    Args:
        of_rows: what examples have ``[B, ...]`` for each of these rows.
        step: runs the block on them.
    """
    assert trace.anatomy is not None
    placement, seen, hidden = trace.anatomy.placements[i], trace.sites[i], trace.calls[trace.forward.block_of[i]].hidden
    if hidden is not None and placement.kind == "replay":
        with hook(sites[i].down, lambda module, args, output: rows.reshape(output.shape).clone()):
            return step(of_rows(hidden))
    rows = placement.norm(rows)
    return rows if seen.rest is None else rows + of_rows(seen.rest)


def without(trace: Trace, sites: Sequence[Site], i: int, off: Off) -> Tensor:
    """Rows ``[n, T, H]`` in the place of a site's anchor, each with one unit off."""
    seen, projection = trace.sites[i], sites[i].projection
    units, owners = (part.to(seen.z.device) for part in (off.units, off.owners))
    anchor, columns = seen.anchor[owners], projection.columns(units)
    if projection.size > 1:
        places = coordinates(units, projection.size).unflatten(0, (len(units), -1))
        z = seen.z[owners[:, None], :, places]  # [n, d, T]
        return anchor - torch.einsum("ndt,hnd->nth", z, columns.unflatten(1, places.shape))
    z = seen.z[owners, :, units]  # [n, T]
    return torch.addcmul(anchor, z[..., None], columns.t()[:, None], value=-1)


def entries(trace: Trace, block_of: Sequence[int], gated: Sequence[int]) -> list[int]:
    """Which gated sites of the first block open the rows: one that runs the block again, gated inside, else all.

    Of several that do, the one that runs first: what it changes goes through the others.
    """
    assert trace.anatomy is not None
    block = min(block_of[i] for i in gated)
    first = [i for i in gated if block_of[i] == block]
    replayed = [i for i in trace.anatomy.order if i in first and trace.anatomy.placements[i].kind == "replay"]
    return replayed[:1] or first


def moved(trace: Trace, sites: Sequence[Site], gates: Mapping[int, RowGates]) -> Tensor:
    """Rows ``[P * B, T, H]`` in the place of the sites' common anchor, each with some of their units gated."""
    rows = trace.sites[min(gates)].anchor
    for i, on in gates.items():
        z, projection = trace.sites[i].z, sites[i].projection
        each = on.spread(projection.size)
        change = z[..., each.columns] * (each.values[:, None, None] - 1).to(z.dtype)
        rows = rows + change @ projection.columns(on.columns).t()
    return rows.flatten(0, 1)
