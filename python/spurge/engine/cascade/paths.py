r"""The paths of integrated gradients: what one interval of a path adds to the attribution of its neurons.

Along the *layer* path all units of one layer are scaled together, along the *joint* path those of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.base.gradients import grad_mode
from spurge.engine.cascade.attribution import ALL, gradients, target_values
from spurge.engine.cascade.memory_model import Footprint
from spurge.engine.cascade.partial_forward import PartialForward, Target, Trace
from spurge.engine.cascade.quadrature import Nodes, Piece, Point, gauss_legendre, gauss_radau

Path = Literal["layer", "joint", "neuron"]
Rule = Literal["legendre", "radau"]
Ends = dict[int, tuple[Tensor | None, ...]]  # per target, the unedited model's gradient at each site's output


@dataclass(frozen=True, eq=False)
class Paths:
    """The paths through one model.

    Attributes:
        forward: the model, entered behind any layer.
        footprint: memory of a cascade over inputs of a shape.
        nodes: S, of each interval.
        rule: of these.
        joint: one path on which all layers are scaled together, or one for each layer.
    """

    forward: PartialForward
    footprint: Callable[[Mapping[str, Any]], Footprint]
    nodes: int
    rule: Rule
    joint: bool

    @property
    def keys(self) -> list[str]:
        """Names of the paths: their sites', or one for all."""
        return [ALL] if self.joint else [site.name for site in self.forward.sites]

    @cached_property
    def _legendre(self) -> tuple[Tensor, Tensor]:
        return gauss_legendre(self.nodes)

    @cached_property
    def _radau(self) -> tuple[Tensor, Tensor, float]:
        return gauss_radau(self.nodes)

    def integrals(
        self, ends: Ends, trace: Trace, target: Target, room: int, pieces: Sequence[Piece]
    ) -> list[dict[str, Tensor]]:
        """Of each interval, what it adds to the attributions: site to ``[Q, B, F]``.

        Args:
            ends: as :func:`end_gradients` gives them.
            room: bytes for it.
        """
        if self.joint:
            return [self._of_all_layers(trace, target, room, self._nodes_of(piece)) for piece in pieces]
        return self._of_layers(ends, trace, target, room, pieces)

    def _of_layers(
        self, ends: Ends, trace: Trace, target: Target, room: int, pieces: Sequence[Piece]
    ) -> list[dict[str, Tensor]]:
        number = {site.name: i for i, site in enumerate(self.forward.sites)}
        sites = [number[piece.key] for piece in pieces]
        rules = [self._nodes_of(piece) for piece in pieces]
        found: list[dict[str, Tensor]] = [{} for _ in pieces]
        for group, s in self.footprint(trace.inputs).cuts(room, self.nodes, trace.batch, sites):
            members: dict[int, list[int]] = {}  # site -> its pieces in this block
            for p in group:
                members.setdefault(sites[p], []).append(p)
            with grad_mode(True):
                leaves = {
                    i: ops.open_rows(
                        trace.sites[i].anchor, trace.sites[i].u, torch.cat([rules[p].alphas[s] for p in own])
                    ).requires_grad_()
                    for i, own in members.items()
                }
                value = target_values(target, self.forward.run(trace, leaves))
            for q, grads in gradients(value, list(leaves.values())):
                for (i, own), grad in zip(members.items(), grads, strict=True):
                    parts = [None] * len(own) if grad is None else grad.chunk(len(own))
                    for p, part in zip(own, parts, strict=True):
                        whole = ops.node_sum(part, rules[p].weights[s]) if part is not None else None
                        last = ends[q][i] if rules[p].end and s.start == 0 else None
                        if last is not None:
                            whole = _plus(whole, last, rules[p].end)
                        score = self._collect(i, trace, whole)
                        total = found[p].setdefault(pieces[p].key, score.new_zeros(value.shape[1], *score.shape))
                        total[q] += score
        return found

    def _nodes_of(self, piece: Piece) -> Nodes:
        """The nodes of one interval; a rule with a node at 1 is of use where the interval ends there."""
        alphas, weights, end = self._radau if self.rule == "radau" and piece.high == 1 else (*self._legendre, 0.0)
        width = piece.high - piece.low
        return Nodes(piece.low + width * alphas, width * weights, width * end)

    def _collect(self, i: int, trace: Trace, pulled: Tensor | None) -> Tensor:
        """``[B, F]`` from the weighted gradient sum ``[B, T, H]``: through W2, times z, summed over tokens."""
        z = trace.sites[i].z
        if pulled is None:  # the target does not read this layer
            return z.new_zeros(z.shape[0], z.shape[2], dtype=torch.float32)
        return ops.multiply_sum(self.forward.sites[i].projection.pull(pulled.to(z.dtype)), z, _mask(trace, z)).float()

    def _of_all_layers(self, trace: Trace, target: Target, room: int, rule: Nodes) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for s in self.footprint(trace.inputs).node_slices(room, self.nodes, trace.batch):
            with grad_mode(True):
                rows, z, scaled = self.forward.scaled(trace, rule.alphas[s])
                value = target_values(target, rows)
            for q, grads in gradients(value, scaled):
                share = rule.weights[s].repeat_interleave(trace.batch)[:, None]
                for site, active, grad in zip(self.forward.sites, z, grads, strict=True):
                    part = active.new_zeros(trace.batch, site.width, dtype=torch.float32)
                    if grad is not None:
                        mask = _mask(trace, active)
                        mask = mask.repeat(len(share) // trace.batch, 1) if mask is not None else None
                        each = ops.multiply_sum(site.projection.pull(grad), active, mask).float()
                        part = (each * share.to(each)).unflatten(0, (-1, trace.batch)).sum(0)
                    whole = total.setdefault(site.name, part.new_zeros(value.shape[1], *part.shape))
                    whole[q] += part
        return total

    def at(
        self, trace: Trace, target: Target, room: int, known: Mapping[Point, Tensor], points: Sequence[Point]
    ) -> list[Tensor]:
        """The target at points of the paths, ``[Q, B]`` each: one row without gradients for each that is not known."""
        missing = [point for point in points if point not in known]
        size, batch = self.footprint(trace.inputs).rows_forward(room, trace.batch), trace.batch
        found = dict(known)
        with grad_mode(False):
            for group in (missing[start : start + size] for start in range(0, len(missing), size)):
                alphas = torch.tensor([alpha for _, alpha in group], dtype=torch.float64)
                if self.joint:
                    rows = self.forward.scaled(trace, alphas)[0]
                else:
                    rows = self.forward.run(trace, self._opened(trace, [key for key, _ in group], alphas))
                values = target_values(target, rows).unflatten(0, (len(group), batch))
                found |= {point: value.t() for point, value in zip(group, values, strict=True)}
        return [found[point] for point in points]

    def _opened(self, trace: Trace, names: Sequence[str], alphas: Tensor) -> dict[int, Tensor]:
        """Rows that open at sites, each scaled by its alpha; names of one site stand together, in the sites' order."""
        number = {site.name: i for i, site in enumerate(self.forward.sites)}
        members: dict[int, list[float]] = {}
        for name, alpha in zip(names, alphas.tolist(), strict=True):
            members.setdefault(number[name], []).append(alpha)
        return {i: ops.open_rows(trace.sites[i].anchor, trace.sites[i].u, own) for i, own in members.items()}


def end_gradients(trace: Trace, target: Target, *, keep: bool) -> tuple[Trace, Ends]:
    """Gradients of the unedited model at every site, ``f(1)`` of each path, and the trace without their graph.

    Args:
        keep: leave the graph as it was: a prompt's next question wants it too.
    """
    if not trace.outputs:
        return trace, {}
    with grad_mode(True):
        value = target_values(target, trace.rows)
    ends = dict(gradients(value, trace.outputs, keep=keep))
    rows = trace.rows
    attention = None if rows.attention is None else rows.attention.detach()
    rows = replace(rows, logits=rows.logits.detach(), attention=attention)
    return replace(trace, rows=rows, outputs=[]), ends


def _plus(whole: Tensor | None, last: Tensor, weight: float) -> Tensor:
    return weight * last.float() if whole is None else whole.add_(last, alpha=weight)


def _mask(trace: Trace, z: Tensor) -> Tensor | None:
    """Which tokens count, ``[B, T]``; None where all do."""
    mask = trace.inputs.get("attention_mask")
    return mask.to(z.device, torch.uint8) if torch.is_tensor(mask) and mask.shape[1:] == z.shape[1:2] else None
