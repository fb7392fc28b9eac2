"""Routed experts as one down projection: the neurons of all experts of a layer side by side.

Token n goes to some of E experts, with routing weights ``r[n, e]`` that depend on the layer's input alone (0: not
routed there). With ``z_e`` ``[N, F_e]`` the activations of expert e and ``W_e`` its down projection, the module gives

.. math:: o_n = \\sum_e r_{ne} (z_{ne} W_e' + b_e) = z'_n W_2' + \\sum_e r_{ne} b_e, \\qquad
          z'_{n,\\,eF_e+k} = r_{ne}\\, z_{nek}, \\quad W_2 = [W_1, \\dots, W_E]

so that ``z'`` ``[N, F]``, ``F = E F_e``, stands where a linear down projection has its input. Modules are taken as
``transformers`` builds them from version 5 on; which of its implementations computes the product does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spurge.engine.base.files import fingerprint
from spurge.engine.base.gradients import without_gradients
from spurge.engine.base.temporary import Temporary
from spurge.engine.models.hooks import hook
from spurge.engine.models.parameters import oddity
from spurge.engine.models.projections import GateHook, Gating, Look, RowGates, gated_after, hooked, misfit, norms

SUPPORTED = (
    "a transformers experts module with 3-D parameters gate_up_proj (or up_proj) and down_proj, called as "
    "experts(hidden [N, H], index [N, K], weights [N, K]), all experts on one rank"
)


def is_routed(path: str, module: nn.Module) -> bool:
    """Whether a module at ``path`` holds the routed experts of a layer, in whatever form."""
    *above, name = path.split(".")
    if "experts" in above:
        return False
    down = module._parameters.get("down_proj")
    named = name == "experts" and any(parameter.dim() > 1 for parameter in module.parameters())
    return named or (down is not None and down.dim() == 3)


def refusal(module: nn.Module) -> str | None:
    """What keeps routed experts from being a site, or None."""
    up = module._parameters.get("gate_up_proj", module._parameters.get("up_proj"))
    down = module._parameters.get("down_proj")
    kind = type(module).__name__
    if up is None or down is None or up.dim() != 3 or down.dim() != 3 or not hasattr(module, "is_transposed"):
        return f"a {kind}"
    if odd := oddity(up) or oddity(down):
        return f"a {kind} with weights that are a {odd}"
    if getattr(module, "_is_expert_parallel", False):
        return f"a {kind} spread over ranks (expert parallelism)"
    if getattr(module, "has_post_expert_norm", False):
        return f"a {kind} with a norm behind each expert"
    return None


@dataclass(frozen=True, eq=False)
class _Routing:
    """One call of an experts module."""

    hidden: Tensor  # [N, H]
    shares: Tensor  # [N, E] routing weights, 0 where a token does not go
    goes: Tensor  # [N, E]

    def experts(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per expert in use: its number, its tokens ``[n]`` and their routing weights ``[n, 1]``."""
        for expert in self.goes.any(0).nonzero()[:, 0].tolist():
            tokens = self.goes[:, expert].nonzero()[:, 0]
            yield expert, tokens, self.shares[tokens, expert, None]


class _ExpertGate(GateHook):
    """Forward hook of an experts module: adds what gated neurons change in its output.

    The module computes all experts in one product, with nothing to hook inside. Of gates that are stacked, each
    changes what those before it left.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        gates = self.gates()
        if gates is None:
            return output
        earlier = _on(takewhile(lambda hook: hook is not self, hooked(module)))
        return Experts(module).moved(args, output, gates, earlier)


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of a layer as one down projection; neuron ``e * F_e + k`` is neuron k of expert e."""

    module: nn.Module
    key: ClassVar[str] = "down_proj"

    @property
    def size(self) -> int:
        return 1

    @property
    def parameter(self) -> Tensor:
        return self.module.down_proj  # type: ignore[return-value]

    @property
    def _down(self) -> Tensor:
        """The experts' down projections, ``[E, H, F_e]``, a view."""
        return self.parameter.transpose(1, 2) if self.module.is_transposed else self.parameter

    @property
    def shape(self) -> tuple[int, int]:
        experts, hidden, width = self._down.shape
        return hidden, experts * width

    def weight(self) -> Tensor:
        """W2 as ``[H, F]``: a copy of all experts' weights, unless they are held transposed."""
        return self._down.transpose(0, 1).flatten(1)

    def bias(self) -> Tensor | None:
        """The experts' biases ``[E, H]``, each weighted by routing as its expert is; or None."""
        return self.module._parameters.get("down_proj_bias")

    def pull(self, gradient: Tensor) -> Tensor:
        experts, _, width = self._down.shape
        pulled = gradient.new_empty(*gradient.shape[:-1], experts, width)
        for expert, down in enumerate(self._down):
            pulled[..., expert, :] = gradient @ down
        return pulled.flatten(-2)

    def columns(self, indices: Tensor) -> Tensor:
        expert, neuron = self._split(indices)
        return self._down[expert, :, neuron].t()

    @without_gradients
    def column_norms(self) -> Tensor:
        return norms(self._down, 1).flatten()

    def write(self, indices: Tensor, columns: Tensor) -> None:
        expert, neuron = self._split(indices)
        self._down[expert, :, neuron] = columns.t()

    def watch(self, look: Look) -> Temporary[None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            routing = self._routing(args)
            return look(self._activations(routing), output, self._rest(routing))

        return hook(self.module, see)

    def gate(self, gates: Gating) -> Temporary[None]:
        return gated_after(self.module, _ExpertGate(gates))

    def verify(self, name: str, z: Tensor, output: Tensor, rest: Tensor | None) -> None:
        width = self._down.shape[2]
        made: Any = sum(linear(part, down).float() for part, down in zip(z.split(width, -1), self._down, strict=True))
        made = made if rest is None else made + rest
        if (odd := misfit(made, output)) is not None:
            raise ValueError(
                f"model: the output of the experts {name!r} is not the weighted sum of their down projections "
                f"(relative difference {odd:.2g}); expected {SUPPORTED}"
            )

    def fingerprint(self) -> str:
        return fingerprint(self.parameter)

    def moved(self, args: tuple[Any, ...], output: Tensor, gates: RowGates, earlier: Sequence[RowGates] = ()) -> Tensor:
        """The output ``[N, H]`` with neurons gated: ``o + (g - 1) z' W2'``, for the experts that ``gates`` touches.

        Args:
            args: what the module was called with.
            output: what it gave, under the gates of ``earlier``.
            gates: of groups of tokens.
            earlier: the gates that ``output`` has seen.
        """
        routing, count = self._routing(args), len(output)
        touched = set(self._split(gates.columns)[0].unique().tolist())
        full, before = self._full(gates), [self._full(other) for other in earlier]
        total = output.new_zeros(output.shape, dtype=torch.promote_types(output.dtype, torch.float32))
        for expert, tokens, shares in routing.experts():
            if expert in touched:
                z = self._expert(expert, routing.hidden[tokens])
                for other in before:
                    z = z * _of(other, expert, tokens, count)
                change = z * (_of(full, expert, tokens, count) - 1) * shares
                total.index_add_(0, tokens, linear(change.to(output.dtype), self._down[expert]).to(total.dtype))
        return (output + total).to(output.dtype)

    def _split(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Expert of each neuron, and which of its own it is."""
        width = self._down.shape[2]
        return indices // width, indices % width

    def _full(self, gates: RowGates) -> Tensor:
        """All gates as ``[P, E, F_e]``."""
        return gates.full(self.shape[1], self.parameter.device).unflatten(1, (-1, self._down.shape[2]))

    def _routing(self, args: tuple[Any, ...]) -> _Routing:
        """Who goes where.

        Raises:
            ValueError: the module was called in another way, or its weights are not there.
        """
        if self.parameter.is_meta:
            raise ValueError("model: the weights of its experts are on the meta device (offloaded or not loaded)")
        if len(args) < 3 or args[0].dim() != 2 or args[1].shape != args[2].shape or len(args[1]) != len(args[0]):
            raise ValueError(
                f"model: {type(self.module).__name__} was called with {len(args)} positional arguments of shapes "
                f"{[tuple(arg.shape) for arg in args if torch.is_tensor(arg)]}; expected {SUPPORTED}"
            )
        hidden, index, weights = args[:3]
        count, experts = len(hidden), len(self._down)
        # An index of E is transformers' mark for "no expert".
        shares = weights.new_zeros(count, experts + 1).scatter_add(1, index, weights)[:, :experts]
        goes = torch.zeros(count, experts + 1, dtype=torch.bool, device=index.device).scatter(1, index, True)
        return _Routing(hidden, shares, goes[:, :experts])

    @without_gradients
    def _activations(self, routing: _Routing) -> Tensor:
        """``z'`` ``[N, F]``, the gates that are on included."""
        count, (experts, _, width) = len(routing.hidden), self._down.shape
        gates = [self._full(found) for found in _on(hooked(self.module))]
        z = routing.hidden.new_zeros(count, experts, width)
        for expert, tokens, shares in routing.experts():
            made = self._expert(expert, routing.hidden[tokens]) * shares
            for full in gates:
                made = made * _of(full, expert, tokens, count)
            z[tokens, expert] = made.to(z.dtype)
        return z.flatten(1)

    def _rest(self, routing: _Routing) -> Tensor | None:
        """The biases as they are weighted, ``[N, H]``; None without biases."""
        bias = self.bias()
        return None if bias is None else routing.shares.to(bias.dtype) @ bias

    def _expert(self, expert: int, hidden: Tensor) -> Tensor:
        """Activations ``[n, F_e]`` of one expert on ``[n, H]``."""
        module: Any = self.module
        key = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
        up, bias = module._parameters[key][expert], module._parameters.get(f"{key}_bias")
        made = linear(hidden, up.t() if module.is_transposed else up, None if bias is None else bias[expert])
        return module._apply_gate(made) if key == "gate_up_proj" else module.act_fn(made)


def _on(hooks: Iterable[GateHook]) -> list[RowGates]:
    """The gates that are on now."""
    return [found for hook in hooks if (found := hook.gates()) is not None]


def _of(full: Tensor, expert: int, tokens: Tensor, count: int) -> Tensor:
    """Gates ``[P, E, F_e]`` of one expert for some of ``count`` tokens: ``[n, F_e]``, or ``[1, F_e]`` where P is 1."""
    groups = len(full)
    return full[:, expert] if groups == 1 else full[tokens * groups // count, expert]
