"""One pass of the unedited model whose gradients are read at the activations: the model's own code, hooks at its sites.

It needs nothing of a model but that its sites run, in whatever order and however often.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import Temporaries, within
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.call_arguments import first, main_input
from spurge.engine.models.hooks import WideAttention, configurations, for_rows, hook
from spurge.engine.models.readout import token_mask
from spurge.engine.passes.activation_gradients import ActivationGradients
from spurge.engine.passes.norm_placement import Anatomy
from spurge.engine.passes.trace import Forward, Graded, Trace, padding_complaint, unedited_rows


def graded_pass(
    forward: Forward,
    inputs: Mapping[str, Any],
    example: Tensor | None = None,
    *,
    stakes: bool = False,
    anatomy: Anatomy | None = None,
) -> Graded:
    """Run the unedited model so that the gradients of its rows can be read at all sites.

    Args:
        forward: of the model.
        inputs: keyword arguments of the model; tensors lead with the batch dimension B.
        example: how targets number these examples, ``[B]``; 0 to B - 1 by default.
        stakes: gradients say what is at stake, too.
        anatomy: where norms stand behind the sites, where that is known.
    """
    given = {
        name: value.detach() if torch.is_tensor(value) else value
        for name, value in inputs.items()
        if name != "use_cache"
    }
    batch, position = len(main_input(given)), forward.handle.probed(given)
    model, last = forward.model, forward.handle.sites[-1]
    complain = partial(padding_complaint, model)
    gradients = ActivationGradients(forward.sites, batch, token_mask(given), complain, stakes)
    with Temporaries() as stack, grad_mode(True):
        row = None
        if forward.attention and last.attention is not None:
            row = stack.enter_context(AttentionRow(last.attention, lambda rows: position))
        if last.parameter.device.type == "cpu" and last.parameter.dtype in (torch.bfloat16, torch.float16):
            stack.enter_context(within(WideAttention()))
        if stakes:
            _watch_streams(stack, forward, gradients, anatomy)
        stack.enter_context(gradients.watched())
        stack.enter_context(for_rows(configurations(model)))
        logits = forward.readout.logits(lambda: model(**given), position)
        attention = None if row is None else row.row().to(logits.device)
    return Graded(unedited_rows(logits, attention, example), gradients)


def untraced(forward: Forward, inputs: Mapping[str, Any], example: Tensor | None = None) -> Trace:
    """Such a pass alone, of a model that nothing else is asked of."""
    graded = graded_pass(forward, inputs, example)
    position = forward.handle.probed(inputs)
    return Trace(dict(inputs), len(main_input(inputs)), position, graded.rows.detached(), forward, graded=graded)


def _watch_streams(
    stack: Temporaries, forward: Forward, gradients: ActivationGradients, anatomy: Anatomy | None
) -> None:
    """What each site adds to: the block's output, or what stands in front of a norm that comes before it."""
    for i, site in enumerate(forward.sites):
        placement = None if anatomy is None else anatomy.placements[i]

        def before(module: nn.Module, args: tuple, output: Any, i: int = i) -> None:
            gradients.adds_to(i, args[0])

        def after(module: nn.Module, args: tuple, output: Any, i: int = i) -> None:
            gradients.adds_to(i, first(output))

        if placement is not None and placement.kind == "post_norm":
            stack.enter_context(hook(placement.norm, before))
        elif placement is not None and placement.kind in ("sandwich", "replay"):
            stack.enter_context(hook(site.down, after))
        else:
            stack.enter_context(hook(site.block, after))
