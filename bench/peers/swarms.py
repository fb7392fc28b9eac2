"""Particle swarms that users have today: pyswarms, and one iteration written by hand in numpy and in torch.

An iteration: new velocities (clamped), new positions (clamped to the box), personal and global bests from a
fitness that is given. All work in float32 and in place but pyswarms, which does as it does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

INERTIA, COGNITIVE, SOCIAL = 0.5, 1.5, 1.5


def pyswarms_minimise(
    cost: Callable[[np.ndarray], np.ndarray], particles: int, dimensions: int, iterations: int, box: float, seed: int
) -> float:
    """Best cost that ``GlobalBestPSO`` finds in ``[-box, box]``; it takes its numbers from numpy's global generator."""
    from pyswarms.single import GlobalBestPSO
    from pyswarms.utils.reporter import Reporter

    Reporter._setup_logger = lambda *args, **kwargs: None  # it would write report.log into the working directory
    np.random.seed(seed)  # noqa: NPY002 - pyswarms draws from numpy's global generator
    bounds = (np.full(dimensions, -box), np.full(dimensions, box))
    options = {"w": INERTIA, "c1": COGNITIVE, "c2": SOCIAL}
    optimiser = GlobalBestPSO(particles, dimensions, options, bounds=bounds)
    return float(optimiser.optimize(cost, iters=iterations, verbose=False)[0])


class NumpySwarm:
    """In-place float32 numpy with buffers for the random numbers: the fastest hand-written form we know."""

    def __init__(self, particles: int, dimensions: int, seed: int = 0):
        self.random = np.random.default_rng(seed)
        shape = (particles, dimensions)
        self.position = self.random.random(shape, dtype=np.float32) * 2 - 1
        self.velocity = np.zeros(shape, dtype=np.float32)
        self.best, self.best_fitness = self.position.copy(), np.full(particles, -np.inf, dtype=np.float32)
        self.leader = self.best[0].copy()
        self.draw, self.pull = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)

    def step(self, fitness: np.ndarray) -> None:
        velocity, draw, pull = self.velocity, self.draw, self.pull
        velocity *= INERTIA
        for goal, strength in ((self.best, COGNITIVE), (self.leader, SOCIAL)):
            self.random.random(out=draw, dtype=np.float32)
            np.subtract(goal, self.position, out=pull)
            pull *= draw
            pull *= strength
            velocity += pull
        np.clip(velocity, -1, 1, out=velocity)
        self.position += velocity
        np.clip(self.position, -1, 1, out=self.position)
        better = fitness > self.best_fitness
        self.best[better], self.best_fitness[better] = self.position[better], fitness[better]
        self.leader = self.best[self.best_fitness.argmax()].copy()


class TorchSwarm:
    """The same in torch; ``update`` is the part that ``torch.compile`` can take."""

    def __init__(self, particles: int, dimensions: int, device: str = "cpu"):
        shape = (particles, dimensions)
        self.position = torch.rand(shape, device=device) * 2 - 1
        self.velocity = torch.zeros(shape, device=device)
        self.best, self.best_fitness = self.position.clone(), torch.full((particles,), -torch.inf, device=device)
        self.leader = self.best[0].clone()
        self.draw, self.pull = torch.empty(shape, device=device), torch.empty(shape, device=device)
        self.move: Callable[..., None] = self._in_place

    def _in_place(self) -> None:
        self.velocity.mul_(INERTIA)
        for goal, strength in ((self.best, COGNITIVE), (self.leader, SOCIAL)):
            torch.sub(goal, self.position, out=self.pull)
            self.velocity.addcmul_(self.pull, self.draw.uniform_(), value=strength)
        self.velocity.clamp_(-1, 1)
        self.position.add_(self.velocity).clamp_(-1, 1)

    def compiled(self) -> TorchSwarm:
        """Use the plain formula under ``torch.compile`` for the moves."""

        def formula(position: Tensor, velocity: Tensor, best: Tensor, leader: Tensor) -> None:
            pull = COGNITIVE * torch.rand_like(position) * (best - position)
            pull = pull + SOCIAL * torch.rand_like(position) * (leader - position)
            velocity.copy_((INERTIA * velocity + pull).clamp(-1, 1))
            position.copy_((position + velocity).clamp(-1, 1))

        torch._dynamo.reset()
        compiled = torch.compile(formula, dynamic=False)
        self.move = lambda: compiled(self.position, self.velocity, self.best, self.leader)
        return self

    def step(self, fitness: Tensor) -> None:
        self.move()
        better = fitness > self.best_fitness
        self.best[better] = self.position[better]
        torch.maximum(self.best_fitness, fitness, out=self.best_fitness)
        self.leader = self.best[self.best_fitness.argmax()].clone()
