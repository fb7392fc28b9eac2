"""One pass over samples in the order of their classes, in blocks that fit a budget, into sums over edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from spurge import ops
from spurge.engine.base.memory import parse_bytes

BLOCK = 8 * 2**20  # bytes of a block's working arrays; larger ones were not faster
_SOFTMAX_ROWS = 256  # rows whose probabilities stay in cache between the passes over them
_LEAST_ROWS = 16
_ROUNDING = {torch.float32: 4e-7, torch.float64: 1e-14}  # of H(G), beside 1 + |log S|: twice what the kernel may err


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be summed, checked: see `association`. Gradients are of the head's cross-entropy where `layer` is set.

    Attributes:
        layer: weight ``[O, M]`` and bias ``[O]`` or None, of type `dtype` on the features' device.
        rows: outputs that count, or None for all.
        targets: own class of each row; None where all rows share `target`.
    """

    features: Tensor
    labels: Tensor
    counts: Tensor
    layer: tuple[Tensor, Tensor | None] | None
    gradients: Tensor | None
    logits: Tensor | None
    rows: Tensor | None
    targets: Tensor | None
    target: int
    relu: bool
    mean: bool
    dtype: torch.dtype

    @property
    def outputs(self) -> int:
        source = self.layer[0] if self.layer is not None else self.gradients
        assert source is not None  # one of them is set
        return source.shape[0] if self.layer is not None else source.shape[-1]

    @property
    def kept(self) -> int:
        """R, the outputs that count."""
        return self.outputs if self.rows is None else len(self.rows)


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over classes of G and of G log G, both float64 ``[R, M]``, G of the wanted classes, and A ``[C, M]``."""

    sums: Tensor
    logs: Tensor
    picked: Tensor
    activations: Tensor


@dataclass(frozen=True)
class Block:
    """Samples ``[start, stop)`` in the order of classes: which classes, where each begins, and what is cut off."""

    start: int
    stop: int
    starts: list[int]
    classes: list[int]
    resumed: bool = False
    unfinished: bool = False


def blocks(counts: Sequence[int], rows: int) -> Iterator[Block]:
    """Blocks of at most ``rows`` samples: as many whole classes as fit, and classes that do not fit alone in pieces."""
    start, starts, classes = 0, [0], list[int]()
    for label, count in enumerate(counts):
        if not count:
            continue
        if classes and starts[-1] + count > rows:
            yield Block(start, start + starts[-1], starts, classes)
            start, starts, classes = start + starts[-1], [0], []
        if count > rows:
            for begin in range(0, count, rows):
                size = min(rows, count - begin)
                place = start + begin
                yield Block(place, place + size, [0, size], [label], begin > 0, begin + size < count)
            start += count
            continue
        starts.append(starts[-1] + count)
        classes.append(label)
    if classes:
        yield Block(start, start + starts[-1], starts, classes)


def stream(job: Job, memory: str | int | None, progress: bool) -> Sums:
    """All sums of a job.

    Raises:
        ValueError: ``memory`` does not even hold the sums and a block of a few samples.
    """
    device, units, kept = job.features.device, job.features.shape[-1], job.kept
    order = None if bool((job.labels.diff() >= 0).all()) else job.labels.argsort(stable=True)
    rows = _block_rows(job, order is not None, memory)
    sizes: list[int] = job.counts.tolist()
    cut = max(sizes) > rows
    found = Sums(
        torch.zeros(kept, units, dtype=torch.float64, device=device),
        torch.zeros(kept, units, dtype=torch.float64, device=device),
        torch.zeros(kept, units, device=device),
        torch.zeros(len(job.counts), units, dtype=torch.float64, device=device),
    )
    carry = torch.zeros((kept, units) if cut else (0,), dtype=torch.float64, device=device)
    place = _places(job)
    source = _Source(job, order, rows)
    with tqdm(total=len(job.labels), desc="association", unit="sample", disable=not progress) as bar:
        for block in blocks(sizes, rows):
            x, g = source.read(block)
            scales = [1 / sizes[label] if job.mean else 1.0 for label in block.classes]
            labels = torch.tensor(block.classes, device=device) if place is None else place[block.classes]
            if x.dim() == 3:
                _fold_positions(job, block, x, g, found, carry, labels.tolist(), scales)
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
                    target=job.target,
                    relu=job.relu,
                    resumed=block.resumed,
                    unfinished=block.unfinished,
                )
            bar.update(block.stop - block.start)
    if place is not None:
        found.activations.copy_(found.activations[place])
    return found


def _places(job: Job) -> Tensor | None:
    """Other numbers for the classes, such that each kept row's own class has the row's number; None where it has."""
    if job.rows is None or job.targets is None:
        return None
    classes = len(job.counts)
    own = job.targets.to(job.features.device)
    rest = torch.ones(classes, dtype=torch.bool, device=own.device)
    rest[own] = False
    place = torch.empty(classes, dtype=torch.int64, device=own.device)
    place[own] = torch.arange(len(own), device=own.device)
    place[rest] = torch.arange(len(own), classes, device=own.device)
    return place


def _block_rows(job: Job, picked_out: bool, memory: str | int | None) -> int:
    """Samples of a block."""
    positions = job.features.shape[1] if job.features.dim() == 3 else 1
    units, size = job.features.shape[-1], torch.finfo(job.dtype).bits // 8
    narrow = job.features.dtype != job.dtype
    each = positions * (units * size * (picked_out + narrow) + job.outputs * size + job.kept * size)
    if job.features.dim() == 3:
        each += job.kept * units * size
    room = BLOCK
    if memory is not None:
        # Sums, logs, a carry, and the results that are made from them.
        fixed = job.kept * units * (24 + 3 * size) + len(job.counts) * units * 8
        room = min(parse_bytes(memory) - fixed, BLOCK)
        least = fixed + each * min(_LEAST_ROWS, len(job.labels))
        if room < each * min(_LEAST_ROWS, len(job.labels)):
            raise ValueError(f"memory: expected at least {least} bytes for these classes and units, got {memory}")
    return max(room // each, 1)


class _Source:
    """Features and gradients of a block, in buffers that all blocks share."""

    def __init__(self, job: Job, order: Tensor | None, rows: int) -> None:
        self.job, self.order = job, order
        rows = min(rows, len(job.labels))
        shape = job.features.shape[1:]
        device = job.features.device
        self.gathered = None if order is None else torch.empty(rows, *shape, dtype=job.features.dtype, device=device)
        self.logits = None
        if job.layer is not None:
            self.logits = torch.empty(rows, job.outputs, dtype=job.dtype, device=device)
        self.widened = None
        if job.layer is not None and job.logits is None and job.features.dtype != job.dtype:
            self.widened = torch.empty(rows, *shape, dtype=job.dtype, device=device)

    def read(self, block: Block) -> tuple[Tensor, Tensor]:
        """Features and gradients by the kept outputs, of the block's samples in the order of classes."""
        job, n = self.job, block.stop - block.start
        features = self._take(job.features, block, self.gathered)
        if job.gradients is not None:
            gradients = self._take(job.gradients, block, None).to(job.dtype)
        else:
            assert self.logits is not None
            assert job.layer is not None
            gradients = self.logits[:n]
            if job.logits is not None:
                gradients.copy_(self._take(job.logits, block, None))
            else:
                wide = features if self.widened is None else self.widened[:n].copy_(features)
                weight, bias = job.layer
                if bias is None:
                    torch.mm(wide, weight.T, out=gradients)
                else:
                    torch.addmm(bias, wide, weight.T, out=gradients)
            residuals_(gradients, self._take(job.labels, block, None))
        if job.rows is not None:
            gradients = gradients.index_select(-1, job.rows)
        return features, gradients

    def _take(self, tensor: Tensor, block: Block, into: Tensor | None) -> Tensor:
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
    job: Job, block: Block, x: Tensor, g: Tensor, found: Sums, carry: Tensor, labels: list[int], scales: list[float]
) -> None:
    """A block whose samples have positions: the gradient of an edge is a sum over them, and only then a magnitude."""
    for s, (label, scale) in enumerate(zip(labels, scales, strict=True)):
        rows = slice(block.starts[s], block.starts[s + 1])
        wide = x[rows].to(job.dtype)
        edges = torch.bmm(g[rows].transpose(1, 2), wide).abs_().sum(0, dtype=torch.float64)
        size = wide.clamp_min(0) if job.relu else wide.abs()
        found.activations[label] += scale * size.sum((0, 1), dtype=torch.float64)
        if block.resumed:
            edges += carry
        if block.unfinished:
            carry.copy_(edges)
            continue
        edges *= scale
        found.sums.add_(edges)
        found.logs.add_(torch.special.xlogy(edges, edges))
        if job.target < 0:
            if label < len(found.picked):
                found.picked[label] = edges[label]
        elif label == job.target:
            found.picked.copy_(edges)


def gradient_entropy(sums: Sums, dtype: torch.dtype) -> Tensor:
    """H(G) ``[R, M]`` of type ``dtype``: with S the sum of G and T that of G log G, ``log S - T / S``; 0 where S is.

    What could be rounding alone counts as 0: over the floor of H(A) it would make a large score of a unit that fires
    for one class.
    """
    rounding = _ROUNDING[dtype]
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
