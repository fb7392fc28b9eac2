"""A model as a differentiable function of its neurons' gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from spurge.engine.base.gradients import grad_mode, without_gradients
from spurge.engine.base.temporary import Temporaries, temporary
from spurge.engine.cascade.cascade import Rows
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import in_this_thread
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.projections import RowGates
from spurge.engine.models.sites import Site, Units
from spurge.methods.macu.objectives import Job


class GatedPass:
    """The model under gates, as a function of them."""

    def __init__(self, handle: Handle, neurons: NeuronSet, row: AttentionRow | None, last: list[Tensor]):
        self.handle, self.row, self._last = handle, row, last
        self.gates: Tensor | None = None
        self._slices: dict[str, slice] = {}
        start = 0
        for site, count in neurons.counts().items():
            self._slices[site] = slice(start, start + count)
            start += count
        self._indices = {site: neurons.indices(site) for site in self._slices}
        self._predicted: dict[int, Tensor] = {}

    def on(self, site: Site) -> RowGates | None:
        """The gates of one site now; None in the unedited model."""
        if self.gates is None:
            return None
        return RowGates(self._indices[site.name], self.gates[self._slices[site.name]][None])

    def rows(self, job: Job, gates: Tensor | None, predicted: Tensor) -> Rows:
        self.gates = gates
        if self.row is not None:
            self._last[:] = [self.handle.probed(job.inputs)]
        logits = self.handle.logits(job.inputs).float()
        attention = self.row.row().to(logits.device) if self.row is not None else None
        return Rows(logits, attention, torch.arange(len(logits), device=logits.device), predicted)

    def value(self, job: Job, gates: Tensor | None) -> Tensor:
        return job.target(self.rows(job, gates, self._unedited(job)))

    def _unedited(self, job: Job) -> Tensor:
        """What the unedited model predicts, ``[B]``; only targets that read attention ask for it."""
        if self.row is None:
            return torch.full_like(job.labels, -1)
        if id(job) not in self._predicted:
            with grad_mode(False):
                self._predicted[id(job)] = self.rows(job, None, job.labels).logits.argmax(1)
        return self._predicted[id(job)]

    @without_gradients
    def mean(self, jobs: Sequence[Job], gates: Tensor | None) -> float:
        """Weighted mean of the target over all rows of ``jobs``, added in float64."""
        total = sum(float((job.weights * self.value(job, gates)).double().sum()) for job in jobs)
        return total / sum(float(job.weights.sum()) for job in jobs)


@temporary
def gated_pass(
    handle: Handle, neurons: NeuronSet, *, attention: bool = False, units: Units = "neurons"
) -> Iterator[GatedPass]:
    """Hooks that multiply the activations of ``neurons`` by gates that may carry gradients; gone after the block."""
    last: list[Tensor] = []
    with Temporaries() as stack:
        row = None
        if attention:
            if handle.sites[-1].attention is None:
                raise ValueError("model: its last layer has no attention to read")
            row = stack.enter_context(AttentionRow(handle.sites[-1].attention, lambda rows: last[0]))
        run = GatedPass(handle, neurons, row, last)
        chosen = set(neurons.sites)
        for site in handle.sites_of(units):
            if site.name in chosen:
                stack.enter_context(site.projection.gate(in_this_thread(partial(run.on, site))))
        yield run
