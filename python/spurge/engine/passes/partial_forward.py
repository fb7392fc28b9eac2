"""Run a model again from any of its layers, with rows of one's own.

A transformer is entered behind a layer instead of at its input: layers below the entry do not run, rows may join the
batch behind any later layer, and the model's own code does everything else (masks, rotary tables, final norm, head).
Rows are ordered so that row ``r`` belongs to example ``r % B``; what the model computes once per example, such as a
padding mask, is therefore right for any number of leading rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.device_checks import deferring, require
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import Temporaries, within
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.call_arguments import at, cut, first, leading, like, main_input, split_call, take
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import (
    WideAttention,
    configurations,
    for_rows,
    hook,
    hook_before,
    in_this_thread,
    replaced_forward,
)
from spurge.engine.models.projections import RowGates
from spurge.engine.models.readout import Readout, token_mask
from spurge.engine.models.sites import Site
from spurge.engine.passes.norm_placement import Anatomy, NormPlacement, NotEntered, check_once, layer_anatomy
from spurge.engine.passes.openings import Kept, Openings, emerge, entries, moved, placed, without
from spurge.engine.passes.trace import Call, Off, Owners, Rows, SiteTrace, Trace, padding_complaint, unedited_rows
from spurge.engine.passes.whole_pass import ScaledRows, disturbed, unlike


class PartialForward:
    """A model prepared to be entered behind any layer.

    Args:
        handle: of a ``transformers`` model whose output has ``logits``.
        attention: capture the attention row of the probed token in the last layer.
        sites: where rows may open; all sites of the model by default. Every block runs whether it has one or not.
        read: how many of the last real tokens a language model is read at.

    Raises:
        NotEntered: a site outside the model's layers.
        ValueError: the weights of a site are offloaded or not loaded.
    """

    def __init__(self, handle: Handle, *, attention: bool = False, sites: Sequence[Site] | None = None, read: int = 1):
        self.handle, self.model, self.readout = handle, handle.model, Readout(handle.head, read)
        every = handle.sites
        self.sites = list(sites) if sites is not None else every
        for site in self.sites:
            _check_loaded(site)
        self.blocks = list({id(site.block): site.block for site in every}.values())
        order = {id(block): i for i, block in enumerate(self.blocks)}
        outside = [site.name for site in self.sites if id(site.block) not in order]
        if outside:
            raise NotEntered(f"{outside[0]!r} is outside its layers")
        self.block_of = [order[id(site.block)] for site in self.sites]
        self.attention = attention
        self.pruned = False  # rows compute only the probed token in the last layer
        self.narrow = False  # and what follows it takes that token alone
        self._copies = False  # the model writes into what the unedited pass leaves
        self._proven: set[Any] = set()  # shapes of inputs
        self._configs = configurations(self.model)
        self._last = every[-1]
        reads = {site.ffn for site in every if site.block is self.blocks[-1]}
        self._reads_once = len(reads) == 1 and None not in reads
        weight = every[-1].parameter
        self._half_on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
        self._anatomy: Anatomy | None = None

    def _anatomy_for(self, inputs: Mapping[str, Any]) -> Anatomy:
        if self._anatomy is None:
            one = take(inputs, slice(0, 1))
            anatomy = self._anatomy_of(one)
            if main_input(inputs).shape[1] == 1:  # one token says nothing about the others
                return anatomy
            self._anatomy = anatomy
            self._prune(one, possible=self._prunable(anatomy) and self.readout.tokens == 1)
        return self._anatomy

    def _anatomy_of(self, one: Mapping[str, Any]) -> Anatomy:
        with for_rows(self._configs):
            return layer_anatomy(self.model, self.blocks, self.sites, one)

    def _prunable(self, anatomy: Anatomy) -> bool:
        """Whether the feed-forward layer of the last block can compute one token: all its sites read one input."""
        ends = [
            placement
            for site, placement in zip(self.sites, anatomy.placements, strict=True)
            if site.block is self.blocks[-1]
        ]
        return self._reads_once and not any(placement.kind == "replay" for placement in ends)

    def _prune(self, inputs: Mapping[str, Any], *, possible: bool) -> None:
        """Find out whether the head reads the probed token alone: the logits stay, bit for bit, when others change."""
        position = self.handle.probed(inputs)
        outputs: list[Any] = []
        with Temporaries() as stack, grad_mode(False):
            for block in self.blocks:
                stack.enter_context(hook(block, lambda module, args, output: outputs.append(output)))
            before = self._logits(inputs, position)

        def after(hidden: Tensor) -> Tensor:
            ends = [*outputs[:-1], like(outputs[-1], hidden)]
            with Temporaries() as stack, grad_mode(False):
                for block, output in zip(self.blocks, ends, strict=True):
                    stack.enter_context(replaced_forward(block, lambda *args, o=output, **kwargs: o))
                return self._logits(inputs, position)

        hidden = first(outputs[-1])
        others = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        others[torch.arange(len(hidden)), position.to(hidden.device)] = False
        self.pruned = (
            possible and torch.equal(before, after(disturbed(hidden, others))) and self._computes_one(inputs, position)
        )
        if self.pruned and self.readout.head is not None:
            try:
                alone = after(at(hidden, position))
            except (RuntimeError, IndexError):  # GPT-2 restores the shape of its input first
                return
            self.narrow = alone.shape == before.shape and not bool(unlike(alone, before, before.dtype))

    def _computes_one(self, inputs: Mapping[str, Any], position: Tensor) -> bool:
        """Whether the last layer runs on one token: its attention, where there is one, and its feed-forward module."""
        try:
            with Temporaries() as stack, grad_mode(False):
                self._last_layer(stack, lambda rows: position, prune=True)
                self._logits(inputs, position)
        except (ValueError, RuntimeError, IndexError):
            return False
        return True

    def _logits(self, inputs: Mapping[str, Any], position: Tensor) -> Tensor:
        with Temporaries() as stack:
            if self._half_on_cpu:
                stack.enter_context(within(WideAttention()))
            stack.enter_context(for_rows(self._configs))
            return self.readout.logits(lambda: self.model(**inputs), position)

    # ---- the unedited pass -------------------------------------------------------------------------------------

    def trace(self, inputs: Mapping[str, Any], example: Tensor | None = None, *, differentiable: bool = False) -> Trace:
        """Run the unedited model once and keep what is needed to enter it again.

        Args:
            inputs: keyword arguments of the model; tensors lead with the batch dimension B.
            example: how targets number these examples, ``[B]``; 0 to B - 1 by default.
            differentiable: let gradients flow from the rows to each down projection's output, ``Trace.outputs``.

        Raises:
            NotEntered: entered on these inputs, the model does not give the logits that it gives as a whole.
        """
        inputs = {name: value for name, value in inputs.items() if name != "use_cache"}
        try:
            while True:
                trace = self._read(inputs, self._anatomy_for(inputs), example, differentiable)
                if trace is None:
                    self._copies = True
                elif self._proves(trace):
                    return trace
        except (RuntimeError, AttributeError, LookupError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or deferring() or self.handle.mesh is not None:
                raise
            raise NotEntered(f"it runs in a way of its own ({type(error).__name__}: {error})") from error

    def _read(
        self, inputs: dict[str, Any], anatomy: Anatomy, example: Tensor | None, differentiable: bool
    ) -> Trace | None:
        """The unedited pass, or None where the model wrote into what it leaves and no copies were kept."""
        batch, position = len(main_input(inputs)), self.handle.probed(inputs)
        kept = Kept(len(self.sites), batch, copies=self._copies, differentiable=differentiable)
        calls: list[Call] = []
        ran: list[int] = []
        replays = {self.block_of[i] for i, placement in enumerate(anatomy.placements) if placement.kind == "replay"}

        def remember(index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden, args, kwargs = split_call(args, kwargs)
            ran.append(index)
            calls.append(Call(leading(args), leading(kwargs), kept.of(hidden) if index in replays else None))

        with Temporaries() as stack, grad_mode(differentiable):
            row = self._last_layer(stack, lambda rows: position, prune=False)
            for i, (site, placement) in enumerate(zip(self.sites, anatomy.placements, strict=True)):
                stack.enter_context(site.projection.watch(partial(kept.watch, i)))
                stack.enter_context(hook(site.block, lambda m, a, o, i=i: kept.keep(i, out=first(o))))
                if placement.kind == "post_norm":
                    stack.enter_context(hook(placement.norm, lambda m, a, o, i=i: kept.keep(i, s=a[0])))
            for index, block in enumerate(self.blocks):
                stack.enter_context(hook_before(block, partial(remember, index)))
            logits = self._logits(inputs, position)
            attention = row.row().to(logits.device) if row is not None else None

        check_once(ran, len(self.blocks), [(site.name, kept.calls[i]) for i, site in enumerate(self.sites)])
        if kept.changed:
            return None
        sites = [
            self._site_trace(site, placement, kept.seen[i], position)
            for i, (site, placement) in enumerate(zip(self.sites, anatomy.placements, strict=True))
        ]
        if any(len(part.z) != batch or len(part.anchor) != batch for part in sites):
            raise NotEntered("its layers do not lead with the rows")
        return Trace(
            inputs,
            batch,
            position,
            unedited_rows(logits, attention, example),
            self,
            sites=sites,
            calls=calls,
            anatomy=anatomy,
            outputs=[kept.outputs[i] for i in sorted(kept.outputs)],
            pruned=self.pruned,
            narrow=self.narrow,
        )

    def _site_trace(self, site: Site, placement: NormPlacement, seen: dict[str, Tensor], position: Tensor) -> SiteTrace:
        def pick(hidden: Tensor) -> Tensor:
            return at(hidden, position) if self.pruned and site.block is self.blocks[-1] else hidden

        z, u, o = pick(seen["z"]), pick(seen["u"]), pick(seen["o"])
        if placement.kind == "residual":
            return SiteTrace(z, u, pick(seen["out"]))
        if placement.kind == "post_norm":
            return SiteTrace(z, u, pick(seen["s"]))
        if placement.kind == "sandwich":
            with grad_mode(False):
                return SiteTrace(z, u, o, pick(seen["out"]) - placement.norm(o))
        return SiteTrace(z, u, o)

    def _proves(self, trace: Trace) -> bool:
        """Compares the model's own logits with those of rows that open unchanged, but for what stands at padding.

        Inputs of a new shape open at the first site, beside rows of another kind, and before the last layer; others
        there alone. False: the last layer may not be pruned, so that the trace is of no use.
        """
        tensors = {name: value for name, value in trace.inputs.items() if torch.is_tensor(value)}
        shape = (trace.batch > 1, *((name, tuple(value.shape[1:])) for name, value in tensors.items()))
        last = len(self.blocks) - 1
        late = max((i for i, block in enumerate(self.block_of) if block < last), default=0)
        new, mask = shape not in self._proven, token_mask(trace.inputs)
        if deferring() and not new:
            require(~self._differs(trace, late, mask), lambda: padding_complaint(self.model))
            return True
        if self._differs(trace, late, mask, deep=new):
            trace.padding_acts = mask is not None and not bool(self._differs(trace, late, None, deep=new))
            if not trace.padding_acts and trace.pruned:
                self.pruned = self.narrow = False
                self._proven.clear()
                return False
            if not trace.padding_acts:
                raise NotEntered("entered in the middle it gives other logits")
        self._proven.add(shape)
        return True

    def _differs(self, trace: Trace, late: int, mask: Tensor | None, *, deep: bool = False) -> Tensor:
        """Whether unchanged rows give other logits; with a mask, disturbed at padding.

        Args:
            late: the site at which they open.
            deep: and at the first one, before others with a disturbance everywhere.
        """

        def rows(i: int) -> Tensor:
            anchor = trace.sites[i].anchor
            padded = mask is not None and mask.shape == anchor.shape[:2]
            return disturbed(anchor, ~mask.to(anchor.device)) if padded else anchor  # type: ignore[union-attr]

        opened, batch = {late: rows(late)}, trace.batch
        if deep:
            everywhere = torch.ones(trace.sites[0].anchor.shape[:2], dtype=torch.bool, device=rows(0).device)
            others = disturbed(trace.sites[0].anchor, everywhere)
            opened = {0: torch.cat([rows(0), others]), late: rows(late)} if late else {0: torch.cat([rows(0), others])}
        with grad_mode(False):
            logits = self._entered(trace, opened, {}).logits.unflatten(0, (-1, batch))
        own = logits if not deep else logits[[0, 2]] if late else logits[:1]
        return unlike(own, trace.rows.logits[None], opened[late].dtype)

    # ---- entering it again -------------------------------------------------------------------------------------

    def run(
        self,
        trace: Trace,
        openings: Mapping[int, Tensor],
        *,
        inside: Mapping[int, RowGates] | None = None,
        owners: Mapping[int, Tensor] | None = None,
    ) -> Rows:
        """Run the model from the first opening on.

        Args:
            trace: the unedited pass over the same batch.
            openings: site index -> rows that open there, ``[m * B, T, H]``, in the place of the site's anchor.
            inside: site index -> what multiplies that site's activations in rows opened below it (and in those that
                run its own block again).
            owners: site index -> the example of each row that opens there; by default ``r % B``.

        Returns:
            All rows after the head, those of earlier sites first; gradients flow back to ``openings``.
        """
        return self._entered(trace, openings, inside or {}, owners)

    def _entered(
        self,
        trace: Trace,
        openings: Mapping[int, Tensor],
        gates: Mapping[int, RowGates],
        each: Mapping[int, Tensor] | None = None,
    ) -> Rows:
        assert trace.anatomy is not None
        batch, tuples = trace.batch, trace.anatomy.tuples
        places, owners = placed(batch, openings, each)
        opened: dict[int, list[int]] = {}
        for i in places:
            opened.setdefault(self.block_of[i], []).append(i)
        entry, end = min(opened), len(self.blocks) - 1
        running = slice(0, 0)  # the rows in the block that runs
        live: list[Tensor] = []  # the rows on their way, at most one tensor
        attended: list[Tensor] = []  # what those attend to that were on their way before the last layer

        def entered(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def behind(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = split_call(args, kwargs)
                if index < entry:
                    return _output(hidden, tuples[index])
                call = trace.calls[index]

                def step(rows: Tensor, where: slice) -> Tensor:
                    nonlocal running
                    running = where
                    rows = rows.clone() if self._copies else rows
                    output = first(
                        forward(
                            rows,
                            *cut(args, call.args, batch, owners.rows, where),
                            **cut(kwargs, call.kwargs, batch, owners.rows, where),
                        )
                    )
                    return at(output, position(len(rows))) if trace.pruned and index == end else output

                before = slice(0, sum(map(len, live)))
                parts = [step(live.pop(), before)] if live else []
                if parts and index == end and row is not None:
                    attended.append(row.row())  # before rows that open here run the layer again
                for i in opened.get(index, ()):
                    run = partial(step, where=places[i])
                    parts.append(emerge(trace, self.sites, i, openings[i], partial(owners.take, rows=places[i]), run))
                rows = torch.cat(parts) if len(parts) > 1 else parts[0]
                if index < end:
                    live.append(rows)
                    return _output(hidden, tuples[index])
                return _output(rows if trace.narrow else rows.expand(-1, hidden.shape[1], -1), tuples[index])

            return behind

        def position(rows: int) -> Tensor:
            return owners.take(trace.position, running)

        with Temporaries() as stack:
            row = self._last_layer(stack, position, prune=trace.pruned)
            for i in gates:
                stack.enter_context(self.sites[i].projection.gate(in_this_thread(partial(gates.get, i))))
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, entered(index, block.forward)))
            logits = self._logits(owners.inputs(trace.inputs), owners.take(trace.position))
        late = places[opened[end][0]].start if end in opened else owners.rows
        return trace.rows.of(owners, logits, _attention(trace, owners, attended, late))

    def opened(self, trace: Trace, alphas: Mapping[int, Tensor]) -> tuple[Rows, Openings]:
        """As `Forward.opened`."""
        openings = Openings(self.sites, trace, alphas)
        return self.run(trace, openings.rows), openings

    def without(self, trace: Trace, off: Mapping[int, Off]) -> Rows:
        """As `Forward.without`."""
        rows = {i: without(trace, self.sites, i, own) for i, own in off.items()}
        return self.run(trace, rows, owners={i: own.owners for i, own in off.items()})

    def gated(self, trace: Trace, gates: Mapping[int, RowGates]) -> Rows:
        """As `Forward.gated`."""
        inside = {i: on.to(trace.sites[i].z.device) for i, on in sorted(gates.items())}
        first = entries(trace, self.block_of, list(inside))
        opened = moved(trace, self.sites, {i: inside.pop(i) for i in first})
        return self.run(trace, {first[0]: opened}, inside=inside)

    def scaled(self, trace: Trace, alphas: Tensor) -> tuple[Rows, ScaledRows]:
        """As `Forward.scaled`: the whole model runs."""
        times = len(alphas)
        owners = Owners(trace.batch, times * trace.batch)
        scaled = ScaledRows(trace, self.sites, dict.fromkeys(range(len(self.sites)), (0, alphas)), times)
        with Temporaries() as stack:
            row = self._last_layer(stack, lambda rows: trace.position.repeat(rows // trace.batch), prune=trace.pruned)
            stack.enter_context(scaled.acting())
            logits = self._logits(owners.inputs(trace.inputs), owners.take(trace.position))
            attention = row.row().to(logits.device) if row is not None else None
        return trace.rows.of(owners, logits, attention), scaled

    def _last_layer(self, stack: Temporaries, position: Callable[[int], Tensor], *, prune: bool) -> AttentionRow | None:
        """Capture the probed attention row; where the head reads nothing else, compute only the probed token."""
        site = self._last
        row = None
        if site.attention is not None and (self.attention or prune):
            row = stack.enter_context(AttentionRow(site.attention, position, prune=prune))
        if prune:

            def only_probed(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                return (at(args[0], position(args[0].shape[0])), *args[1:]), kwargs

            if site.query is not None:
                length: list[int] = []
                stack.enter_context(hook_before(site.query, lambda m, a, k: length.append(a[0].shape[1])))
                stack.enter_context(hook_before(site.query, only_probed))
                stack.enter_context(hook(site.query, lambda m, a, o: o.expand(-1, length.pop(), -1)))
            for module in (site.attention_output, site.ffn):
                if module is not None:
                    stack.enter_context(hook_before(module, only_probed))
        return row if self.attention else None


def _attention(trace: Trace, owners: Owners, attended: Sequence[Tensor], late: int) -> Tensor | None:
    """Of all rows; those from ``late`` on open behind the last layer and attend as the unedited model does."""
    unedited = trace.rows.attention
    if unedited is None:
        return None
    return torch.cat([own.to(unedited.device) for own in attended] + [owners.take(unedited, slice(late, owners.rows))])


def _output(hidden: Tensor, length: int) -> Any:
    """What a block returns: a tuple of this length, or 0 for the hidden states alone."""
    return (hidden, *[None] * (length - 1)) if length else hidden


def _check_loaded(site: Site) -> None:
    if site.parameter.is_meta:
        raise ValueError(
            f"model: the weights of {site.name!r} are not in memory (offloaded or not loaded), expected them where "
            "the layer runs: load the model with a device_map that offloads nothing to the CPU or the disk"
        )
