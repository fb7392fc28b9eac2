"""One seed of a task: its models (fine-tuned plainly, or as a rival does), the neurons located in them, and edits.

Models, located neurons and edits are kept in a folder under keys of all that they depend on, with the processor time
that they took when they were made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import models
from experiments.rivals import c2l, nfl, poe, svd_tail, swapped, wise_ft
from experiments.tasks import Task
from spurge.demo.train import Loss, load_base
from spurge.engine.base import files
from spurge.engine.base.temporary import Temporaries
from spurge.engine.data.examples import Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_deltas import WeightDeltas
from spurge.engine.evaluation.prediction import accuracy
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import widths
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.repair import Repairer
from spurge.methods.macu.search import Climb
from spurge.methods.macu.settings import LOCATING
from spurge.methods.macu.swarm import Swarm
from spurge.methods.macu.training import Repair

PLAIN = "fine-tuning"
TUNED = (PLAIN, "nfl-co", "nfl-cp", "poe", "c2l", "swaps")
PRESETS = ("macu-paper", "macu-best")
EXACT = 64  # neurons that the exact localiser measures for each text
EDIT_TEXTS = 24  # of the paper's swarm: each costs 800 forward passes
SECONDS = "cpu_seconds"
_POOL = 8  # batches whose texts are sorted by length together


@dataclass(frozen=True, eq=False)
class Subject:
    """A task at one seed, which draws the training texts, the head and all else.

    Attributes:
        cache: folder.
        quick: a few texts and steps: to see that it runs.
        factors: of the penalties of NFL, by method, once they are chosen.
    """

    task: Task
    seed: int
    cache: Path
    quick: bool
    factors: dict[str, float]

    @cached_property
    def rows(self) -> Examples:
        """What is trained on."""
        return self.task.train.sample(min(self.task.rows, len(self.task.train)), self.seed)

    def tuned(self, name: str, factor: float | None = None) -> models.Tuned:
        """A model, by one of `TUNED`."""
        how: dict[str, Any] = {"epochs": self.task.epochs, "seed": self.seed, "cache": self.cache / "models"}
        how |= {"max_length": self.task.max_length, "pool": _POOL}
        rows = self.rows
        if name == "swaps":
            model, tokenizer = load_base(rows.labels)
            rows = swapped.augmented(Handle(model, tokenizer), rows, self.task.golden, self.seed)
        return models.fine_tuned(rows, loss=self._loss(name, factor), **how)

    def _loss(self, name: str, factor: float | None) -> tuple[str, Callable[[], Loss]] | None:
        rows, length = self.rows, self.task.max_length
        if name in ("nfl-co", "nfl-cp"):
            strength = self.factors[name] if factor is None else factor
            make = nfl.constrained_outputs if name == "nfl-co" else nfl.constrained_parameters
            return f"{name} {strength}", lambda: make(rows.labels, strength)
        if name == "poe":
            return f"poe {poe.FOLDS}", lambda: poe.product(rows, self.seed)
        if name == "c2l":
            return f"c2l {c2l.SHARE}", lambda: c2l.contrastive(self.handle(PLAIN), rows, length, self.seed)
        return None

    def handle(self, name: str) -> Handle:
        """The model and its tokenizer."""
        tuned = self.tuned(name)
        return Handle(tuned.model, tuned.tokenizer)

    def choose_factor(self, name: str) -> float:
        """The factor of an NFL penalty with the best accuracy on dev; the smaller of equal ones."""
        factors = nfl.FACTORS["outputs" if name == "nfl-co" else "parameters"]
        found = {}
        for factor in factors[:1] if self.quick else factors:
            model, tokenizer, _ = self.tuned(name, factor)
            found[factor] = accuracy(model, tokenizer, self.task.dev, max_length=self.task.max_length)
        return max(found, key=lambda factor: found[factor])

    def macu(self, preset: str) -> MacU:
        """The settings of a preset; of the paper's, with another localiser (table 13) or editor (table 14), too."""
        how: dict[str, Any] = {"certify": 0, "max_length": self.task.max_length, "seed": self.seed, "progress": False}
        if preset == "macu-best":
            small: dict[str, Any] = {"texts": 16, "edit_texts": 16, "climb": Climb(steps=4, look=2)}
            return MacU.best(**how | (small if self.quick else {}))
        small = {"texts": 16, "edit_texts": 4, "swarm": Swarm(particles=3, iterations=2, seed=self.seed)}
        how = {"edit_texts": EDIT_TEXTS} | how | (small if self.quick else {})
        return MacU.paper(**how | VARIANTS[preset.removeprefix("macu-paper").removeprefix("@")])

    def located(self, name: str, handle: Handle, macu: MacU) -> Located:
        """What `macu` locates in the model of a name."""
        path = self._path("located", name, {key: value for key, value in asdict(macu).items() if key in LOCATING})
        if path.exists():
            return Located.load(path)
        start = time.process_time()
        found = macu.locate(handle.model, handle.tokenizer, self.rows, self.task.golden)
        found = replace(found, info={**found.info, SECONDS: time.process_time() - start})
        found.save(path)
        return found

    def gates(self, name: str, handle: Handle, macu: MacU) -> NeuronEdit:
        """What `macu` makes of a model, nothing where it locates nothing.

        The seconds are those of both steps, of a swarm that was interrupted those since.
        """
        path = self._path("edit", name, asdict(macu))
        if path.exists():
            return NeuronEdit.load(path)
        located = self.located(name, handle, macu)
        start = time.process_time()
        if not len(located.spurious_set):
            return NeuronEdit.build(handle.model, NeuronSet(), 1.0, {SECONDS: located.info[SECONDS]})
        state = path.with_suffix(".swarm")
        edit = macu.edit(handle.model, handle.tokenizer, self.rows, located, self.task.golden, resume=state)
        assert isinstance(edit, NeuronEdit)
        seconds = located.info[SECONDS] + time.process_time() - start
        edit = replace(edit, info={**edit.info, SECONDS: seconds})
        edit.save(path)
        state.unlink(missing_ok=True)
        return edit

    def _path(self, what: str, name: str, settings: dict[str, Any]) -> Path:
        task, factor = self.task, self.factors.get(name)
        data = [self.rows.fingerprint(), task.golden.fingerprint()]
        origin = [name, *data, task.epochs, task.max_length, factor, settings]
        mark = files.fingerprint(files.canonical_json(origin))[:16]
        return self.cache / f"{what}-{task.name}-{name}-{self.seed}-{mark}.safetensors"

    def repairer(self, handle: Handle) -> Repairer:
        """What edits of weights are chosen by, and the repair itself."""
        task = self.task
        settings = Repair(last_layer=True, dev_texts=len(task.dev), max_length=task.max_length)
        settings = replace(settings, steps=2, warm_up=1) if self.quick else settings
        return Repairer(
            handle,
            self.rows,
            task.dev,
            task.golden,
            settings,
            held_out=0.25,
            max_length=task.max_length,
            memory=None,
            seed=self.seed,
            progress=False,
        )

    def spurious_weights(self, handle: Handle, located: Located) -> WeightDeltas:
        """A repair of what the located spurious neurons read and write, in the place of their gates."""
        repairer = self.repairer(handle)
        alone = replace(repairer, settings=replace(repairer.settings, last_layer=False))
        return alone.edit("neurons", located.spurious_set, None, {"method": "repair of neurons"})

    def weights(self, method: str, handle: Handle) -> WeightDeltas:
        """An edit of the plain model's weights by one of `WEIGHTS`."""
        return WEIGHTS[method](self.repairer(handle), self.cache / f"state-{self.task.name}-{self.seed}.safetensors")

    def random_like(self, handle: Handle, edit: NeuronEdit, number: int) -> NeuronEdit:
        """The gates of an edit on as many other neurons of each layer."""
        sites = widths(handle.sites)
        drawn = edit.neurons.random_like(sites, 1000 * self.seed + number, edit.neurons)
        return NeuronEdit.build(handle.model, drawn, edit.vector())


VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "layer-path": {"path": "layer", "nodes": 4},
    "exact": {"exact": EXACT},
    "counterfactual": {"objective": "counterfactual"},
    "gradient": {"search": "gradient", "fitness": "soft"},
    "weights": {},
}
"""Of the paper's procedure: other localisers, then other editors of what it locates."""


def _repaired(repairer: Repairer, state: Path) -> WeightDeltas:
    edit = repairer.edit("all", None, state, {"method": "repair"})
    state.unlink()
    return edit


def _truncated(repairer: Repairer, state: Path) -> WeightDeltas:
    edits = svd_tail.truncations(repairer.handle.model)
    return repairer.choose(sorted(edits), lambda rank: edits[int(rank)])


WEIGHTS: dict[str, Callable[[Repairer, Path], WeightDeltas]] = {
    "wise-ft": lambda repairer, _: repairer.strength(wise_ft.to_base(repairer.handle.model), wise_ft.SHARES),
    "svd-tail": _truncated,
    "last-layer": lambda repairer, _: repairer.last_layer(),
    "repair": _repaired,
}


def depths(handle: Handle, neurons: NeuronSet) -> list[int]:
    """Layers of neurons, from 1."""
    place = {site.name: layer for layer, site in enumerate(handle.sites, 1)}
    return [place[ref.site] for ref in neurons]


def activations(handle: Handle, neurons: NeuronSet, rows: Examples, max_length: int) -> Tensor:
    """Mean activation of neurons over the tokens of each text, ``[N]``."""
    found = torch.zeros(len(rows))
    with frozen(handle.model, gradients=False), Temporaries() as hooks:
        seen: list[Tensor] = []

        def look(name: str, z: Tensor, output: Tensor, rest: Tensor | None) -> None:
            seen.append(z[..., neurons.indices(name)].sum(-1))

        for site in handle.sites:
            if site.name in neurons.sites:
                hooks.enter_context(site.projection.watch(partial(look, site.name)))
        for start in range(0, len(rows), 32):
            batch = rows[start : start + 32]
            inputs = handle.encode(batch, max_length)
            seen.clear()
            handle.model(**inputs)
            mask = inputs["attention_mask"].float()
            total = torch.stack(seen).sum(0) / len(neurons) if seen else torch.zeros_like(mask)
            found[start : start + len(batch)] = (mask * total).sum(1) / mask.sum(1)
    return found
