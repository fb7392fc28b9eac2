"""How long a cascade's operations take on this machine: a short run through the model's last layers, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from spurge.engine.calls import main_input, take
from spurge.engine.operations import Cost, opened, stand_in
from spurge.engine.relay import Relay
from spurge.engine.spread import is_spread

_SAMPLED = 2  # layers of a timed run
_WORK = {"cpu": 5e9, "cuda": 1e12}  # operations of one, forwards: a fraction of a second
_REPEATS = 3


class Sample:
    """A short run through the last layers, with ``rows`` rows or as many as are quickly done."""

    def __init__(self, relay: Relay, inputs: Mapping[str, Any], cost: Cost, rows: int) -> None:
        self.relay, self.cost = relay, cost
        self.device = main_input(inputs).device
        before = [i for i, place in enumerate(relay.place) if place < len(relay.blocks) - _SAMPLED]
        self.site = max(before, default=0)
        most = _WORK.get(self.device.type, _WORK["cuda"]) / max(1, cost.forward[self.site].row)
        examples = max(1, min(rows, int(most), len(main_input(inputs))))
        with torch.no_grad():
            self.trace = relay.trace(take(inputs, slice(0, examples)))
        times = max(1, int(min(rows, most)) // examples)
        self.rows, self.leaf = times * examples, opened(self.trace, self.site, times)

    def seconds(self, graded: int, free: int) -> float:
        """What so many operations take, of passes with gradients and without."""
        forward, backward = (of[self.site].of(self.rows) for of in (self.cost.forward, self.cost.backward))
        total = 0.0
        if graded:
            total += graded / (forward + backward) * self._time(self._graded)
        if free:
            total += free / forward * self._time(self._free)
        return total

    def products(self, operations: int) -> float:
        """What they would take as products with the matrices of a middle layer; NaN where these are not at hand."""
        block = self.relay.blocks[len(self.relay.blocks) // 2]
        weights = [_matrix(parameter) for parameter in block.parameters() if _plain(parameter)]
        if not weights:
            return float("nan")
        height = self.rows * self.trace.sites[0].z.shape[1]
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

    def _graded(self) -> None:
        with torch.enable_grad():
            value = stand_in(self.relay.run(self.trace, {self.site: self.leaf}).logits)
        torch.autograd.grad(value, self.leaf)

    def _free(self) -> None:
        with torch.no_grad():
            self.relay.run(self.trace, {self.site: self.leaf.detach()})

    def _time(self, call: Callable[[], None]) -> float:
        """Median of a few calls, the first one left out."""
        times: list[float] = []
        for _ in range(1 + _REPEATS):  # as many on every rank that holds a part of the model
            start = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return median(times[1:])


def _plain(parameter: Tensor) -> bool:
    whole = not parameter.is_meta and not is_spread(parameter)
    return whole and parameter.dim() > 1 and parameter.is_floating_point()


def _matrix(parameter: Tensor) -> Tensor:
    """A parameter as a matrix; of stacked experts, the first one's."""
    with torch.no_grad():
        return parameter[0] if parameter.dim() == 3 else parameter.detach().flatten(1)
