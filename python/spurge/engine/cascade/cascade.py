"""The cascade: what would the model do if these neurons were scaled so, asked for all layers in one pass.

What switching one neuron off does is estimated for all of them by one gradient of the unedited model
(`spurge.engine.cascade.first_order`), and measured for as many as matter.

Integrated gradients of the feed-forward neurons, layer by layer, usually run the whole model once per layer and
quadrature node. Here one batch holds all those questions and each begins only behind the layer where it differs:
the down projection is linear, so scaling a layer's activations by ``alpha`` moves its output by ``(alpha - 1) u``,
``u = z W2'``, and rows open there at no cost in their own layer. One backward pass gives the gradients of every path,
and since ``z`` is the same for all nodes they are summed in the model's width before one product with ``W2``:

.. math:: \\mathrm{Attr}_{l,k} = \\sum_t z_{l,t,k} \\Bigl( \\sum_s w_s \\frac{\\partial F}{\\partial u_{l,t}}
          \\Big|_{\\alpha_s} W_2 \\Bigr)_k
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spurge.engine.base.checks import choice, integer, warn
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.tensor_parallel import agreed
from spurge.engine.cascade.ablation import Unit, ablated, gated
from spurge.engine.cascade.attribution import Attribution, check_differentiable, join, residuals, target_values
from spurge.engine.cascade.first_order import first_order
from spurge.engine.cascade.gradient_path import Effort, effects_of_units, settled_effort
from spurge.engine.cascade.memory_model import Footprint, measure_footprint
from spurge.engine.cascade.paths import Path, Paths, Rule, end_gradients, settled
from spurge.engine.cascade.quadrature import Goal, gauss_legendre, integrate, warn_of_missed
from spurge.engine.models.call_arguments import main_input, take
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import Site, Units
from spurge.engine.passes.graded_pass import graded_pass, untraced
from spurge.engine.passes.norm_placement import NotEntered
from spurge.engine.passes.partial_forward import PartialForward
from spurge.engine.passes.trace import Forward, Rows, Target, Trace, padding_complaint, predicted_logit
from spurge.engine.passes.whole_pass import WholePass

__all__ = ["Attribution", "Cascade", "Path", "Rows", "Target", "predicted_logit"]

Result = TypeVar("Result")

APART = 1 << 20  # seeds, of the draws of neighbouring examples
KEPT_SHARE = 0.25  # of the budget, for the unedited pass of a prompt that is asked about again


@dataclass(frozen=True, eq=False)
class Prompt:
    """A batch to ask about more than once: its unedited pass is kept where a quarter of the memory budget holds it.

    Valid while the model's weights and applied edits stay as they were when it was read.
    """

    inputs: Mapping[str, Any]
    traces: list[Trace]  # empty where they did not fit: then each question runs them again
    kept: int  # bytes of these and of those that were read with them
    reader: Cascade  # others run them again


class Cascade:
    r"""Effects of feed-forward neurons and attention heads: estimated, measured, or integrated along a path.

    Args:
        model: a ``transformers`` classifier (encoder or decoder), image classifier or causal language model.
        path: ``"gradient"``: each unit alone, as MacU Eq. 5 reads: its integral is ``F(1) - F(unit off)``, estimated
            for all units by one gradient at the unedited model, and measured for the ``exact`` units whose estimates
            are at stake most; ``"neuron"``: measured for every unit, one forward row for each; ``"layer"``: all units
            of a layer scaled together, layer by layer (knowledge neurons, DEPN); ``"joint"``: all layers scaled
            together, whose sum is the whole network's effect. None: ``"layer"`` where ``nodes`` or ``rule`` are given,
            else ``"gradient"``.
        exact: units that are measured on the gradient path for each example on average, 32 by default: those at stake
            most in all of them.
        audit: of all values of a call (an example's unit each), so many of the others are drawn and measured, 256 by
            default: `Attribution.agreement` says by them how well all values agree with the equation. 0: it says
            nothing.
        seed: of that draw; of one call alone where it says so.
        nodes: quadrature nodes S of the layer and joint paths, 2 by default; of each interval when
            ``tolerance`` is given.
        rule: ``"legendre"``; ``"radau"``, on the layer path: S free nodes and the unedited model itself as one more,
            which a single backward pass over the examples gives for all layers.
            A norm right behind the down projection (GLM-4) undoes any scale but zero: there the layer and joint paths
            are a step at 0 and converge slowly; the residual says so, and the neuron path is the one to use. In a
            mixture of experts the routers of later layers jump along a path, and what jumps is in no integral.
        tolerance: on the gradient path: measure more units until the relative error of all values (2-norm) is at most
            that, by the upper bound of its audit; a warning says where a quarter of the units was not enough. On the
            layer and joint paths: refine each path, halving intervals with ``nodes`` in each, until halving one changes
            its values by at most ``tolerance`` (relative 2-norm) *and* its completeness residual is at most
            ``tolerance`` times the example's largest layer effect ``|F(1) - F(0)|``. None: as they are.
        completeness: on the layer and joint paths, measure F(0) and with it the residual, one more forward row per
            layer and example (a fifth to a sixth of the work with two nodes). False leaves both out of the result; a
            tolerance needs them.
        memory: budget in bytes or as text (``"256MiB"``) for what is needed beyond the model itself; a share of what
            is free by default. The work is split to fit; the result does not depend on the split, but for which values
            the gradient path measures: those at stake most in each part.
        attention: give targets the attention row of the probed token (first token of an encoder, last real token of a
            decoder).
        units: ``"neurons"`` of the feed-forward layers, attention ``"heads"``, or ``"both"``
            (`spurge.engine.models.sites.find_sites`). A head's gate stands in front of the output projection.
        sites: restrict to these; all sites of ``units`` by default.
        read: how many of its last real tokens a language model is read at (`Rows.logits`).
        progress: show a progress bar over the parts of a call.

    Raises:
        ValueError: a setting out of range, a model without sites, or one whose weights are offloaded.
    """

    def __init__(
        self,
        model: nn.Module | Handle,
        *,
        path: Path | None = None,
        exact: int | None = None,
        audit: int | None = None,
        seed: int = 0,
        nodes: int | None = None,
        rule: Rule | None = None,
        tolerance: float | None = None,
        completeness: bool = True,
        memory: str | int | None = None,
        attention: bool = False,
        units: Units = "neurons",
        sites: Sequence[Site] | None = None,
        read: int = 1,
        progress: bool = False,
    ):
        path, nodes, rule = settled(path, nodes, rule)
        if rule == "radau" and path != "layer":
            raise ValueError(f"rule: radau belongs to the layer path, got path {path!r}")
        gauss_legendre(nodes)  # raises for a number of nodes there is no rule for
        if tolerance is not None and not 0 < tolerance < 1:
            raise ValueError(f"tolerance: expected a number between 0 and 1, got {tolerance!r}")
        if tolerance is not None and path == "neuron":
            raise ValueError("tolerance: the neuron path is exact and takes none")
        self.effort = settled_effort(path, exact, audit, tolerance, seed)
        if tolerance is not None and path != "gradient" and not completeness:
            raise ValueError("completeness: a tolerance needs it, got False")
        self.handle = Handle.of(model)
        self.model, self.path, self.nodes = self.handle.model, path, nodes
        self.tolerance, self.rule, self.completeness, self.progress = tolerance, rule, completeness, progress
        choice("units", units, get_args(Units))
        if units != "neurons" and sites is not None:
            raise ValueError(f"units: sites say which units are meant, expected none beside them, got {units!r}")
        if units != "neurons":
            sites = self.handle.sites_of(units)
        self._whole = partial(WholePass, self.handle, attention=attention, sites=sites, read=read)
        try:
            self.forward: Forward = PartialForward(self.handle, attention=attention, sites=sites, read=read)
        except NotEntered as reason:
            self.forward = self._run_whole(reason)
        self.sites = self.forward.sites
        self.budget = self.handle.budget(memory)
        self._paths = Paths(self.sites, self.footprint, nodes, rule, path == "joint")
        self._footprints: dict[tuple[int, ...], Footprint] = {}

    # ---- public calls ------------------------------------------------------------------------------------------

    def read(self, inputs: Mapping[str, Any]) -> Prompt:
        """The unedited pass over a batch, kept for the calls below: the questions asked of it share that pass.

        Raises:
            ValueError: empty batch.
        """
        return self.read_all([inputs])[0]

    def read_all(self, batches: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """As :meth:`read`, of several batches that are asked in turn: as many as fit together are kept."""
        differentiable, total, fitting = self.path == "gradient" or self.rule == "radau", 0, []
        for inputs in batches:
            main_input(inputs)
            self.handle.limits.check(inputs)
            kept = self.footprint(inputs).kept(len(main_input(inputs)), differentiable=differentiable)
            fitting.append(total + kept <= KEPT_SHARE * self.budget)
            total += kept if fitting[-1] else 0
        with frozen(self.model, gradients=differentiable):
            return [
                Prompt(inputs, list(self._traces(inputs, graded=True)) if fits else [], total, self)
                for inputs, fits in zip(batches, fitting, strict=True)
            ]

    def attribute(
        self,
        inputs: Mapping[str, Any] | Prompt,
        target: Target,
        *,
        measured: Target | None = None,
        seed: int | None = None,
    ) -> Attribution:
        """Attribution of every neuron to ``target`` on a batch.

        Args:
            inputs: keyword arguments of the model, tensors ``[B, ...]``, or what :meth:`read` made of them.
            target: rows -> ``[R]`` or ``[R, Q]``, differentiable in the rows' logits and attention; it indexes its own
                per-example data with ``rows.example``.
            measured: on the gradient path, what units are measured by, where that is not differentiable and ``target``
                a smooth form of it; ``target`` by default.
            seed: of the audit's draws, where questions are audited together: each its own.

        Raises:
            ValueError: empty batch, a target of the wrong shape or not finite, a budget too small for one example.
        """
        effort = self.effort if seed is None else replace(self.effort, seed=integer("seed", seed, 0))
        batch = len(main_input(inputs.inputs if isinstance(inputs, Prompt) else inputs))
        with frozen(self.model):
            traces, room, keep = self._traces(inputs, graded=True), self._room(inputs), isinstance(inputs, Prompt)
            if self.path == "gradient":
                parts = []
                for trace in traces:
                    own = _of_block(effort, trace, batch)
                    parts.append(self._literal(trace, target, measured or target, own, room, keep=keep))
            else:
                parts = [self._attribute(trace, target, room, keep=keep) for trace in traces]
        return join(parts)

    def ablate(self, inputs: Mapping[str, Any] | Prompt, target: Target, neurons: NeuronSet) -> Tensor:
        """Exact effect of switching single units off, ``F(1) - F(unit off)``: ``[Q, B, n]`` in order of ``neurons``.

        Equals MacU Eq. 5 on the path of that unit alone, for any target, differentiable or not.

        Raises:
            ValueError: a neuron the model does not have, an empty set or batch, a target not finite.
        """
        units = self.units(neurons)
        with frozen(self.model, gradients=False):
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
        with frozen(self.model, gradients=False):
            parts = [self._gated(trace, target, units, gates, self._room(inputs)) for trace in self._traces(inputs)]
        return torch.cat(parts, 1)

    # ---- splitting ---------------------------------------------------------------------------------------------

    def _room(self, inputs: Mapping[str, Any] | Prompt) -> int:
        """Bytes for a question, beside what a prompt keeps."""
        return self.budget - inputs.kept if isinstance(inputs, Prompt) else self.budget

    def _traces(self, inputs: Mapping[str, Any] | Prompt, *, graded: bool = False) -> Iterator[Trace]:
        """The unedited pass, a block of examples at a time.

        Args:
            graded: with the gradients that attributions read from it.
        """
        if isinstance(inputs, Prompt):
            entered = self.path != "gradient" or self.effort.measures
            if inputs.traces and inputs.reader is self and (graded or entered):
                yield from inputs.traces
                return
            inputs = inputs.inputs
        batch = len(main_input(inputs))
        self.handle.limits.check(inputs)
        numbers, start = torch.arange(batch, device=main_input(inputs).device), 0

        def read(part: slice, forward: Forward) -> Trace:
            given, number = take(inputs, part), numbers[part]
            if self.path != "gradient" or not graded:
                return forward.trace(given, number, differentiable=graded and self.rule == "radau")
            if not self.effort.measures:
                return untraced(forward, given, number)
            trace = forward.trace(given, number)
            trace.graded = graded_pass(forward, given, number, stakes=True, anatomy=trace.anatomy)
            return trace

        with tqdm(total=batch, desc="cascade", unit="example", disable=not self.progress) as bar:
            while start < batch:
                size = self.at_once(inputs)
                yield self._entered(partial(read, slice(start, start + size)))
                start += size
                bar.update(size)

    def at_once(self, inputs: Mapping[str, Any]) -> int:
        """Examples of a batch that go into one unedited pass.

        Raises:
            ValueError: on the gradient path, a budget too small for one.
        """
        footprint = self.footprint(inputs)
        if self.path == "gradient":
            return footprint.read_examples(self.budget, len(main_input(inputs)), more=self.effort.measures)
        return footprint.examples(self.budget, self.nodes)

    def _entered(self, ask: Callable[[Forward], Result]) -> Result:
        """What is asked of the model as it can be entered; where it cannot, of whole passes, from then on."""
        try:
            return ask(self.forward)
        except NotEntered as reason:
            if isinstance(self.forward, WholePass):
                raise
            self.forward = self._run_whole(reason)
            self._footprints.clear()
            return ask(self.forward)

    def _run_whole(self, reason: NotEntered) -> Forward:
        name = type(self.model).__name__
        warn(f"{name} is run whole for every row, which takes longer: {reason}")
        return self._whole()

    def footprint(self, inputs: Mapping[str, Any]) -> Footprint:
        """The memory of a cascade over inputs of this shape, by which its work is cut; measured once for a shape."""
        shape = tuple(main_input(inputs).shape[1:])
        if shape not in self._footprints:
            self._footprints[shape] = self._footprint(inputs)
        return self._footprints[shape]

    def _footprint(self, inputs: Mapping[str, Any]) -> Footprint:
        """Of ranks that hold the model together, the largest that any of them measures."""
        self.handle.limits.check(inputs)
        found = self._entered(lambda forward: measure_footprint(forward, inputs))
        mesh = self.handle.mesh
        if mesh is None:
            return found
        sizes = {name: size for name, size in asdict(found).items() if type(size) is int}
        largest: dict[str, Any] = dict(zip(sizes, agreed([*sizes.values()], mesh, largest=True), strict=True))
        return replace(found, **largest)

    def units(self, neurons: NeuronSet) -> list[Unit]:
        """(site, index) of every neuron, in the order given.

        Raises:
            ValueError: a neuron the model does not have, or an empty set.
        """
        number = {site.name: i for i, site in enumerate(self.sites)}
        units = []
        for ref in neurons:
            if ref.site not in number or ref.index >= self.sites[number[ref.site]].width:
                raise ValueError(f"neurons: the model has no neuron {ref}")
            units.append((number[ref.site], ref.index))
        if not units:
            raise ValueError("neurons: the set is empty")
        return units

    # ---- the paths ---------------------------------------------------------------------------------------------

    def _attribute(self, trace: Trace, target: Target, room: int, *, keep: bool) -> Attribution:
        if self.path != "neuron":
            self.footprint(trace.inputs).check(room, self.nodes, trace.batch, joint=self.path == "joint")
        trace, ends = end_gradients(trace, target, keep=keep)
        with grad_mode(False):
            full = target_values(target, trace.rows)
            if self.path == "neuron":
                return self._neuron_path(trace, target, full.t(), room)
        if trace.padding_acts:
            raise ValueError(padding_complaint(self.model))
        full = full.t()
        check_differentiable(target, trace.rows)
        keys = self._paths.keys
        erased: dict[str, Tensor] = {}
        if self.completeness:
            at_zero = self._paths.at(trace, target, room, {}, [(key, 0.0) for key in keys])
            erased = dict(zip(keys, at_zero, strict=True))
        goal = None
        if self.tolerance is not None:
            effect = torch.stack([(full - value).abs() for value in erased.values()]).amax(0)
            known = {(key, 0.0): value for key, value in erased.items()} | {(key, 1.0): full for key in keys}
            goal = Goal(self.tolerance, effect, partial(self._paths.at, trace, target, room, known))
        found = integrate(keys, partial(self._paths.integrals, ends, trace, target, room), self.nodes, goal)
        values: dict[str, Tensor] = {}
        nodes: dict[str, int] = {}
        change: dict[str, float | None] = {}
        for integral in found.values():
            total = integral.total()
            values |= total
            nodes |= dict.fromkeys(total, integral.nodes)
            change |= dict.fromkeys(total, integral.change)
        residual = residuals(full, erased, values)
        if goal is not None:
            warn_of_missed(goal, found, residual)
        return Attribution(values, full, erased, residual, nodes, change)

    def _literal(
        self, trace: Trace, target: Target, measured: Target, effort: Effort, room: int, *, keep: bool
    ) -> Attribution:
        if trace.padding_acts:
            raise ValueError(padding_complaint(self.model))
        assert trace.graded is not None
        found = first_order(trace.graded, target, keep=keep, room=room)
        if not keep:
            trace.graded = None  # its graph is not held while units are measured
        with grad_mode(False):
            full = target_values(measured, trace.rows).t()
            room = self.footprint(trace.inputs).after(room)
            ablate = partial(self._ablated, trace, measured, room=room)
            effects = effects_of_units(found, ablate, effort)
        values = {site.name: own for site, own in zip(self.sites, effects.values, strict=True)}
        samples = () if effects.sample is None else (effects.sample,)
        none: dict[str, float | None] = dict.fromkeys(values)
        return Attribution(values, full, {}, {}, dict.fromkeys(values, 0), none, effects.exact, samples)

    def _neuron_path(self, trace: Trace, target: Target, full: Tensor, room: int) -> Attribution:
        units = [(i, k) for i, site in enumerate(self.sites) for k in range(site.width)]
        effects = self._ablate(trace, target, units, room).split([site.width for site in self.sites], 2)
        values = {site.name: own for site, own in zip(self.sites, effects, strict=True)}
        return Attribution(values, full, {}, {}, dict.fromkeys(values, 0), dict.fromkeys(values))

    def _ablate(self, trace: Trace, target: Target, units: Sequence[Unit], room: int) -> Tensor:
        """``[Q, B, n]``: each unit for all examples."""
        every, owners = torch.tensor(units).repeat_interleave(trace.batch, 0), torch.arange(trace.batch)
        effects = self._ablated(trace, target, every, owners.repeat(len(units)), room)
        return effects.unflatten(1, (len(units), trace.batch)).transpose(1, 2)

    def _ablated(self, trace: Trace, target: Target, units: Tensor, owners: Tensor, room: int) -> Tensor:
        at_once = trace.batch * self.footprint(trace.inputs).rows_forward(room, trace.batch)
        return ablated(trace, target, units, owners, at_once, progress=self.progress)

    def _gated(self, trace: Trace, target: Target, units: Sequence[Unit], gates: Tensor, room: int) -> Tensor:
        at_once = self.footprint(trace.inputs).rows_forward(room, trace.batch)
        return gated(trace, target, units, gates, at_once)


def _of_block(effort: Effort, trace: Trace, batch: int) -> Effort:
    """The effort for a block of a batch's examples: its share of the draws, which are its own."""
    if not effort.measures:
        return effort
    audit = -(-effort.audit * trace.batch // batch)
    return replace(effort, audit=audit, seed=effort.seed + int(trace.rows.example[0]) * APART)
