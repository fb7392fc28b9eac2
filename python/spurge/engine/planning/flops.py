"""Operations of a cascade's passes, counted on one row and on two: what belongs to a pass, and what to each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import Temporaries, within
from spurge.engine.cascade.meter import Meter
from spurge.engine.cascade.partial_forward import PartialForward, Trace
from spurge.engine.models.call_arguments import first, repeat_rows, take
from spurge.engine.models.hooks import hook, hook_before, replaced_forward


@dataclass(frozen=True)
class Operations:
    """Of a pass: whatever its rows, and for each row."""

    fixed: int
    row: int

    def of(self, rows: int) -> int:
        """Of a pass of so many rows."""
        return self.fixed + rows * self.row


@dataclass(frozen=True)
class Cost:
    """Operations of passes.

    Attributes:
        unedited: of the unedited pass.
        forward, backward: by site, of a pass whose rows open there.
        pulled: by site, of the product of one example's gradients with the down projection.
    """

    unedited: Operations
    forward: tuple[Operations, ...]
    backward: tuple[Operations, ...]
    pulled: tuple[int, ...]


def cost_of(partial_forward: PartialForward, inputs: Mapping[str, Any]) -> Cost:
    """Counted with the first example of ``inputs``; the model has to be frozen."""
    one = take(inputs, slice(0, 1))
    unedited = []
    for times in (1, 2):
        with within(Meter(operations=True)) as meter, grad_mode(False):
            trace = partial_forward.trace({name: repeat_rows(value, 1, times) for name, value in one.items()})
        unedited.append(meter.flops)
    single, double = (_counted(partial_forward, one, times) for times in (1, 2))
    forward, backward = (
        tuple(_line(a, b) for a, b in zip(first, second, strict=True))
        for first, second in zip(single, double, strict=True)
    )
    pulled = tuple(site.z.numel() * site.u.shape[-1] for site in trace.sites)  # of two rows, 2 for each multiply-add
    return Cost(_line(*unedited), forward, backward, pulled)


def _line(one: int, two: int) -> Operations:
    """From the operations of one row and of two."""
    return Operations(2 * one - two, two - one)


def _counted(partial_forward: PartialForward, one: Mapping[str, Any], times: int) -> tuple[list[int], list[int]]:
    """Operations of a pass with so many rows that open at each site: forwards, and back."""
    with grad_mode(False):
        trace = partial_forward.trace(one)
    leaf, meter = opened(trace, 0, times), Meter(operations=True)
    marks: list[int] = []  # operations so far, at each block's start and end
    reached: dict[int, int] = {}  # block -> operations until a gradient came back to its output

    def watched(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            first(output).register_hook(lambda _: reached.update({number: meter.flops}))
            return output

        return run

    with Temporaries() as stack:
        for number, block in enumerate(partial_forward.blocks):
            stack.enter_context(hook_before(block, lambda *_: marks.append(meter.flops)))
            stack.enter_context(hook(block, lambda *_: marks.append(meter.flops)))
            stack.enter_context(replaced_forward(block, watched(number, block.forward)))
        with within(meter), grad_mode(True):
            value = stand_in(partial_forward.run(trace, {0: leaf}).logits)
            there = meter.flops
            torch.autograd.grad(value, leaf)
    entry, ends = partial_forward.block_of[0], marks[1::2]
    outside = marks[0] + ends[entry] - marks[2 * entry]  # before the first layer, and where rows open
    back = meter.flops - reached.setdefault(entry, meter.flops)
    forward = [outside + there - ends[number] for number in partial_forward.block_of]
    return forward, [back + reached[number] - there for number in partial_forward.block_of]


def opened(trace: Trace, site: int, times: int) -> Tensor:
    """Rows that open at a site, with every node at 0, ready for a gradient."""
    marks = trace.sites[site]
    return ops.open_rows(marks.anchor, marks.u, torch.zeros(times, dtype=torch.float64)).requires_grad_()


def stand_in(logits: Tensor) -> Tensor:
    """A stand-in for a target."""
    return logits.log_softmax(-1)[..., 0].sum()
