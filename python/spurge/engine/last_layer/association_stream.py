"""One pass over samples in the order of their classes, in blocks that fit a budget, into sums over edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from spurge import ops
from spurge.engine.base.budgets import parse_bytes

BLOCK = 8 * 2**20  # bytes of a block's working arrays; larger ones were not faster
_SOFTMAX_ROWS = 256  # rows whose probabilities stay in cache between the passes over them
_LEAST_ROWS = 16
_ROUNDING = {torch.float32: 4e-7, torch.float64: 1e-14}  # of H(G), beside 1 + |log S|: twice what the kernel may err


@dataclass(frozen=True, eq=False)
class GradientSource:
    """Where gradients by the outputs of a layer come from: given ones, or cross-entropy's where `layer` is set.

    Attributes:
        layer: weight ``[O, M]`` and bias ``[O]`` or None, of type `EdgeInputs.dtype` on the features' device.
        gradients: ``[N, O]`` or ``[N, T, O]``, instead of a layer.
        logits: the layer's outputs ``[N, O]``, where they are known.
    """

    layer: tuple[Tensor, Tensor | None] | None
    gradients: Tensor | None
    logits: Tensor | None

    @property
    def outputs(self) -> int:
        """O."""
        if self.layer is not None:
            return len(self.layer[0])
        assert self.gradients is not None  # one of them is set
        return self.gradients.shape[-1]


@dataclass(frozen=True, eq=False)
class EdgeInputs:
    """What is to be summed over samples for each edge, checked: see `association`.

    Attributes:
        features: ``[N, M]`` or ``[N, T, M]``.
        labels: class of each sample, int64 ``[N]``.
        counts: samples of each class, int64 ``[C]``.
        source: of the gradients.
        rows: outputs that count, or None for all.
        targets: own class of each row; None where all rows share `target`.
        target: the class that all rows share, or -1.
        relu: a negative feature is no activation; otherwise its size is.
        mean: samples of a class share a weight of 1; otherwise each has that.
        dtype: of the gradients.
    """

    features: Tensor
    labels: Tensor
    counts: Tensor
    source: GradientSource
    rows: Tensor | None
    targets: Tensor | None
    target: int
    relu: bool
    mean: bool
    dtype: torch.dtype

    @property
    def kept(self) -> int:
        """R, the outputs that count."""
        return self.source.outputs if self.rows is None else len(self.rows)


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over samples, and over classes.

    Attributes:
        sums: of G over classes, float64 ``[R, M]``.
        logs: of G log G over classes, float64 ``[R, M]``.
        picked: G of the wanted classes, ``[R, M]``.
        activations: A, float64 ``[C, M]``.
        residuals: sizes of the gradient by each output, added up over each class, float64 ``[C, R]``: G over A for an
            input that is the same for all samples of the class.
    """

    sums: Tensor
    logs: Tensor
    picked: Tensor
    activations: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class ClassBlock:
    """Samples ``[start, stop)`` in the order of classes: which classes, where each begins, and what is cut off."""

    start: int
    stop: int
    starts: list[int]
    classes: list[int]
    resumed: bool = False
    unfinished: bool = False


def class_blocks(counts: Sequence[int], rows: int) -> Iterator[ClassBlock]:
    """Blocks of at most ``rows`` samples: as many whole classes as fit, and classes that do not fit alone in pieces."""
    start, starts, classes = 0, [0], list[int]()
    for label, count in enumerate(counts):
        if not count:
            continue
        if classes and starts[-1] + count > rows:
            yield ClassBlock(start, start + starts[-1], starts, classes)
            start, starts, classes = start + starts[-1], [0], []
        if count > rows:
            for begin in range(0, count, rows):
                size = min(rows, count - begin)
                first = start + begin
                yield ClassBlock(first, first + size, [0, size], [label], begin > 0, begin + size < count)
            start += count
            continue
        starts.append(starts[-1] + count)
        classes.append(label)
    if classes:
        yield ClassBlock(start, start + starts[-1], starts, classes)


def stream(inputs: EdgeInputs, memory: str | int | None, progress: bool) -> Sums:
    """All sums over the samples, block by block.

    Raises:
        ValueError: ``memory`` does not even hold the sums and a block of a few samples.
    """
    device, units, kept = inputs.features.device, inputs.features.shape[-1], inputs.kept
    order = None if bool((inputs.labels.diff() >= 0).all()) else inputs.labels.argsort(stable=True)
    rows = _block_rows(inputs, order is not None, memory)
    sizes: list[int] = inputs.counts.tolist()
    cut = max(sizes) > rows
    found = Sums(
        torch.zeros(kept, units, dtype=torch.float64, device=device),
        torch.zeros(kept, units, dtype=torch.float64, device=device),
        torch.zeros(kept, units, device=device),
        torch.zeros(len(inputs.counts), units, dtype=torch.float64, device=device),
        torch.zeros(len(inputs.counts), kept, dtype=torch.float64, device=device),
    )
    carry = torch.zeros((kept, units) if cut else (0,), dtype=torch.float64, device=device)
    numbers = _class_numbers(inputs)
    reader = _BlockReader(inputs, order, rows)
    with tqdm(total=len(inputs.labels), desc="association", unit="sample", disable=not progress) as bar:
        for block in class_blocks(sizes, rows):
            x, g = reader.read(block)
            scales = [1 / sizes[label] if inputs.mean else 1.0 for label in block.classes]
            labels = torch.tensor(block.classes, device=device) if numbers is None else numbers[block.classes]
            _add_residuals(found.residuals, block, g)
            if x.dim() == 3:
                _fold_positions(inputs, block, x, g, found, carry, labels.tolist(), scales)
            else:
                ops.associate_(
                    found.sums,
                    found.logs,
                    carry,
                    found.picked,
                    found.activations,
                    x,
                    g,
                    torch.tensor(block.starts, device=device),
                    labels,
                    torch.tensor(scales, dtype=torch.float64, device=device),
                    target=inputs.target,
                    relu=inputs.relu,
                    resumed=block.resumed,
                    unfinished=block.unfinished,
                )
            bar.update(block.stop - block.start)
    if numbers is not None:
        found.activations.copy_(found.activations[numbers])
    return found


def _add_residuals(residuals: Tensor, block: ClassBlock, g: Tensor) -> None:
    """Over positions, where a sample has several, the size of their mean."""
    sizes = g.abs() if g.dim() == 2 else g.mean(1).abs_()
    for label, start, stop in zip(block.classes, block.starts, block.starts[1:], strict=False):
        residuals[label] += sizes[start:stop].sum(0)


def _class_numbers(inputs: EdgeInputs) -> Tensor | None:
    """Other numbers for the classes, such that each kept row's own class has the row's number; None where it has."""
    if inputs.rows is None or inputs.targets is None:
        return None
    classes = len(inputs.counts)
    own = inputs.targets.to(inputs.features.device)
    rest = torch.ones(classes, dtype=torch.bool, device=own.device)
    rest[own] = False
    numbers = torch.empty(classes, dtype=torch.int64, device=own.device)
    numbers[own] = torch.arange(len(own), device=own.device)
    numbers[rest] = torch.arange(len(own), classes, device=own.device)
    return numbers


def _block_rows(inputs: EdgeInputs, picked_out: bool, memory: str | int | None) -> int:
    """Samples of a block."""
    positions = inputs.features.shape[1] if inputs.features.dim() == 3 else 1
    units, size = inputs.features.shape[-1], torch.finfo(inputs.dtype).bits // 8
    narrow = inputs.features.dtype != inputs.dtype
    each = positions * (units * size * (picked_out + narrow) + inputs.source.outputs * size + 2 * inputs.kept * size)
    if inputs.features.dim() == 3:
        each += inputs.kept * units * size
    room = BLOCK
    if memory is not None:
        # Sums, logs, a carry, and the results that are made from them.
        fixed = inputs.kept * units * (24 + 3 * size) + len(inputs.counts) * (units + inputs.kept) * 8
        room = min(parse_bytes(memory) - fixed, BLOCK)
        least = fixed + each * min(_LEAST_ROWS, len(inputs.labels))
        if room < each * min(_LEAST_ROWS, len(inputs.labels)):
            raise ValueError(f"memory: expected at least {least} bytes for these classes and units, got {memory}")
    return max(room // each, 1)


class _BlockReader:
    """Features and gradients of a block, in buffers that all blocks share."""

    def __init__(self, inputs: EdgeInputs, order: Tensor | None, rows: int) -> None:
        self.inputs, self.order = inputs, order
        rows = min(rows, len(inputs.labels))
        shape = inputs.features.shape[1:]
        device = inputs.features.device
        self.gathered = None if order is None else torch.empty(rows, *shape, dtype=inputs.features.dtype, device=device)
        source = inputs.source
        self.logits = None
        if source.layer is not None:
            self.logits = torch.empty(rows, source.outputs, dtype=inputs.dtype, device=device)
        self.widened = None
        if source.layer is not None and source.logits is None and inputs.features.dtype != inputs.dtype:
            self.widened = torch.empty(rows, *shape, dtype=inputs.dtype, device=device)

    def read(self, block: ClassBlock) -> tuple[Tensor, Tensor]:
        """Features and gradients by the kept outputs, of the block's samples in the order of classes."""
        inputs, source, n = self.inputs, self.inputs.source, block.stop - block.start
        features = self._take(inputs.features, block, self.gathered)
        if source.gradients is not None:
            gradients = self._take(source.gradients, block, None).to(inputs.dtype)
        else:
            assert self.logits is not None
            assert source.layer is not None
            gradients = self.logits[:n]
            if source.logits is not None:
                gradients.copy_(self._take(source.logits, block, None))
            else:
                wide = features if self.widened is None else self.widened[:n].copy_(features)
                weight, bias = source.layer
                if bias is None:
                    torch.mm(wide, weight.T, out=gradients)
                else:
                    torch.addmm(bias, wide, weight.T, out=gradients)
            residuals_(gradients, self._take(inputs.labels, block, None))
        if inputs.rows is not None:
            gradients = gradients.index_select(-1, inputs.rows)
        return features, gradients

    def _take(self, tensor: Tensor, block: ClassBlock, into: Tensor | None) -> Tensor:
        if self.order is None:
            return tensor[block.start : block.stop]
        index = self.order[block.start : block.stop]
        if into is None:
            return tensor.index_select(0, index)
        return torch.index_select(tensor, 0, index, out=into[: block.stop - block.start])


def residuals_(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Logits ``[n, O]`` replaced by the magnitudes of cross-entropy's gradient, :math:`|p_o - 1[y = o]|`.

    The residual of the true class is the sum of the other probabilities: ``1 - p`` would lose all digits of a
    confident prediction.
    """
    for start in range(0, len(logits), _SOFTMAX_ROWS):
        part, own = logits[start : start + _SOFTMAX_ROWS], labels[start : start + _SOFTMAX_ROWS, None]
        part.sub_(part.amax(1, keepdim=True)).exp_()
        true = part.gather(1, own)
        part.scatter_(1, own, 0.0)
        others = part.sum(1, keepdim=True)
        scale = (others + true).reciprocal_()
        part.scatter_(1, own, others).mul_(scale)
    return logits


def _fold_positions(
    inputs: EdgeInputs,
    block: ClassBlock,
    x: Tensor,
    g: Tensor,
    found: Sums,
    carry: Tensor,
    labels: list[int],
    scales: list[float],
) -> None:
    """A block whose samples have positions: the gradient of an edge is a sum over them, and only then a magnitude."""
    for s, (label, scale) in enumerate(zip(labels, scales, strict=True)):
        rows = slice(block.starts[s], block.starts[s + 1])
        wide = x[rows].to(inputs.dtype)
        edges = torch.bmm(g[rows].transpose(1, 2), wide).abs_().sum(0, dtype=torch.float64)
        size = wide.clamp_min(0) if inputs.relu else wide.abs()
        found.activations[label] += scale * size.sum((0, 1), dtype=torch.float64)
        if block.resumed:
            edges += carry
        if block.unfinished:
            carry.copy_(edges)
            continue
        edges *= scale
        found.sums.add_(edges)
        found.logs.add_(torch.special.xlogy(edges, edges))
        if inputs.target < 0:
            if label < len(found.picked):
                found.picked[label] = edges[label]
        elif label == inputs.target:
            found.picked.copy_(edges)


def rounding_of_entropy(dtype: torch.dtype) -> float:
    """How far H(G) of type ``dtype`` may be from the truth, beside ``1 + |log S|``."""
    return _ROUNDING[dtype]


def gradient_entropy(sums: Sums, dtype: torch.dtype) -> Tensor:
    """H(G) ``[R, M]`` of type ``dtype``: with S the sum of G and T that of G log G, ``log S - T / S``; 0 where S is.

    What could be rounding alone counts as 0: over the floor of H(A) it would make a large score of a unit that fires
    for one class.
    """
    rounding = rounding_of_entropy(dtype)
    out = torch.empty(sums.sums.shape, dtype=dtype, device=sums.sums.device)
    step = max(1, BLOCK // 64 // max(1, out.shape[1]))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        entropy = _entropy(sums.sums[part], sums.logs[part])
        noise = rounding * (1 + sums.sums[part].clamp_min(torch.finfo(torch.float64).tiny).log().abs())
        out[part] = entropy.where(entropy > noise, 0.0)
    return out


def activation_entropy(activations: Tensor) -> Tensor:
    """H(A) ``[M]`` of activations ``[C, M]``."""
    logs = torch.zeros_like(activations[0])
    step = max(1, BLOCK // 64 // max(1, activations.shape[1]))
    for start in range(0, len(activations), step):
        part = activations[start : start + step]
        logs += torch.special.xlogy(part, part).sum(0)
    return _entropy(activations.sum(0), logs)


def _entropy(total: Tensor, logs: Tensor) -> Tensor:
    alive = total > 0
    safe = total.where(alive, 1.0)
    return (safe.log() - logs / safe).clamp_min_(0.0).where(alive, 0.0)
