"""``swarm_step_`` and ``swarm_best_``: one iteration of a particle swarm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spurge import _core, reference
from spurge.ops._registry import check, check_device, register, run, written


def _check_swarm(**tensors: Tensor) -> None:
    """All float32 on one device; the first is [P, D] and gives the shape of all but leader and fitness."""
    (first, lead), *others = tensors.items()
    check(lead.dim() == 2, lambda: f"{first}: must have 2 dimensions [P, D], got shape {tuple(lead.shape)}")
    particles, dimensions = lead.shape
    check(lead.dtype == torch.float32, lambda: f"{first}: dtype must be float32, got {lead.dtype}")
    for name, x in others:
        want = {"leader": (dimensions,), "fitness": (particles,), "best_fitness": (particles,)}.get(name, lead.shape)
        check(x.shape == want, lambda: f"{name}: shape must be {tuple(want)}, got {tuple(x.shape)}")  # noqa: B023
        check(x.dtype == torch.float32, lambda: f"{name}: dtype must be float32, got {x.dtype}")  # noqa: B023
        check_device(first, lead, name, x)


def _swarm_step_fake(
    position: Tensor,
    velocity: Tensor,
    best: Tensor,
    leader: Tensor,
    inertia: float,
    cognitive: float,
    social: float,
    low: float,
    high: float,
    max_velocity: float,
    seed: int,
    iteration: int,
) -> None:
    _check_swarm(position=position, velocity=velocity, best=best, leader=leader)
    numbers = {"inertia": inertia, "cognitive": cognitive, "social": social, "low": low, "high": high}
    for name, value in numbers.items():
        check(math.isfinite(value), lambda: f"{name}: must be finite, got {value}")  # noqa: B023
    check(low < high, lambda: f"low: must be below high = {high}, got {low}")
    check(max_velocity > 0, lambda: f"max_velocity: must be positive, got {max_velocity}")
    check(0 <= seed < 2**63, lambda: f"seed: must lie in [0, 2^63), got {seed}")
    check(0 <= iteration < 2**32, lambda: f"iteration: must lie in [0, 2^32), got {iteration}")


def _swarm_step_kernel(position: Tensor, velocity: Tensor, best: Tensor, leader: Tensor, *numbers: Any) -> None:
    best, leader = best.contiguous(), leader.contiguous()
    written(position, lambda x: written(velocity, lambda v: run(_core.swarm_step, x, v, best, leader, *numbers)))


def _swarm_step_twin(position: Tensor, velocity: Tensor, *rest: Any) -> None:
    moved, speed = reference.swarm_step(position, velocity, *rest)
    position.copy_(moved)
    velocity.copy_(speed)


_swarm_step_ = register(
    "swarm_step_(Tensor(a!) position, Tensor(b!) velocity, Tensor best, Tensor leader, float inertia,"
    " float cognitive, float social, float low, float high, float max_velocity, int seed, int iteration) -> ()",
    _swarm_step_fake,
    _swarm_step_kernel,
    _swarm_step_twin,
)


def swarm_step_(
    position: Tensor,
    velocity: Tensor,
    best: Tensor,
    leader: Tensor,
    *,
    inertia: float,
    cognitive: float,
    social: float,
    low: float,
    high: float,
    max_velocity: float,
    seed: int,
    iteration: int,
) -> None:
    r"""Move a particle swarm by one iteration, in place (MacU Eq. 8 and 9).

    .. math::
        v \leftarrow \mathrm{clip}\big(w v + c_1 r_1 (p - x) + c_2 r_2 (g - x),\; \pm v_{\max}\big), \qquad
        x \leftarrow \mathrm{clip}(x + v,\; [\mathrm{low}, \mathrm{high}])

    Where ``x`` met a wall, ``v`` changes its sign. ``r1`` and ``r2`` are new for each particle and dimension:
    24 bits of Philox-4x32-10 with ``seed`` as the key, and particle, dimension and ``iteration`` as the counter.
    So they depend on nothing else, and a swarm is bitwise the same for any number of threads, any instruction
    set, and on the GPU (unless the process flushes denormals to zero). Not differentiable.

    Args:
        position: x, float32 ``[P, D]``, changed; through a copy where it is not contiguous.
        velocity: v, float32 ``[P, D]``, changed; likewise.
        best: p, each particle's best position so far, float32 ``[P, D]``; no memory shared with ``position``.
        leader: g, the best position of all, float32 ``[D]``.
        inertia: w.
        cognitive: c1.
        social: c2.
        low, high: the box, the same in each dimension.
        max_velocity: largest change of a coordinate in one iteration, in its units; infinity is allowed.
        seed: in [0, 2^63).
        iteration: in [0, 2^32); the same number draws the same random numbers.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.

    >>> x, v = torch.zeros(2, 3), torch.zeros(2, 3)
    >>> swarm_step_(x, v, torch.ones(2, 3), torch.ones(3), inertia=0.5, cognitive=1.5, social=1.5,
    ...             low=-1.0, high=1.0, max_velocity=0.5, seed=0, iteration=1)
    >>> bool((x > 0).all() and (x <= 0.5).all() and torch.equal(x, v))
    True
    """
    _swarm_step_(position, velocity, best, leader, inertia, cognitive, social, low, high, max_velocity, seed, iteration)


def _swarm_best_fake(best: Tensor, best_fitness: Tensor, position: Tensor, fitness: Tensor) -> Tensor:
    _check_swarm(best=best, best_fitness=best_fitness, position=position, fitness=fitness)
    check(best.shape[0] >= 1, lambda: "best: need at least 1 particle, got 0")
    return best.new_empty((), dtype=torch.int64)


def _swarm_best_kernel(best: Tensor, best_fitness: Tensor, position: Tensor, fitness: Tensor) -> Tensor:
    leader = best.new_empty((), dtype=torch.int64)
    position, fitness = position.contiguous(), fitness.contiguous()
    written(
        best,
        lambda b: written(best_fitness, lambda f: run(_core.swarm_best, leader, b, f, position, fitness)),
    )
    return leader


def _swarm_best_twin(best: Tensor, best_fitness: Tensor, position: Tensor, fitness: Tensor) -> Tensor:
    places, values, leader = reference.swarm_best(best, best_fitness, position, fitness)
    best.copy_(places)
    best_fitness.copy_(values)
    return leader


_swarm_best_ = register(
    "swarm_best_(Tensor(a!) best, Tensor(b!) best_fitness, Tensor position, Tensor fitness) -> Tensor",
    _swarm_best_fake,
    _swarm_best_kernel,
    _swarm_best_twin,
)


def swarm_best_(best: Tensor, best_fitness: Tensor, position: Tensor, fitness: Tensor) -> Tensor:
    r"""Remember each particle's best position, in place, and find the leader; fitness is maximised.

    .. math:: p_i \leftarrow x_i \text{ where } F(x_i) > F(p_i), \qquad g = p_j,\; j = \arg\max_i F(p_i)

    NaN never wins; among equals the smaller index leads. Bitwise the same everywhere. Not differentiable.

    Args:
        best: p, float32 ``[P, D]``, changed.
        best_fitness: F(p), float32 ``[P]``, changed; begin with minus infinity.
        position: x, float32 ``[P, D]``.
        fitness: F(x), float32 ``[P]``.

    Returns:
        j, int64, a tensor without dimensions: nothing waits for the GPU. 0 if no fitness has ever won.

    Raises:
        ValueError: a shape, dtype or device does not fit, or there is no particle.

    >>> best, fitness = torch.zeros(3, 1), torch.full((3,), -torch.inf)
    >>> swarm_best_(best, fitness, torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0.5, torch.nan, 0.7])).item()
    2
    >>> best.flatten().tolist()
    [1.0, 0.0, 3.0]
    """
    return _swarm_best_(best, best_fitness, position, fitness)
