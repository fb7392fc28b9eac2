"""Particle swarm search in a box, over any batched fitness.

Each particle ``x`` remembers its best position ``p``; the best of all is the leader ``g``. In every iteration
(MacU Eq. 8 and 9; Kennedy and Eberhart 1995 with the inertia weight of Shi and Eberhart 1998)

    v <- clip(w v + c1 r1 (p - x) + c2 r2 (g - x), max_velocity),    x <- clip(x + v, [low, high])

with ``r1``, ``r2`` uniform in [0, 1) for each particle and dimension. Where ``x`` met a wall, ``v`` changes its
sign. The random numbers are counted, not drawn from a state (see :func:`spurge.ops.swarm_step_`): a swarm depends
on its seed and its fitness only, not on threads, the device, or whether it was interrupted.

Letters: P particles, D dimensions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge import ops
from spurge.engine.base.checks import shaped
from spurge.engine.base.files import PathLike, canonical_json, structured
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.tensor_files import reading, write_tensors

Fitness = Callable[[Tensor], Tensor]
"""Positions float32 ``[P, D]`` -> fitness ``[P]``, the larger the better. NaN never wins."""


@dataclass(frozen=True, eq=False)
class SwarmResult:
    """What a swarm found.

    Attributes:
        position: the best position, float32 ``[D]``.
        fitness: its fitness.
        history: one number per iteration under each of ``"best"`` (largest fitness so far), ``"mean"`` (fitness of
            this iteration's particles, NaN left out) and ``"spread"`` (root mean square distance of the particles
            from their centre, per dimension, as a share of the box).
        evaluations: how many positions were evaluated: particles times iterations.
    """

    position: Tensor
    fitness: float
    history: dict[str, list[float]]
    evaluations: int

    def __repr__(self) -> str:
        iterations = len(self.history["best"])
        return (
            f"SwarmResult(fitness={self.fitness:.6g}, dimensions={self.position.numel()}, "
            f"iterations={iterations}, evaluations={self.evaluations})"
        )


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """Settings of a particle swarm; :meth:`maximise` runs it.

    ``max_velocity`` and ``launch`` were chosen by the median final fitness on sphere, Rastrigin and Ackley in 32
    dimensions with the optimum at the centre, off it, and at the walls. A smaller velocity limit looks better
    where the optimum is at the centre of the box and only there: it holds the particles near the centre.

    Attributes:
        particles: P, at least 2.
        iterations: how often all particles are evaluated.
        inertia: w. With c1 + c2 = 3, 0.5 lies inside the regions of order-1 and order-2 stability.
        cognitive: c1, pull to the particle's own best position.
        social: c2, pull to the best position of all.
        low, high: the box, the same in each dimension.
        max_velocity: largest move per dimension and iteration, as a share of ``high - low``; infinity is allowed.
        launch: first velocity: the way to a random point of the box, times this. 0 starts at rest.
        seed: in [0, 2^63).

    Raises:
        ValueError: a number outside its range.
        TypeError: a number of the wrong type.
    """

    particles: int = 20
    iterations: int = 40
    inertia: float = 0.5
    cognitive: float = 1.5
    social: float = 1.5
    low: float = -1.0
    high: float = 1.0
    max_velocity: float = 0.25
    launch: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, limit in (("particles", 2, 2**32), ("iterations", 1, 2**32), ("seed", 0, 2**63)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected int, got {type(value).__name__}")
            if not least <= value < limit:
                raise ValueError(f"{name}: must be at least {least} and below {limit}, got {value}")
        for name in ("inertia", "cognitive", "social", "low", "high", "max_velocity", "launch"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name}: expected float, got {type(value).__name__}")
            finite = math.isfinite(value) or (name == "max_velocity" and value > 0)
            if not finite or math.isnan(value):
                raise ValueError(f"{name}: must be finite, got {value}")
        for name in ("inertia", "cognitive", "social"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if not self.low < self.high:
            raise ValueError(f"low: must be below high = {self.high}, got {self.low}")
        if self.max_velocity <= 0:
            raise ValueError(f"max_velocity: must be positive, got {self.max_velocity}")
        if not 0 <= self.launch <= 1:
            raise ValueError(f"launch: must lie in [0, 1], got {self.launch}")

    @classmethod
    def paper(cls, *, particles: int = 20, seed: int = 0) -> Swarm:
        """The settings of the MacU paper: 40 iterations, box [-1, 1], c1 = c2 = 1.5, w = 0.5.

        It does not give the number of particles, the first velocity or a velocity limit: read here as 20, at rest,
        and half the box.
        """
        return cls(particles=particles, seed=seed, max_velocity=0.5, launch=0.0)

    def maximise(
        self,
        fitness: Fitness,
        start: Tensor | None = None,
        dimensions: int | None = None,
        *,
        progress: bool = False,
        device: torch.device | str | None = None,
        checkpoint: PathLike | None = None,
        fingerprint: str = "",
        keep: bool = True,
    ) -> SwarmResult:
        """Search the box for the largest ``fitness``.

        ``fitness`` is called once per iteration with all particles, under ``no_grad``. Memory does not grow with
        the iterations: 12 bytes per particle and dimension, and three numbers per iteration.

        Args:
            fitness: float32 ``[P, D]`` -> ``[P]``; it must not change the positions it is given.
            start: first positions of the first n <= P particles, ``[n, D]``, inside the box; the others start at
                random, uniform in the box.
            dimensions: D; may be left out where ``start`` gives it.
            progress: show a progress bar.
            device: where the swarm lives; default: where ``start`` does, or the CPU.
            checkpoint: a file that holds the swarm after each iteration. Where it exists, the search goes on from
                it, with the same result as if it had never stopped; ``iterations`` may have grown.
            fingerprint: what the fitness is made of, in any words; a checkpoint with another one is refused.
            keep: write the checkpoint; False where another process, with the same swarm, does.

        Raises:
            ValueError: ``start`` or ``dimensions`` do not fit; the fitness has the wrong shape, changed the
                positions, or is NaN for every particle of the first iteration; the checkpoint belongs to other
                settings.
            TypeError: the fitness is no tensor.
            OSError: the checkpoint cannot be read or written.

        >>> found = Swarm(iterations=30).maximise(lambda x: -(x - 0.5).square().sum(1), dimensions=3)
        >>> [round(v, 2) for v in found.position.tolist()]
        [0.5, 0.5, 0.5]
        """
        with grad_mode(False):
            search = _Search(self, start, dimensions, device)
            path = None if checkpoint is None else Path(checkpoint)
            if path is not None and path.exists():
                search.load(path, fingerprint)
            done = len(search.history)
            with tqdm(total=self.iterations, initial=done, desc="swarm", unit="iteration", disable=not progress) as bar:
                for iteration in range(done, self.iterations):
                    search.advance(fitness, iteration)
                    if path is not None and keep:
                        search.save(path, fingerprint)
                    bar.set_postfix(best=f"{search.history[-1][0]:.4g}", refresh=False)
                    bar.update()
            return search.result()


class _Search:
    """A swarm under way: positions, velocities, memories, and the history so far."""

    def __init__(
        self, settings: Swarm, start: Tensor | None, dimensions: int | None, device: torch.device | str | None
    ) -> None:
        self.settings = s = settings
        if start is not None:
            start = _checked_start(s, start)
            if dimensions is not None and dimensions != start.shape[1]:
                raise ValueError(f"dimensions: start has {start.shape[1]}, got {dimensions}")
            dimensions = start.shape[1]
            device = start.device if device is None else device
        if dimensions is None:
            raise ValueError("dimensions: must be given where start is not")
        if dimensions < 1:
            raise ValueError(f"dimensions: need at least 1, got {dimensions}")

        def everywhere(value: float) -> Tensor:
            return torch.full((s.particles, dimensions), value, dtype=torch.float32, device=device)

        self.position = self._random(everywhere, cognitive=1.0, social=0.0)
        if start is not None:
            self.position[: start.shape[0]] = start.to(self.position)
        goal = self._random(everywhere, cognitive=0.0, social=1.0)
        fastest = s.max_velocity * (s.high - s.low)
        self.velocity = goal.sub_(self.position).mul_(s.launch).clamp_(-fastest, fastest)
        self.best = self.position.clone()
        self.best_fitness = self.position.new_full((s.particles,), -torch.inf)
        self.leader = torch.zeros((), dtype=torch.int64, device=self.position.device)
        self.history: list[list[float]] = []  # best, mean, spread

    def _random(self, everywhere: Callable[[float], Tensor], cognitive: float, social: float) -> Tensor:
        """Uniform in the box: one step of iteration 0, from the lower corner towards the upper one."""
        s = self.settings
        x, high = everywhere(s.low), everywhere(s.high)
        ops.swarm_step_(
            x, everywhere(0.0), high, high[0], inertia=0.0, cognitive=cognitive, social=social, low=s.low, high=s.high,
            max_velocity=math.inf, seed=s.seed, iteration=0,
        )  # fmt: skip
        return x

    def advance(self, fitness: Fitness, iteration: int) -> None:
        """Move (except the first time), evaluate, remember."""
        s = self.settings
        if iteration > 0:
            ops.swarm_step_(
                self.position, self.velocity, self.best, self.best.index_select(0, self.leader.view(1))[0],
                inertia=s.inertia, cognitive=s.cognitive, social=s.social, low=s.low, high=s.high,
                max_velocity=s.max_velocity * (s.high - s.low), seed=s.seed, iteration=iteration,
            )  # fmt: skip
        version = self.position._version
        values = _checked_fitness(fitness(self.position), self.position)
        if self.position._version != version:
            raise ValueError("fitness: must not change the positions it is given; work on a copy")
        self.leader = ops.swarm_best_(self.best, self.best_fitness, self.position, values)
        spread = self.position.var(0, correction=0).mean().sqrt() / (s.high - s.low)
        best, mean, wide = torch.stack([self.best_fitness[self.leader], values.nanmean(), spread]).tolist()
        if best == -math.inf:
            what = "NaN" if bool(values.isnan().all()) else "NaN or minus infinity"
            raise ValueError(f"fitness: need a number for at least one particle, got {what} for all {s.particles}")
        self.history.append([best, mean, wide])

    def result(self) -> SwarmResult:
        best, mean, spread = (list(column) for column in zip(*self.history, strict=True))
        leader = int(self.leader)
        return SwarmResult(
            position=self.best[leader].clone(),
            fitness=float(self.best_fitness[leader]),
            history={"best": best, "mean": mean, "spread": spread},
            evaluations=self.settings.particles * len(self.history),
        )

    # ---- checkpoints -----------------------------------------------------------------------------

    _TENSORS = ("position", "velocity", "best", "best_fitness", "leader")

    def _origin(self, fingerprint: str) -> dict[str, object]:
        """What two swarms must share for one to go on where the other stopped."""
        settings = dataclasses.asdict(self.settings)
        del settings["iterations"]
        return {"fingerprint": fingerprint, "dimensions": self.position.shape[1]} | {
            name: "infinity" if value == math.inf else value for name, value in settings.items()
        }

    def save(self, path: Path, fingerprint: str) -> None:
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        tensors["history"] = torch.tensor(self.history, dtype=torch.float64)
        origin = canonical_json(self._origin(fingerprint))
        write_tensors(path, tensors, {"kind": "swarm", "origin": origin})

    def load(self, path: Path, fingerprint: str) -> None:
        with reading(path, "swarm", "the state of a swarm") as file:
            found, tensors = file.value("origin", dict), file.tensors
            steps = len(tensors["history"])
        for name, value in self._origin(fingerprint).items():
            if found.get(name) != value:
                raise ValueError(f"checkpoint: {path} has {name} = {found.get(name)!r}, this swarm has {value!r}")
        if steps > self.settings.iterations:
            asked = self.settings.iterations
            raise ValueError(f"checkpoint: {path} holds {steps} iterations, more than the {asked} asked for")
        with structured(path, "the state of a swarm"):
            shaped("history", tensors["history"], torch.float64, steps, 3)
            for name in self._TENSORS:
                own = getattr(self, name)
                shaped(name, tensors[name], own.dtype, *own.shape)
            if not 0 <= int(tensors["leader"]) < self.settings.particles:
                raise ValueError(f"leader: must be below {self.settings.particles}, got {int(tensors['leader'])}")
        for name in self._TENSORS:
            setattr(self, name, tensors[name].to(self.position.device))
        self.history = tensors["history"].tolist()


def _checked_start(s: Swarm, start: Tensor) -> Tensor:
    if not isinstance(start, Tensor):
        raise TypeError(f"start: expected a tensor [n, D], got {type(start).__name__}")
    if start.dim() != 2:
        raise ValueError(f"start: must have 2 dimensions [n, D], got shape {tuple(start.shape)}")
    if start.shape[0] > s.particles:
        raise ValueError(f"start: at most {s.particles} particles, got {start.shape[0]}")
    inside = (start >= s.low) & (start <= s.high)
    if not bool(inside.all()):
        raise ValueError(f"start: must lie in [{s.low}, {s.high}], got {start[~inside][0].item()}")
    return start.detach()


def _checked_fitness(values: Tensor, position: Tensor) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"fitness: expected a tensor [P], got {type(values).__name__}")
    if values.shape != position.shape[:1]:
        raise ValueError(f"fitness: must return shape {(position.shape[0],)}, got {tuple(values.shape)}")
    return values.detach().to(device=position.device, dtype=torch.float32)
