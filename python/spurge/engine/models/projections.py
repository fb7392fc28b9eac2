"""Down projections: what the neurons of a site go through, ``u = z W2'``, and how they are watched and gated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spurge import ops
from spurge.engine.base.temporary import Temporary, temporary
from spurge.engine.models.hooks import hook

Look = Callable[[Tensor, Tensor, "Tensor | None"], "Tensor | None"]
"""What watches a projection: activations ``[..., F]``, output ``o`` ``[..., H]`` and what of ``o`` does not scale with
the activations (the bias; None: nothing) -> another output in the place of ``o``, or None."""


@dataclass(frozen=True, eq=False)
class RowGates:
    """What multiplies some neurons, in P groups of rows: rows are ordered by group.

    Attributes:
        columns: the neurons, int64 ``[n]``, distinct.
        values: float32 ``[P, n]``; may carry gradients where P is 1.
    """

    columns: Tensor
    values: Tensor

    def full(self, width: int, device: torch.device) -> Tensor:
        """Gates of all neurons of a site, ``[P, F]``: 1 where there are none."""
        ones = torch.ones(width, len(self.values), device=device)
        return ones.index_put((self.columns.to(device),), self.values.t().to(device)).t()

    def on(self, z: Tensor) -> Tensor:
        """Activations ``[R, ..., F]`` times the gates. Half precision is multiplied in float32 and rounded once.

        One group leaves ``z`` alone, which whoever computed it may still hold; several write into it.
        """
        if len(self.values) == 1:
            return (z * self.full(z.shape[-1], z.device)[0]).to(z.dtype)
        z = z.clone() if z._is_view() else z  # a view may share memory with what the layer still needs
        rows = z if z.dim() == 3 else z.unflatten(0, (len(self.values), -1))
        ops.gate_columns_(rows, self.columns, self.values)
        return z


Gating = Callable[[], "RowGates | None"]
"""Says which gates are on now; None: the neurons stay as they are."""


class GateHook:
    """Gates as they hang on a module, among its forward hooks."""

    def __init__(self, gates: Gating) -> None:
        self.gates = gates


def hooked(module: nn.Module) -> list[GateHook]:
    """The gates on a module, in the order they were attached."""
    hooks: tuple[Any, ...] = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in hooks if isinstance(hook, GateHook)]


@temporary
def gated_before(module: nn.Module, gate: GateHook) -> Iterator[None]:
    """Gates that multiply what goes into a module."""
    handle = module.register_forward_pre_hook(gate)  # type: ignore[arg-type]
    yield
    handle.remove()


@temporary
def gated_after(module: nn.Module, gate: GateHook) -> Iterator[None]:
    """Gates that change what comes out of a module."""
    handle = module.register_forward_hook(gate)  # type: ignore[arg-type]
    yield
    handle.remove()


class Projection(Protocol):
    """What every kind of down projection answers. F neurons in, H numbers out.

    Attributes:
        module: what is hooked.
        key: name of the parameter of ``module`` that holds W2.
    """

    key: ClassVar[str]

    @property
    def module(self) -> nn.Module: ...

    @property
    def parameter(self) -> Tensor:
        """The parameter that holds W2, in its own shape."""

    @property
    def shape(self) -> tuple[int, int]:
        """(H, F)."""

    def weight(self) -> Tensor:
        """W2 as ``[H, F]``: column k belongs to neuron k."""

    def bias(self) -> Tensor | None:
        """What is added to ``u`` and does not scale with the activations, as the module holds it."""

    def pull(self, gradient: Tensor) -> Tensor:
        """Gradients by the output ``[..., H]`` -> by the activations ``[..., F]``, without a copy of W2."""

    def columns(self, indices: Tensor) -> Tensor:
        """A copy of the columns ``indices`` ``[n]`` of W2, ``[H, n]``."""

    def write(self, indices: Tensor, columns: Tensor) -> None:
        """Puts ``columns`` ``[H, n]`` in the place of those of ``indices``, in the parameter itself."""

    def watch(self, look: Look) -> Temporary[None]:
        """Calls ``look`` after each forward of the module in this thread."""

    def gate(self, gates: Gating) -> Temporary[None]:
        """Multiplies the activations in each forward of the module by what ``gates`` says then.

        Those act in any thread: :func:`spurge.engine.models.hooks.in_this_thread` makes gates of this one alone.
        """

    def verify(self, name: str, z: Tensor, output: Tensor, rest: Tensor | None) -> None:
        """Raises ValueError unless what :meth:`watch` saw fits together, ``output = z W2' + rest``."""


class _LinearGate(GateHook):
    """Forward pre-hook of a linear layer: gates on its input."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        gates = self.gates()
        return args if gates is None else (gates.on(args[0]), *args[1:])


@dataclass(frozen=True, eq=False)
class Linear:
    """A down projection that is one linear layer, ``nn.Linear`` or transformers' ``Conv1D``: its input is ``z``."""

    module: nn.Module
    key: ClassVar[str] = "weight"

    @property
    def parameter(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        if isinstance(self.module, Conv1D):
            return self.module.nf, self.module.nx
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    def weight(self) -> Tensor:
        return self.parameter.t() if isinstance(self.module, Conv1D) else self.parameter

    def bias(self) -> Tensor | None:
        return self.module.bias  # type: ignore[return-value]

    def pull(self, gradient: Tensor) -> Tensor:
        return gradient @ self.weight()

    def columns(self, indices: Tensor) -> Tensor:
        return self.weight()[:, indices]

    def write(self, indices: Tensor, columns: Tensor) -> None:
        self.weight()[:, indices] = columns

    def watch(self, look: Look) -> Temporary[None]:
        return hook(self.module, lambda module, args, output: look(args[0], output, self.bias()))

    def gate(self, gates: Gating) -> Temporary[None]:
        return gated_before(self.module, _LinearGate(gates))

    def verify(self, name: str, z: Tensor, output: Tensor, rest: Tensor | None) -> None:
        """Nothing to verify: ``z`` is the input of the layer itself."""
