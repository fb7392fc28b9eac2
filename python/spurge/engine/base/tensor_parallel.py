"""Weights that several ranks hold together: tensor parallelism, as transformers loads a model with a ``tp_plan``.

Every rank then runs the same rows, and what the model hands from layer to layer is the same on all of them. What is
decided by a number of one rank alone, such as its free memory, has to be agreed on, or the ranks would wait for each
other in different places.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spurge.engine.base.gradients import grad_mode

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether several ranks hold ``tensor`` together."""
    return dist.is_available() and isinstance(tensor, DTensor)


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """The ranks that hold the weights of ``module`` together; None where each has all of them."""
    sharded = (parameter for parameter in module.parameters() if is_sharded(parameter))
    return getattr(next(sharded, None), "device_mesh", None)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    if not is_sharded(tensor):
        return tensor
    with grad_mode(False):
        return tensor.to_local()  # type: ignore[attr-defined]


def joined(part: Tensor, mesh: DeviceMesh, width: int) -> Tensor:
    """``[..., width]`` from the parts ``[..., n]`` of the ranks, side by side in their order."""
    shape = torch.Size((*part.shape[:-1], width))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride).full_tensor()


def agreed(numbers: list[int], mesh: DeviceMesh, *, largest: bool) -> list[int]:
    """Per place in the list, the largest (smallest) number of all ranks."""
    both = torch.tensor(numbers, dtype=torch.int64, device=mesh.device_type)
    dist.all_reduce(both, dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN, mesh.get_group())
    return both.tolist()


def added(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' parts, on every rank; what is computed from it is the same on all, and so its gradient."""
    return _Added.apply(part, mesh)  # type: ignore[no-untyped-call]


def shared(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """``value``, the same on all ranks and put to a different use by each: its gradient is the sum of theirs."""
    return _Shared.apply(value, mesh)  # type: ignore[no-untyped-call]


def _summed(part: Tensor, mesh: DeviceMesh) -> Tensor:
    total = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=mesh.get_group())
    return total


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: DeviceMesh) -> Tensor:
        return _summed(part, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _summed(gradient, ctx.mesh), None
