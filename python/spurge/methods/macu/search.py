"""Two ways to find gates: the paper's particle swarm, and gradient ascent inside a box with a pull to 1."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.base.checks import integer
from spurge.engine.base.distributed import ALONE, Message, Ranks
from spurge.engine.base.files import PathLike
from spurge.engine.base.files import fingerprint as hashed
from spurge.engine.base.gradients import grad_mode
from spurge.engine.cascade.cascade import Cascade, Prompt, Rows
from spurge.engine.edits.gates import attached
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import Units
from spurge.methods.macu.gated_model import gated_pass
from spurge.methods.macu.objectives import Job
from spurge.methods.macu.swarm import Swarm

REFUSED = -1e6  # fitness of settings that cost too much accuracy: below any objective
# Particles that are evaluated in one batch. The height of a batch decides how its products round, so it must not follow
# the number of ranks. 5 is a quarter of the usual swarm: a rank more or less still finds work.
GROUP = 5


@dataclass(frozen=True, eq=False)
class Found:
    """Gates that a search ended with.

    Attributes:
        gates: ``[n]`` float32 on the CPU, in the order of the searched neurons.
        value: what the search maximised, there.
        history: columns with one number per iteration of the swarm, or per look of the gradient search.
        info: what else the search has to say, JSON-able.
    """

    gates: Tensor
    value: float
    history: dict[str, list[float]]
    info: dict[str, Any]

    def message(self) -> Message:
        return Message({"value": self.value, "history": self.history, "info": self.info}, {"gates": self.gates})

    @classmethod
    def of_message(cls, message: Message) -> Found:
        return cls(message.tensors["gates"], **message.facts)


@dataclass(frozen=True, kw_only=True)
class Climb:
    """Settings of the gradient search.

    Adam (Kingma and Ba, 2015) on the gates, each step followed by the proximal step of ``l1 * sum |g - 1|`` and a cut
    to the box; the gates kept are those best on held-out training texts, among them the start.

    Attributes:
        steps: at most so many minibatches.
        rate: Adam's step size; a gate moves by about that much a step.
        low, high: the box of a gate, 1 is unedited, 0 erased. By default gates only weaken: a MiniLM of SST-2
            then lost 0.8 points at home instead of 2.0 in [-1, 2], and gained as much elsewhere (250 texts a set).
        l1: pull to 1. A gate returns by ``rate * l1`` a step, so one whose gradient is mostly noise stays near 1.
        look: steps between two looks at the held-out texts.
        patience: stop after so many looks without a new best.
        drop: gates that end within this distance of 1 are left out of the edit.
        seed: of the order of minibatches.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type.
    """

    steps: int = 60
    rate: float = 0.1
    low: float = 0.0
    high: float = 1.0
    l1: float = 0.1
    look: int = 10
    patience: int = 3
    drop: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "look", "patience"):
            integer(name, getattr(self, name), 1)
        integer("seed", self.seed, 0)
        for name in ("rate", "low", "high", "l1", "drop"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not math.isfinite(value):
                raise ValueError(f"{name}: must be finite, got {value}")
        if self.rate <= 0:
            raise ValueError(f"rate: must be above 0, got {self.rate}")
        if not self.low <= 1 <= self.high or self.low == self.high:
            raise ValueError(f"low, high: the box must contain 1, the unedited gate, got [{self.low}, {self.high}]")
        if not 0 <= self.l1 < 1:
            raise ValueError(f"l1: must be at least 0 and below 1, got {self.l1}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop: must be at least 0 and below 1, got {self.drop}")

    def maximise(
        self,
        handle: Handle,
        neurons: NeuronSet,
        jobs: Sequence[Job],
        held: Sequence[Job],
        *,
        attention: bool = False,
        units: Units = "neurons",
        progress: bool = False,
    ) -> Found:
        """The gates of ``neurons`` with the highest mean target on ``held``, learned on ``jobs``.

        Deterministic on a CPU for a seed. The model's weights get no gradient and do not change.

        Args:
            neurons: which gates move; all start at 1.
            jobs: minibatches.
            held: batches whose mean target decides.
            attention: targets read the attention row of the probed token.
            units: what ``neurons`` are.

        Raises:
            ValueError: no neurons, no jobs, or a target that is not differentiable or not finite.
        """
        if not len(neurons) or not jobs or not held:
            raise ValueError(f"search: need neurons and texts, got {len(neurons)}, {len(jobs)} and {len(held)} batches")
        gates = torch.ones(len(neurons), device=handle.device, requires_grad=True)
        adam = torch.optim.Adam([gates], lr=self.rate, betas=(0.9, 0.99))
        with frozen(handle.model), gated_pass(handle, neurons, attention=attention, units=units) as run:
            best, kept, value, stale = 0, gates.detach().clone(), run.mean(held, None), 0
            history: dict[str, list[float]] = {"step": [0], "value": [value], "moved": [0]}
            order: list[int] = []
            draw = random.Random(self.seed)
            for step in tqdm(range(1, self.steps + 1), desc="gradient search", unit="step", disable=not progress):
                if not order:
                    order = list(range(len(jobs)))
                    draw.shuffle(order)
                job = jobs[order.pop()]
                loss = -(job.weights * run.value(job, gates)).mean()
                if not loss.requires_grad:
                    raise ValueError("search: the target is not differentiable by the gates; use search='pso'")
                if not torch.isfinite(loss):
                    raise ValueError(f"search: the target is not finite at step {step}")
                adam.zero_grad(set_to_none=True)
                loss.backward()
                adam.step()
                with grad_mode(False):
                    away = gates - 1
                    gates.copy_(1 + away.sign() * (away.abs() - self.rate * self.l1).clamp_min(0)).clamp_(
                        self.low, self.high
                    )
                if step % self.look and step < self.steps:
                    continue
                now = run.mean(held, gates.detach())
                for name, number in (("step", step), ("value", now), ("moved", int((gates.detach() != 1).sum()))):
                    history[name].append(number)
                if now > value:
                    best, kept, value, stale = step, gates.detach().clone(), now, 0
                else:
                    stale += 1
                    if stale == self.patience:
                        break
        return Found(kept.cpu(), value, history, {"best_step": best, "start": history["value"][0]})


def swarm_search(
    cascade: Cascade,
    jobs: Sequence[Job],
    free: NeuronSet,
    erased: NeuronSet,
    swarm: Swarm,
    *,
    ranks: Ranks = ALONE,
    guard: float | None = None,
    checkpoint: PathLike | None = None,
    fingerprint: str = "",
    progress: bool = False,
) -> Found:
    """Particle swarm over the gates of ``free`` (MacU Eq. 8 and 9) while those of ``erased`` are 0.

    One particle starts at 1 (unedited), one at 0 (erased), the others anywhere in the box.

    Every rank moves the whole swarm and measures its share of the particles, a few of them on one job at a time.

    Args:
        jobs: the fitness is the weighted mean of their targets over all rows.
        free, erased: disjoint sets of neurons.
        guard: refuse particles whose accuracy on the jobs' labelled texts is more than this many percentage points
            below the unedited model's; among refused ones the more accurate is better.
        ranks: which share the work.
        checkpoint, fingerprint: a file to go on from, and what the fitness is made of (`Swarm.maximise`). Rank 0
            writes it and all must see it.

    Raises:
        ValueError: no free neurons, no jobs, sets that overlap, a guard without labelled texts, or a checkpoint that
            not all ranks see.
        RankError: another rank ended early.
    """
    if not len(free) or not jobs:
        raise ValueError(f"search: need neurons and texts, got {len(free)} neurons and {len(jobs)} batches")
    if len(free & erased):
        raise ValueError("search: free and erased neurons must differ")
    if guard is not None and not any(bool((job.labels >= 0).any()) for job in jobs):
        raise ValueError("guard: the texts have no labels to measure accuracy by")
    ranks.doing = "a swarm was evaluated"
    written = None
    if checkpoint is not None:
        ranks.doing += "; start again with the same resume file to go on"
        written = hashed(Path(checkpoint).read_bytes()) if Path(checkpoint).exists() else None
    ranks.agree("edit: data, settings, model and resume file", [fingerprint, len(free), len(jobs), written])
    device, fitness = jobs[0].labels.device, _Fitness(cascade, jobs, free, ranks)
    if guard is not None:
        fitness.floor = float(fitness.measure(torch.ones(1, len(free), device=device))[1]) - guard
    start = torch.stack([torch.ones(len(free)), torch.zeros(len(free))]).clamp(swarm.low, swarm.high)
    # Erased in the model itself: then all layers below the first free neuron are the same for every particle.
    zeros = NeuronEdit.of_sites({site.name: site for site in cascade.sites}, erased, 0.0)
    with attached(zeros.fit(cascade.model), zeros.full()):
        fitness.inputs = cascade.read_all([job.inputs for job in jobs])
        result = swarm.maximise(
            fitness,
            start,
            len(free),
            progress=progress and ranks.rank == 0,
            device=device,
            checkpoint=checkpoint,
            keep=ranks.rank == 0,
            fingerprint=fingerprint,
        )
    both = free | erased
    gates = torch.zeros(len(both))
    gates[torch.tensor([ref in free for ref in both])] = result.position.detach().cpu().float()
    info = {"evaluations": result.evaluations, "guard_met": result.fitness > REFUSED}
    return Found(gates, float(result.fitness), result.history, info)


class _Fitness:
    """MacU Eq. 7 of settings of the free gates; those that cost too much accuracy are refused.

    Attributes:
        inputs: of each job, or its unedited pass.
        floor: accuracy in percent below which a setting is refused.
    """

    def __init__(self, cascade: Cascade, jobs: Sequence[Job], free: NeuronSet, ranks: Ranks):
        self.cascade, self.jobs, self.free, self.ranks = cascade, jobs, free, ranks
        self.inputs: Sequence[Mapping[str, Any] | Prompt] = [job.inputs for job in jobs]
        self.floor = -math.inf
        self._weight = sum(float(job.weights.sum()) for job in jobs)
        self._labelled = max(1, sum(int((job.labels >= 0).sum()) for job in jobs))

    def __call__(self, position: Tensor) -> Tensor:
        value, accuracy = self.measure(position)
        shortfall = self.floor - accuracy
        return torch.where(shortfall > 1e-9, REFUSED * (1 + shortfall), value).to(position)

    def measure(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Mean target and accuracy (percent) of settings ``[P, n]`` of the free gates, each ``[P]`` float64."""
        jobs, ranks = self.jobs, self.ranks
        measured = torch.zeros(2, len(jobs), len(gates), dtype=torch.float64)  # of one rank; 0 where others measure
        tasks = [(j, slice(start, start + GROUP)) for start in range(0, len(gates), GROUP) for j in range(len(jobs))]
        for j, group in tasks[ranks.rank :: ranks.size]:
            out = self.cascade.gated(self.inputs[j], _with_accuracy(jobs[j]), self.free, gates[group]).double()
            measured[0, j, group] = (out[..., 0] * jobs[j].weights.to(out)).sum(1).cpu()
            measured[1, j, group] = out[..., 1].sum(1).cpu()
        value, right = ranks.sum(measured).sum(1)
        return value / self._weight, 100 * right / self._labelled


def _with_accuracy(job: Job) -> Any:
    def target(rows: Rows) -> Tensor:
        right = rows.logits.argmax(1) == job.labels[rows.example].to(rows.logits.device)
        value = job.target(rows)
        return torch.stack([value, right.to(value)], 1)

    return target
