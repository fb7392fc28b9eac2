"""CA and SCA of the edges of a last layer, as people write them in torch.

The layer is ``z = x W' + b`` under cross-entropy; the gradient of the weight of edge (m -> o) by one sample is
``(p_o - [y = o]) x_m``. ``G_c[o, m]`` and ``A_c[m]`` are the means over class c of its magnitude and of ``|x_m|``;
``CA = H(G) / H(A)`` with the entropies over classes, ``SCA_c = CA G_c A_c``. Every form answers one of three
questions: each row for its own class, all rows for one ``target`` class, or one ``row`` for its own class.
Letters: N samples, M features, C classes, one output for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-6  # of H(A), in units of log C
LEAST_RESIDUAL, LEAST_FEATURE = 1e-15, 1e-18  # in the tuned form: nothing is 0, so that nothing is clamped before log


class Layer(NamedTuple):
    """features ``[N, M]`` f32 or f16, labels ``[N]``, weight ``[C, M]`` and bias ``[C]`` f32."""

    features: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor


class Scores(NamedTuple):
    """``[C, M]`` each, or ``[1, M]`` where one row was asked for."""

    ca: Tensor
    sca: Tensor


def make_layer(
    samples: int, classes: int, width: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Layer:
    """Features after a ReLU whose class means differ a little, and a head that knows the means."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, width, generator=generator).mul_(0.1)
    labels = torch.randint(classes, (samples,), generator=generator)
    features = torch.randn(samples, width, generator=generator)
    for rows, of in zip(features.split(4096), labels.split(4096), strict=True):
        rows.add_(means[of]).relu_()
    weight = means * (2 / (features[:1000] @ means.T).std())
    bias = torch.randn(classes, generator=generator).mul_(0.1)
    return Layer(*(x.to(device) for x in (features.to(dtype), labels, weight, bias)))


def residuals(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``|p - y|`` ``[n, C]``, in one array."""
    out = torch.addmm(bias, features, weight.T)
    torch.softmax(out, 1, out=out)
    out[torch.arange(len(labels), device=out.device), labels] -= 1
    return out.abs_()


def _scores(entropy: Tensor, picked: Tensor, activations: Tensor, own: Tensor) -> Scores:
    """From H(G) ``[R, M]``, the wanted G ``[R, M]``, all A ``[C, M]`` and the wanted ones ``[R, M]`` or ``[M]``."""
    alive = activations.sum(0) > 0
    ca = (entropy / _entropy(activations).clamp_min(FLOOR * math.log(len(activations)))).where(alive, 0.0)
    return Scores(ca, ca * picked * own)


def _entropy(values: Tensor) -> Tensor:
    """Over the first dimension, scaled to sum 1. Written out: ``torch.special.entr`` is slower."""
    shares = values / values.sum(0).clamp_min(1e-30)
    return -(shares * shares.clamp_min(1e-38).log()).sum(0)


def _from_all(gradients: Tensor, activations: Tensor, target: int | None, row: int | None) -> Scores:
    """From the whole G: ``[C, C, M]``, or ``[C, M]`` of the one row."""
    entropy = _entropy(gradients)
    if row is not None:
        return _scores(entropy[None], gradients[row][None], activations, activations[row])
    if target is not None:
        return _scores(entropy, gradients[target], activations, activations[target])
    every = torch.arange(len(activations), device=activations.device)
    return _scores(entropy, gradients[every, every], activations, activations)


def _class_means(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)[:, None]
    sums = features.new_zeros(classes, features.shape[1], dtype=torch.float32)
    return sums.index_add_(0, labels, features.float().abs()) / counts, counts


def vmap_grad(
    layer: Layer, *, target: int | None = None, row: int | None = None, samples: int | None = None, chunk: int = 0
) -> Scores:
    """torch.func per-sample gradients, in chunks, added up by class: G ``[C, C, M]``; the first ``samples`` only.

    For one row the derivative is by that row alone.
    """
    x, y, weight, bias = layer
    classes = len(weight)
    parameter = weight if row is None else weight[row]
    chunk = chunk or max(1, min(256, (1 << 25) // parameter.numel()))  # at most 128 MiB of gradients

    def loss(parameter: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if row is None:
            return F.cross_entropy(F.linear(x, parameter, bias), y)
        logits = F.linear(x, weight, bias)
        own = torch.arange(classes, device=x.device) == row
        return F.cross_entropy(torch.where(own, x @ parameter + bias[row], logits), y)

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    activations, counts = _class_means(x, y, classes)
    gradients = torch.zeros(classes, *parameter.shape, device=x.device)
    last = len(y) if samples is None else samples
    for start in range(0, last, chunk):
        block = slice(start, min(start + chunk, last))
        gradients.index_add_(0, y[block], per_sample(parameter, x[block].float(), y[block]).abs_())
    gradients /= counts if row is not None else counts[:, :, None]
    return _from_all(gradients, activations, target, row)


def autograd_loop(
    layer: Layer, *, target: int | None = None, row: int | None = None, samples: int | None = None
) -> Scores:
    """A backward pass for each sample, folded in class by class; the first ``samples`` of the sorted ones only."""
    x, y, weight, bias = layer
    classes = len(weight)
    activations, counts = _class_means(x, y, classes)
    parameter = weight.clone().requires_grad_()
    order = y.argsort(stable=True)[:samples]
    sums, logs = torch.zeros_like(weight), torch.zeros_like(weight)
    picked = torch.zeros_like(weight)

    for c, members in enumerate(order.split(torch.bincount(y[order], minlength=classes).tolist())):
        if len(members) == 0:
            continue
        mean = torch.zeros_like(weight)
        for n in members.tolist():
            loss = F.cross_entropy(F.linear(x[n].float(), parameter, bias), y[n])
            mean += torch.autograd.grad(loss, parameter)[0].abs()
        mean /= int(counts[c])
        sums += mean
        logs += mean * mean.clamp_min(1e-38).log()
        if target is None:
            picked[c] = mean[c]
        elif c == target:
            picked.copy_(mean)
    return _from_two(sums, logs, picked, activations, target, row)


def _from_two(
    sums: Tensor, logs: Tensor, picked: Tensor, activations: Tensor, target: int | None, row: int | None
) -> Scores:
    """From S = sum of G_c and T = sum of G_c log G_c: H(G) = log S - T / S."""
    safe = sums.clamp_min(1e-30)
    entropy = safe.log() - logs / safe
    if row is not None:
        return _scores(entropy[row][None], picked[row][None], activations, activations[row])
    return _scores(entropy, picked, activations, activations if target is None else activations[target])


def class_einsum(layer: Layer, *, target: int | None = None, row: int | None = None) -> Scores:
    """One einsum for each class into the whole G ``[C, C, M]``, then its entropy over classes."""
    x, y, weight, bias = layer
    classes, width = weight.shape
    d = residuals(x.float(), y, weight, bias)
    activations, counts = _class_means(x, y, classes)
    d = d if row is None else d[:, row : row + 1]
    gradients = torch.zeros(classes, d.shape[1], width, device=x.device)
    for c in range(classes):
        members = y == c
        gradients[c] = torch.einsum("no,nm->om", d[members], x[members].float().abs()) / counts[c]
    return _from_all(gradients if row is None else gradients.squeeze(1), activations, target, row)


def streaming(layer: Layer, *, target: int | None = None, row: int | None = None) -> Scores:
    """The same without the whole G: S and T are added up while the classes go by. The plain loop."""
    x, y, weight, bias = layer
    classes, width = weight.shape
    d = residuals(x.float(), y, weight, bias)
    d = d if row is None else d[:, row : row + 1]
    sums, logs = (torch.zeros(d.shape[1], width, device=x.device) for _ in range(2))
    picked, activations = torch.zeros_like(sums), torch.zeros(classes, width, device=x.device)
    for c in range(classes):
        members = (y == c).nonzero().flatten()
        if len(members) == 0:
            continue
        part = x[members].float().abs()
        mean = d[members].T @ part / len(members)
        activations[c] = part.mean(0)
        sums += mean
        logs += mean * mean.clamp_min(1e-38).log()
        if row is not None:
            picked = mean if c == row else picked
        elif target is None:
            picked[c] = mean[c]
        elif c == target:
            picked = mean
    if row is None:
        return _from_two(sums, logs, picked, activations, target, None)
    safe = sums.clamp_min(1e-30)
    return _scores(safe.log() - logs / safe, picked, activations, activations[row])


def _fold(mean: Tensor, sums: Tensor, logs: Tensor) -> None:
    sums.add_(mean)
    logs.add_(mean * mean.log())


class Tuned:
    """The best torch form we know: streaming in blocks of whole classes, tiled over M so that a tile of G and of both
    sums stays in the core's cache, everything in place, scales folded into the residuals.

    Args:
        compiled: the additions and the logarithm of a tile as one loop of ``torch.compile``.
        dtype: everything is computed in it; float64 is the answer that others are compared with.
        block: samples of a block, as long as classes are no larger.
        tile: bytes of a tile of G.
    """

    def __init__(
        self,
        *,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
        block: int = 1600,
        tile: int = 1 << 19,
    ) -> None:
        self.dtype, self.block, self.tile = dtype, block, tile
        self.fold: Callable[[Tensor, Tensor, Tensor], None] = self._in_place
        self.buffer: Tensor | None = None
        if compiled:
            torch._dynamo.reset()
            self.fold = torch.compile(_fold, dynamic=False)

    def _in_place(self, mean: Tensor, sums: Tensor, logs: Tensor) -> None:
        if self.buffer is None or self.buffer.shape != mean.shape:
            self.buffer = torch.empty_like(mean)
        sums.add_(mean)
        logs.addcmul_(mean, torch.log(mean, out=self.buffer))

    def _blocks(self, counts: list[int]) -> list[list[int]]:
        blocks: list[list[int]] = [[]]
        held = 0
        for c, count in enumerate(counts):
            if blocks[-1] and held + count > self.block:
                blocks.append([])
                held = 0
            blocks[-1].append(c)
            held += count
        return blocks

    @torch.no_grad()
    def __call__(self, layer: Layer, *, target: int | None = None, row: int | None = None) -> Scores:
        x, y = layer.features, layer.labels
        weight, bias = layer.weight.to(self.dtype), layer.bias.to(self.dtype)
        classes, width = weight.shape
        outputs = classes if row is None else 1
        columns = min(width, max(64, self.tile // (outputs * weight.element_size()) // 64 * 64))
        tiles = range(0, width, columns)
        order, counts = y.argsort(stable=True), torch.bincount(y, minlength=classes).tolist()
        shapes = [(outputs, min(columns, width - start)) for start in tiles]
        sums, logs, means = ([weight.new_zeros(shape) for shape in shapes] for _ in range(3))
        picked, activations = weight.new_zeros(outputs, width), weight.new_zeros(classes, width)
        done = 0
        for block in self._blocks(counts):
            members = order[done : done + sum(counts[c] for c in block)]
            done += len(members)
            part, labels = x[members].to(self.dtype), y[members]
            d = residuals(part, labels, weight, bias)
            part.abs_()
            d = d.clamp_min_(LEAST_RESIDUAL) if row is None else d[:, row : row + 1].clamp_min(LEAST_RESIDUAL)
            scales = torch.tensor([1 / max(1, counts[c]) for c in block], dtype=d.dtype, device=d.device)
            d *= scales.repeat_interleave(torch.tensor([counts[c] for c in block], device=d.device))[:, None]
            bounds = [0]
            for c in block:
                bounds.append(bounds[-1] + counts[c])
                torch.sum(part[bounds[-2] : bounds[-1]], 0, out=activations[c])
            part += LEAST_FEATURE
            for t, start in enumerate(tiles):
                mean = means[t]
                for c, low, high in zip(block, bounds, bounds[1:], strict=False):
                    if low == high:
                        continue
                    torch.mm(d[low:high].T, part[low:high, start : start + columns], out=mean)
                    self.fold(mean, sums[t], logs[t])
                    if row is not None:
                        if c == row:
                            picked[:, start : start + columns] = mean
                    elif target is None:
                        picked[c, start : start + columns] = mean[c]
                    elif c == target:
                        picked[:, start : start + columns] = mean
        activations /= torch.tensor(counts, dtype=d.dtype, device=d.device).clamp_min(1)[:, None]
        total, product = torch.cat(sums, 1), torch.cat(logs, 1)
        if row is None:
            return _from_two(total, product, picked, activations, target, None)
        safe = total.clamp_min(1e-30)
        return _scores(safe.log() - product / safe, picked, activations, activations[row])
