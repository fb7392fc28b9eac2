"""Where a model's inputs go, also where its parts lie on several devices."""

from __future__ import annotations

import torch
from torch import nn


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


def _embeddings(model: nn.Module) -> nn.Module:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not of transformers, or of its models without any
        return model
    return found if isinstance(found, nn.Module) else model
