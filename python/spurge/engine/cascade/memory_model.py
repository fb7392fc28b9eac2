"""What a cascade takes of memory, measured on one example, and how to cut it into blocks that fit a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import Temporaries, within
from spurge.engine.cascade.meter import Meter
from spurge.engine.models.call_arguments import take
from spurge.engine.models.hooks import frozen, hook, hook_before
from spurge.engine.passes.partial_forward import PartialForward
from spurge.engine.passes.trace import Forward, Trace

MARGIN = 1.1  # allocators round up
HOLES = 2  # times what rows that pass without gradients hold at once: a CPU's heap, measured as 1.8 to 2.2
AGAIN = 1.2  # an allocator that has served one block serves the next, of another size, less well
AGAIN_CPU = 2.3  # the same of a CPU's heap: with blocks of long texts it held 1.4 to 2 times what they need
PACKED_COPIES = 4  # of the largest weight: what a CPU's matrix products keep beside it
CUBLAS_WORKSPACE = 32 * 2**20
CPU_TOKENS = 4096  # tokens of all rows of one block on a CPU; above it activations leave the caches


@dataclass(frozen=True)
class Footprint:
    """Bytes of a cascade over inputs of one shape.

    Where rows join at every layer, each layer's tensors are larger than those of the layer before. An allocator can
    then not put them where temporaries were, and what a layer needs for a moment counts for all layers.

    Attributes:
        block_of: block of each site.
        blocks: L, the layers of the model.
        tokens: T, positions per row.
        trace: kept by the unedited pass, per example.
        saved: kept by autograd, per row and layer.
        spare: needed beside it while a row is in a layer, per row and layer.
        last: both in the last layer, which may compute a single token, per row.
        opened: the row as it opens, and as it goes on.
        head: logits, what a target keeps of them, and the gradients of these, per row.
        row: the hidden states of one row, ``[T, H]``.
        passing: needed at once to run a row through the model without gradients.
        fixed: workspaces of the matrix products, whatever the number of rows.
        cpu: whether blocks should also stay in cache.
    """

    block_of: tuple[int, ...]
    blocks: int
    tokens: int
    trace: int
    saved: int
    spare: int
    last: int
    opened: int
    head: int
    row: int
    passing: int
    fixed: int
    cpu: bool

    def backward(self, sites: Sequence[int], nodes: int, batch: int) -> int:
        """Bytes of a pass with gradients in which ``nodes`` rows per example open at each of ``sites``.

        The gradients of a first target, which stay while those of a second are computed, are among them.
        """
        places = [self.block_of[i] for i in sites]
        layers = sum(max(0, self.blocks - 2 - place) for place in places)  # that rows run through before the last one
        growing = layers if len(set(places)) > 1 else min(layers, len(places))
        ends = sum(place < self.blocks - 1 for place in places)
        rows = layers * (self.saved + self.row) + growing * self.spare + ends * self.last
        return self._bytes(batch, self.trace + nodes * (rows + len(places) * (self.opened + self.head)))

    def scaled(self, nodes: int, batch: int) -> int:
        """Bytes of a pass with gradients in which ``nodes`` rows per example run through all layers, scaled in each."""
        layers = (self.blocks - 1) * (self.saved + self.row) + self.spare + self.last
        return self._bytes(batch, self.trace + nodes * (layers + self.trace + self.opened + self.head))

    def peak(self, cuts: Sequence[tuple[Sequence[int], int]], batch: int) -> int:
        """Bytes of several passes as :meth:`backward`, one after the other: of each its sites and nodes."""
        most = max(self.backward(sites, nodes, batch) for sites, nodes in cuts)
        return int(self._again * most) if len(cuts) > 1 else most

    def forward(self, rows: int, batch: int) -> int:
        """Bytes of a pass without gradients with ``rows`` rows per example."""
        return self._bytes(batch, self.trace + rows * self._through)

    def kept(self, batch: int, *, differentiable: bool) -> int:
        """Bytes of the unedited pass over ``batch`` examples while it is kept."""
        graph = self.blocks * self.saved + self.spare + self.head
        return int(MARGIN * batch * (self.trace + (graph if differentiable else 0)))

    def examples(self, limit: int, nodes: int) -> int:
        """Examples that go into one cascade over all sites; at least one."""
        sites = range(len(self.block_of))
        fitting = (limit - self.fixed) // (self.backward(sites, nodes, 1) - self.fixed)
        if self.cpu:
            fitting = min(fitting, CPU_TOKENS // (self.tokens * nodes * len(sites)))
        return max(1, fitting)

    def read(self, batch: int) -> int:
        """Bytes of an unedited pass whose activations' gradients are read, with its backward pass."""
        graph = self.blocks * (self.saved + self.row) + self.spare + self.opened + self.head
        return self._bytes(batch, self.trace + graph)

    def read_examples(self, limit: int, batch: int, *, more: bool) -> int:
        """Of ``batch`` examples, how many go into one such pass.

        Args:
            more: whether other work follows it.

        Raises:
            ValueError: one, or one row of it without gradients, does not fit ``limit``.
        """
        room = self.after(limit) if more else self._room(limit, self.read(batch))
        fitting = (room - self.fixed) // max(1, self.read(1) - self.fixed)
        if fitting < 1 or (more and self.forward(1, 1) > room):
            self._check_room(limit, math.ceil((max(self.forward(1, 1), self.read(1)) + 1) * self._again))
        if self.cpu:
            fitting = min(fitting, CPU_TOKENS // self.tokens)
        return max(1, min(fitting, batch))

    def cuts(self, limit: int, nodes: int, batch: int, sites: Sequence[int]) -> list[tuple[range, slice]]:
        """Blocks of the openings at ``sites`` (by place in that list), each with a slice of the nodes, few and large.

        Raises:
            ValueError: when one node of one opening does not fit ``limit``.
        """
        end, cuts = len(sites), []
        room = self._room(limit, self.backward(sites, nodes, batch))
        while end:
            start = 0
            while start < end - 1 and self.backward(sites[start:end], nodes, batch) > room:
                start += 1
            parts = self._slices(limit, room, nodes, partial(self.backward, sites[start:end], batch=batch))
            cuts += [(range(start, end), part) for part in parts]
            end = start
        return cuts

    def node_slices(self, limit: int, nodes: int, batch: int) -> list[slice]:
        """Slices of the nodes, of rows that run through all layers as on the joint path, that fit ``limit``.

        Raises:
            ValueError: when one node does not fit.
        """
        room = self._room(limit, self.scaled(nodes, batch))
        return self._slices(limit, room, nodes, lambda size: self.scaled(size, batch))

    def after(self, limit: int) -> int:
        """What work may take that follows other work in the same memory."""
        return int(limit / self._again)

    def _room(self, limit: int, whole: int) -> int:
        """What each of several blocks may take, all of it where the whole is one that fits."""
        return limit if whole <= limit else self.after(limit)

    def _slices(self, limit: int, room: int, nodes: int, need: Callable[[int], int]) -> list[slice]:
        """Slices of the nodes of which each fits the room; ``need`` says what so many nodes take."""
        size = nodes
        while size > 1 and need(size) > room:
            size = (size + 1) // 2
        if need(size) > room:
            self._check_room(limit, math.ceil((need(size) + 1) * self._again))
        return [slice(start, start + size) for start in range(0, nodes, size)]

    def check(self, limit: int, nodes: int, batch: int, *, joint: bool) -> None:
        """Refuses a ``limit`` in which no path can be followed, by all that the layers' paths, or the joint one, need.

        Raises:
            ValueError: one node, or one row without gradients, does not fit.
        """
        sites, run = range(len(self.block_of)), self.forward(1, batch)
        whole = self.scaled(nodes, batch) if joint else self.backward(sites, nodes, batch)
        least = self.scaled(1, batch) if joint else max(self.backward([i], 1, batch) for i in sites)
        if max(whole, run) > limit:
            self._check_room(limit, max(run, math.ceil((least + 1) * self._again)))

    def _check_room(self, limit: int, need: int) -> None:
        if need > limit:
            raise ValueError(
                f"memory: one example of {self.tokens} tokens needs {math.ceil(need / 2**20)} MiB, got "
                f"{limit / 2**20:.0f} MiB"
            )

    def rows_forward(self, limit: int, batch: int) -> int:
        """Rows per example that go into one pass without gradients.

        Raises:
            ValueError: when one does not fit.
        """
        rows = int(((limit - self.fixed) / (MARGIN * batch) - self.trace) // self._through)
        rows -= self.forward(rows, batch) > limit  # the division may round up
        if rows < 1:
            need = self.forward(1, batch)
            raise ValueError(f"memory: one row needs {need / 2**20:.0f} MiB, got {limit / 2**20:.0f} MiB")
        return min(rows, max(1, CPU_TOKENS // (self.tokens * batch))) if self.cpu else rows

    @property
    def _again(self) -> float:
        return AGAIN_CPU if self.cpu else AGAIN

    @property
    def _through(self) -> int:
        return HOLES * (2 * self.row + self.passing)  # as it opens, as it joins those on their way, and on its way

    def _bytes(self, batch: int, each: int) -> int:
        """All that is needed; never less than what the unedited pass needs on its own way."""
        return self.fixed + math.ceil(MARGIN * batch * max(each, self.trace + self._through))


def measure_footprint(forward: Forward, inputs: Mapping[str, Any]) -> Footprint:
    """The memory of a cascade, measured on the first example of ``inputs``."""
    meter = Meter()
    with frozen(forward.model):
        with within(meter), grad_mode(False):
            trace = forward.trace(take(inputs, slice(0, 1)))
        if isinstance(forward, PartialForward):
            return _of_entered(forward, trace, meter)
        return _of_whole(forward, trace, meter)


def _of_entered(forward: PartialForward, trace: Trace, meter: Meter) -> Footprint:
    marks = [(0, 0)]  # at each block's end, what it keeps and what it needed beside that

    def start(*_: Any) -> None:
        marks.append((meter.restart(), 0))

    def end(*_: Any) -> None:
        marks[-1] = meter.live - marks[-1][0], meter.peak - meter.live

    kept, seen = meter.live, trace.sites[0]
    leaf = ops.open_rows(seen.anchor, seen.u, torch.zeros(1, dtype=torch.float64))
    with within(meter), grad_mode(False):
        before = meter.restart()
        forward.run(trace, {0: leaf})
    passing = meter.peak - before
    with Temporaries() as stack:
        for block in forward.blocks:
            stack.enter_context(hook_before(block, start))
            stack.enter_context(hook(block, end))
        with within(meter), grad_mode(True):
            rows = forward.run(trace, {0: leaf.requires_grad_()})
            value = rows.logits.log_softmax(-1)
        head = meter.live - before - sum(saved for saved, _ in marks)
    del value
    entered, *behind = marks[1 + forward.block_of[0] :]
    *full, last = behind or [(0, 0)]
    row = _bytes(seen.anchor)
    return Footprint(
        block_of=tuple(forward.block_of),
        blocks=len(forward.blocks),
        tokens=trace.tokens,
        trace=kept,
        saved=_mean([saved for saved, _ in full]) if full else last[0],
        spare=_mean([spare for _, spare in full]) if full else last[1],
        last=sum(last),
        opened=row + max(row, entered[0]),
        head=2 * head,
        row=row,
        passing=passing,
        fixed=_fixed(forward, seen.z.device),
        cpu=seen.z.device.type == "cpu",
    )


def _of_whole(forward: Forward, trace: Trace, meter: Meter) -> Footprint:
    """Each row runs through all layers, and keeps the activations of its own site until it is scored."""
    kept, layers, zero = meter.live, len(forward.blocks), {0: torch.zeros(1, dtype=torch.float64)}
    with within(meter), grad_mode(False):
        before = meter.restart()
        forward.opened(trace, zero)
    passing = meter.peak - before
    with within(meter), grad_mode(True):
        before = meter.restart()
        rows, opened = forward.opened(trace, zero)
        value = rows.logits.log_softmax(-1)
        saved, spare = -(-(meter.live - before) // layers), meter.peak - meter.live
    del value
    leaf, logits = opened.leaves[0], rows.logits
    row, most = _bytes(leaf), max(site.width * site.projection.size / site.hidden for site in forward.sites)
    return Footprint(
        block_of=tuple(forward.block_of),
        blocks=layers,
        tokens=trace.tokens,
        trace=kept,
        saved=saved,
        spare=spare,
        last=saved + spare,
        opened=2 * row + math.ceil(2 * row * most),
        head=4 * _bytes(logits),
        row=row,
        passing=passing,
        fixed=_fixed(forward, leaf.device),
        cpu=leaf.device.type == "cpu",
    )


def _fixed(forward: Forward, device: torch.device) -> int:
    if device.type == "cpu":
        return PACKED_COPIES * max(_bytes(site.parameter) for site in forward.sites)
    return CUBLAS_WORKSPACE


def _mean(sizes: Sequence[int]) -> int:
    return -(-sum(sizes) // len(sizes))


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
