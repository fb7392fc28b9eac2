"""What goes into a linear layer and what gradient comes back to its output, kept while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.temporary import temporary
from spurge.engine.models.hooks import hook


class Captured:
    """Inputs of a layer and the gradients by its outputs, of all passes so far; filled by :func:`captured`."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._gradients: dict[int, Tensor] = {}

    def inputs(self) -> Tensor:
        """Inputs ``[N, ..., M]`` of all passes, in order.

        Raises:
            ValueError: there was no pass.
        """
        if not self._inputs:
            raise ValueError("captured: no pass went through the layer")
        return torch.cat(self._inputs)

    def gradients(self) -> Tensor:
        """Gradients ``[N, ..., O]`` by the layer's output, of the same passes.

        Raises:
            ValueError: there was no pass, or one that was not followed by a backward pass.
        """
        self.inputs()
        missing = [number for number in range(len(self._inputs)) if number not in self._gradients]
        if missing:
            raise ValueError(f"captured: no backward pass reached the layer's output of pass {missing[0]}")
        return torch.cat([self._gradients[number] for number in range(len(self._inputs))])


@temporary
def captured(layer: nn.Linear) -> Iterator[Captured]:
    """Keeps inputs and output gradients of ``layer`` for each pass of this thread: for `association` of any loss.

    The loss has to be a sum over the samples (``reduction="sum"``), so that each has its own gradient. The layer's
    hooks go when the block ends, however it ends.

    Raises:
        TypeError: ``layer`` is no ``nn.Linear``.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"layer: expected an nn.Linear, got {type(layer).__name__}")
    found = Captured()

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        number = len(found._inputs)
        found._inputs.append(inputs[0].detach())
        if output.requires_grad:
            output.register_hook(lambda gradient: found._gradients.__setitem__(number, gradient.detach()))

    with hook(layer, keep):
        yield found
