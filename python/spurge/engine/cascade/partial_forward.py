"""Run a model again from any of its layers, with rows of one's own.

A transformer is entered behind a layer instead of at its input: layers below the entry do not run, rows may join the
batch behind any later layer, and the model's own code does everything else (masks, rotary tables, final norm, head).
Rows are ordered so that row ``r`` belongs to example ``r % B``; what the model computes once per example, such as a
padding mask, is therefore right for any number of leading rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import Temporaries, within
from spurge.engine.cascade.norm_placement import Anatomy, NormPlacement, layer_anatomy
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.call_arguments import at, cut, first, leading, like, main_input, repeat_rows, split_call, take
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import (
    WideAttention,
    hook,
    hook_before,
    in_this_thread,
    replaced_forward,
)
from spurge.engine.models.projections import RowGates
from spurge.engine.models.readout import Readout
from spurge.engine.models.sites import Site


@dataclass(frozen=True)
class Rows:
    """What a target sees of R rows of one forward pass.

    Attributes:
        logits: ``[R, Y]``, float32; of a language model over its vocabulary, after the probed token; ``[R, K, V]``
            after the last K real tokens where more than one is read.
        attention: head-mean attention of the probed token over the positions, ``[R, T]`` float32, where asked for.
        example: which example of the batch each row belongs to, ``[R]``.
        predicted: the class (the next token) the unedited model predicts for that example, ``[R]``.
    """

    logits: Tensor
    attention: Tensor | None
    example: Tensor
    predicted: Tensor


Target = Callable[[Rows], Tensor]


def predicted_logit(rows: Rows) -> Tensor:
    """The logit of the class that the unedited model predicts, ``[R]``: the usual target of integrated gradients."""
    logits = rows.logits if rows.logits.dim() == 2 else rows.logits[:, -1]
    return logits.gather(1, rows.predicted[:, None])[:, 0]


@dataclass
class SiteTrace:
    """What the unedited pass left at one site. T is 1 in a last layer that computes only the probed token.

    ``anchor`` is where rows open: the layer's output (residual), the sum before its closing norm (post_norm), or the
    down projection's output itself (sandwich, replay).
    """

    z: Tensor  # [B, T, F] activations, the input of the down projection
    u: Tensor  # [B, T, H] its output without the bias
    anchor: Tensor  # [B, T, H]
    rest: Tensor | None = None  # [B, T, H] sandwich: layer output minus the normed branch


@dataclass(frozen=True)
class Call:
    """What a block was called with: the leading dimensions of its arguments, and its hidden states for a replay."""

    args: Any
    kwargs: Any
    hidden: Tensor | None


@dataclass
class Trace:
    """The unedited pass over a batch: computed once, entered many times."""

    inputs: dict[str, Any]
    batch: int
    position: Tensor  # [B] the probed token
    rows: Rows
    sites: list[SiteTrace]
    calls: list[Call]  # one per block
    anatomy: Anatomy
    outputs: list[Tensor]  # of each down projection, [B, T, H], in the rows' graph; empty without gradients


class PartialForward:
    """A model prepared to be entered behind any layer.

    Args:
        handle: of a ``transformers`` model whose output has ``logits``.
        attention: capture the attention row of the probed token in the last layer.
        sites: where rows may open; all sites of the model by default. Every block runs whether it has one or not.
        read: how many of the last real tokens a language model is read at.

    Raises:
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
        self.block_of = [order[id(site.block)] for site in self.sites]
        self.attention = attention
        self.pruned = False  # the last layer computes only the probed token
        self.narrow = False  # and what follows it takes that token alone
        self._last = every[-1]
        reads = {site.ffn for site in every if site.block is self.blocks[-1]}
        self._reads_once = len(reads) == 1 and None not in reads
        weight = every[-1].parameter
        self._half_on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
        self._anatomy: Anatomy | None = None

    def _anatomy_for(self, inputs: Mapping[str, Any]) -> Anatomy:
        if self._anatomy is None:
            one = take(inputs, slice(0, 1))
            anatomy = layer_anatomy(self.model, self.blocks, self.sites, one)
            if main_input(inputs).shape[1] == 1:  # one token says nothing about the others
                return anatomy
            self._anatomy = anatomy
            self._prune(one, possible=self._prunable(anatomy) and self.readout.tokens == 1)
        return self._anatomy

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
        disturbed = hidden + 1
        disturbed[torch.arange(len(hidden)), position.to(hidden.device)] = at(hidden, position)[:, 0]
        self.pruned = possible and torch.equal(before, after(disturbed)) and self._shows_attention(inputs, position)
        if self.pruned and self.readout.head is not None:
            try:
                alone = after(at(hidden, position))
            except (RuntimeError, IndexError):  # GPT-2 restores the shape of its input first
                return
            slack = 64 * torch.finfo(before.dtype).eps * before.abs().max()
            self.narrow = alone.shape == before.shape and bool((alone - before).abs().max() <= slack)

    def _shows_attention(self, inputs: Mapping[str, Any], position: Tensor) -> bool:
        """Whether the last layer's attention can be cut to one row (none: there is nothing to cut)."""
        if self._last.attention is None:
            return True
        try:
            with AttentionRow(self._last.attention, lambda rows: position, prune=True), grad_mode(False):
                self._logits(inputs, position)
        except ValueError:
            return False
        return True

    def _logits(self, inputs: Mapping[str, Any], position: Tensor) -> Tensor:
        with within(WideAttention()) if self._half_on_cpu else nullcontext():
            return self.readout.logits(lambda: self.model(**inputs), position)

    # ---- the unedited pass -------------------------------------------------------------------------------------

    def trace(self, inputs: Mapping[str, Any], example: Tensor | None = None, *, differentiable: bool = False) -> Trace:
        """Run the unedited model once and keep what is needed to enter it again.

        Args:
            inputs: keyword arguments of the model; tensors lead with the batch dimension B.
            example: how targets number these examples, ``[B]``; 0 to B - 1 by default.
            differentiable: let gradients flow from the rows to each down projection's output, ``Trace.outputs``.
        """
        inputs = dict(inputs)
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            inputs["use_cache"] = False  # a layer may run several times on different rows
        batch = len(main_input(inputs))
        position = self.handle.probed(inputs)
        anatomy = self._anatomy_for(inputs)
        seen: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(self.sites))}
        calls: list[Call] = []
        replays = {self.block_of[i] for i, placement in enumerate(anatomy.placements) if placement.kind == "replay"}

        outputs: dict[int, Tensor] = {}

        def watch(i: int, z: Tensor, o: Tensor, rest: Tensor | None) -> Tensor:
            rows, still = _by_row(o, batch), o.detach()
            u = still if rest is None else still - rest.detach()
            seen[i].update(z=_by_row(z.detach(), batch), o=_by_row(still, batch), u=_by_row(u, batch))
            if differentiable:
                outputs[i] = rows if rows.requires_grad else rows.requires_grad_()
            return rows.view_as(o)

        with Temporaries() as stack, grad_mode(differentiable):
            row = self._last_layer(stack, lambda rows: position)
            for i, (site, placement) in enumerate(zip(self.sites, anatomy.placements, strict=True)):
                keep = seen[i]
                stack.enter_context(site.projection.watch(partial(watch, i)))
                stack.enter_context(hook(site.block, lambda m, a, o, k=keep: k.update(out=first(o).detach())))
                if placement.kind == "post_norm":
                    stack.enter_context(hook(placement.norm, lambda m, a, o, k=keep: k.update(s=a[0].detach())))
            for index, block in enumerate(self.blocks):

                def remember(module: nn.Module, args: tuple, kwargs: dict, keep: bool = index in replays) -> None:
                    hidden, args, kwargs = split_call(args, kwargs)
                    calls.append(Call(leading(args), leading(kwargs), hidden.detach() if keep else None))

                stack.enter_context(hook_before(block, remember))
            logits = self._logits(inputs, position)
            attention = row.row().to(logits.device) if row is not None else None

        example = torch.arange(batch) if example is None else example
        predicted = (logits if logits.dim() == 2 else logits[:, -1]).argmax(1)
        rows = Rows(logits.float(), attention, example.to(logits.device), predicted)
        sites = [
            self._site_trace(site, placement, seen[i], position)
            for i, (site, placement) in enumerate(zip(self.sites, anatomy.placements, strict=True))
        ]
        return Trace(inputs, batch, position, rows, sites, calls, anatomy, [outputs[i] for i in sorted(outputs)])

    def _site_trace(self, site: Site, placement: NormPlacement, seen: dict[str, Tensor], position: Tensor) -> SiteTrace:
        o, u, out = seen["o"], seen["u"], seen["out"]

        def pick(hidden: Tensor) -> Tensor:
            return at(hidden, position) if self.pruned and site.block is self.blocks[-1] else hidden

        if placement.kind == "residual":
            return SiteTrace(seen["z"], u, pick(out))
        if placement.kind == "post_norm":
            return SiteTrace(seen["z"], u, pick(seen["s"]))
        if placement.kind == "sandwich":
            with grad_mode(False):
                return SiteTrace(seen["z"], u, o, pick(out) - placement.norm(o))
        return SiteTrace(seen["z"], u, o)

    # ---- entering it again -------------------------------------------------------------------------------------

    def run(
        self,
        trace: Trace,
        openings: Mapping[int, Tensor],
        *,
        inside: Mapping[int, RowGates] | None = None,
    ) -> Rows:
        """Run the model from the first opening on.

        Args:
            trace: the unedited pass over the same batch.
            openings: site index -> rows that open there, ``[m * B, T, H]``, in the place of the site's anchor.
            inside: site index -> what multiplies that site's activations in rows opened below it (and in those that
                run its own block again).

        Returns:
            All rows after the head, those of earlier sites first; gradients flow back to ``openings``.
        """
        batch, gates = trace.batch, dict(inside or {})
        total = sum(rows.shape[0] for rows in openings.values())
        times = total // batch
        opened: dict[int, list[int]] = {}
        for i in sorted(openings):
            opened.setdefault(self.block_of[i], []).append(i)
        entry, end = min(opened), len(self.blocks) - 1
        live: list[Tensor] = []  # the rows on their way, at most one tensor

        def wrap(index: int, hidden: Tensor) -> Any:
            length = trace.anatomy.tuples[index]
            return (hidden, *[None] * (length - 1)) if length else hidden

        def entered(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def behind(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = split_call(args, kwargs)
                if index < entry:
                    return wrap(index, hidden)
                call = trace.calls[index]

                def step(rows: Tensor) -> Tensor:
                    n = rows.shape[0]
                    output = first(
                        forward(
                            rows,
                            *cut(args, call.args, batch, total, n),
                            **cut(kwargs, call.kwargs, batch, total, n),
                        )
                    )
                    return at(output, trace.position.repeat(n // batch)) if self.pruned and index == end else output

                parts = [step(live.pop())] if live else []
                parts += [self._emerge(i, openings[i], trace, call, step) for i in opened.get(index, ())]
                rows = torch.cat(parts) if len(parts) > 1 else parts[0]
                if index < end:
                    live.append(rows)
                    return wrap(index, hidden)
                return wrap(index, rows if self.narrow else rows.expand(-1, hidden.shape[1], -1))

            return behind

        with Temporaries() as stack:
            row = self._last_layer(stack, lambda rows: trace.position.repeat(rows // batch))
            for i in gates:
                stack.enter_context(self.sites[i].projection.gate(in_this_thread(partial(gates.get, i))))
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, entered(index, block.forward)))
            repeated = {k: repeat_rows(v, batch, times) for k, v in trace.inputs.items()}
            logits = self._logits(repeated, trace.position.repeat(times))
            attention = trace.rows.attention
            if (
                row is not None and attention is not None
            ):  # rows that open behind the last layer attend as the unedited model does
                late = sum(openings[i].shape[0] for i in opened.get(end, ())) // batch
                parts = [row.row().to(logits.device)] if late < times else []
                attention = torch.cat([*parts, *[attention] * late])
        return self._rows(trace, times, logits, attention)

    def scaled(self, trace: Trace, alphas: Tensor) -> tuple[Rows, list[Tensor], list[Tensor]]:
        """Run the whole model with every site's activations scaled together, one row per node and example.

        Args:
            alphas: ``[S]``.

        Returns:
            The rows (node-major), each site's activations ``[S * B, T, F]`` before scaling, and each down projection's
            output after it, ``[S * B, T, H]``: differentiable, the first one a leaf.
        """
        times, count = len(alphas), len(alphas) * trace.batch
        shift = (alphas - 1).repeat_interleave(trace.batch)[:, None, None]
        z: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}

        def scale(i: int, active: Tensor, o: Tensor, rest: Tensor | None) -> Tensor:
            z[i] = _by_row(active.detach(), count)
            u = o if rest is None else o - rest
            rows = torch.addcmul(_by_row(o, count), _by_row(u, count), shift.to(o))
            outputs[i] = rows if rows.requires_grad or not torch.is_grad_enabled() else rows.requires_grad_()
            return outputs[i].view_as(o)

        with Temporaries() as stack:
            row = self._last_layer(stack, lambda rows: trace.position.repeat(rows // trace.batch))
            for i, site in enumerate(self.sites):
                stack.enter_context(site.projection.watch(partial(scale, i)))
            repeated = {k: repeat_rows(v, trace.batch, times) for k, v in trace.inputs.items()}
            logits = self._logits(repeated, trace.position.repeat(times))
            attention = row.row().to(logits.device) if row is not None else None
        order = range(len(self.sites))
        return self._rows(trace, times, logits, attention), [z[i] for i in order], [outputs[i] for i in order]

    def _rows(self, trace: Trace, times: int, logits: Tensor, attention: Tensor | None) -> Rows:
        return Rows(logits.float(), attention, trace.rows.example.repeat(times), trace.rows.predicted.repeat(times))

    def _emerge(self, i: int, rows: Tensor, trace: Trace, call: Call, step: Callable[[Tensor], Tensor]) -> Tensor:
        """Carry rows from their site's anchor to the output of its block."""
        placement, seen, times = trace.anatomy.placements[i], trace.sites[i], rows.shape[0] // trace.batch
        if call.hidden is not None and placement.kind == "replay":
            with hook(self.sites[i].down, lambda module, args, output: rows.reshape(output.shape)):
                return step(call.hidden.repeat(times, 1, 1))
        rows = placement.norm(rows)
        return rows if seen.rest is None else rows + seen.rest.repeat(times, 1, 1)

    def _last_layer(self, stack: Temporaries, position: Callable[[int], Tensor]) -> AttentionRow | None:
        """Capture the probed attention row; where the head reads nothing else, compute only the probed token."""
        site = self._last
        row = None
        if site.attention is not None and (self.attention or self.pruned):
            row = stack.enter_context(AttentionRow(site.attention, position, prune=self.pruned))
        if self.pruned:

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


def _check_loaded(site: Site) -> None:
    if site.parameter.is_meta:
        raise ValueError(
            f"model: the weights of {site.name!r} are not in memory (offloaded or not loaded), expected them where "
            "the layer runs: load the model with a device_map that offloads nothing to the CPU or the disk"
        )


def _by_row(values: Tensor, rows: int) -> Tensor:
    """``[R, T, ...]`` of what a module sees with the tokens of all rows in one dimension; anything else as it is."""
    return values.unflatten(0, (rows, -1)) if values.dim() == 2 else values
