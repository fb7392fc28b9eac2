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


def adapted_layers(model: nn.Module) -> dict[nn.Module, Any]:
    """Each layer that adapters act on now, with the module that peft put around it."""
    found = {}
    for module in model.modules():
        layer = getattr(module, "base_layer", None)
        idle = getattr(module, "disable_adapters", False) or getattr(module, "merged", False)
        if isinstance(layer, nn.Module) and not idle:
            found[layer] = module
    return found


@without_gradients
def additions(around: Any, place: Place) -> list[Tensor]:
    """What each adapter in the module ``around`` a layer adds to a parameter of it, in its shape; None: there are none.

    Raises:
        ValueError: an adapter that does not add to it (DoRA, IA³, ...).
    """
    if around is None or place.key not in ("weight", "bias"):
        return []
    plain = isinstance(getattr(around, "lora_A", None), nn.ModuleDict) and not getattr(around, "lora_variant", None)
    if not plain or any(around.use_dora.values()):
        raise ValueError(
            f"model: {place.name!r} is adapted in another way than by adding to it (LoRA); merge the adapter first"
        )
    active = [name for name in around.active_adapters if name in around.lora_A]
    if place.key == "weight":
        return [around.get_delta_weight(name) for name in active]
    biases = ((around.lora_B[name].bias, around.scaling[name]) for name in active)
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
