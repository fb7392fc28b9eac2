r"""The paths of integrated gradients: what one interval of a path adds to the attribution of its neurons.

Along the *layer* path all units of one layer are scaled together, along the *joint* path those of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spurge.engine.base.checks import choice
from spurge.engine.base.gradients import grad_mode
from spurge.engine.cascade.attribution import ALL, gradients, target_values
from spurge.engine.cascade.memory_model import Footprint
from spurge.engine.cascade.quadrature import Nodes, Piece, Point, gauss_legendre, gauss_radau
from spurge.engine.models.call_arguments import at
from spurge.engine.models.sites import Site
from spurge.engine.passes.trace import Rows, Share, Target, Trace

Path = Literal["gradient", "layer", "joint", "neuron"]
Rule = Literal["legendre", "radau"]

Ends = dict[int, tuple[Tensor | None, ...]]  # per target, the unedited model's gradient at each site's output


def settled(path: Path | None, nodes: int | None, rule: Rule | None) -> tuple[Path, int, Rule]:
    """A path and its quadrature with defaults: the layer path for who asks for a quadrature, the gradient path else.

    Raises:
        ValueError: an unknown path or rule, or a quadrature of the gradient path.
    """
    asked = {"nodes": nodes, "rule": rule}
    given = [name for name, value in asked.items() if value is not None]
    if path is None:
        path = "layer" if given else "gradient"
    choice("path", path, get_args(Path))
    if path == "gradient" and given:
        raise ValueError(f"{given[0]}: belongs to the layer and joint paths, got path 'gradient'")
    if rule is not None:
        choice("rule", rule, get_args(Rule))
    return path, 2 if nodes is None else nodes, rule or "legendre"


@dataclass(frozen=True, eq=False)
class Paths:
    """The paths through one model.

    Attributes:
        sites: whose activations are scaled.
        footprint: memory of a cascade over inputs of a shape.
        nodes: S, of each interval.
        rule: of these.
        joint: one path on which all layers are scaled together, or one for each layer.
    """

    sites: Sequence[Site]
    footprint: Callable[[Mapping[str, Any]], Footprint]
    nodes: int
    rule: Rule
    joint: bool

    @property
    def keys(self) -> list[str]:
        """Names of the paths: their sites', or one for all."""
        return [ALL] if self.joint else [site.name for site in self.sites]

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
            return [self._of_all_layers(trace, target, room, self._nodes_of(piece, end=False)) for piece in pieces]
        return self._of_layers(ends, trace, target, room, pieces)

    def _of_layers(
        self, ends: Ends, trace: Trace, target: Target, room: int, pieces: Sequence[Piece]
    ) -> list[dict[str, Tensor]]:
        number = {site.name: i for i, site in enumerate(self.sites)}
        sites = [number[piece.key] for piece in pieces]
        rules = [self._nodes_of(piece, end=bool(ends)) for piece in pieces]
        found: list[dict[str, Tensor]] = [{} for _ in pieces]
        for group, s in self.footprint(trace.inputs).cuts(room, self.nodes, trace.batch, sites):
            members: dict[int, list[int]] = {}  # site -> its pieces in this block
            for p in sorted(group, key=sites.__getitem__):
                members.setdefault(sites[p], []).append(p)
            with grad_mode(True):
                rows, opened = trace.forward.opened(
                    trace, {i: torch.cat([rules[p].alphas[s] for p in own]) for i, own in members.items()}
                )
                value = target_values(target, rows)
            del rows  # of which a target may need little
            for q, grads in gradients(value, opened.leaves):
                shares = {
                    i: [self._share(rules[p], s, ends[q][i] if ends else None) for p in own]
                    for i, own in members.items()
                }
                for i, parts in opened.scores(grads, shares):
                    for p, score in zip(members[i], parts, strict=True):
                        total = found[p].setdefault(pieces[p].key, score.new_zeros(value.shape[1], *score.shape))
                        total[q] += score
        return found

    def _share(self, rule: Nodes, s: slice, last: Tensor | None) -> Share:
        """What the nodes ``s`` of an interval weigh; its end, where it has one, goes with the first of them."""
        return Share(rule.weights[s], rule.end, last) if s.start == 0 and rule.end else Share(rule.weights[s])

    def _nodes_of(self, piece: Piece, *, end: bool) -> Nodes:
        """The nodes of one interval; a rule with a node at 1 is of use where the interval ends there and that is known.

        Args:
            end: whether it is.
        """
        alphas, weights, last = self._radau if end and piece.high == 1 else (*self._legendre, 0.0)
        width = piece.high - piece.low
        return Nodes(piece.low + width * alphas, width * weights, width * last)

    def _of_all_layers(self, trace: Trace, target: Target, room: int, rule: Nodes) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for s in self.footprint(trace.inputs).node_slices(room, self.nodes, trace.batch):
            with grad_mode(True):
                rows, scaled = trace.forward.scaled(trace, rule.alphas[s])
                value = target_values(target, rows)
            del rows
            shares = [Share(rule.weights[s])]
            for q, grads in gradients(value, scaled.leaves):
                for i, (part,) in scaled.scores(grads, dict.fromkeys(range(len(self.sites)), shares)):
                    whole = total.setdefault(self.sites[i].name, part.new_zeros(value.shape[1], *part.shape))
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
                    rows, _ = trace.forward.scaled(trace, alphas)
                else:
                    rows = self._opened(trace, [key for key, _ in group], alphas)
                values = target_values(target, rows).unflatten(0, (len(group), batch))
                found |= {point: value.t() for point, value in zip(group, values, strict=True)}
        return [found[point] for point in points]

    def _opened(self, trace: Trace, names: Sequence[str], alphas: Tensor) -> Rows:
        """Rows that open at sites, each scaled by its alpha; names of one site stand together, in the sites' order."""
        number = {site.name: i for i, site in enumerate(self.sites)}
        members: dict[int, list[float]] = {}
        for name, alpha in zip(names, alphas.tolist(), strict=True):
            members.setdefault(number[name], []).append(alpha)
        opened = {i: torch.tensor(own, dtype=alphas.dtype) for i, own in members.items()}
        return trace.forward.opened(trace, opened)[0]


def end_gradients(trace: Trace, target: Target, *, keep: bool) -> tuple[Trace, Ends]:
    """Gradients of the unedited model at every site, ``f(1)`` of each path, and the trace without their graph.

    Args:
        keep: leave the graph as it was: a prompt's next question wants it too.
    """
    if not trace.outputs:
        return trace, {}
    with grad_mode(True):
        value = target_values(target, trace.rows)
    found = dict(gradients(value, trace.outputs, keep=keep))
    ends = {q: tuple(_where_rows_are(trace, i, grad) for i, grad in enumerate(grads)) for q, grads in found.items()}
    return replace(trace, rows=trace.rows.detached(), outputs=[]), ends


def _where_rows_are(trace: Trace, i: int, grad: Tensor | None) -> Tensor | None:
    """Gradients by a site's output ``[B, T, H]`` at the tokens that its rows compute."""
    return grad if grad is None or grad.shape[1] == trace.sites[i].u.shape[1] else at(grad, trace.position)
