"""How a transformer layer joins its down projection to its output, learnt from one pass and checked by erasing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import Temporaries
from spurge.engine.models.call_arguments import first, same, split_call
from spurge.engine.models.hooks import hook, hook_before
from spurge.engine.models.sites import Site

Kind = Literal["residual", "post_norm", "sandwich", "replay"]


@dataclass(frozen=True)
class NormPlacement:
    """What happens between a down projection's output ``o`` and its layer's output.

    ``residual``: added to the rest (pre-norm and parallel layers); ``post_norm``: added, then ``norm`` (BERT);
    ``sandwich``: through ``norm``, then added (GLM-4); ``replay``: anything else, the layer is run again.
    """

    kind: Kind
    norm: nn.Module = field(default_factory=nn.Identity)


@dataclass(frozen=True)
class Anatomy:
    """Per site its placement; per block the length of the tuple it returns, 0 for the bare hidden states."""

    placements: list[NormPlacement]
    tuples: list[int]


def layer_anatomy(
    model: nn.Module, blocks: Sequence[nn.Module], sites: Sequence[Site], inputs: Mapping[str, Any]
) -> Anatomy:
    """Find the placement of every site from one pass over ``inputs``.

    Raises:
        ValueError: the model does something to the hidden states between two blocks, or has experts whose output is
            not what their activations and down projections give.
    """
    outputs: list[Any] = []
    starts: list[tuple[tuple, dict]] = []
    seen: list[dict[str, Any]] = [{"leaves": []} for _ in sites]
    with Temporaries() as stack, grad_mode(False):
        for block in blocks:
            stack.enter_context(hook_before(block, lambda m, args, kwargs: starts.append((args, kwargs))))
            stack.enter_context(hook(block, lambda m, args, output: outputs.append(output)))
        for site, keep in zip(sites, seen, strict=True):
            stack.enter_context(site.projection.watch(partial(_keep, keep)))
            for module in site.block.modules():
                if not any(module.children()) and module is not site.down:
                    leaves = keep["leaves"]
                    stack.enter_context(hook(module, lambda m, args, made, k=leaves: k.append((m, args[:1], made))))
        model(**inputs)

    for index in range(1, len(blocks)):
        hidden, _, _ = split_call(*starts[index])
        if not same(hidden, first(outputs[index - 1])):
            raise ValueError(
                f"model: {type(model).__name__} changes the hidden states between layers {index - 1} and {index}; "
                "it cannot be entered in the middle"
            )
    order = {id(block): index for index, block in enumerate(blocks)}
    placements = []
    with grad_mode(False):
        for site, keep in zip(sites, seen, strict=True):
            index = order[id(site.block)]
            site.projection.verify(site.name, keep["z"], keep["o"], keep["rest"])
            placements.append(
                _placement(site, starts[index], first(outputs[index]), keep["o"], keep["rest"], keep["leaves"])
            )
    return Anatomy(placements, [len(output) if isinstance(output, tuple) else 0 for output in outputs])


def _keep(seen: dict[str, Any], z: Tensor, o: Tensor, rest: Tensor | None) -> None:
    seen.update(z=z, o=o, rest=rest)


def _placement(
    site: Site,
    start: tuple[tuple, dict],
    out: Tensor,
    o: Tensor,
    rest: Tensor | None,
    leaves: list[tuple[nn.Module, tuple, Tensor]],
) -> NormPlacement:
    """How a layer joins ``o``, the output of its down projection, to its own output ``out``."""
    erased = torch.zeros_like(o) if rest is None else rest.to(o.dtype).expand_as(o)
    with hook(site.down, lambda module, args, output: erased):
        truth = first(site.block(*start[0], **start[1]))
    if o.dim() == 2:  # tokens of all rows in one dimension
        o, erased = o.view_as(out), erased.view_as(out)

    guesses: list[tuple[Kind, nn.Module, Tensor]] = []
    for module, args, made in leaves:
        if not args or not torch.is_tensor(args[0]) or not torch.is_tensor(made) or args[0].shape != made.shape:
            continue
        if same(made, out) and not same(args[0], out):
            guesses.append(("post_norm", module, module(args[0] - o + erased)))
        elif same(args[0], o) and not same(made, o):
            guesses.append(("sandwich", module, out - made + module(erased)))
    guesses.append(("residual", nn.Identity(), out - o + erased))
    slack = 64 * torch.finfo(out.dtype).eps * out.abs().max()
    for kind, norm, guess in guesses:
        if (guess - truth).abs().max() <= slack:
            return NormPlacement(kind, norm)
    return NormPlacement("replay")
