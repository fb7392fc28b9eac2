"""What small_job.cpp does, in Python, and the folder of inputs for both:  python small_job.py FOLDER"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import count, takewhile
from pathlib import Path

import numpy
import torch
from torch import Tensor

from spurge import ops

WEIGHTS = [5 / 18, 8 / 18, 5 / 18]  # three Gauss-Legendre nodes on [0, 1]
PARTICLES, ITERATIONS, STRONGEST = 24, 40, 16
RATES = [i / 10 for i in range(21)]


def make(folder: Path, blocks: int = 3, examples: int = 4, tokens: int = 7, neurons: int = 64) -> None:
    """Made-up activations and gradients of a layer, block by block; logits of 200 samples, and an edit's shifts."""
    draw = torch.Generator().manual_seed(0)

    def save(name: str, values: Tensor) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        numpy.save(folder / name, values.numpy())

    for b in range(blocks):
        activations = torch.randn(examples, tokens, neurons, generator=draw)
        noise = torch.randn(len(WEIGHTS), examples, tokens, neurons, generator=draw)
        save(f"block_{b}/activations.npy", activations)
        save(f"block_{b}/gradients.npy", (activations + 8 * noise) / 64)
        lengths = torch.randint(3, tokens + 1, (examples, 1), generator=draw)
        save(f"block_{b}/mask.npy", (torch.arange(tokens) < lengths).to(torch.uint8))
    labels = torch.randint(10, (200,), generator=draw)
    logits = torch.randn(200, 10, generator=draw) + 3 * torch.nn.functional.one_hot(labels, 10)
    shortcut = 5.0 * torch.randint(2, (200, 1), generator=draw)  # towards outputs 3 and 8, which rate 1 takes back
    rows = torch.tensor([3, 8])
    logits[:, rows] += shortcut
    save("logits.npy", logits)
    save("shifts.npy", torch.randn(200, 2, generator=draw) / 2 - shortcut)
    save("rows.npy", rows)
    save("labels.npy", labels)


def load(path: Path) -> Tensor:
    return torch.from_numpy(numpy.load(path))


def attributions(folder: Path) -> list[float]:
    """Of each neuron: the mean gradient over the path times the activation, over all tokens of all blocks."""
    total: list[float] = []
    for block in takewhile(Path.is_dir, (folder / f"block_{b}" for b in count())):
        gradients, activations, mask = (load(block / f"{name}.npy") for name in ("gradients", "activations", "mask"))
        mean = ops.node_sum(gradients.flatten(0, 1), WEIGHTS)
        for row in ops.multiply_sum(mean, activations, mask).tolist():
            total = [sum(pair) for pair in zip(total or [0.0] * len(row), row, strict=True)]
    return total


def objective(gates: list[float], adds: list[float]) -> float:
    """Halve what the neurons add, and stay near 1."""
    left = whole = moved = 0.0
    for gate, add in zip(gates, adds, strict=True):
        left += gate * add
        whole += add
        moved += (1 - gate) * (1 - gate)
    return -(left - 0.5 * whole) * (left - 0.5 * whole) - 0.01 * moved


def search(fitness: Callable[[list[float]], float], dimensions: int) -> tuple[list[float], float]:
    """The best gates that a particle swarm finds, and their fitness."""
    position, velocity = torch.ones(PARTICLES, dimensions), torch.zeros(PARTICLES, dimensions)
    best, best_fitness = position.clone(), torch.full((PARTICLES,), -math.inf)
    towards = torch.zeros(dimensions)  # all begin at 1, and first step this way
    for iteration in range(ITERATIONS + 1):
        values = torch.tensor([fitness(gates) for gates in position.tolist()])
        leader = int(ops.swarm_best_(best, best_fitness, position, values))
        if iteration == ITERATIONS:
            break
        ops.swarm_step_(
            position,
            velocity,
            best,
            towards if iteration == 0 else best[leader],
            inertia=0.7298,
            cognitive=1.49618,
            social=1.49618,
            low=0.0,
            high=1.0,
            max_velocity=0.25,
            seed=7,
            iteration=iteration,
        )
    return best[leader].tolist(), float(best_fitness[leader])


def right(folder: Path) -> list[int]:
    """Right predictions of a linear layer at each rate of the edit."""
    logits, shifts, rows, labels = (load(folder / f"{name}.npy") for name in ("logits", "shifts", "rows", "labels"))
    intervals = ops.correct_interval(logits, shifts, rows, labels, RATES[0], RATES[-1]).tolist()
    return [sum(low <= rate <= high for low, high in intervals) for rate in RATES]


def run(folder: Path) -> list[str]:
    """The lines that small_job prints."""
    total = attributions(folder)
    chosen = sorted(range(len(total)), key=lambda j: -abs(total[j]))[:STRONGEST]
    adds = [total[j] for j in chosen]
    gates, fitness = search(lambda gates: objective(gates, adds), len(chosen))
    lines = [
        f"neuron {j} attribution {add:.9g} gate {gate:.9g}" for j, add, gate in zip(chosen, adds, gates, strict=True)
    ]
    lines.append(f"fitness {fitness:.9g}")
    lines += [f"rate {rate:.1f} right {n}" for rate, n in zip(RATES, right(folder), strict=True)]
    return lines


if __name__ == "__main__":
    inputs = Path(sys.argv[1])
    if not inputs.exists():
        make(inputs)
    print("\n".join(run(inputs)))
