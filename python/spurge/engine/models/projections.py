"""Down projections: what the neurons of a site go through, ``u = z W2'``, and how they are watched and gated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spurge import ops
from spurge.engine.base.files import canonical_json, fingerprint
from spurge.engine.base.gradients import grad_mode, without_gradients
from spurge.engine.base.temporary import Temporary, temporary
from spurge.engine.models.hooks import hook
from spurge.engine.models.parameters import FLOATS, bits, oddity

Look = Callable[[Tensor, Tensor, "Tensor | None"], "Tensor | None"]
"""What watches a projection: activations ``[..., F * size]``, output ``o`` ``[..., H]`` and what of ``o`` does not
scale with the activations (the bias; None: nothing) -> another output in the place of ``o``, or None."""


@dataclass(frozen=True, eq=False)
class RowGates:
    """What multiplies some neurons, in P groups of rows: rows are ordered by group.

    Attributes:
        columns: the neurons, int64 ``[n]``, distinct.
        values: float32 ``[P, n]``; may carry gradients where P is 1.
    """

    columns: Tensor
    values: Tensor

    def to(self, device: torch.device) -> RowGates:
        """The same on another device."""
        return RowGates(self.columns.to(device), self.values.to(device))

    def spread(self, size: int) -> RowGates:
        """The same on the coordinates of units that have ``size`` of them each."""
        return self if size == 1 else RowGates(coordinates(self.columns, size), self.values.repeat_interleave(size, 1))

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


# Relative error that rounding leaves between two ways to one output; another form is off by about 1. TF32 leaves 1e-3
# in float32, and half precision rounds activations, products and sums apart.
_LEAST, _ROUNDINGS = 1e-2, 8


def misfit(made: Tensor, output: Tensor) -> float | None:
    """The relative difference of two outputs where it is more than rounding leaves, else None."""
    error, size = (made - output).norm(), output.float().norm()
    fits = error <= max(_LEAST, _ROUNDINGS * torch.finfo(output.dtype).eps) * size
    return None if fits else float(error / size)


class GateHook:
    """Gates as they hang on a module, among its forward hooks.

    Args:
        size: coordinates of each unit.
    """

    def __init__(self, gates: Gating, size: int = 1) -> None:
        self.gates, self.size = gates, size

    def now(self) -> RowGates | None:
        """What multiplies the coordinates of the activations now."""
        gates = self.gates()
        return None if gates is None else gates.spread(self.size)


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


def coordinates(units: Tensor, size: int) -> Tensor:
    """Which coordinates of the activations are those of ``units`` ``[n]``: ``[n * size]``, unit by unit."""
    return units if size == 1 else (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def by_unit(values: Tensor, size: int) -> Tensor:
    """Sums over the coordinates of each unit: ``[..., F * size]`` -> ``[..., F]``."""
    return values if size == 1 else values.unflatten(-1, (-1, size)).sum(-1)


class Projection(Protocol):
    """What every kind of down projection answers. F units in, H numbers out.

    A unit is a neuron, one coordinate of the activations, or an attention head, ``size`` coordinates side by side.

    Attributes:
        module: what is hooked.
        key: name of the parameter of ``module`` that holds W2.
    """

    key: ClassVar[str]

    @property
    def size(self) -> int:
        """Coordinates of a unit."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def parameter(self) -> Tensor:
        """The parameter that holds W2, in its own shape."""

    @property
    def shape(self) -> tuple[int, int]:
        """(H, F)."""

    def weight(self) -> Tensor:
        """W2 as ``[H, F * size]``: the columns of unit k are ``k * size`` to ``(k + 1) * size - 1``."""

    def bias(self) -> Tensor | None:
        """What is added to ``u`` and does not scale with the activations, as the module holds it."""

    def pull(self, gradient: Tensor) -> Tensor:
        """Gradients by the output ``[..., H]`` -> by the activations ``[..., F * size]``, no copy of W2."""

    def columns(self, indices: Tensor) -> Tensor:
        """A copy of the columns of units ``indices`` ``[n]`` of W2, ``[H, n * size]``."""

    def column_norms(self) -> Tensor:
        """Size of each column of W2, float32 ``[F * size]``."""

    def write(self, indices: Tensor, columns: Tensor) -> None:
        """Puts ``columns`` ``[H, n * size]`` in the place of those of ``indices``, in the parameter itself."""

    def watch(self, look: Look) -> Temporary[None]:
        """Calls ``look`` after each forward of the module in this thread."""

    def gate(self, gates: Gating) -> Temporary[None]:
        """Multiplies the units in each forward of the module by what ``gates`` says then.

        Those act in any thread: :func:`spurge.engine.models.hooks.in_this_thread` makes gates of this one alone.
        """

    def verify(self, name: str, z: Tensor, output: Tensor, rest: Tensor | None) -> None:
        """Raises ValueError unless what :meth:`watch` saw fits together, ``output = z W2' + rest``."""

    def fingerprint(self) -> str:
        """SHA-256 of what decides W2."""


def norms(weight: Tensor, dim: int) -> Tensor:
    """Sizes along a dimension, float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=dim, dtype=wide).float()


class _LinearGate(GateHook):
    """Forward pre-hook of a linear layer: gates on its input."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        gates = self.now()
        return args if gates is None else (gates.on(args[0]), *args[1:])


@dataclass(frozen=True, eq=False)
class Linear:
    """A down projection that is one linear layer, ``nn.Linear`` or transformers' ``Conv1D``: its input is ``z``.

    Attributes:
        size: coordinates of a unit: 1 of a neuron, the head's width where the input is that of attention's heads.
        whole: the input holds all of ``z``.
    """

    module: nn.Module
    size: int = 1
    key: ClassVar[str] = "weight"
    whole: ClassVar[bool] = True

    @property
    def parameter(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        return (features(self.module) or (0, 0))[1], self.inputs // self.size

    @property
    def inputs(self) -> int:
        """Coordinates of ``z``."""
        return (features(self.module) or (0, 0))[0]

    def weight(self) -> Tensor:
        return self.parameter.t() if isinstance(self.module, Conv1D) else self.parameter

    def bias(self) -> Tensor | None:
        return self.module.bias  # type: ignore[return-value]

    def pull(self, gradient: Tensor) -> Tensor:
        return gradient @ self.weight()

    def columns(self, indices: Tensor) -> Tensor:
        return self.weight()[:, coordinates(indices, self.size)]

    @without_gradients
    def column_norms(self) -> Tensor:
        return norms(self.weight(), 0)

    def write(self, indices: Tensor, columns: Tensor) -> None:
        self.weight()[:, coordinates(indices, self.size)] = columns

    def watch(self, look: Look) -> Temporary[None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return look(args[0], output, self.bias())

        return hook(self.module, see, foremost=True)

    def gate(self, gates: Gating) -> Temporary[None]:
        return gated_before(self.module, _LinearGate(gates, self.size))

    def verify(self, name: str, z: Tensor, output: Tensor, rest: Tensor | None) -> None:
        """Nothing to verify: ``z`` is the input of the layer itself."""

    def fingerprint(self) -> str:
        return fingerprint(self.parameter)


@dataclass(frozen=True, eq=False)
class Composite(Linear):
    """A linear layer that holds no plain W2: of several parts (LoRA), quantised, or with a weight that is computed.

    It is known by what it gives, ``f(z) = z W2' + f(0)``: W2 is read off from its outputs, and gradients go through
    its own backward pass.
    """

    @property
    def parameter(self) -> Tensor:
        """The largest tensor of its parts."""
        parts = [*self.module.parameters(), *self.module.buffers()]
        if not parts:
            raise ValueError(f"model: {self._kind} shows no weights (quantised in a form that torch cannot look into)")
        return max(parts, key=Tensor.numel)

    @property
    def dtype(self) -> torch.dtype:
        """The type it is called in."""
        parts = [self.parameter, *self.module.parameters(), *self.module.buffers()]
        return next((part.dtype for part in parts if part.dtype in FLOATS), torch.float32)

    @property
    def _kind(self) -> str:
        return f"the {type(self.module).__name__}"

    def weight(self) -> Tensor:
        return self.columns(torch.arange(self.shape[1]))

    def bias(self) -> Tensor:
        return self._at_zero(self._zeros(1))

    def pull(self, gradient: Tensor) -> Tensor:
        z = gradient.new_zeros(*gradient.shape[:-1], self.inputs).requires_grad_()
        with grad_mode(True):
            output = self.module.forward(z)
        if not output.requires_grad:
            raise ValueError(
                f"model: {self._kind} gives no gradients (quantised for inference alone); ablations, gates and "
                "path='neuron' work"
            )
        return torch.autograd.grad(output, z, gradient.to(output.dtype))[0]

    @without_gradients
    def columns(self, indices: Tensor) -> Tensor:
        places = coordinates(indices, self.size)
        ones = self._zeros(len(places))
        ones[torch.arange(len(places), device=ones.device), places.to(ones.device)] = 1
        return (self.module.forward(ones) - self.bias()).t()

    def write(self, indices: Tensor, columns: Tensor) -> None:
        raise ValueError(f"model: {self._kind} holds no plain weight to write to (adapted, quantised or computed)")

    def watch(self, look: Look) -> Temporary[None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return look(args[0], output, self._at_zero(args[0].new_zeros(1, args[0].shape[-1])).to(output.dtype))

        return hook(self.module, see, foremost=True)

    @without_gradients
    def verify(self, name: str, z: Tensor, output: Tensor, rest: Tensor | None) -> None:
        constant = 0 if rest is None else rest
        if (odd := misfit(2 * (self.module.forward(z / 2) - constant), output - constant)) is not None:
            raise ValueError(
                f"model: the output of {name!r} ({type(self.module).__name__}) does not scale with its input "
                f"(relative difference {odd:.2g}), expected a linear layer"
            )

    def fingerprint(self) -> str:
        """Of all its tensors, and of the numbers that scale adapters."""
        held = {name: value for name, value in self.module.state_dict().items() if isinstance(value, Tensor)}
        parts: list[Any] = [[name, *map(fingerprint, bits(name, held[name]))] for name in sorted(held)]
        parts.append([repr(getattr(self.module, name, None)) for name in ("scaling", "active_adapters")])
        return fingerprint(canonical_json(parts))

    @without_gradients
    def _at_zero(self, zeros: Tensor) -> Tensor:
        return self.module.forward(zeros)[0]

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.inputs, dtype=self.dtype, device=self.parameter.device)


def features(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer as it says itself, or None."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        sizes = [getattr(module, name, None) for name in names]
        if all(hasattr(size, "__index__") for size in sizes):
            return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear layer, of whatever parts: LoRA around another one, or a quantised one."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    inner = getattr(module, "base_layer", getattr(module, "original_module", None))  # what peft wraps
    if isinstance(inner, nn.Module):
        return is_linear(inner)
    below = (child for child in module.modules() if child is not module)
    return features(module) is not None and not any(map(is_linear, below))


def linears(module: nn.Module, path: str = "", seen: set[int] | None = None) -> dict[str, nn.Module]:
    """The linear layers of a module by path, each once; one of several parts, never its parts."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return {}
    seen.add(id(module))
    if is_linear(module):
        return {path: module}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        found |= linears(child, f"{path}.{name}" if path else name, seen)
    return found


@without_gradients
def plain(module: nn.Module) -> bool:
    """Whether a linear layer multiplies by W2 as its float parameter ``weight`` holds it, and adds its bias."""
    weight = module._parameters.get("weight")
    if weight is None or oddity(weight) is not None:
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) or weight.is_meta:
        return True
    inputs = Linear(module).inputs  # a class with a forward of its own (Falcon's) may do the same
    z = torch.linspace(-1, 1, inputs, dtype=weight.dtype, device=weight.device)[None]
    return misfit(nn.functional.linear(z, Linear(module).weight(), Linear(module).bias()), module.forward(z)) is None
