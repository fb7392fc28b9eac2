"""Softmax regression by minibatches, as the papers retrain a last layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.base.checks import integer, number


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """Minibatch descent with momentum, as ``torch.optim.SGD``; rows are drawn with replacement, by their weights.

    The defaults are those of the published last-layer retraining.

    Attributes:
        epochs: looks at the result.
        batches: in an epoch.
        batch: rows of a batch.
        rate: step size.
        momentum: of the steps.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type.
    """

    epochs: int = 50
    batches: int = 200
    batch: int = 128
    rate: float = 1e-3
    momentum: float = 0.9

    def __post_init__(self) -> None:
        for name in ("epochs", "batches", "batch"):
            integer(name, getattr(self, name), 1)
        if not number("rate", self.rate) > 0:
            raise ValueError(f"rate: must be above 0, got {self.rate}")
        if not 0 <= number("momentum", self.momentum) < 1:
            raise ValueError(f"momentum: must be at least 0 and below 1, got {self.momentum}")


def descend(
    values: Tensor,
    labels: Tensor,
    weights: Tensor,
    gates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    decay: float,
    settings: Sgd,
    generator: torch.Generator,
    watch: Callable[[int, Tensor, Tensor | None], None],
    progress: bool,
) -> tuple[Tensor, Tensor | None]:
    """V and b after all epochs, in float32 (float64 with float64 features).

    Args:
        values: x, floating ``[N, M]``.
        labels: y, int64 ``[N]``.
        weights: chance of each row, float64 ``[N]``.
        gates: g of ``logits = (g * V) x + b``, ``[1, M]`` or ``[O, M]``.
        weight, bias: V and b to start with; not changed.
        decay: weight decay of both.
        settings: of the descent.
        generator: of the draws, on the CPU.
        watch: called after each epoch with its number, V and b.
        progress: show a progress bar.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    weight, gates = weight.to(dtype, copy=True), gates.to(dtype)
    bias = None if bias is None else bias.to(dtype, copy=True)
    speed, bias_speed = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    chances = weights.cpu()
    for epoch in tqdm(range(1, settings.epochs + 1), desc="fit", disable=not progress, leave=False):
        drawn = torch.multinomial(chances, settings.batches * settings.batch, replacement=True, generator=generator)
        for index in drawn.to(values.device).split(settings.batch):
            x = values[index].to(dtype)
            slope = torch.nn.functional.linear(x, weight * gates, bias).softmax(1)
            slope.scatter_add_(1, labels[index, None], slope.new_full((len(index), 1), -1.0))
            slope /= len(index)
            speed.mul_(settings.momentum).add_((slope.T @ x) * gates).add_(weight, alpha=decay)
            weight.sub_(speed, alpha=settings.rate)
            if bias is not None and bias_speed is not None:
                bias_speed.mul_(settings.momentum).add_(slope.sum(0)).add_(bias, alpha=decay)
                bias.sub_(bias_speed, alpha=settings.rate)
        watch(epoch, weight, bias)
    return weight, bias
