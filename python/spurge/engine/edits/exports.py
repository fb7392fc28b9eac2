"""What edits are as adapters: gates, and new values of weights.

With gates ``g`` a layer computes ``W2 (g * z) + b``. That is IA³ (Liu et al., 2022) on the layer's input, and LoRA
(Hu et al., 2021) with ``W2 (g - 1)`` as ``B`` and a one for each gate in ``A``: of rank k for k gates, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spurge.engine.base.checks import integer
from spurge.engine.edits.adapters import Adapter, parameters_of
from spurge.engine.edits.low_rank import Factors, RankTooHigh, factored
from spurge.engine.models.experts import is_routed
from spurge.engine.models.parameters import Place
from spurge.engine.models.projections import Linear
from spurge.engine.models.sites import Site

MAX_RANK = 512
"""The highest rank of an exported layer, unless another is asked for: the highest that servers of adapters take."""


def add_vectors(adapter: Adapter, sites: Mapping[str, Site], gates: Mapping[str, Tensor]) -> None:
    """Gates ``[F]`` by site name as vectors of IA³.

    Raises:
        ValueError: a site that peft cannot hold.
    """
    for name, vector in gates.items():
        path = _adaptable(adapter, sites[name])
        adapter.gates[path] = vector.repeat_interleave(sites[name].projection.size)


def add_gates(
    adapter: Adapter,
    sites: Mapping[str, Site],
    gates: Mapping[str, tuple[Tensor, Tensor]],
    max_rank: int,
    truncate: bool,
) -> None:
    """Gates (indices ``[n]``, values ``[n]``) by site name as LoRA.

    Raises:
        ValueError: a site that peft cannot hold, or more gates than ``max_rank`` where ``truncate`` is False.
    """
    for name, (indices, values) in gates.items():
        projection = sites[name].projection
        path = _adaptable(adapter, sites[name])
        columns = projection.columns(indices.to(projection.parameter.device)).cpu().double()
        change = torch.zeros(projection.shape[0], projection.shape[1] * projection.size, dtype=torch.float64)
        places = (indices[:, None] * projection.size + torch.arange(projection.size)).flatten()
        change[:, places] = columns * (values.double() - 1).repeat_interleave(projection.size)
        adapter.lora[path] = _factors(path, change, 0.0, max_rank, truncate, "; format='ia3' is exact for gates")


def add_weights(
    adapter: Adapter,
    places: Mapping[str, Place],
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    products: Mapping[str, tuple[Tensor, Tensor]],
    max_rank: int,
    truncate: bool,
) -> None:
    """New values of parameters by name, as LoRA of linear layers, and as whole modules of the head and of others.

    Args:
        places: where they are.
        old, new: the parameters as they were and as they shall be.
        products: factors of the change, of parameters of which they are known.

    Raises:
        ValueError: a layer needs a higher rank than ``max_rank`` where ``truncate`` is False, or parameters that belong
            to neither a layer nor another module without parts.
    """
    changed = [name for name in new if not torch.equal(old[name], new[name])]
    paths, head = {name: adapter.path(places[name].module) for name in changed}, adapter.head()
    linear = {name for name in changed if _is_adaptable(places[name].module) and paths[name] != head}
    bare = any(_bias(places[name].module) is None for name in linear)
    for name in changed:
        place, path = places[name], paths[name]
        if name not in linear or (bare and place.key == "bias"):
            _add_whole(adapter, path, place.module)
    for name in changed:  # peft takes what is named like the end of another, such as `classifier` and `pre_classifier`
        if any(paths[name].endswith(whole) for whole in list(adapter.whole)):
            _add_whole(adapter, paths[name], places[name].module)
    for name in changed:
        place, path = places[name], paths[name]
        if path in adapter.whole:
            adapter.whole[path][place.key] = new[name].detach().cpu().contiguous()
            continue
        change = new[name].detach().cpu().double() - old[name].detach().cpu().double()
        if place.key == "bias":
            adapter.biases[path] = change
            continue
        slack = float(new[name].norm().double()) * torch.finfo(new[name].dtype).eps / 2
        up, down = products.get(name, (None, None))
        if isinstance(place.module, Conv1D):
            change, up, down = change.t(), None if down is None else down.t(), None if up is None else up.t()
        if up is not None and down is not None and len(down) <= max_rank:
            adapter.lora[path] = Factors(down.contiguous(), up.contiguous())
        else:
            adapter.lora[path] = _factors(path, change, slack, max_rank, truncate, "")


def _factors(path: str, change: Tensor, slack: float, max_rank: int, truncate: bool, advice: str) -> Factors:
    try:
        return factored(change, slack, integer("max_rank", max_rank, 1), truncate=truncate)
    except RankTooHigh as error:
        raise ValueError(f"max_rank: the change of {path!r} {error}; truncate=True writes that{advice}") from error


def _add_whole(adapter: Adapter, path: str, module: nn.Module) -> None:
    """A module's parameters as they are, to be changed; once."""
    if next(module.children(), None) is not None or is_routed(path, module):
        key = next(iter(module._parameters))
        raise ValueError(
            f"model: {path!r} is a {type(module).__name__}, of which peft cannot hold {key!r} alone; fold the edit "
            "instead"
        )
    adapter.whole.setdefault(path, parameters_of(module))


def _bias(module: nn.Module) -> Tensor | None:
    return module._parameters.get("bias")


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _adaptable(adapter: Adapter, site: Site) -> str:
    """The path of a site's layer, once peft can put an adapter around it that always acts."""
    if type(site.projection) is not Linear or not _is_adaptable(site.down):
        raise ValueError(
            f"model: {site.name!r} is a {type(site.down).__name__}, and adapters are for linear layers with a plain "
            "weight of their own (no experts in one parameter, no parts on several ranks, not quantised); fold the "
            "edit instead"
        )
    if isinstance(site.block, nn.TransformerEncoderLayer):
        raise ValueError(
            f"model: {site.name!r} lies in a torch.nn.TransformerEncoderLayer, whose fast path would pass an adapter "
            "by; fold the edit instead"
        )
    return adapter.path(site.down)
