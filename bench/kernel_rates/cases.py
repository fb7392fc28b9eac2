"""One case for each kernel, dtype and size: inputs, the bytes it must move, and the ways to compute it.

``spurge`` is the kernel; ``torch`` the fastest eager form we know; ``torch-usual``, where it differs, what
people write first. ``torch.compile`` gets the usual form, which is what it is for. Bytes: every input read once
and every output written once; temporaries are the method's own affair and do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

MIB = 1 << 20
TOKENS, HIDDEN, NEURONS, NODES = 32, 384, 1536, 4
SIZES = {  # MiB moved: within the first cache that one core owns, beyond it, beyond all caches
    "cpu": {"cache": 1, "middle": 32, "memory": 1024},
    "cuda": {"cache": 8, "middle": 128, "memory": 4096},
}
Function = Callable[..., Any]


@dataclass
class Case:
    """``calls``: name -> function of ``inputs``; each returns what it computed. ``traffic`` in bytes."""

    kernel: str
    shape: str
    dtype: torch.dtype
    traffic: int
    inputs: tuple[Any, ...]
    calls: dict[str, Function]
    usual: Function

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    def outputs(self, function: Function) -> list[Tensor]:
        """What ``function`` computes, on copies of the inputs: some work in place."""
        out = function(*(x.clone() if isinstance(x, Tensor) else x for x in self.inputs))
        return [out] if isinstance(out, Tensor) else list(out)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _examples(traffic: int, bytes_each: int) -> int:
    return max(1, round(traffic / bytes_each))


def _normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def open_rows(traffic: int, dtype: torch.dtype, device: str) -> Case:
    from spurge import ops

    batch = _examples(traffic, TOKENS * HIDDEN * dtype.itemsize * (2 + NODES))
    x, u = (_normal(batch, TOKENS, HIDDEN, dtype=dtype, device=device) for _ in range(2))
    alphas = [0.07, 0.33, 0.67, 0.93]
    shift = (torch.tensor(alphas, device=device) - 1).to(dtype).view(-1, 1, 1, 1)

    def usual(x: Tensor, u: Tensor) -> Tensor:
        return (x + shift * u).flatten(0, 1)

    calls = {
        "spurge": lambda x, u: ops.open_rows(x, u, alphas),
        "torch": lambda x, u: torch.addcmul(x, shift, u).flatten(0, 1),
        "torch-usual": usual,
    }
    shape = f"{NODES}x{batch}x{TOKENS}x{HIDDEN}"
    return Case("open_rows", shape, dtype, (2 + NODES) * _size(x), (x, u), calls, usual)


def _gate(kernel: str, columns: Tensor, traffic: int, line: int, dtype: torch.dtype, device: str) -> Case:
    from spurge import ops

    touched = line * len((columns.cpu() * dtype.itemsize // line).unique())  # bytes of a token's row that must move
    particles = _examples(traffic, 2 * 2 * TOKENS * touched)
    z = _normal(2 * particles, TOKENS, NEURONS, dtype=dtype, device=device)
    gates = torch.randint(0, 2, (particles, len(columns)), device=device).float() * 2 - 1  # +-1: z keeps its size
    whole = torch.ones(particles, NEURONS, device=device)
    whole[:, columns] = gates
    whole = whole.to(dtype).view(particles, 1, 1, NEURONS)

    def usual(z: Tensor) -> Tensor:
        groups = z.view(particles, -1, TOKENS, NEURONS)
        groups[..., columns] *= gates[:, None, None].to(dtype)
        return z

    def multiply_all(z: Tensor) -> Tensor:
        z.view(particles, -1, TOKENS, NEURONS).mul_(whole)
        return z

    calls: dict[str, Function] = {
        "spurge": lambda z: ops.gate_columns_(z, columns, gates),
        "torch": multiply_all,
        "torch-usual": usual,
    }
    moved = 2 * z.shape[0] * TOKENS * touched + _size(gates)
    shape = f"{z.shape[0]}x{TOKENS}x{NEURONS}, {len(columns)} columns"
    return Case(kernel, shape, dtype, moved, (z,), calls, multiply_all)


def gate_all(traffic: int, dtype: torch.dtype, device: str) -> Case:
    return _gate("gate_columns_", torch.arange(NEURONS, device=device), traffic, dtype.itemsize, dtype, device)


def gate_few(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """One column in 16, drawn at random: whole cache lines (GPU: sectors of 32 bytes) count as moved."""
    columns = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(0))[: NEURONS // 16].sort().values
    line = 64 if device == "cpu" else 32
    return _gate("gate_columns_ few", columns.to(device), traffic, line, dtype, device)


def node_sum(traffic: int, dtype: torch.dtype, device: str) -> Case:
    from spurge import ops

    batch = _examples(traffic, TOKENS * HIDDEN * (NODES * dtype.itemsize + 4))
    grads = _normal(NODES * batch, TOKENS, HIDDEN, dtype=dtype, device=device)
    weights = [0.174, 0.326, 0.326, 0.174]
    column = torch.tensor(weights, device=device)

    def usual(grads: Tensor) -> Tensor:
        return (column.view(-1, 1, 1, 1) * grads.view(NODES, batch, TOKENS, HIDDEN)).sum(0)

    def product(grads: Tensor) -> Tensor:
        return (column.to(dtype) @ grads.view(NODES, -1)).view(batch, TOKENS, HIDDEN)

    calls = {"spurge": lambda grads: ops.node_sum(grads, weights), "torch": product, "torch-usual": usual}
    moved = _size(grads) + 4 * batch * TOKENS * HIDDEN
    return Case("node_sum", f"{NODES}x{batch}x{TOKENS}x{HIDDEN}", dtype, moved, (grads,), calls, usual)


def multiply_sum(traffic: int, dtype: torch.dtype, device: str) -> Case:
    from spurge import ops

    batch = _examples(traffic, 2 * TOKENS * NEURONS * dtype.itemsize)
    p, z = (_normal(batch, TOKENS, NEURONS, dtype=dtype, device=device) for _ in range(2))
    mask = torch.ones(batch, TOKENS, dtype=torch.uint8, device=device)
    mask[:, -3:] = 0

    def usual(p: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        return (p * z * mask[..., None]).float().sum(1)

    def einsum(p: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        return torch.einsum("btf,btf,bt->bf", p, z, mask.to(p.dtype))

    calls = {"spurge": ops.multiply_sum, "torch": einsum, "torch-usual": usual}
    moved = _size(p) + _size(z) + _size(mask) + 4 * batch * NEURONS
    return Case("multiply_sum", f"{batch}x{TOKENS}x{NEURONS}", dtype, moved, (p, z, mask), calls, usual)


def first_order(traffic: int, dtype: torch.dtype, device: str) -> Case:
    from spurge import ops

    batch = _examples(traffic, 2 * TOKENS * NEURONS * dtype.itemsize)
    p, z = (_normal(batch, TOKENS, NEURONS, dtype=dtype, device=device) for _ in range(2))
    scale = torch.rand(batch, TOKENS, device=device)
    mask = torch.ones(batch, TOKENS, dtype=torch.uint8, device=device)
    mask[:, -3:] = 0

    def usual(p: Tensor, z: Tensor, scale: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        product = p * z * mask[..., None]
        reach = (z.abs() * (scale * mask)[..., None]).amax(1)
        return product.float().sum(1), product.abs().float().sum(1), reach

    calls = {"spurge": ops.first_order, "torch": usual}
    moved = _size(p) + _size(z) + _size(scale) + _size(mask) + 3 * 4 * batch * NEURONS
    return Case("first_order", f"{batch}x{TOKENS}x{NEURONS}", dtype, moved, (p, z, scale, mask), calls, usual)


UNITS, TOP, SHARPNESS, VOCABULARY = 32, 5, 0.25, 30_000


def _texts(rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, ids, bitmap and labels of so many texts."""
    scores = torch.softmax(torch.randn(rows, UNITS, device=device), 1).to(dtype)
    ids = torch.randint(0, VOCABULARY, (rows, UNITS), dtype=torch.int32, device=device)
    bitmap = torch.randint(-(2**31), 2**31, (2, 2, (VOCABULARY + 31) // 32), device=device).int()
    return scores, ids, bitmap, torch.randint(0, 2, (rows,), device=device)


def proximity(traffic: int, dtype: torch.dtype, device: str) -> Case:
    from spurge import ops

    # a quarter of the bytes: eager torch needs twenty times as many in temporaries
    rows = _examples(traffic // 4, UNITS * 8 + 24)
    inputs = _texts(rows, dtype, device)

    def usual(scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        top = scores.topk(TOP + 1, 1)
        tau = (top.values[:, TOP - 1 : TOP] + top.values[:, TOP:]) / 2
        spread = SHARPNESS * scores.std(1, correction=0, keepdim=True)
        soft_member = torch.sigmoid((scores - tau) / spread)
        chosen = torch.zeros_like(scores).scatter_(1, top.indices[:, :TOP], 1.0)
        words = bitmap[:, labels[:, None], (ids >> 5).long()]  # [G, R, U]
        golden = ((words >> (ids & 31)) & 1).to(scores.dtype).transpose(0, 1)  # [R, G, U]
        hit = chosen[:, None] * golden
        count = hit.sum(2)
        hard = count / TOP + (hit * scores[:, None]).sum(2) / count.clamp_min(1)
        kept = soft_member[:, None] * golden
        total, inside, weighted = soft_member.sum(1, keepdim=True), kept.sum(2), (kept * scores[:, None]).sum(2)
        return hard, inside / total + weighted / (inside + 1e-6)

    calls: dict[str, Function] = {
        "spurge": lambda *inputs: ops.proximity(*inputs, TOP, SHARPNESS),
        "torch": usual,
    }
    scores, ids, _, labels = inputs
    moved = _size(scores) + _size(ids) + _size(labels) + rows * 4 * dtype.itemsize
    return Case("proximity", f"{rows}x{UNITS}, top {TOP}", dtype, moved, inputs, calls, usual)


def proximity_gradient(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """What locating asks: soft proximity and what autograd makes of it by the scores."""
    from peers.proximity import members, soft_proximity
    from spurge import ops

    rows = _examples(traffic // 4, UNITS * 12 + 24)
    inputs = _texts(rows, dtype, device)

    def differentiated(soft: Function) -> Function:
        def call(scores: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            leaf = scores.detach().requires_grad_()
            value = soft(leaf, *rest)
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

        return call

    def eager(scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor) -> Tensor:
        return soft_proximity(scores, ids >= 0, members(ids, bitmap, labels), TOP, SHARPNESS)

    usual = differentiated(eager)
    calls = {"spurge": differentiated(lambda *inputs: ops.proximity(*inputs, TOP, SHARPNESS)[1]), "torch": usual}
    scores, ids, _, labels = inputs
    moved = 2 * _size(scores) + _size(ids) + _size(labels) + rows * 2 * dtype.itemsize
    return Case("proximity_gradient", f"{rows}x{UNITS}, top {TOP}", dtype, moved, inputs, calls, usual)


def segment_medians(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """One segment with an odd number of rows in any order: with an even one, ``torch.median`` is another number."""
    from spurge import ops

    columns = 1024
    rows = _examples(traffic, columns * dtype.itemsize) | 1
    x, order = _normal(rows, columns, dtype=dtype, device=device), torch.randperm(rows, device=device)
    starts = torch.tensor([0, rows], device=device)

    def usual(x: Tensor, order: Tensor) -> Tensor:
        return x[order].median(0).values

    calls: dict[str, Function] = {
        "spurge": lambda x, order: ops.segment_medians(x, order, starts)[0].to(dtype),
        "torch": usual,
    }
    if device == "cpu" and dtype == torch.float32:
        calls["numpy"] = lambda x, order: torch.from_numpy(numpy.median(x.numpy()[order.numpy()], axis=0))
    moved = _size(x) + _size(order) + 4 * columns
    return Case("segment_medians", f"{rows}x{columns}", dtype, moved, (x, order), calls, usual)


def correct_interval(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """One edited row of ten; the length of each interval, since empty ones cannot be subtracted."""
    from spurge import ops

    outputs, edited = 10, torch.tensor([3], device=device)
    rows = _examples(traffic, (outputs + 1) * dtype.itemsize + 8 + 16)
    logits, shifts = (3 * _normal(rows, n, dtype=dtype, device=device) for n in (outputs, 1))
    labels = torch.randint(0, outputs, (rows,), device=device)

    def length(interval: Tensor) -> Tensor:
        return (interval[..., 1] - interval[..., 0]).clamp_min(0)

    def usual(logits: Tensor, shifts: Tensor, labels: Tensor) -> Tensor:
        z, s = logits.double(), torch.zeros_like(logits, dtype=torch.float64)
        s[:, edited] = shifts.double()
        gap, slope = z - z.gather(1, labels[:, None]), s.gather(1, labels[:, None]) - s
        at = gap / slope
        first = at.where(slope > 0, -torch.inf).amax(1).clamp_min(0)
        last = at.where(slope < 0, torch.inf).amin(1).clamp_max(1)
        never = ((slope == 0) & (gap > 0)).any(1)
        return length(torch.stack([first, last.where(~never, -1.0)], 1))

    calls: dict[str, Function] = {
        "spurge": lambda z, s, labels: length(ops.correct_interval(z, s, edited, labels, 0.0, 1.0)),
        "torch": usual,
    }
    moved = _size(logits) + _size(shifts) + _size(labels) + 16 * rows
    return Case("correct_interval", f"{rows}x{outputs}, 1 row", dtype, moved, (logits, shifts, labels), calls, usual)


def balance_sweep(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """Value and gradient of one problem with 500 covariates; the peer computes in float32, Spurge in float64."""
    from spurge import ops

    columns = 500
    rows = _examples(traffic, columns * dtype.itemsize)
    x = _normal(rows, columns, dtype=dtype, device=device)
    base, dual = torch.ones(rows, dtype=torch.float64, device=device), torch.randn(columns, device=device).double() / 50

    def usual(x: Tensor, dual: Tensor) -> Tensor:
        return x.t() @ (x @ dual.to(x.dtype)).softmax(0)

    calls: dict[str, Function] = {
        "spurge": lambda x, dual: ops.balance_sweep(x, base, dual)[1].to(dtype),
        "torch": usual,
    }
    return Case("balance_sweep", f"{rows}x{columns}", dtype, _size(x), (x, dual), calls, usual)


def balance_batch(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """Problems of 500 rows and 6 covariates, solved; the peer takes as many Newton steps, without a line search."""
    from spurge import ops

    rows, columns, steps = 500, 6, 5
    problems = _examples(traffic, rows * columns * dtype.itemsize)
    x = _normal(problems, rows, columns, dtype=dtype, device=device)
    targets = x.double().mean(1) + 0.1
    base = torch.ones(rows, dtype=torch.float64, device=device)
    outcomes = torch.randn(rows, 1, device=device).double()

    def spurge(x: Tensor, targets: Tensor) -> Tensor:
        return ops.balance_batch(x, base, targets, outcomes, torch.zeros_like(targets))[1].to(dtype)

    def usual(x: Tensor, targets: Tensor) -> Tensor:
        y = x.double() - targets[:, None]
        dual = torch.zeros_like(targets)
        for _ in range(steps):
            w = torch.einsum("pnk,pk->pn", y, dual).softmax(1)
            gradient = torch.einsum("pn,pnk->pk", w, y)
            hessian = torch.einsum("pn,pnj,pnk->pjk", w, y, y) - gradient[:, :, None] * gradient[:, None]
            dual = dual - torch.linalg.solve(hessian, gradient)
        return (torch.einsum("pnk,pk->pn", y, dual).softmax(1) @ outcomes).to(dtype)

    calls: dict[str, Function] = {"spurge": spurge, "torch": usual}
    return Case("balance_batch", f"{problems}x{rows}x{columns}", dtype, _size(x), (x, targets), calls, usual)


def balance_strata(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """Units of 1,000 rows in ten strata; the peer is a dense Newton over the 21 moments, its arrays made beforehand."""
    from spurge import ops

    size, strata, steps = 100, 10, 4
    rows = size * strata
    units = max(1, _examples(traffic, rows * dtype.itemsize) // 8)  # an eighth: the peer's arrays are 22 times as large
    x = _normal(units, rows, dtype=dtype, device=device)
    starts = torch.arange(0, rows + 1, size, device=device)
    base = torch.ones(rows, dtype=torch.float64, device=device)
    masses = torch.full((strata,), 1 / strata, dtype=torch.float64, device=device)
    parts = x.double().view(units, strata, size)
    means, squares = parts.mean(2) + 0.1, parts.square().mean((1, 2)) + 0.05
    outcomes, start = (
        torch.randn(rows, 1, device=device).double(),
        torch.zeros(units, strata + 1, device=device).double(),
    )
    marks = torch.eye(strata, dtype=torch.float64, device=device).repeat_interleave(size, 0)

    def spurge(x: Tensor) -> Tensor:
        return ops.balance_strata(x, starts, base, masses, means, squares, outcomes, start)[1].to(dtype)

    def usual(x: Tensor) -> Tensor:
        v = x.double()[..., None]
        y = torch.cat([marks[:, :-1].expand(units, -1, -1), v * marks, v.square()], 2)
        target = torch.cat([masses[:-1].expand(units, -1), masses * means, squares[:, None]], 1)
        y = y - target[:, None]
        dual = torch.zeros_like(target)
        for _ in range(steps):
            w = torch.einsum("pnk,pk->pn", y, dual).softmax(1)
            gradient = torch.einsum("pn,pnk->pk", w, y)
            hessian = (w[..., None] * y).transpose(1, 2) @ y - gradient[:, :, None] * gradient[:, None]
            dual = dual - torch.linalg.solve(hessian, gradient)
        return (torch.einsum("pnk,pk->pn", y, dual).softmax(1) @ outcomes).to(dtype)

    calls: dict[str, Function] = {"spurge": spurge, "torch": usual}
    return Case("balance_strata", f"{units}x{rows}, {strata} strata", dtype, _size(x), (x,), calls, usual)


def associate(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """Ten classes of equal size and a row for each."""
    from spurge import ops

    outputs, width = 10, 512
    edges = (outputs, width)
    kept = 2 * (8 + 8 + 8) * outputs * width  # sums, logs and activations, read and written
    samples = max(1, _examples(max(traffic - kept, 0), width * dtype.itemsize + 4 * outputs) // outputs)
    x = _normal(samples * outputs, width, dtype=dtype, device=device)
    g = torch.rand(samples * outputs, outputs, device=device)
    starts = torch.arange(0, len(x) + 1, samples, device=device)
    classes = torch.arange(outputs, device=device)
    scales = torch.full((outputs,), 1 / samples, dtype=torch.float64, device=device)
    places = [torch.zeros(edges, dtype=torch.float64, device=device) for _ in range(3)]
    picked, nothing = torch.zeros(edges, device=device), torch.zeros(0, dtype=torch.float64, device=device)

    def spurge(sums: Tensor, logs: Tensor, activations: Tensor, picked: Tensor, x: Tensor, g: Tensor) -> Any:
        ops.associate_(sums, logs, nothing, picked, activations, x, g, starts, classes, scales)
        return sums, logs, activations, picked

    def streaming(sums: Tensor, logs: Tensor, activations: Tensor, picked: Tensor, x: Tensor, g: Tensor) -> Any:
        for c in range(outputs):
            size = x[c * samples : (c + 1) * samples].float().abs()
            total = (g[c * samples : (c + 1) * samples].abs().t() @ size).div_(samples)
            sums += total
            picked[c] = total[c]
            logs += total.log().nan_to_num_(neginf=0.0).mul_(total)
            activations[c] += size.mean(0)
        return sums, logs, activations, picked

    def usual(sums: Tensor, logs: Tensor, activations: Tensor, picked: Tensor, x: Tensor, g: Tensor) -> Any:
        size = x.float().abs().view(outputs, samples, width)
        total = g.abs().view(outputs, samples, outputs).transpose(1, 2) @ size / samples
        sums += total.sum(0)
        logs += torch.special.xlogy(total, total).sum(0)
        activations += size.mean(1)
        return sums, logs, activations, picked.copy_(total.diagonal(dim1=0, dim2=1).t())

    calls = {"spurge": spurge, "torch": streaming, "torch-usual": usual}
    moved = _size(x) + _size(g) + kept
    return Case("associate_", f"{len(x)}x{outputs}x{width}", dtype, moved, (*places, picked, x, g), calls, usual)


KERNELS: dict[str, Callable[[int, torch.dtype, str], Case]] = {
    "open_rows": open_rows,
    "gate_columns_": gate_all,
    "gate_columns_few": gate_few,
    "node_sum": node_sum,
    "multiply_sum": multiply_sum,
    "first_order": first_order,
    "proximity": proximity,
    "proximity_gradient": proximity_gradient,
    "associate_": associate,
    "segment_medians": segment_medians,
    "correct_interval": correct_interval,
    "balance_sweep": balance_sweep,
    "balance_batch": balance_batch,
    "balance_strata": balance_strata,
}
DTYPES = dict.fromkeys(KERNELS, (torch.float32, torch.bfloat16)) | {
    "proximity": (torch.float32,),
    "proximity_gradient": (torch.float32,),
    "correct_interval": (torch.float32,),
    "balance_sweep": (torch.float32,),
    "balance_batch": (torch.float32,),
    "balance_strata": (torch.float32,),
}
