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
from spurge.engine.models.call_arguments import first, take
from spurge.engine.models.hooks import hook, hook_before, replaced_forward
from spurge.engine.passes.partial_forward import PartialForward
from spurge.engine.passes.trace import Forward, Owners


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
        ends: of its own gradients, by every site.
        scaled: of a pass that runs through all layers, scaled in each.
        forward, backward: by site, of a pass whose rows open there.
        pulled: by site, of the product of one example's gradients with the down projection.
    """

    unedited: Operations
    ends: Operations
    scaled: Operations
    forward: tuple[Operations, ...]
    backward: tuple[Operations, ...]
    pulled: tuple[int, ...]


def cost_of(forward: Forward, inputs: Mapping[str, Any]) -> Cost:
    """Counted with the first example of ``inputs``; the model has to be frozen."""
    one = take(inputs, slice(0, 1))
    passes, counts = [], []
    for times in (1, 2):
        rows = Owners(1, times).inputs(one)
        with grad_mode(False):
            forward.trace(rows)  # which looks, once for a shape, whether it can be entered
        passes.append(_unedited(forward, rows))
        entered = isinstance(forward, PartialForward)
        counts.append(_counted(forward, one, times) if entered else _counted_whole(forward, one, times))
    unedited, ends, scaled = map(_line, *passes)
    there, back = (tuple(map(_line, *both)) for both in zip(*counts, strict=True))
    return Cost(unedited, ends, scaled, there, back, _pulled(forward, one))


def _unedited(forward: Forward, rows: Mapping[str, Any]) -> tuple[int, int, int]:
    """Operations of `Cost.unedited`, `Cost.ends` and `Cost.scaled`."""
    with within(Meter(operations=True)) as meter, grad_mode(False):
        trace = forward.trace(rows)
    with within(Meter(operations=True)) as scaling, grad_mode(False):
        forward.scaled(trace, zeros(1))
    trace = forward.trace(rows, differentiable=True)
    with within(Meter(operations=True)) as back, grad_mode(True):
        if trace.outputs:
            torch.autograd.grad(stand_in(trace.rows.logits), trace.outputs, allow_unused=True)
    return meter.flops, back.flops, scaling.flops


def _pulled(forward: Forward, one: Mapping[str, Any]) -> tuple[int, ...]:
    """By site, of the product of an example's gradients with W2: 2 for each multiply-add."""
    with grad_mode(False):
        trace = forward.trace(one)
    if not trace.sites:
        return tuple(2 * trace.tokens * site.width * site.projection.size * site.hidden for site in forward.sites)
    return tuple(2 * site.z.numel() * site.u.shape[-1] for site in trace.sites)


def _line(one: int, two: int) -> Operations:
    """From the operations of one row and of two."""
    return Operations(2 * one - two, two - one)


def _counted(partial_forward: Any, one: Mapping[str, Any], times: int) -> tuple[list[int], list[int]]:
    """Operations of a pass with so many rows that open at each site: forwards, and back."""
    with grad_mode(False):
        trace = partial_forward.trace(one)
    seen, meter = trace.sites[0], Meter(operations=True)
    leaf = ops.open_rows(seen.anchor, seen.u, zeros(times)).requires_grad_()
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


def _counted_whole(forward: Forward, one: Mapping[str, Any], times: int) -> tuple[list[int], list[int]]:
    """The same where rows run through the whole model; gradients by the first site are the most work."""
    with grad_mode(False):
        trace = forward.trace(one)
    with within(Meter(operations=True)) as meter, grad_mode(True):
        rows, opened = forward.opened(trace, {0: zeros(times)})
        value = stand_in(rows.logits)
        there = meter.flops
        torch.autograd.grad(value, opened.leaves)
    return [there] * len(forward.sites), [meter.flops - there] * len(forward.sites)


def zeros(times: int) -> Tensor:
    """So many nodes at 0."""
    return torch.zeros(times, dtype=torch.float64)


def stand_in(logits: Tensor) -> Tensor:
    """A stand-in for a target."""
    return logits.log_softmax(-1)[..., 0].sum()
