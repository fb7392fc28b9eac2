"""What a cascade weighs in memory, measured on one example, and how to cut it into blocks that fit a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.calls import take
from spurge.engine.patches import hook
from spurge.engine.relay import Relay

MARGIN = 1.45  # allocators round up, and a pass holds a few tensors no module returns
PACKED_COPIES = 4  # of the largest weight: what oneDNN keeps beside it, measured as 3.4 on BERT-base
CUBLAS_WORKSPACE = 32 * 2**20
CPU_TOKENS = 4096  # tokens of all rows of one block on a CPU; above it activations leave the caches


@dataclass(frozen=True)
class Weight:
    """Bytes of a cascade over inputs of one shape.

    Attributes:
        place: block of each site.
        blocks: L, the layers of the model.
        tokens: T, positions per row.
        trace: kept by the unedited pass, per example.
        saved: kept by autograd, per row and layer.
        row: the hidden states of one row, ``[T, H]``.
        passing: temporaries of one row inside a layer.
        fixed: workspaces of the matrix products, whatever the number of rows.
        cpu: whether blocks should also stay in cache.
    """

    place: tuple[int, ...]
    blocks: int
    tokens: int
    trace: int
    saved: int
    row: int
    passing: int
    fixed: int
    cpu: bool

    def backward(self, sites: Sequence[int], nodes: int, batch: int) -> int:
        """Bytes of a pass with gradients in which ``nodes`` rows per example open at each of ``sites``."""
        layers = sum(self.blocks - self.place[i] for i in sites)
        rows = nodes * len(sites)
        each = self.trace + nodes * layers * self.saved + rows * (3 * self.row + self.passing)
        return self.fixed + int(MARGIN * batch * each)

    def forward(self, rows: int, batch: int) -> int:
        """Bytes of a pass without gradients with ``rows`` rows per example."""
        return self.fixed + int(MARGIN * batch * (self.trace + rows * (3 * self.row + self.passing)))

    def kept(self, batch: int, *, differentiable: bool) -> int:
        """Bytes of the unedited pass over ``batch`` examples while it is kept."""
        return int(MARGIN * batch * (self.trace + (self.blocks * self.saved if differentiable else 0)))

    def examples(self, limit: int, nodes: int) -> int:
        """Examples that go into one cascade over all sites; at least one."""
        sites = range(len(self.place))
        fitting = (limit - self.fixed) // (self.backward(sites, nodes, 1) - self.fixed)
        if self.cpu:
            fitting = min(fitting, CPU_TOKENS // (self.tokens * nodes * len(sites)))
        return max(1, fitting)

    def cuts(self, limit: int, nodes: int, batch: int, sites: Sequence[int]) -> list[tuple[range, slice]]:
        """Blocks of the openings at ``sites`` (by place in that list), each with a slice of the nodes, few and large.

        Raises:
            ValueError: when one node of one opening does not fit ``limit``.
        """
        end, cuts = len(sites), []
        while end:
            start = 0
            while start < end - 1 and self.backward(sites[start:end], nodes, batch) > limit:
                start += 1
            parts = self.node_slices(limit, nodes, batch, sites[start:end])
            cuts += [(range(start, end), part) for part in parts]
            end = start
        return cuts

    def node_slices(self, limit: int, nodes: int, batch: int, group: Sequence[int] = (0,)) -> list[slice]:
        """Slices of the nodes that fit ``limit`` when rows open at the sites of ``group``.

        One row per node through every layer, as on the joint path, is what opening at the first site alone costs.

        Raises:
            ValueError: when one node does not fit.
        """
        size = nodes
        while size > 1 and self.backward(group, size, batch) > limit:
            size = (size + 1) // 2
        need = self.backward(group, size, batch)
        if need > limit:
            raise ValueError(
                f"memory: one example of {self.tokens} tokens needs {need / 2**20:.0f} MiB, got {limit / 2**20:.0f} MiB"
            )
        return [slice(start, start + size) for start in range(0, nodes, size)]

    def rows_forward(self, limit: int, batch: int) -> int:
        """Rows per example that go into one pass without gradients.

        Raises:
            ValueError: when one does not fit.
        """
        rows = int(((limit - self.fixed) / (MARGIN * batch) - self.trace) // (3 * self.row + self.passing))
        if rows < 1:
            need = self.forward(1, batch)
            raise ValueError(f"memory: one row needs {need / 2**20:.0f} MiB, got {limit / 2**20:.0f} MiB")
        return min(rows, max(1, CPU_TOKENS // (self.tokens * batch))) if self.cpu else rows


def weigh(relay: Relay, inputs: Mapping[str, Any]) -> Weight:
    """Measure a cascade's weight on the first example of ``inputs``."""
    trace = relay.trace(take(inputs, slice(0, 1)))
    kept = sum(_bytes(x) for seen in trace.sites for x in (seen.z, seen.u, seen.anchor, seen.rest) if x is not None)
    known = {parameter.untyped_storage().data_ptr() for parameter in relay.model.parameters()}
    saved: dict[int, int] = {}
    passing: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    middle = relay.blocks[-1 if len(relay.blocks) < 3 else -2]
    with ExitStack() as stack:
        for module in middle.modules():
            if not any(module.children()):
                stack.enter_context(hook(module, lambda m, args, out: passing.append(_bytes(out))))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        with torch.enable_grad():
            seen = trace.sites[0]
            opened = ops.open_rows(seen.anchor, seen.u, torch.zeros(1, dtype=torch.float64)).requires_grad_()
            relay.run(trace, {0: opened})
    cpu = seen.z.device.type == "cpu"
    largest = max(_bytes(site.parameter) for site in relay.sites)
    behind = max(1, len(relay.blocks) - 1 - relay.place[0])
    return Weight(
        place=tuple(relay.place),
        blocks=len(relay.blocks),
        tokens=trace.sites[0].z.shape[1],
        trace=kept,
        saved=sum(saved.values()) // behind,
        row=_bytes(seen.anchor),
        passing=sum(passing),
        fixed=PACKED_COPIES * largest if cpu else CUBLAS_WORKSPACE,
        cpu=cpu,
    )


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if torch.is_tensor(value) else 0
