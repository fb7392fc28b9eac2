"""Cases of ``proximity`` and ``swarm``: scores of words, and the search for gates."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from spurge import ops, reference
from spurge.bench.case import NEURONS, Case, Function, examples, size_of

UNITS, TOP, SHARPNESS, VOCABULARY = 32, 5, 0.25, 30_000


def _texts(rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, ids, bitmap and labels of so many texts."""
    scores = torch.softmax(torch.randn(rows, UNITS, device=device), 1).to(dtype)
    ids = torch.randint(0, VOCABULARY, (rows, UNITS), dtype=torch.int32, device=device)
    bitmap = torch.randint(-(2**31), 2**31, (2, 2, (VOCABULARY + 31) // 32), device=device).int()
    return scores, ids, bitmap, torch.randint(0, 2, (rows,), device=device)


def _proximity(scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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


def proximity(traffic: int, dtype: torch.dtype, device: str) -> Case:
    # a quarter of the bytes: eager torch needs twenty times as many in temporaries
    rows = examples(traffic // 4, UNITS * 8 + 24)
    scores, ids, _, labels = inputs = _texts(rows, dtype, device)
    calls: dict[str, Function] = {
        "spurge": lambda scores, ids, bitmap, labels: ops.proximity(scores, ids, bitmap, labels, TOP, SHARPNESS),
        "torch": _proximity,
    }
    moved = size_of(scores) + size_of(ids) + size_of(labels) + rows * 4 * dtype.itemsize
    shape = f"{rows}x{UNITS}, top {TOP}"
    return Case("proximity", shape, dtype, moved, inputs, calls, _proximity, scores.numel())


def proximity_gradient(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """What locating asks: soft proximity and what autograd makes of it by the scores."""
    rows = examples(traffic // 4, UNITS * 12 + 24)
    scores, ids, _, labels = inputs = _texts(rows, dtype, device)

    def differentiated(soft: Function) -> Function:
        def call(scores: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            leaf = scores.detach().requires_grad_()
            value = soft(leaf, *rest)
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

        return call

    def kernel(scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor) -> Tensor:
        return ops.proximity(scores, ids, bitmap, labels, TOP, SHARPNESS)[1]

    usual = differentiated(lambda *given: _proximity(*given)[1])
    calls = {"spurge": differentiated(kernel), "torch": usual}
    moved = 2 * size_of(scores) + size_of(ids) + size_of(labels) + rows * 2 * dtype.itemsize
    shape = f"{rows}x{UNITS}, top {TOP}"
    return Case("proximity_gradient", shape, dtype, moved, inputs, calls, usual, scores.numel())


def _swarm(particles: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, velocities, each particle's best place, and the leader's."""
    position, best = (torch.rand(particles, NEURONS, device=device) * 2 - 1 for _ in range(2))
    return position, torch.zeros_like(position), best, best[0].clone()


def swarm_step(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """The peer draws other random numbers; what the kernel moves is compared with its float64 twin."""
    particles = examples(traffic, 5 * 4 * NEURONS)  # position and velocity read and written, best places read
    inputs = _swarm(particles, device)
    draw, pull = (torch.empty_like(inputs[0]) for _ in range(2))
    weights = {"inertia": 0.5, "cognitive": 1.5, "social": 1.5, "low": -1.0, "high": 1.0, "max_velocity": 1.0}
    numbers: dict[str, Any] = weights | {"seed": 0, "iteration": 1}

    def spurge(position: Tensor, velocity: Tensor, best: Tensor, leader: Tensor) -> tuple[Tensor, Tensor]:
        ops.swarm_step_(position, velocity, best, leader, **numbers)
        return position, velocity

    def in_place(position: Tensor, velocity: Tensor, best: Tensor, leader: Tensor) -> tuple[Tensor, Tensor]:
        velocity.mul_(0.5)
        for goal in (best, leader):
            torch.sub(goal, position, out=pull)
            velocity.addcmul_(pull, draw.uniform_(), value=1.5)
        velocity.clamp_(-1, 1)
        return position.add_(velocity).clamp_(-1, 1), velocity

    def usual(position: Tensor, velocity: Tensor, best: Tensor, leader: Tensor) -> tuple[Tensor, Tensor]:
        pulls = 1.5 * torch.rand_like(position) * (best - position)
        pulls = pulls + 1.5 * torch.rand_like(position) * (leader - position)
        velocity.copy_((0.5 * velocity + pulls).clamp(-1, 1))
        return position.copy_((position + velocity).clamp(-1, 1)), velocity

    calls: dict[str, Function] = {"spurge": spurge, "torch": in_place, "torch-usual": usual}
    shape, moved = f"{particles}x{NEURONS}", 5 * size_of(inputs[0])
    wanted = partial(reference.swarm_step, **numbers)
    return Case("swarm_step_", shape, dtype, moved, inputs, calls, usual, inputs[0].numel(), wanted)


def swarm_best(traffic: int, dtype: torch.dtype, device: str) -> Case:
    """Every particle has come to a better place, and copies it."""
    particles = examples(traffic, 2 * 4 * NEURONS)
    position, _, best, _ = _swarm(particles, device)
    fitness, before = torch.rand(particles, device=device), torch.full((particles,), -torch.inf, device=device)

    def spurge(best: Tensor, position: Tensor, fitness: Tensor) -> tuple[Tensor, Tensor]:
        return best, ops.swarm_best_(best, before.clone(), position, fitness)

    def chosen(best: Tensor, position: Tensor, fitness: Tensor) -> tuple[Tensor, Tensor]:
        torch.where((fitness > before)[:, None], position, best, out=best)
        return best, torch.maximum(before, fitness).argmax()

    def usual(best: Tensor, position: Tensor, fitness: Tensor) -> tuple[Tensor, Tensor]:
        better = fitness > before
        best[better] = position[better]
        return best, torch.maximum(before, fitness).argmax()

    calls: dict[str, Function] = {"spurge": spurge, "torch": chosen, "torch-usual": usual}
    inputs = best, position, fitness
    return Case("swarm_best_", f"{particles}x{NEURONS}", dtype, 2 * size_of(best), inputs, calls, usual)
