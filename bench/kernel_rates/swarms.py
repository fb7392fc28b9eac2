"""The swarm part of ``run.py kernels``: nanoseconds per particle and dimension, memory, and what the swarm finds.

Times are of one iteration with a fitness that costs nothing, so that they are the swarm's own: new velocities
and positions, personal bests and the leader. ``spurge`` is the two kernels; ``spurge-maximise`` the optimiser
that calls them, and ``pyswarms`` an optimiser too; both are timed by the difference of two iteration counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.harness import Timing, compare, peak_of_call, peak_of_child, threads
from peers.swarms import COGNITIVE, INERTIA, SOCIAL, NumpySwarm, TorchSwarm, pyswarms_minimise

SHAPES = {"40x256": (2, 22), "128x4096": (2, 12), "1024x65536": (1, 3)}  # and the two iteration counts
QUICK_SHAPES = {"40x256": (2, 12)}
BYTES = 20  # position and velocity read and written, personal best read


class Kernels:
    """An iteration by the two ops."""

    def __init__(self, particles: int, dimensions: int, device: str = "cpu"):
        self.position = torch.rand(particles, dimensions, device=device) * 2 - 1
        self.velocity = torch.zeros_like(self.position)
        self.best, self.best_fitness = self.position.clone(), torch.full((particles,), -torch.inf, device=device)
        self.leader, self.iteration = self.best[0].clone(), 0

    def step(self, fitness: Tensor) -> None:
        from spurge import ops

        self.iteration += 1
        pulls = {"inertia": INERTIA, "cognitive": COGNITIVE, "social": SOCIAL}
        box = {"low": -1.0, "high": 1.0, "max_velocity": 1.0}
        state = (self.position, self.velocity, self.best, self.leader)
        ops.swarm_step_(*state, **pulls, **box, seed=0, iteration=self.iteration)
        leader = ops.swarm_best_(self.best, self.best_fitness, self.position, fitness)
        self.leader = self.best[leader]  # indexed by a tensor: a copy


def maximise(
    fitness: Callable[[Tensor], Tensor], particles: int, dimensions: int, iterations: int, box: float, seed: int
) -> Any:
    """The library's optimiser on ``[-box, box]``, everything else by default."""
    from spurge.methods.macu.swarm import Swarm

    pulls = {"inertia": INERTIA, "cognitive": COGNITIVE, "social": SOCIAL}
    swarm = Swarm(particles=particles, iterations=iterations, low=-box, high=box, seed=seed, **pulls)
    return swarm.maximise(fitness, dimensions=dimensions)


def _free(particles: int, array: Any) -> Callable[[Any], Any]:
    """A fitness that costs nothing and still makes new personal bests now and then."""
    values = [array(np.random.default_rng(i).random(particles, dtype=np.float32)) for i in range(16)]
    calls = [0]

    def fitness(position: Any) -> Any:
        calls[0] += 1
        return values[calls[0] % 16]

    return fitness


def _by_difference(call: Callable[[int], Any], counts: tuple[int, int], repeats: int) -> Timing:
    low, high = counts
    both = compare({"low": lambda: call(low), "high": lambda: call(high)}, repeats=repeats, budget=30.0)
    per = high - low
    return Timing(
        (both["high"].seconds - both["low"].seconds) / per,
        both["high"].spread / per,
        both["high"].n,
        (both["high"].cpu_seconds - both["low"].cpu_seconds) / per,
    )


def time_iterations(shape: str, counts: tuple[int, int], *, device: str, with_compile: bool) -> dict[str, Timing]:
    """Seconds of one iteration by each method."""
    particles, dimensions = map(int, shape.split("x"))
    fitness = _free(particles, lambda values: torch.from_numpy(values).to(device))
    arrays = _free(particles, lambda values: values)
    size = (particles, dimensions, device)
    swarms: dict[str, Any] = {"spurge": Kernels(*size), "torch": TorchSwarm(*size)}
    if with_compile:
        swarms["torch.compile"] = TorchSwarm(*size).compiled()
    calls = {name: (lambda swarm=swarm: swarm.step(fitness(None))) for name, swarm in swarms.items()}
    if device == "cpu":
        numpy_swarm = NumpySwarm(particles, dimensions)
        calls["numpy"] = lambda: numpy_swarm.step(arrays(None))
    timings = compare(calls, repeats=7, budget=15.0, sample_seconds=0.02, device=device)
    swarms.clear()
    calls.clear()
    if device == "cpu":
        repeats = 5 if particles * dimensions < 1 << 24 else 1
        timings["spurge-maximise"] = _by_difference(
            lambda n: maximise(fitness, particles, dimensions, n, 1.0, 0), counts, repeats
        )
        timings["pyswarms"] = _by_difference(
            lambda n: pyswarms_minimise(arrays, particles, dimensions, n, 1.0, 0), counts, repeats
        )
    return timings


# --------------------------------------------------------------------------------------------------------- quality


def sphere(x: Tensor) -> Tensor:
    return x.square().sum(1)


def rastrigin(x: Tensor) -> Tensor:
    return 10 * x.shape[1] + (x.square() - 10 * torch.cos(2 * math.pi * x)).sum(1)


def ackley(x: Tensor) -> Tensor:
    return (
        -20 * torch.exp(-0.2 * x.square().mean(1).sqrt()) - torch.exp(torch.cos(2 * math.pi * x).mean(1)) + 20 + math.e
    )


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "sphere": (sphere, 5.12),
    "rastrigin": (rastrigin, 5.12),
    "ackley": (ackley, 32.0),
}


def quality(name: str, method: str, seed: int) -> float:
    """Best value found in 32 dimensions by 40 particles in 40 iterations; 0 is the minimum of all three functions."""
    function, box = FUNCTIONS[name]
    if method == "pyswarms":
        return pyswarms_minimise(lambda x: function(torch.from_numpy(x)).numpy(), 40, 32, 40, box, seed)
    return -float(maximise(lambda x: -function(x), 40, 32, 40, box, seed).fitness)


# ---------------------------------------------------------------------------------------------------------- memory


def child(rest: list[str]) -> dict[str, int]:
    """``run.py child swarm``: peak bytes of one optimisation above what the process held before."""
    method, *sizes = rest

    def call(particles: int, dimensions: int, iterations: int) -> None:
        if method == "pyswarms":
            pyswarms_minimise(_free(particles, lambda values: values), particles, dimensions, iterations, 1.0, 0)
        else:
            maximise(_free(particles, torch.from_numpy), particles, dimensions, iterations, 1.0, 0)

    call(4, 8, 2)  # libraries are in memory before the measured call
    return {"peak_bytes": peak_of_call(partial(call, *map(int, sizes)))}


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """The swarm's rows of ``run.py kernels``; saved after each case."""
    for shape, counts in (QUICK_SHAPES if args.quick else SHAPES).items():
        for count in args.threads:
            with threads(count):
                timings = time_iterations(shape, counts, device=args.device, with_compile=args.compile)
            label = shape if count == args.threads[0] else f"{shape} ({count} threads)"
            _add_rates(results, label, math.prod(map(int, shape.split("x"))), timings)
            save()
    if torch.device(args.device).type != "cpu":
        return
    for method in ("spurge", "pyswarms"):
        _add_memory(results, method, (5, 15) if args.quick else (10, 60))
        save()
    for name in FUNCTIONS:
        for method in ("spurge", "pyswarms"):
            _add_quality(results, name, method, seeds=5 if args.quick else 15)
        save()


def _add_rates(results: Any, case: str, elements: int, timings: dict[str, Timing]) -> None:
    print(f"swarm {case}", flush=True)
    for method, timing in timings.items():
        each = timing.seconds / elements
        spread = timing.spread / elements * 1e9
        results.add(case, method, "ns_per_element", each * 1e9, spread=spread, n=timing.n, unit="ns")
        results.add(case, method, "bandwidth", BYTES / each / 1e9, unit="GB/s")
        print(f"    {method:16s} {each * 1e9:9.2f} ns per particle and dimension", flush=True)


def _add_memory(results: Any, method: str, iterations: tuple[int, int]) -> None:
    low, high = iterations
    small, large = (peak_of_child(["swarm", method, "128", "4096", str(n)])["peak_bytes"] for n in (low, high))
    growth = (large - small) / (high - low)
    results.add("128x4096", method, "peak_bytes", large, unit="bytes")
    results.add("128x4096", method, "growth_per_iteration", growth, unit="bytes")
    print(f"swarm memory {method:16s} peak {large / 1e6:.0f} MB, {growth / 1e6:.2f} MB more with each iteration")


def _add_quality(results: Any, name: str, method: str, *, seeds: int) -> None:
    values = [quality(name, method, seed) for seed in range(seeds)]
    low, _, high = quantiles(values, n=4, method="inclusive")
    results.add(f"{name}, 32-d, 40x40", method, "best", median(values), spread=high - low, n=seeds, unit="")
    print(f"swarm {name:10s} {method:16s} median best {median(values):.3f}")
