"""How long a cascade's passes take on this machine: two short runs through the model's last layers, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.tensor_parallel import is_sharded
from spurge.engine.models.call_arguments import main_input, take
from spurge.engine.passes.trace import Forward
from spurge.engine.planning.flops import Cost, stand_in, zeros

_SAMPLED = 2  # layers of the longer run
_WORK = {"cpu": 5e9, "cuda": 1e12}  # operations of it, forwards: a fraction of a second
_REPEATS = 4


@dataclass(frozen=True)
class Rate:
    """Seconds of a pass whatever it computes, and of each operation."""

    whole: float
    each: float

    def of(self, passes: int, operations: int) -> float:
        """Seconds of so many passes with so many operations in all."""
        return passes * self.whole + operations * self.each


class Sample:
    """Short runs through the last layers, with ``rows`` rows or as many as are quickly done."""

    def __init__(self, forward: Forward, inputs: Mapping[str, Any], cost: Cost, rows: int) -> None:
        self.forward, self.cost = forward, cost
        self.device = main_input(inputs).device
        block_of, sampled = forward.block_of, len(forward.blocks) - _SAMPLED
        before = [i for i, block in enumerate(block_of) if block < sampled]
        self.ends = max(before, default=0), len(block_of) - 1  # sites where the longer run begins, and the shorter
        most = _WORK.get(self.device.type, _WORK["cuda"]) / max(1, cost.forward[self.ends[0]].row)
        examples = max(1, min(rows, int(most), len(main_input(inputs))))
        with grad_mode(False):
            self.trace = forward.trace(take(inputs, slice(0, examples)))
        self.times = max(1, int(min(rows, most)) // examples)
        self.rows = self.times * examples

    def graded(self) -> Rate:
        """Of passes with gradients."""

        def run(site: int) -> None:
            with grad_mode(True):
                rows, opened = self.forward.opened(self.trace, {site: zeros(self.times)})
                value = stand_in(rows.logits)
            torch.autograd.grad(value, opened.leaves)

        forward, backward = self.cost.forward, self.cost.backward
        return self._rate(run, [forward[i].of(self.rows) + backward[i].of(self.rows) for i in self.ends])

    def free(self) -> Rate:
        """Of passes without."""

        def run(site: int) -> None:
            with grad_mode(False):
                self.forward.opened(self.trace, {site: zeros(self.times)})

        return self._rate(run, [self.cost.forward[i].of(self.rows) for i in self.ends])

    def _rate(self, run: Callable[[int], None], operations: Sequence[int]) -> Rate:
        """The line through both runs; where there is but one, all of its time is that of its operations."""
        long, short = (self._time(partial(run, site)) for site in self.ends)
        more, fewer = operations
        if more <= fewer or long <= short:
            return Rate(0.0, long / max(1, more))
        each = min((long - short) / (more - fewer), long / more)
        return Rate(max(0.0, short - each * fewer), each)

    def products(self, operations: int) -> float:
        """What they would take as products with the matrices of a middle layer; NaN where these are not at hand."""
        block = self.forward.blocks[len(self.forward.blocks) // 2]
        weights = [_matrix(parameter) for parameter in block.parameters() if _plain(parameter)]
        if not weights:
            return float("nan")
        height = self.rows * self.trace.tokens
        pairs = [
            (weight.new_ones(height, weight.shape[1]), weight.t(), weight.new_ones(height, weight.shape[0]), weight)
            for weight in weights
        ]

        def multiply() -> None:
            for there, across, back, weight in pairs:
                there @ across
                back @ weight

        done = sum(4 * height * weight.numel() for weight in weights)
        return operations / done * self._time(multiply)

    def _time(self, call: Callable[[], None]) -> float:
        """The second fastest of a few calls, the first one left out: what disturbs some of them does not count."""
        times: list[float] = []
        for _ in range(1 + _REPEATS):  # as many on every rank that holds a part of the model
            start = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return sorted(times[1:])[1]


def _plain(parameter: Tensor) -> bool:
    whole = not parameter.is_meta and not is_sharded(parameter)
    return whole and parameter.dim() > 1 and parameter.is_floating_point()


def _matrix(parameter: Tensor) -> Tensor:
    """A parameter as a matrix; of stacked experts, the first one's."""
    with grad_mode(False):
        return parameter[0] if parameter.dim() == 3 else parameter.detach().flatten(1)
