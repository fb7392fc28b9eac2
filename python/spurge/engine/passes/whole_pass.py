"""Run a model whole for every question: what works for any model whose rows do not depend on each other.

A model that cannot be entered in the middle (layers that run more than once, work between layers, an encoder and a
decoder) is run from its inputs on, with the activations of each group of rows multiplied at the sites, in every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spurge import ops
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import Temporaries, temporary
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.call_arguments import main_input, split_call
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import configurations, for_rows, hook_before, in_this_thread
from spurge.engine.models.projections import RowGates, by_unit
from spurge.engine.models.readout import Readout, token_mask
from spurge.engine.models.sites import Site
from spurge.engine.passes.norm_placement import by_rows
from spurge.engine.passes.trace import Off, Owners, Rows, Share, Trace, unedited_rows

# How far two ways to the same logits may lie apart, of the largest one: what TF32 leaves, and half precision in depth.
_APART, _HALF_APART = 1e-3, 0.1


def unlike(got: Tensor, want: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether two ways of computing logits differ by more than rounding: a bool scalar.

    Args:
        dtype: of the model.
    """
    slack = _HALF_APART if dtype in (torch.bfloat16, torch.float16) else _APART
    return ~((got - want).abs().max() <= slack * want.abs().max())


def disturbed(hidden: Tensor, where: Tensor) -> Tensor:
    """Hidden states ``[R, T, H]`` with others where ``where`` ``[R, T]`` is true, in a way that no norm takes away."""
    ramp = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    return hidden + where.to(hidden)[..., None] * ramp * hidden.abs().amax().clamp_min(1)


class ScaledRows:
    """Rows whose activations are multiplied on their way through the model, in every call of a site.

    Args:
        trace: the unedited pass over the same batch.
        sites: of the model.
        spans: site -> the group of B rows where its own begin, and what multiplies each of its groups, ``[m]``.
        times: groups of rows in all.
    """

    def __init__(self, trace: Trace, sites: Sequence[Site], spans: Mapping[int, tuple[int, Tensor]], times: int):
        self._trace, self._sites, self._spans, self._times = trace, sites, spans, times
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in spans}  # z and output of each call
        self._versions: list[tuple[Tensor, int]] = []

    @property
    def leaves(self) -> list[Tensor]:
        """The down projections' outputs, ``[R, T, H]`` for each call of each site."""
        return [output for calls in self._seen.values() for _, output in calls]

    @temporary
    def acting(self) -> Iterator[None]:
        """The model scales rows inside the ``with`` block."""
        with Temporaries() as stack:
            for i in self._spans:
                stack.enter_context(self._sites[i].projection.watch(partial(self._scale, i)))
            yield

    def _scale(self, i: int, z: Tensor, o: Tensor, rest: Tensor | None) -> Tensor:
        start, alphas = self._spans[i]
        batch = self._trace.batch
        shift = torch.zeros(self._times, dtype=torch.float64)
        shift[start : start + len(alphas)] = alphas.cpu() - 1
        u = o if rest is None else o - rest
        by_row = by_rows(o, self._times * batch)
        each = shift.repeat_interleave(batch).view(-1, *[1] * (by_row.dim() - 1))
        rows = torch.addcmul(by_row, by_rows(u.expand_as(o), self._times * batch), each.to(o))
        if not torch.is_grad_enabled():
            return rows.view_as(o)
        rows = rows if rows.requires_grad else rows.requires_grad_()
        own = by_rows(z.detach(), self._times * batch)[self._own(i)]
        self._seen[i].append((own, rows))
        self._versions.append((own, own._version))
        return rows.view_as(o).clone()  # which the model may write into

    def _own(self, i: int) -> slice:
        start, alphas = self._spans[i]
        return slice(start * self._trace.batch, (start + len(alphas)) * self._trace.batch)

    def scores(
        self, grads: Sequence[Tensor | None], shares: Mapping[int, Sequence[Share]]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """As `Opened.scores`.

        Raises:
            ValueError: the model wrote into its activations behind a site.
        """
        if any(z._version != version for z, version in self._versions):
            raise ValueError(f"model: {type(self._trace.forward.model).__name__} writes into activations it has used")
        left = list(grads)
        for i, calls in self._seen.items():
            groups = [len(share.weights) * self._trace.batch for share in shares[i]]
            projection = self._sites[i].projection
            size = self._sites[i].width * projection.size
            whole = torch.zeros(sum(groups), size, device=self._sites[i].parameter.device)
            for z, _ in calls:
                grad = left.pop(0)
                if grad is not None:
                    pulled = projection.pull(grad[self._own(i)].to(z.dtype))
                    whole = whole.to(z.device) + ops.multiply_sum(pulled.flatten(1, -2), z.flatten(1, -2), None).float()
            parts = by_unit(whole, projection.size).split(groups)
            yield i, [ops.node_sum(part, share.weights) for part, share in zip(parts, shares[i], strict=True)]


class WholePass:
    """A model that is run whole for each group of rows; answers what `Forward` does.

    Args:
        handle, attention, sites, read: as for `PartialForward`.

    Raises:
        ValueError: an attention row is wanted of a model with an encoder and a decoder.
    """

    def __init__(self, handle: Handle, *, attention: bool = False, sites: Sequence[Site] | None = None, read: int = 1):
        self.handle, self.model, self.readout = handle, handle.model, Readout(handle.head, read)
        self.sites = list(handle.sites if sites is None else sites)
        self.blocks = list({id(site.block): site.block for site in handle.sites}.values())
        self.block_of = [-1] * len(self.sites)
        self.attention = attention
        if attention and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"attention: {type(self.model).__name__} has an encoder and a decoder, expected a model with one text"
            )
        self._proven: set[Any] = set()  # shapes of inputs
        self._configs = configurations(self.model)

    def trace(self, inputs: Mapping[str, Any], example: Tensor | None = None, *, differentiable: bool = False) -> Trace:
        """Run the unedited model once.

        Args:
            inputs: keyword arguments of the model; tensors lead with the batch dimension B.
            example: how targets number these examples, ``[B]``; 0 to B - 1 by default.
            differentiable: gradients of the unedited pass are not kept: its rows are run as any others.

        Raises:
            ValueError: the rows of a batch depend on each other.
        """
        inputs = {name: value for name, value in inputs.items() if name != "use_cache"}
        position = self.handle.probed(inputs)
        with grad_mode(False):
            logits, attention = self._logits(inputs, position)
        rows = unedited_rows(logits, attention, example)
        trace = Trace(inputs, len(main_input(inputs)), position, rows, self)
        shape = [(name, tuple(value.shape)) for name, value in inputs.items() if torch.is_tensor(value)]
        if tuple(shape) not in self._proven:
            self._prove(trace, logits.dtype)
            self._proven.add(tuple(shape))
        trace.padding_acts = self._padding_acts(trace, logits.dtype)
        return trace

    def _prove(self, trace: Trace, dtype: torch.dtype) -> None:
        """Rows of one pass have to be what they are alone: unedited ones beside others with all sites erased."""
        every = range(len(self.sites))
        off, beside = (torch.tensor([alpha], dtype=torch.float64) for alpha in (0.0, 1.0))
        with grad_mode(False):
            alone = self._scaled(trace, dict.fromkeys(every, (0, off)), 1)[0].logits
            both = self._scaled(trace, dict.fromkeys(every, (0, torch.cat([beside, off]))), 2)[0].logits
        if trace.rows.logits.isfinite().all() and unlike(both, torch.cat([trace.rows.logits, alone]), dtype):
            raise ValueError(
                f"model: {type(self.model).__name__} mixes the rows of a batch or orders them anew, expected each "
                "row's logits to depend on its own inputs"
            )

    def _padding_acts(self, trace: Trace, dtype: torch.dtype) -> bool:
        """Whether the logits change where the hidden states at padding do."""
        mask = token_mask(trace.inputs)
        if mask is None or bool(mask.all()):
            return False

        def disturb(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            hidden, rest, named = split_call(args, kwargs)
            if hidden.shape[:2] != mask.shape:
                return None
            changed = disturbed(hidden, ~mask)
            return ((changed, *rest), named) if args else (rest, {**named, "hidden_states": changed})

        with hook_before(self.blocks[0], disturb), grad_mode(False):
            logits, _ = self._logits(trace.inputs, trace.position)
        return bool(unlike(logits.float(), trace.rows.logits, dtype))

    def opened(self, trace: Trace, alphas: Mapping[int, Tensor]) -> tuple[Rows, ScaledRows]:
        """As `Forward.opened`."""
        spans, times = {}, 0
        for i in sorted(alphas):
            spans[i] = (times, alphas[i])
            times += len(alphas[i])
        return self._scaled(trace, spans, times)

    def scaled(self, trace: Trace, alphas: Tensor) -> tuple[Rows, ScaledRows]:
        """As `Forward.scaled`."""
        return self._scaled(trace, dict.fromkeys(range(len(self.sites)), (0, alphas)), len(alphas))

    def without(self, trace: Trace, off: Mapping[int, Off]) -> Rows:
        """As `Forward.without`."""
        rows, start, gates = sum(len(own.units) for own in off.values()), 0, {}
        for i in sorted(off):
            columns, place = off[i].units.unique(return_inverse=True)
            values = torch.ones(rows, len(columns))
            values[torch.arange(start, start + len(place)), place] = 0
            start += len(place)
            gates[i] = RowGates(columns, values)
        return self._gated(trace, gates, Owners(trace.batch, rows, torch.cat([off[i].owners for i in sorted(off)])))

    def gated(self, trace: Trace, gates: Mapping[int, RowGates]) -> Rows:
        """As `Forward.gated`."""
        times = max(len(on.values) for on in gates.values())
        return self._gated(trace, gates, Owners(trace.batch, times * trace.batch))

    def _gated(self, trace: Trace, gates: Mapping[int, RowGates], owners: Owners) -> Rows:
        with Temporaries() as stack:
            for i, given in gates.items():
                on = given.to(self.sites[i].parameter.device)
                stack.enter_context(self.sites[i].projection.gate(in_this_thread(lambda on=on: on)))
            return trace.rows.of(owners, *self._logits(owners.inputs(trace.inputs), owners.take(trace.position)))

    def _scaled(self, trace: Trace, spans: Mapping[int, tuple[int, Tensor]], times: int) -> tuple[Rows, ScaledRows]:
        scaled, owners = ScaledRows(trace, self.sites, spans, times), Owners(trace.batch, times * trace.batch)
        with scaled.acting():
            rows = trace.rows.of(owners, *self._logits(owners.inputs(trace.inputs), owners.take(trace.position)))
        return rows, scaled

    def _logits(self, inputs: Mapping[str, Any], position: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the attention row where it is wanted, of a pass over rows."""
        with Temporaries() as stack:
            row, last = None, self.handle.sites[-1].attention
            if self.attention and last is not None:
                row = stack.enter_context(AttentionRow(last, lambda rows: position))
            stack.enter_context(for_rows(self._configs))
            logits = self.readout.logits(lambda: self.model(**inputs), position)
            return logits, None if row is None else row.row().to(logits.device)
