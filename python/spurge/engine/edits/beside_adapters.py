"""Parameters beside which LoRA's adapters lie: an edit of the merged model fits them, too.

``peft`` computes with ``W + D``, and merging writes that sum. What an edit made for the merged model writes is meant
for the sum, and the parameter gets the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from spurge.engine.base.gradients import without_gradients
from spurge.engine.models.parameters import Place


def around(model: nn.Module, layer: nn.Module) -> Any:
    """The module that peft put around a layer, where adapters in it act now; else None."""
    for module in model.modules():
        if getattr(module, "base_layer", None) is layer:
            idle = getattr(module, "disable_adapters", False) or getattr(module, "merged", False)
            return None if idle else module
    return None


@without_gradients
def additions(model: nn.Module, place: Place) -> list[Tensor]:
    """What each adapter adds to a parameter, in its shape; none where none acts.

    Raises:
        ValueError: an adapter that does not add to it (DoRA, IA³, ...).
    """
    layer = around(model, place.module)
    if layer is None or place.key not in ("weight", "bias"):
        return []
    plain = isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) and not getattr(layer, "lora_variant", None)
    if not plain or any(layer.use_dora.values()):
        raise ValueError(
            f"model: {place.name!r} is adapted in another way than by adding to it (LoRA); merge the adapter first"
        )
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if place.key == "weight":
        return [layer.get_delta_weight(name) for name in active]
    biases = ((layer.lora_B[name].bias, layer.scaling[name]) for name in active)
    return [bias * scale for bias, scale in biases if bias is not None]


def merged(parameter: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """What merging makes of a parameter, bit for bit as peft adds."""
    parameter = parameter.detach().clone()
    for part in parts:
        parameter += part
    return parameter


def rest(values: Tensor, indices: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """What a parameter has to hold at flat ``indices`` ``[n]`` for the sum to be ``values`` ``[n]``, in their type."""
    wide = values.double()
    for part in parts:
        wide = wide - part.detach().reshape(-1)[indices.to(part.device)].to(wide)
    return wide.to(values.dtype)
