"""A down projection whose neurons are dealt out to ranks, as transformers' tensor parallelism loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from spurge.engine.base.temporary import Temporary
from spurge.engine.base.tensor_parallel import added, is_sharded, joined, shared, whole
from spurge.engine.models.hooks import hook
from spurge.engine.models.projections import GateHook, Gating, Linear, Look, RowGates, coordinates, gated_before


def refusal(linear: nn.Module) -> str | None:
    """What keeps a linear layer with weights spread over ranks from being a site, or None."""
    weight: Any = linear.weight
    placements = tuple(weight.placements)
    if isinstance(linear, nn.Linear) and len(placements) == 1 and placements[0].is_shard(1):
        return None
    return (
        f"held by several ranks as {', '.join(map(str, placements))}; expected a nn.Linear split along its inputs "
        "alone (transformers' tp_plan 'rowwise'); load the model with device_map instead"
    )


class _ShardGate(GateHook):
    """Forward pre-hook of a sharded linear layer: gates on this rank's part of its input."""

    def __init__(self, gates: Gating, projection: RowSharded) -> None:
        super().__init__(gates, projection.size)
        self.projection = projection

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        gates, z = self.now(), args[0]
        if gates is not None and z.shape[-1] != self.projection.inputs:
            gates = self.projection.own(gates)
        return args if gates is None else (gates.on(z), *args[1:])


@dataclass(frozen=True, eq=False)
class RowSharded(Linear):
    """A linear layer of whose F inputs each rank has some: ``z`` ``[..., F]`` is joined, and seen whole by every rank.

    All ranks call every method, in the same order: each answers with what all of them hold.
    """

    whole: ClassVar[bool] = False

    @property
    def _weight(self) -> Any:
        return self.parameter

    @property
    def _start(self) -> int:
        """The first coordinate of this rank: parts are of one size but for the last ones."""
        mesh, width = self._weight.device_mesh, self.inputs
        return min(width, mesh.get_local_rank() * -(-width // mesh.size()))

    def weight(self) -> Tensor:
        """W2 as ``[H, F]``, a copy put together from all ranks."""
        return whole(self.parameter)

    def bias(self) -> Tensor | None:
        bias = super().bias()
        return None if bias is None else whole(bias)

    def pull(self, gradient: Tensor) -> Tensor:
        return self._joined(gradient @ self._weight.to_local())

    def columns(self, indices: Tensor) -> Tensor:
        local = self._weight.to_local()
        place, mine = self._places(coordinates(indices, self.size))
        columns = local.new_zeros(len(local), len(place))
        columns[:, mine] = local[:, place[mine]]
        return added(columns, self._weight.device_mesh)

    def write(self, indices: Tensor, columns: Tensor) -> None:
        """Writes those of the columns that this rank holds."""
        place, mine = self._places(coordinates(indices, self.size))
        self._weight.to_local()[:, place[mine]] = columns[:, mine]

    def watch(self, look: Look) -> Temporary[None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return look(self._joined(args[0].detach()), output, self.bias())

        return hook(self.module, see)

    def gate(self, gates: Gating) -> Temporary[None]:
        return gated_before(self.module, _ShardGate(gates, self))

    def own(self, gates: RowGates) -> RowGates | None:
        """The gates of this rank's coordinates, counted from its first; None where it has none to multiply."""
        values = gates.values
        if values.requires_grad:
            values = shared(values, self._weight.device_mesh)  # on every rank: all of them sum in the backward pass
        place, mine = self._places(gates.columns)
        if not values.requires_grad and not mine.any():
            return None
        return RowGates(place[mine], values[:, mine.to(values.device)])

    def _places(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Where this rank would hold coordinates, counted from its first, and which of them it holds."""
        place = indices - self._start
        return place, (place >= 0) & (place < self._weight.to_local().shape[1])

    def _joined(self, part: Tensor) -> Tensor:
        """``[..., F * size]`` from this rank's part; what is whole already stays."""
        if is_sharded(part):
            raise ValueError(
                f"model: a down projection is called with a {type(part).__name__}, expected plain tensors as "
                "transformers' own tp_plan hands them on"
            )
        width = self.inputs
        return part if part.shape[-1] == width else joined(part, self._weight.device_mesh, width)
