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


class NotEntered(ValueError):
    """A model that cannot be entered in the middle on these inputs; the message says why."""


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
    """Per site its placement; per block the length of the tuple it returns, 0 for the bare hidden states.

    Attributes:
        order: the sites, by number, as they run.
    """

    placements: list[NormPlacement]
    tuples: list[int]
    order: list[int]


def by_rows(values: Tensor, rows: int) -> Tensor:
    """``[R, ...]`` of what a module sees with R rows one behind the other; tokens of all of them may share a dimension.

    Raises:
        NotEntered: it cannot be so.
    """
    if values.dim() > 2 and values.shape[0] == rows:
        return values
    if values.dim() < 2 or values.shape[0] % rows:
        raise NotEntered(
            f"model: a down projection is called with {tuple(values.shape)} for {rows} rows, expected the rows one "
            "behind the other"
        )
    return values.unflatten(0, (rows, -1))


def layer_anatomy(
    model: nn.Module, blocks: Sequence[nn.Module], sites: Sequence[Site], inputs: Mapping[str, Any]
) -> Anatomy:
    """Find the placement of every site from one pass over ``inputs``.

    Raises:
        NotEntered: the model does something to the hidden states between two blocks, or calls one of them, or a site,
            more or less than once.
        ValueError: experts whose output is not what their activations and down projections give.
    """
    outputs: list[Any] = []
    stills: list[Tensor] = []  # their hidden states, which the next block may write into
    starts: list[tuple[tuple, dict]] = []
    ran: list[int] = []
    seen: list[dict[str, Any]] = [{"leaves": [], "calls": 0} for _ in sites]
    called: list[int] = []

    def start(index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden, rest, named = split_call(args, kwargs)
        if outputs and not same(hidden, first(outputs[-1])):
            raise NotEntered(f"it changes the hidden states between layers {len(outputs) - 1} and {len(outputs)}")
        ran.append(index)
        still = hidden.clone()  # a block may write into it
        starts.append(((still, *rest), named) if args else (rest, {**named, "hidden_states": still}))

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.append(output)
        stills.append(first(output).clone())

    with Temporaries() as stack, grad_mode(False):
        for index, block in enumerate(blocks):
            stack.enter_context(hook_before(block, partial(start, index)))
            stack.enter_context(hook(block, end))
        for i, (site, keep) in enumerate(zip(sites, seen, strict=True)):
            stack.enter_context(site.projection.watch(partial(_keep, keep)))
            stack.enter_context(hook(site.down, lambda m, args, made, i=i: called.append(i)))
            for module in site.block.modules():
                if next(module.children(), None) is None and module is not site.down:
                    leaves = keep["leaves"]
                    stack.enter_context(hook(module, lambda m, args, made, k=leaves: k.append((m, args[:1], made))))
        model(**inputs)

    check_once(ran, len(blocks), [(site.name, keep["calls"]) for site, keep in zip(sites, seen, strict=True)])
    order = {id(block): index for index, block in enumerate(blocks)}
    placements = []
    with grad_mode(False):
        for site, keep in zip(sites, seen, strict=True):
            index = order[id(site.block)]
            site.projection.verify(site.name, keep["z"], keep["o"], keep["rest"])
            placements.append(_placement(site, starts[index], first(outputs[index]), stills[index], keep))
    tuples = [len(output) if isinstance(output, (tuple, list)) else 0 for output in outputs]
    return Anatomy(_of_one_kind(sites, placements), tuples, called)


def _of_one_kind(sites: Sequence[Site], placements: Sequence[NormPlacement]) -> list[NormPlacement]:
    """The placements, all of a block ``replay`` where its sites join its output in different ways."""
    found: dict[int, set[tuple[Kind, int]]] = {}
    for site, placement in zip(sites, placements, strict=True):
        if placement.kind != "replay":
            norm = placement.norm if placement.kind != "residual" else None
            found.setdefault(id(site.block), set()).add((placement.kind, id(norm)))
    mixed = {block for block, kinds in found.items() if len(kinds) > 1}
    return [NormPlacement("replay") if id(s.block) in mixed else p for s, p in zip(sites, placements, strict=True)]


def check_once(ran: Sequence[int], blocks: int, calls: Sequence[tuple[str, int]]) -> None:
    """Raises NotEntered unless each block ran once, in order, and so did each site."""
    if list(ran) != list(range(blocks)):
        raise NotEntered(f"it runs its {blocks} layers as {list(ran)}")
    for name, count in calls:
        if count != 1:
            raise NotEntered(f"it runs {name!r} {count} times")


def _keep(seen: dict[str, Any], z: Tensor, o: Tensor, rest: Tensor | None) -> None:
    seen.update(z=z.clone(), o=o.clone(), made=o, rest=rest, calls=seen["calls"] + 1)


def _placement(
    site: Site, start: tuple[tuple, dict], output: Tensor, out: Tensor, seen: Mapping[str, Any]
) -> NormPlacement:
    """How a layer joins ``o``, the output of its down projection, to its own ``output``, which was ``out``."""
    o, rest = seen["o"], seen["rest"]
    erased = torch.zeros_like(o) if rest is None else rest.to(o.dtype).expand_as(o)
    with hook(site.down, lambda module, args, output: erased.clone()):
        truth = first(site.block(*start[0], **start[1]))
    made = seen["made"]
    if o.dim() == 2:  # tokens of all rows in one dimension
        o, erased, made = o.view_as(out), erased.reshape(out.shape), made.view_as(out)

    guesses: list[tuple[Kind, nn.Module, Tensor]] = []
    for module, args, given in seen["leaves"]:
        if not args or not torch.is_tensor(args[0]) or not torch.is_tensor(given) or args[0].shape != given.shape:
            continue
        if same(given, output) and not same(args[0], output):
            guesses.append(("post_norm", module, module(args[0] - o + erased)))
        elif same(args[0], made) and not same(given, made):
            guesses.append(("sandwich", module, out - given + module(erased)))
    guesses.append(("residual", nn.Identity(), out - o + erased))
    slack = 64 * torch.finfo(out.dtype).eps * out.abs().max()
    for kind, norm, guess in guesses:
        if (guess - truth).abs().max() <= slack:
            return NormPlacement(kind, norm)
    return NormPlacement("replay")
