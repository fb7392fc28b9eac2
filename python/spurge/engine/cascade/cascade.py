"""The cascade: what would the model do if these neurons were scaled so, asked for all layers in one pass.

Integrated gradients of the feed-forward neurons, layer by layer, usually run the whole model once per layer and
quadrature node. Here one batch holds all those questions and each begins only behind the layer where it differs:
the down projection is linear, so scaling a layer's activations by ``alpha`` moves its output by ``(alpha - 1) u``,
``u = z W2'``, and rows open there at no cost in their own layer. One backward pass gives the gradients of every path,
and since ``z`` is the same for all nodes they are summed in the model's width before one product with ``W2``:

.. math:: \\mathrm{Attr}_{l,k} = \\sum_t z_{l,t,k} \\Bigl( \\sum_s w_s \\frac{\\partial F}{\\partial u_{l,t}}
          \\Big|_{\\alpha_s} W_2 \\Bigr)_k
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spurge import ops
from spurge.engine.base.tensor_parallel import agreed, mesh_of
from spurge.engine.cascade.attribution import (
    ALL,
    Attribution,
    check_differentiable,
    gradients,
    join,
    residuals,
    target_values,
)
from spurge.engine.cascade.footprint import Weight, weigh
from spurge.engine.cascade.partial_forward import Relay, Rows, Target, Trace, predicted_logit
from spurge.engine.cascade.quadrature import Goal, Nodes, Piece, Point, gauss_legendre, gauss_radau, integrate
from spurge.engine.models.arguments import main_input, take
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.placement import model_budget
from spurge.engine.models.projections import RowGates
from spurge.engine.models.sites import Site

__all__ = ["Attribution", "Cascade", "Path", "Rows", "Target", "predicted_logit"]

Path = Literal["layer", "joint", "neuron"]
Rule = Literal["legendre", "radau"]
Ends = dict[int, tuple[Tensor | None, ...]]  # per target, the unedited model's gradient at each site's output
KEPT_SHARE = 0.25  # of the budget, for the unedited pass of a prompt that is asked about again


@dataclass(frozen=True, eq=False)
class Prompt:
    """A batch to ask about more than once: its unedited pass is kept where a quarter of the memory budget holds it.

    Valid while the model's weights and applied edits stay as they were when it was read.
    """

    inputs: Mapping[str, Any]
    traces: list[Trace]  # empty where they did not fit: then each question runs them again
    kept: int  # bytes of these and of those that were read with them


class Cascade:
    r"""Integrated gradients, exact ablations and gated runs of feed-forward neurons.

    Args:
        model: a ``transformers`` classifier (encoder or decoder), image classifier or causal language model.
        path: ``"layer"``: all units of a layer scaled together, layer by layer (knowledge neurons, DEPN);
            ``"joint"``: all layers scaled together, the cheapest, its sum is the whole network's effect;
            ``"neuron"``: each unit alone, as MacU Eq. 5 reads; there the integral is ``F(1) - F(unit off)``, computed
            exactly with one forward row per unit.
        nodes: quadrature nodes S of the layer and joint paths; of each interval when ``tolerance`` is given.
        rule: ``"legendre"``; ``"radau"``, on the layer path: S free nodes and the unedited model itself as one more,
            which a single backward pass over the examples gives for all layers.
            A norm right behind the down projection (GLM-4) undoes any scale but zero: there the layer and joint paths
            are a step at 0 and converge slowly; the residual says so, and the neuron path is the one to use. In a
            mixture of experts the routers of later layers jump along a path, and what jumps is in no integral.
        tolerance: refine each layer's path, halving intervals with ``nodes`` in each, until halving one changes the
            layer's values by at most ``tolerance`` (relative 2-norm) *and* its completeness residual is at most
            ``tolerance`` times the example's largest layer effect ``|F(1) - F(0)|``. None: ``nodes`` as they are.
        completeness: measure F(0) and with it the residual, one more forward row per layer and example (a fifth to a
            sixth of the work with two nodes). False leaves both out of the result; a tolerance needs them.
        memory: budget in bytes or as text (``"256MiB"``) for what is needed beyond the model itself; a share of what
            is free by default. The work is split to fit; the result does not depend on the split.
        attention: give targets the attention row of the probed token (first token of an encoder, last real token of a
            decoder).
        sites: restrict to these; all feed-forward sites by default.
        read: how many of its last real tokens a language model is read at (`Rows.logits`).
        progress: show a progress bar over the parts of a call.

    Raises:
        ValueError: a setting out of range, a model without sites, or one whose weights are offloaded.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        path: Path = "layer",
        nodes: int = 2,
        rule: Rule = "legendre",
        tolerance: float | None = None,
        completeness: bool = True,
        memory: str | int | None = None,
        attention: bool = False,
        sites: Sequence[Site] | None = None,
        read: int = 1,
        progress: bool = False,
    ):
        if path not in get_args(Path):
            raise ValueError(f"path: expected one of {', '.join(get_args(Path))}, got {path!r}")
        if rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}")
        if rule == "radau" and path != "layer":
            raise ValueError(f"rule: radau belongs to the layer path, got path {path!r}")
        self._rules = gauss_legendre(nodes), gauss_radau(nodes)
        if tolerance is not None and not 0 < tolerance < 1:
            raise ValueError(f"tolerance: expected a number between 0 and 1, got {tolerance!r}")
        if tolerance is not None and path == "neuron":
            raise ValueError("tolerance: the neuron path is exact and takes none")
        if tolerance is not None and not completeness:
            raise ValueError("completeness: a tolerance needs it, got False")
        self.model, self.path, self.nodes, self.tolerance, self.progress = model, path, nodes, tolerance, progress
        self.rule, self.completeness = rule, completeness
        self.relay = Relay(model, attention=attention, sites=sites, read=read)
        self.sites = self.relay.sites
        self.budget = model_budget(model, memory)
        self._weights: dict[tuple[int, ...], Weight] = {}

    # ---- public calls ------------------------------------------------------------------------------------------

    def read(self, inputs: Mapping[str, Any]) -> Prompt:
        """The unedited pass over a batch, kept for the calls below: the questions asked of it share that pass.

        Raises:
            ValueError: empty batch.
        """
        return self.read_all([inputs])[0]

    def read_all(self, batches: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """As :meth:`read`, of several batches that are asked in turn: as many as fit together are kept."""
        differentiable, total, fitting = self.rule == "radau", 0, []
        for inputs in batches:
            kept = self.weigh(inputs).kept(len(main_input(inputs)), differentiable=differentiable)
            fitting.append(total + kept <= KEPT_SHARE * self.budget)
            total += kept if fitting[-1] else 0
        with frozen(self.model), torch.set_grad_enabled(differentiable):
            return [
                Prompt(inputs, list(self._traces(inputs, differentiable=differentiable)) if fits else [], total)
                for inputs, fits in zip(batches, fitting, strict=True)
            ]

    def attribute(self, inputs: Mapping[str, Any] | Prompt, target: Target) -> Attribution:
        """Attribution of every neuron to ``target`` on a batch.

        Args:
            inputs: keyword arguments of the model, tensors ``[B, ...]``, or what :meth:`read` made of them.
            target: rows -> ``[R]`` or ``[R, Q]``, differentiable in the rows' logits and attention; it indexes its own
                per-example data with ``rows.example``.

        Raises:
            ValueError: empty batch, a target of the wrong shape or not finite, a budget too small for one example.
        """
        with frozen(self.model):
            traces = self._traces(inputs, differentiable=self.rule == "radau")
            keep = isinstance(inputs, Prompt)
            parts = [self._attribute(trace, target, self._room(inputs), keep=keep) for trace in traces]
        return join(parts)

    def ablate(self, inputs: Mapping[str, Any] | Prompt, target: Target, neurons: NeuronSet) -> Tensor:
        """Exact effect of switching single units off, ``F(1) - F(unit off)``: ``[Q, B, n]`` in order of ``neurons``.

        Equals MacU Eq. 5 on the path of that unit alone, for any target, differentiable or not.

        Raises:
            ValueError: a neuron the model does not have, an empty set or batch, a target not finite.
        """
        units = self.units(neurons)
        with frozen(self.model), torch.no_grad():
            parts = [self._ablate(trace, target, units, self._room(inputs)) for trace in self._traces(inputs)]
        return torch.cat(parts, 1)

    def gated(self, inputs: Mapping[str, Any] | Prompt, target: Target, neurons: NeuronSet, gates: Tensor) -> Tensor:
        """Targets of the model under P settings of the gates of ``neurons``, without gradients: ``[P, B, Q]``.

        The layers below the first gated one run once for all settings.

        Args:
            gates: ``[P, n]`` in the order of ``neurons``; 1 leaves a unit as it is, 0 erases it.

        Raises:
            ValueError: a neuron the model does not have, gates of another shape or not finite.
        """
        units = self.units(neurons)
        if not torch.is_tensor(gates) or gates.dim() != 2 or gates.shape[1] != len(units) or not len(gates):
            came = tuple(gates.shape) if torch.is_tensor(gates) else type(gates).__name__
            raise ValueError(f"gates: expected [settings, {len(units)}], got {came}")
        if not torch.isfinite(gates).all():
            raise ValueError("gates: must be finite")
        with frozen(self.model), torch.no_grad():
            parts = [self._gated(trace, target, units, gates, self._room(inputs)) for trace in self._traces(inputs)]
        return torch.cat(parts, 1)

    # ---- splitting ---------------------------------------------------------------------------------------------

    def _room(self, inputs: Mapping[str, Any] | Prompt) -> int:
        """Bytes for a question, beside what a prompt keeps."""
        return self.budget - inputs.kept if isinstance(inputs, Prompt) else self.budget

    def _traces(self, inputs: Mapping[str, Any] | Prompt, *, differentiable: bool = False) -> Iterator[Trace]:
        """The unedited pass, a block of examples at a time."""
        if isinstance(inputs, Prompt):
            if inputs.traces:
                yield from inputs.traces
                return
            inputs = inputs.inputs
        batch = len(main_input(inputs))
        size = min(batch, self.weigh(inputs).examples(self.budget, self.nodes))
        starts = range(0, batch, size)
        for start in tqdm(starts, desc="cascade", unit="block", disable=not self.progress or len(starts) == 1):
            examples = slice(start, start + size)
            number = torch.arange(batch, device=main_input(inputs).device)[examples]
            yield self.relay.trace(take(inputs, examples), number, differentiable=differentiable)

    def weigh(self, inputs: Mapping[str, Any]) -> Weight:
        """What a cascade over inputs of this shape weighs, by which its work is cut; measured once for a shape."""
        shape = tuple(main_input(inputs).shape[1:])
        if shape not in self._weights:
            self._weights[shape] = self._weight(inputs)
        return self._weights[shape]

    def _weight(self, inputs: Mapping[str, Any]) -> Weight:
        """The weight by which the work is cut: the largest that any of the ranks that hold the model together finds."""
        weight, mesh = weigh(self.relay, inputs), mesh_of(self.model)
        if mesh is None:
            return weight
        sizes = {name: size for name, size in asdict(weight).items() if type(size) is int}
        largest: dict[str, Any] = dict(zip(sizes, agreed([*sizes.values()], mesh, largest=True), strict=True))
        return replace(weight, **largest)

    def units(self, neurons: NeuronSet) -> list[tuple[int, int]]:
        """(site, index) of every neuron, in the order given.

        Raises:
            ValueError: a neuron the model does not have, or an empty set.
        """
        place = {site.name: i for i, site in enumerate(self.sites)}
        units = []
        for ref in neurons:
            if ref.site not in place or ref.index >= self.sites[place[ref.site]].width:
                raise ValueError(f"neurons: the model has no neuron {ref}")
            units.append((place[ref.site], ref.index))
        if not units:
            raise ValueError("neurons: the set is empty")
        return units

    # ---- the paths ---------------------------------------------------------------------------------------------

    def _attribute(self, trace: Trace, target: Target, room: int, *, keep: bool) -> Attribution:
        trace, ends = self._ends(trace, target, keep=keep)
        with torch.no_grad():
            full = target_values(target, trace.rows).t()
        if self.path == "neuron":
            return self._neuron_path(trace, target, full, room)
        check_differentiable(target, trace.rows)
        measure = self._joint_path if self.path == "joint" else partial(self._layer_path, ends)
        erased = self._erased(trace, target, room) if self.completeness else {}
        keys = [ALL] if self.path == "joint" else [site.name for site in self.sites]

        goal = None
        if self.tolerance is not None:
            effect = torch.stack([(full - value).abs() for value in erased.values()]).amax(0)
            known = {(key, 0.0): value for key, value in erased.items()} | {(key, 1.0): full for key in keys}
            goal = Goal(self.tolerance, effect, partial(self._at, trace, target, room, known))
        found = integrate(keys, partial(measure, trace, target, room), self.nodes, goal)
        values: dict[str, Tensor] = {}
        nodes: dict[str, int] = {}
        change: dict[str, float | None] = {}
        for integral in found.values():
            total = integral.total()
            values |= total
            nodes |= dict.fromkeys(total, integral.nodes)
            change |= dict.fromkeys(total, integral.change)
        residual = residuals(full, erased, values)
        late = [key for key, integral in found.items() if not integral.reached]
        if goal is not None and late:
            worst = max(float((residual[key].abs() / goal.effect).nan_to_num().max()) for key in late)
            warnings.warn(
                f"tolerance {self.tolerance:g} not reached on {len(late)} of {len(found)} paths with up to "
                f"{max(found[key].nodes for key in late)} nodes: relative residual {worst:.2g}",
                stacklevel=4,
            )
        return Attribution(values, full, erased, residual, nodes, change)

    def _ends(self, trace: Trace, target: Target, *, keep: bool) -> tuple[Trace, Ends]:
        """Gradients of the unedited model at every site, ``f(1)`` of each path, and the trace without their graph.

        Args:
            keep: leave the graph as it was: a prompt's next question wants it too.
        """
        if not trace.outputs:
            return trace, {}
        with torch.enable_grad():
            value = target_values(target, trace.rows)
        ends = dict(gradients(value, trace.outputs, keep=keep))
        rows = trace.rows
        attention = None if rows.attention is None else rows.attention.detach()
        rows = replace(rows, logits=rows.logits.detach(), attention=attention)
        return replace(trace, rows=rows, outputs=[]), ends

    def _layer_path(
        self, ends: Ends, trace: Trace, target: Target, room: int, pieces: Sequence[Piece]
    ) -> list[dict[str, Tensor]]:
        number = {site.name: i for i, site in enumerate(self.sites)}
        sites = [number[piece.key] for piece in pieces]
        rules = [self._rule(piece) for piece in pieces]
        found: list[dict[str, Tensor]] = [{} for _ in pieces]
        for group, s in self.weigh(trace.inputs).cuts(room, self.nodes, trace.batch, sites):
            members: dict[int, list[int]] = {}  # site -> its pieces in this block
            for p in group:
                members.setdefault(sites[p], []).append(p)
            with torch.enable_grad():
                leaves = {
                    i: ops.open_rows(
                        trace.sites[i].anchor, trace.sites[i].u, torch.cat([rules[p].alphas[s] for p in own])
                    ).requires_grad_()
                    for i, own in members.items()
                }
                value = target_values(target, self.relay.run(trace, leaves))
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

    def _rule(self, piece: Piece) -> Nodes:
        """The nodes of one interval; a rule with a node at 1 is of use where the interval ends there."""
        legendre, radau = self._rules
        alphas, weights, end = radau if self.rule == "radau" and piece.high == 1 else (*legendre, 0.0)
        width = piece.high - piece.low
        return Nodes(piece.low + width * alphas, width * weights, width * end)

    def _collect(self, i: int, trace: Trace, pulled: Tensor | None) -> Tensor:
        """``[B, F]`` from the weighted gradient sum ``[B, T, H]``: through W2, times z, summed over tokens."""
        z = trace.sites[i].z
        if pulled is None:  # the target does not read this layer
            return z.new_zeros(z.shape[0], z.shape[2], dtype=torch.float32)
        return ops.multiply_sum(self.sites[i].projection.pull(pulled.to(z.dtype)), z, _mask(trace, z)).float()

    def _joint_path(self, trace: Trace, target: Target, room: int, pieces: Sequence[Piece]) -> list[dict[str, Tensor]]:
        return [self._joint_piece(trace, target, room, self._rule(piece)) for piece in pieces]

    def _joint_piece(self, trace: Trace, target: Target, room: int, rule: Nodes) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for s in self.weigh(trace.inputs).node_slices(room, self.nodes, trace.batch):
            with torch.enable_grad():
                rows, z, scaled = self.relay.scaled(trace, rule.alphas[s])
                value = target_values(target, rows)
            for q, grads in gradients(value, scaled):
                share = rule.weights[s].repeat_interleave(trace.batch)[:, None]
                for site, active, grad in zip(self.sites, z, grads, strict=True):
                    part = active.new_zeros(trace.batch, site.width, dtype=torch.float32)
                    if grad is not None:
                        mask = _mask(trace, active)
                        mask = mask.repeat(len(share) // trace.batch, 1) if mask is not None else None
                        each = ops.multiply_sum(site.projection.pull(grad), active, mask).float()
                        part = (each * share.to(each)).unflatten(0, (-1, trace.batch)).sum(0)
                    whole = total.setdefault(site.name, part.new_zeros(value.shape[1], *part.shape))
                    whole[q] += part
        return total

    def _neuron_path(self, trace: Trace, target: Target, full: Tensor, room: int) -> Attribution:
        units = [(i, k) for i, site in enumerate(self.sites) for k in range(site.width)]
        with torch.no_grad():
            effects = self._ablate(trace, target, units, room)
        values = dict(
            zip((site.name for site in self.sites), effects.split([site.width for site in self.sites], 2), strict=True)
        )
        return Attribution(values, full, {}, {}, dict.fromkeys(values, 0), dict.fromkeys(values))

    def _erased(self, trace: Trace, target: Target, room: int) -> dict[str, Tensor]:
        """F(0) of every path, ``[Q, B]``."""
        keys = [ALL] if self.path == "joint" else [site.name for site in self.sites]
        return dict(zip(keys, self._at(trace, target, room, {}, [(key, 0.0) for key in keys]), strict=True))

    def _at(
        self, trace: Trace, target: Target, room: int, known: Mapping[Point, Tensor], points: Sequence[Point]
    ) -> list[Tensor]:
        """The target at points of the paths, ``[Q, B]`` each: one row without gradients for each that is not known."""
        missing = [point for point in points if point not in known]
        size, batch = self.weigh(trace.inputs).rows_forward(room, trace.batch), trace.batch
        found = dict(known)
        with torch.no_grad():
            for group in (missing[start : start + size] for start in range(0, len(missing), size)):
                alphas = torch.tensor([alpha for _, alpha in group], dtype=torch.float64)
                if self.path == "joint":
                    rows = self.relay.scaled(trace, alphas)[0]
                else:
                    rows = self.relay.run(trace, self._opened(trace, [key for key, _ in group], alphas))
                values = target_values(target, rows).unflatten(0, (len(group), batch))
                found |= {point: value.t() for point, value in zip(group, values, strict=True)}
        return [found[point] for point in points]

    def _opened(self, trace: Trace, names: Sequence[str], alphas: Tensor) -> dict[int, Tensor]:
        """Rows that open at sites, each scaled by its alpha; names of one site stand together, in the sites' order."""
        number = {site.name: i for i, site in enumerate(self.sites)}
        members: dict[int, list[float]] = {}
        for name, alpha in zip(names, alphas.tolist(), strict=True):
            members.setdefault(number[name], []).append(alpha)
        return {i: ops.open_rows(trace.sites[i].anchor, trace.sites[i].u, own) for i, own in members.items()}

    def _ablate(self, trace: Trace, target: Target, units: list[tuple[int, int]], room: int) -> Tensor:
        order = sorted(range(len(units)), key=units.__getitem__)
        at_once = self.weigh(trace.inputs).rows_forward(room, trace.batch)
        full = target_values(target, trace.rows)
        effects = full.new_empty(len(units), *full.shape)
        blocks = range(0, len(order), at_once)
        for start in tqdm(blocks, desc="ablate", unit="block", disable=not self.progress or len(blocks) == 1):
            chosen = order[start : start + at_once]
            columns: dict[int, list[int]] = {}
            for j in chosen:
                columns.setdefault(units[j][0], []).append(units[j][1])
            opened = {i: self._without(i, trace, torch.tensor(ks)) for i, ks in columns.items()}
            value = target_values(target, self.relay.run(trace, opened)).unflatten(0, (len(chosen), trace.batch))
            effects[chosen] = full - value
        return effects.permute(2, 1, 0)

    def _without(self, i: int, trace: Trace, columns: Tensor) -> Tensor:
        """Rows ``[n * B, T, H]`` in the place of the site's anchor, each with one unit off."""
        seen = trace.sites[i]
        columns = columns.to(seen.z.device)
        z = seen.z[..., columns].movedim(-1, 0)[..., None]  # [n, B, T, 1]
        w = self.sites[i].projection.columns(columns).t()[:, None, None]  # [n, 1, 1, H]
        return torch.addcmul(seen.anchor[None], z, w, value=-1).flatten(0, 1)

    def _gated(self, trace: Trace, target: Target, units: list[tuple[int, int]], gates: Tensor, room: int) -> Tensor:
        gates = gates.to(torch.float32)
        members: dict[int, list[int]] = {}  # site -> positions in `units`
        for j, (i, _) in enumerate(units):
            members.setdefault(i, []).append(j)
        device = {i: trace.sites[i].z.device for i in members}
        columns = {i: torch.tensor([units[j][1] for j in js], device=device[i]) for i, js in members.items()}
        entries = self._entries(trace, sorted(members))
        results = []
        for setting in gates.split(self.weigh(trace.inputs).rows_forward(room, trace.batch)):
            on = {i: RowGates(columns[i], setting[:, js].contiguous().to(device[i])) for i, js in members.items()}
            opened = self._moved(trace, {i: on.pop(i) for i in entries})
            value = target_values(target, self.relay.run(trace, {entries[0]: opened}, inside=on))
            results.append(value.unflatten(0, (len(setting), trace.batch)))
        return torch.cat(results)

    def _entries(self, trace: Trace, sites: list[int]) -> list[int]:
        """Which gated sites of the first block open the rows: one that runs the block again, gated inside, else all."""
        place = self.relay.place
        first = [i for i in sites if place[i] == place[sites[0]]]
        return [i for i in first if trace.anatomy.junctions[i].kind == "replay"][:1] or first

    def _moved(self, trace: Trace, gates: Mapping[int, RowGates]) -> Tensor:
        """Rows ``[P * B, T, H]`` in the place of the sites' common anchor, each with some of their units gated."""
        rows = trace.sites[min(gates)].anchor
        for i, on in gates.items():
            z = trace.sites[i].z
            change = z[..., on.columns] * (on.values[:, None, None] - 1).to(z.dtype)
            rows = rows + change @ self.sites[i].projection.columns(on.columns).t()
        return rows.flatten(0, 1)


def _plus(whole: Tensor | None, last: Tensor, weight: float) -> Tensor:
    return weight * last.float() if whole is None else whole.add_(last, alpha=weight)


def _mask(trace: Trace, z: Tensor) -> Tensor | None:
    """Which tokens count, ``[B, T]``; None where all do."""
    mask = trace.inputs.get("attention_mask")
    return mask.to(z.device, torch.uint8) if torch.is_tensor(mask) and mask.shape[1:] == z.shape[1:2] else None
