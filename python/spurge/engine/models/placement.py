"""Where a model's inputs go and what memory it leaves, also where its parts lie on several devices or ranks."""

from __future__ import annotations

import torch
from torch import nn

from spurge.engine.base.memory import budget
from spurge.engine.base.tensor_parallel import agreed, mesh_of


def input_device(model: nn.Module) -> torch.device:
    """The device of the input embeddings, of the first parameter where a model has none.

    Parts that accelerate keeps elsewhere and brings when they are used (their weights are on "meta" meanwhile) say
    themselves where they run.

    Raises:
        ValueError: the model has no parameters.
    """
    for part in (_embeddings(model), model):
        parameter = next(part.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            return parameter.device
        runs_on = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if runs_on is not None:
            return torch.device(runs_on)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("model: has no parameters, expected a model with weights")
    return parameter.device


def model_budget(model: nn.Module, memory: str | int | None) -> int:
    """The bytes that a job on ``model`` may take: what was asked for, else a share of what is free.

    Of several devices, what the fullest of them offers; of ranks that hold the model together, the same on all.

    Raises:
        ValueError: ``memory`` is no size, or the model has no parameters.
    """
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta} or {input_device(model)}
    fits = min(budget(memory, device) for device in devices)
    mesh = mesh_of(model)
    if mesh is None:
        return fits
    if memory is None and mesh.device_type == "cpu":
        fits //= mesh.size()
    return agreed([fits], mesh, largest=False)[0]


def _embeddings(model: nn.Module) -> nn.Module:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not of transformers, or of its models without any
        return model
    return found if isinstance(found, nn.Module) else model
