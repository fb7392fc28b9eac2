"""Where a backward pass leaves every neuron's gradient times activation, summed over tokens, and keeps no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spurge import ops
from spurge.engine.base.device_checks import require
from spurge.engine.base.temporary import Temporaries, temporary
from spurge.engine.models.hooks import hook, hook_before
from spurge.engine.models.projections import Linear, by_unit
from spurge.engine.models.sites import Site
from spurge.engine.passes.norm_placement import by_rows

BENT = 0.2  # weight of the second part of a stake; found where effects of all units were known


@dataclass(frozen=True, eq=False)
class FirstOrder:
    """Of one target, by site, ``[B, F]`` float32.

    Attributes:
        estimate: gradient times activation, summed over tokens.
        stake: how far the estimate may be off, up to a common factor; empty where nobody asked.
    """

    estimate: list[Tensor]
    stake: list[Tensor]


@dataclass(frozen=True, eq=False)
class _Sums:
    """What the calls of one site add up to, ``[B, F * size]`` each; parts of stakes where these were asked for.

    Attributes:
        total: gradient times activation, summed over tokens.
        magnitude: the same without signs.
        reach: the largest activation of any token, as a share of the stream it adds to.
        bend: the largest of any token by how much its gradient turns with that share, squared.
    """

    total: Tensor
    magnitude: Tensor
    reach: Tensor
    bend: Tensor

    @classmethod
    def zero(cls, batch: int, site: Site) -> _Sums:
        return cls(*torch.zeros(4, batch, site.width * site.projection.size, device=site.parameter.device))

    def __add__(self, other: _Sums) -> _Sums:
        reach, bend = torch.maximum(self.reach, other.reach), torch.maximum(self.bend, other.bend)
        return _Sums(self.total + other.total, self.magnitude + other.magnitude, reach, bend)


class _Read(torch.autograd.Function):
    """An identity whose backward pass calls ``seen(gradient)``.

    Its gradient is in the graph of ``leaf``, whether the values' own are wanted or not: by one leaf all are read.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, leaf: Tensor, seen: Callable[[Tensor], None]) -> Tensor:
        ctx.seen = seen
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen(gradient)
        return gradient, None, None


@dataclass(eq=False)
class ActivationGradients:
    """The activations of one forward pass as places where its gradients are read.

    Each gradient is summed into ``[B, F * size]`` as the backward pass makes it; none is kept. A layer that runs more
    than once is read at each of its calls. Of a head, the coordinates' estimates add up, and so do the terms of its
    stake; its reach is that of the coordinate that reaches furthest.

    Args:
        sites: where.
        batch: B of the pass.
        mask: which tokens are real, ``[B, T]``; None where all are. Those that are not have no gradient, whatever they
            hold: where they have one at the first site, padding changes the rows.
        complaint: says so.
        stakes: what is at stake is wanted, too.
    """

    sites: Sequence[Site]
    batch: int
    mask: Tensor | None
    complaint: Callable[[], str]
    stakes: bool
    _leaf: Tensor = field(init=False)
    _sums: dict[int, _Sums] = field(init=False, default_factory=dict)
    _streams: dict[int, Tensor] = field(init=False, default_factory=dict)  # sizes of what sites add to, [B, T]
    _sizes: dict[int, Tensor] = field(init=False, default_factory=dict)  # of the gradients of outputs, [B, T]

    def __post_init__(self) -> None:
        self._leaf = torch.zeros((), device=self.sites[0].parameter.device).requires_grad_()

    @temporary
    def watched(self) -> Iterator[None]:
        """Gradients can be read at the sites of a forward pass that runs meanwhile, in this thread."""
        with Temporaries() as stack:
            for i, site in enumerate(self.sites):
                projection = site.projection
                if isinstance(projection, Linear) and projection.whole:
                    stack.enter_context(hook_before(site.down, partial(self._before, i)))
                    stack.enter_context(hook(site.down, partial(self._after, i), foremost=True))
                else:
                    stack.enter_context(projection.watch(partial(self._behind, i)))
            yield

    def adds_to(self, i: int, stream: Tensor) -> None:
        """Says what site ``i`` adds to, ``[B, T, H]``: where its stakes look for the size of a step."""
        self._streams[i] = _norm(stream.detach())

    def read(self, value: Tensor, *, keep: bool) -> FirstOrder:
        """The estimates for a target's values on the rows of the pass, ``[B]``.

        Args:
            keep: leave the graph as it is, for another target.
        """
        self._sums = {}
        if value.requires_grad:
            torch.autograd.grad(value.sum(), self._leaf, retain_graph=keep, allow_unused=True)
        found = FirstOrder([], [])
        for i, site in enumerate(self.sites):
            sums = self._sums.pop(i, None) or _Sums.zero(self.batch, site)  # the target reads nothing of it
            size = site.projection.size
            found.estimate.append(by_unit(sums.total, size).float())
            if self.stakes:
                norms = site.projection.column_norms().to(sums.reach)
                reach, bend = (_furthest(part * norms, size) for part in (sums.reach, sums.bend))
                stake = by_unit(sums.magnitude, size) * reach + BENT * bend.square()
                found.stake.append(stake.float())
        return found

    def _before(self, i: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        z = args[0].detach()
        read = _Read.apply(args[0], self._leaf, partial(self._add, i, z, z._version))
        return (read, *args[1:]), kwargs  # what else reads the activations is none of the neurons' business

    def _after(self, i: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        output.register_hook(partial(self._size, i))

    def _behind(self, i: int, z: Tensor, o: Tensor, rest: Tensor | None) -> Tensor:
        z, pull = z.detach(), self.sites[i].projection.pull
        version = z._version

        def add(gradient: Tensor) -> None:
            self._size(i, gradient)
            self._add(i, z, version, pull(gradient.to(z.dtype)))

        return _Read.apply(o, self._leaf, add)

    def _size(self, i: int, gradient: Tensor) -> None:
        """Sees the gradient of a site's output, which comes before that of its activations."""
        masked = i == 0 and self.mask is not None
        if not self.stakes and not masked:
            return
        size = _norm(_rows(gradient, self.batch))
        if self.stakes:
            self._sizes[i] = size
        if masked and (mask := self._mask(size)) is not None:
            require(~(size * (mask == 0)).any(), self.complaint)

    def _mask(self, tokens: Tensor) -> Tensor | None:
        """The mask of ``[B, T, ...]``, uint8; None where these are other tokens than the mask speaks of."""
        if self.mask is None or self.mask.shape != tokens.shape[:2]:
            return None
        return self.mask.to(tokens.device, torch.uint8)

    def _add(self, i: int, z: Tensor, version: int, gradient: Tensor) -> None:
        if z._version != version:
            raise ValueError(f"model: writes over the activations of {self.sites[i].name!r} after they were used")
        z, gradient = _rows(z, self.batch), _rows(gradient, self.batch)
        mask = self._mask(z)
        if self.stakes:
            stream = self._stream(i, z)
            scale = stream.clamp_min(torch.finfo(stream.dtype).tiny).reciprocal()
            total, magnitude, reach = ops.first_order(gradient, z, scale, mask)
            bend = ops.first_order(gradient, z, (self._sizes.pop(i) * scale).sqrt(), mask)[2]
            sums = _Sums(total, magnitude, reach, bend)
        else:
            total = ops.multiply_sum(gradient, z, mask)
            sums = _Sums(total, total, total, total)
        self._sums[i] = self._sums[i] + sums if i in self._sums else sums

    def _stream(self, i: int, z: Tensor) -> Tensor:
        """Size of what the site adds to, ``[B, T]``; 1 where that was not seen token by token."""
        stream = self._streams.get(i)
        if stream is None or stream.shape != z.shape[:2]:
            return z.new_ones(z.shape[:2], dtype=_wide(z.dtype))
        return stream.to(z.device)


def _furthest(values: Tensor, size: int) -> Tensor:
    """Largest of the coordinates of each unit: ``[B, F * size]`` -> ``[B, F]``."""
    return values if size == 1 else values.unflatten(-1, (-1, size)).amax(-1)


def _rows(values: Tensor, rows: int) -> Tensor:
    """``[B, T, ...]`` of what a module sees, tokens in one dimension."""
    return by_rows(values, rows).flatten(1, -2)


def _norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=2, dtype=_wide(vectors.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
