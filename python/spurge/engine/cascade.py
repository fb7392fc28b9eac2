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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spurge import ops
from spurge.engine.attribution import (
    ALL,
    Attribution,
    check_differentiable,
    gradients,
    join,
    relative_change,
    residuals,
    target_values,
)
from spurge.engine.calls import main_input, take
from spurge.engine.memory import budget
from spurge.engine.neurons import NeuronSet
from spurge.engine.patches import frozen
from spurge.engine.quadrature import MOST_NODES, gauss_legendre, gauss_radau
from spurge.engine.relay import Relay, Rows, Target, Trace, predicted_logit
from spurge.engine.sites import Site
from spurge.engine.weight import Weight, weigh

__all__ = ["Attribution", "Cascade", "Path", "Rows", "Target", "predicted_logit"]

Path = Literal["layer", "joint", "neuron"]
Rule = Literal["legendre", "radau"]
Ends = dict[int, tuple[Tensor | None, ...]]  # per target, the unedited model's gradient at each site's output


class Cascade:
    r"""Integrated gradients, exact ablations and gated runs of feed-forward neurons.

    Args:
        model: a ``transformers`` classifier (encoder or decoder), image classifier or causal language model.
        path: ``"layer"``: all units of a layer scaled together, layer by layer (knowledge neurons, DEPN);
            ``"joint"``: all layers scaled together, the cheapest, its sum is the whole network's effect;
            ``"neuron"``: each unit alone, as MacU Eq. 5 reads; there the integral is ``F(1) - F(unit off)``, computed
            exactly with one forward row per unit.
        nodes: quadrature nodes S of the layer and joint paths; the first count to try when ``tolerance`` is given.
        rule: ``"legendre"``; ``"radau"``, on the layer path: S free nodes and the unedited model itself as one more,
            which a single backward pass over the examples gives for all layers.
            A norm right behind the down projection (GLM-4) undoes any scale but zero: there the layer and joint paths
            are a step at 0 and converge slowly; the residual says so, and the neuron path is the one to use.
        tolerance: refine each layer, doubling its nodes, until its completeness residual is at most ``tolerance``
            times the example's largest layer effect ``|F(1) - F(0)|`` *and* its values change by at most ``tolerance``
            (relative L2) from half as many nodes. None: ``nodes`` as they are.
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
        ValueError: a setting out of range, a model without sites.
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
        gauss_legendre(nodes)
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
        self.budget = budget(memory, next(model.parameters()).device)
        self._weights: dict[tuple[int, ...], Weight] = {}

    # ---- public calls ------------------------------------------------------------------------------------------

    def attribute(self, inputs: Mapping[str, Any], target: Target) -> Attribution:
        """Attribution of every neuron to ``target`` on a batch.

        Args:
            inputs: keyword arguments of the model, tensors ``[B, ...]``.
            target: rows -> ``[R]`` or ``[R, Q]``, differentiable in the rows' logits and attention; it indexes its own
                per-example data with ``rows.example``.

        Raises:
            ValueError: empty batch, a target of the wrong shape or not finite, a budget too small for one example.
        """
        with frozen(self.model):
            traces = self._traces(inputs, differentiable=self.rule == "radau")
            parts = [self._attribute(trace, target) for trace in traces]
        return join(parts)

    def ablate(self, inputs: Mapping[str, Any], target: Target, neurons: NeuronSet) -> Tensor:
        """Exact effect of switching single units off, ``F(1) - F(unit off)``: ``[Q, B, n]`` in order of ``neurons``.

        Equals MacU Eq. 5 on the path of that unit alone, for any target, differentiable or not.

        Raises:
            ValueError: a neuron the model does not have, an empty set or batch, a target not finite.
        """
        units = self._units(neurons)
        with frozen(self.model), torch.no_grad():
            parts = [self._ablate(trace, target, units) for trace in self._traces(inputs)]
        return torch.cat(parts, 1)

    def gated(self, inputs: Mapping[str, Any], target: Target, neurons: NeuronSet, gates: Tensor) -> Tensor:
        """Targets of the model under P settings of the gates of ``neurons``, without gradients: ``[P, B, Q]``.

        The layers below the first gated one run once for all settings.

        Args:
            gates: ``[P, n]`` in the order of ``neurons``; 1 leaves a unit as it is, 0 erases it.

        Raises:
            ValueError: a neuron the model does not have, gates of another shape or not finite.
        """
        units = self._units(neurons)
        if not torch.is_tensor(gates) or gates.dim() != 2 or gates.shape[1] != len(units) or not len(gates):
            came = tuple(gates.shape) if torch.is_tensor(gates) else type(gates).__name__
            raise ValueError(f"gates: expected [settings, {len(units)}], got {came}")
        if not torch.isfinite(gates).all():
            raise ValueError("gates: must be finite")
        with frozen(self.model), torch.no_grad():
            parts = [self._gated(trace, target, units, gates) for trace in self._traces(inputs)]
        return torch.cat(parts, 1)

    # ---- splitting ---------------------------------------------------------------------------------------------

    def _traces(self, inputs: Mapping[str, Any], *, differentiable: bool = False) -> Iterator[Trace]:
        """The unedited pass, a block of examples at a time."""
        batch = len(main_input(inputs))
        size = min(batch, self._weigh(inputs).examples(self.budget, self.nodes))
        starts = range(0, batch, size)
        for start in tqdm(starts, desc="cascade", unit="block", disable=not self.progress or len(starts) == 1):
            examples = slice(start, start + size)
            number = torch.arange(batch, device=main_input(inputs).device)[examples]
            yield self.relay.trace(take(inputs, examples), number, differentiable=differentiable)

    def _weigh(self, inputs: Mapping[str, Any]) -> Weight:
        shape = tuple(main_input(inputs).shape[1:])
        if shape not in self._weights:
            self._weights[shape] = weigh(self.relay, inputs)
        return self._weights[shape]

    def _units(self, neurons: NeuronSet) -> list[tuple[int, int]]:
        """(site, index) of every neuron, in the order given."""
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

    def _attribute(self, trace: Trace, target: Target) -> Attribution:
        trace, ends = self._ends(trace, target)
        with torch.no_grad():
            full = target_values(target, trace.rows).t()
        if self.path == "neuron":
            return self._neuron_path(trace, target, full)
        check_differentiable(target, trace.rows)
        measure = self._joint_path if self.path == "joint" else partial(self._layer_path, ends)
        erased = self._erased(trace, target) if self.completeness else {}
        effect = torch.stack([(full - value).abs() for value in erased.values()]).amax(0) if erased else full
        values: dict[str, Tensor] = {}
        nodes = dict.fromkeys((site.name for site in self.sites), self.nodes)
        change: dict[str, float | None] = dict.fromkeys(nodes)
        pending, count, tolerance = list(range(len(self.sites))), self.nodes, self.tolerance

        def settled(name: str, within: float) -> bool:
            moved, gap = change[name], residual[name if name in residual else ALL].abs()
            return moved is not None and moved <= within and not bool((gap > within * effect).any())

        while pending:
            new = measure(trace, target, count, pending)
            change |= {name: relative_change(values.get(name), value) for name, value in new.items()}
            values |= new
            nodes |= dict.fromkeys(new, count)
            residual = residuals(full, erased, values)
            if tolerance is None:
                break
            late = [i for i in pending if not settled(self.sites[i].name, tolerance)]
            pending = pending if self.path == "joint" and late else late
            count *= 2
            if pending and count > MOST_NODES:
                worst = max(float((residual[key].abs() / effect).nan_to_num().max()) for key in residual)
                warnings.warn(
                    f"tolerance {tolerance:g} not reached with {count // 2} nodes: relative residual {worst:.2g}",
                    stacklevel=4,
                )
                break
        return Attribution(values, full, erased, residual, nodes, change)

    def _ends(self, trace: Trace, target: Target) -> tuple[Trace, Ends]:
        """Gradients of the unedited model at every site, ``f(1)`` of each path, and the trace without their graph."""
        if not trace.outputs:
            return trace, {}
        with torch.enable_grad():
            value = target_values(target, trace.rows)
        ends = dict(gradients(value, trace.outputs))
        rows = trace.rows
        attention = None if rows.attention is None else rows.attention.detach()
        rows = replace(rows, logits=rows.logits.detach(), attention=attention)
        return replace(trace, rows=rows, outputs=[]), ends

    def _layer_path(
        self, ends: Ends, trace: Trace, target: Target, nodes: int, pending: list[int]
    ) -> dict[str, Tensor]:
        end = 0.0
        if self.rule == "radau":
            alphas, weights, end = gauss_radau(nodes)
        else:
            alphas, weights = gauss_legendre(nodes)
        values: dict[str, Tensor] = {}
        for group, s in self._weigh(trace.inputs).cuts(self.budget, nodes, trace.batch, pending):
            with torch.enable_grad():
                opened = [ops.open_rows(trace.sites[i].anchor, trace.sites[i].u, alphas[s]) for i in group]
                leaves = [rows.requires_grad_() for rows in opened]
                value = target_values(target, self.relay.run(trace, dict(zip(group, leaves, strict=True))))
            for q, grads in gradients(value, leaves):
                for i, grad in zip(group, grads, strict=True):
                    whole = ops.node_sum(grad, weights[s]) if grad is not None else None
                    last = ends[q][i] if ends and s.start == 0 else None
                    if last is not None:
                        whole = end * last.float() if whole is None else whole.add_(last, alpha=end)
                    part = self._collect(i, trace, whole)
                    total = values.setdefault(self.sites[i].name, part.new_zeros(value.shape[1], *part.shape))
                    total[q] += part
        return {self.sites[i].name: values[self.sites[i].name] for i in pending}

    def _collect(self, i: int, trace: Trace, pulled: Tensor | None) -> Tensor:
        """``[B, F]`` from the weighted gradient sum ``[B, T, H]``: through W2, times z, summed over tokens."""
        z = trace.sites[i].z
        if pulled is None:  # the target does not read this layer
            return z.new_zeros(z.shape[0], z.shape[2], dtype=torch.float32)
        return ops.multiply_sum(pulled.to(z.dtype) @ self.sites[i].weight(), z, _mask(trace, z)).float()

    def _joint_path(self, trace: Trace, target: Target, nodes: int, pending: list[int]) -> dict[str, Tensor]:
        alphas, weights = gauss_legendre(nodes)
        total: dict[str, Tensor] = {}
        for s in self._weigh(trace.inputs).node_slices(self.budget, nodes, trace.batch):
            with torch.enable_grad():
                rows, z, scaled = self.relay.scaled(trace, alphas[s])
                value = target_values(target, rows)
            for q, grads in gradients(value, scaled):
                share = weights[s].repeat_interleave(trace.batch)[:, None]
                for site, active, grad in zip(self.sites, z, grads, strict=True):
                    part = active.new_zeros(trace.batch, site.width, dtype=torch.float32)
                    if grad is not None:
                        mask = _mask(trace, active)
                        mask = mask.repeat(len(alphas[s]), 1) if mask is not None else None
                        each = ops.multiply_sum(grad @ site.weight(), active, mask).float()
                        part = (each * share.to(each)).unflatten(0, (-1, trace.batch)).sum(0)
                    whole = total.setdefault(site.name, part.new_zeros(value.shape[1], *part.shape))
                    whole[q] += part
        return total

    def _neuron_path(self, trace: Trace, target: Target, full: Tensor) -> Attribution:
        units = [(i, k) for i, site in enumerate(self.sites) for k in range(site.width)]
        with torch.no_grad():
            effects = self._ablate(trace, target, units)
        values = dict(
            zip((site.name for site in self.sites), effects.split([site.width for site in self.sites], 2), strict=True)
        )
        return Attribution(values, full, {}, {}, dict.fromkeys(values, 0), dict.fromkeys(values))

    def _erased(self, trace: Trace, target: Target) -> dict[str, Tensor]:
        """F(0) of every path, ``[Q, B]``."""
        zero = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            if self.path == "joint":
                return {ALL: target_values(target, self.relay.scaled(trace, zero)[0]).t()}
            erased: dict[str, Tensor] = {}
            sites, size = range(len(self.sites)), self._weigh(trace.inputs).rows_forward(self.budget, trace.batch)
            for group in (sites[start : start + size] for start in range(0, len(sites), size)):
                opened = {i: ops.open_rows(trace.sites[i].anchor, trace.sites[i].u, zero) for i in group}
                value = target_values(target, self.relay.run(trace, opened)).unflatten(0, (len(group), trace.batch))
                erased |= {self.sites[i].name: value[j].t() for j, i in enumerate(group)}
            return erased

    def _ablate(self, trace: Trace, target: Target, units: list[tuple[int, int]]) -> Tensor:
        order = sorted(range(len(units)), key=units.__getitem__)
        at_once = self._weigh(trace.inputs).rows_forward(self.budget, trace.batch)
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
        w = self.sites[i].weight()[:, columns].t()[:, None, None]  # [n, 1, 1, H]
        return torch.addcmul(seen.anchor[None], z, w, value=-1).flatten(0, 1)

    def _gated(self, trace: Trace, target: Target, units: list[tuple[int, int]], gates: Tensor) -> Tensor:
        device = trace.sites[0].z.device
        gates = gates.to(device, torch.float32)
        members: dict[int, list[int]] = {}  # site -> positions in `units`
        for j, (i, _) in enumerate(units):
            members.setdefault(i, []).append(j)
        columns = {i: torch.tensor([units[j][1] for j in js], device=device) for i, js in members.items()}
        entry = min(members)

        def gated_at(i: int, values: Tensor) -> Callable[[Tensor], Tensor]:
            def gate(z: Tensor) -> Tensor:
                z = z.clone() if z._is_view() else z  # a view may share memory with what the layer still needs
                ops.gate_columns_(z, columns[i], values)
                return z

            return gate

        results = []
        for setting in gates.split(self._weigh(trace.inputs).rows_forward(self.budget, trace.batch)):
            opened = self._moved(entry, trace, columns[entry], setting[:, members[entry]])
            inside = {i: gated_at(i, setting[:, js].contiguous()) for i, js in members.items() if i != entry}
            value = target_values(target, self.relay.run(trace, {entry: opened}, inside=inside))
            results.append(value.unflatten(0, (len(setting), trace.batch)))
        return torch.cat(results)

    def _moved(self, i: int, trace: Trace, columns: Tensor, gates: Tensor) -> Tensor:
        """Rows ``[P * B, T, H]`` in the place of the site's anchor, each with some units gated: ``[P, n]``."""
        seen = trace.sites[i]
        change = seen.z[..., columns] * (gates[:, None, None] - 1).to(seen.z.dtype)
        return (seen.anchor + change @ self.sites[i].weight()[:, columns].t()).flatten(0, 1)


def _mask(trace: Trace, z: Tensor) -> Tensor | None:
    """Which tokens count, ``[B, T]``; None where all do."""
    mask = trace.inputs.get("attention_mask")
    return mask.to(torch.uint8) if torch.is_tensor(mask) and mask.shape[1:] == z.shape[1:2] else None
