"""MacU, its controls and its rivals at one seed of a task: what each method gives, made where it is not there yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch

from experiments import data
from experiments.outcomes import Part, Record, chosen, logits, right
from experiments.subjects import PLAIN, PRESETS, SECONDS, TUNED, VARIANTS, WEIGHTS, Subject, activations, depths
from experiments.tasks import Task
from spurge.engine.base import files
from spurge.engine.data.cues import Cue
from spurge.engine.data.examples import Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.parameter_edits import ParameterEdit
from spurge.engine.evaluation.prediction import Prepared
from spurge.engine.evaluation.threshold import matched_shift, moved
from spurge.engine.models.handle import Handle
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU

View = Callable[[Task, Examples], Examples]
HYPOTHESIS = "hypothesis-only"
VIEWS: dict[str, View] = {
    "deleted": lambda task, rows: Cue(task.golden.irrelevant).deleted(rows),
    HYPOTHESIS: lambda task, rows: data.hypotheses(rows),
}
"""Other texts for the plain model: without the irrelevant golden words; the hypothesis of a pair alone (table 15)."""
DRAWS = 3  # of random neurons, at each seed
CORE = (PLAIN, *(f"{preset}{part}" for preset in PRESETS for part in ("", ":zero", ":random", ":threshold")))
CORE = (*CORE, "macu-paper:amplified")
ABLATIONS = tuple(f"macu-paper@{name}" for name in VARIANTS if name)
OTHERS = (*TUNED[1:], *WEIGHTS, *VIEWS)
BOTH = tuple(f"{name}+{preset}" for preset in reversed(PRESETS) for name in ("poe", "nfl-co", "nfl-cp", "swaps"))
METHODS = (*CORE, *OTHERS, *BOTH, *ABLATIONS)
COMPARED = (
    *((preset, f"{preset}:{part}") for preset in PRESETS for part in ("zero", "random", "threshold")),
    *((method, method.partition("+")[0]) for method in BOTH),
)
Edit = NeuronEdit | ParameterEdit


@dataclass(frozen=True, eq=False)
class Bench:
    """A task's methods at all seeds.

    Attributes:
        quick: a few texts and steps.
        factors: of the penalties of NFL, once they are chosen.
        plain: the method that edits nothing.
        prefix: of the cases.
        subjects: gives a seed's models where they are others than fine-tuned MiniLMs.
    """

    task: Task
    record: Record
    seeds: Sequence[int]
    quick: bool
    factors: dict[str, float] = field(default_factory=dict)
    plain: str = PLAIN
    prefix: str = ""
    subjects: Callable[[int], Subject] | None = None

    def part(self, method: str, seed: int) -> Part:
        """What a method gives, made where it is not there yet."""
        known = self.record.parts.get((self.prefix, method), {})
        if seed in known:
            return known[seed]
        task = self.task
        sets = [rows.fingerprint() for rows in (task.dev, *task.tests.values())]
        size = [task.rows, task.epochs, task.max_length]
        chosen_at = [self.seeds[0]] if method.startswith("nfl") else []
        key = files.canonical_json([files.spurge_version(), self.quick, task.name, *size, sets, *chosen_at])
        return self.record.measure(self.prefix, method, seed, key, partial(self._make, method, self.subject(seed)))

    def subject(self, seed: int) -> Subject:
        """A seed's models and edits; the factors of NFL are chosen at the first seed."""
        if self.subjects is not None:
            return self.subjects(seed)
        return Subject(self.task, seed, self.record.cache, self.quick, self.factors)

    def _make(self, method: str, subject: Subject) -> Part:
        name, plus, preset = method.partition("+")
        for penalty in {"nfl-co", "nfl-cp"} & {name} - self.factors.keys():
            self.factors[penalty] = self.subject(self.seeds[0]).choose_factor(penalty)
        if name in (*TUNED, self.plain) and not plus:
            tuned = subject.tuned(name)
            facts = {SECONDS: tuned.cpu_seconds, **({"factor": self.factors[name]} if name in self.factors else {})}
            return self._measured(Handle(tuned.model, tuned.tokenizer), None, facts)
        handle = subject.handle(name if plus else self.plain)
        if name in VIEWS:
            return self._measured(handle, None, {}, VIEWS[name])
        if name in WEIGHTS:
            start = time.process_time()
            edit = subject.weights(name, handle)
            facts = {SECONDS: time.process_time() - start}
            return self._measured(handle, edit, facts | chosen(edit.info))
        if plus:
            gates = subject.gates(name, handle, subject.macu(preset))
            return self._measured(handle, gates, {SECONDS: gates.info[SECONDS], "neurons": len(gates.neurons)})
        preset, _, control = method.partition(":")
        return self._edited(subject, handle, preset, control)

    def _edited(self, subject: Subject, handle: Handle, preset: str, control: str) -> Part:
        """MacU on the plain model, or a control of it."""
        macu = subject.macu(preset)
        located = subject.located(self.plain, handle, macu)
        if control in ("zero", "amplified"):
            gate = 0.0 if control == "zero" else 2.0
            return self._measured(handle, NeuronEdit.build(handle.model, located.spurious_set, gate), {})
        if preset == "macu-paper@weights":
            start = time.process_time()
            trained = subject.spurious_weights(handle, located)
            return self._measured(handle, trained, {SECONDS: located.info[SECONDS] + time.process_time() - start})
        edit = subject.gates(self.plain, handle, macu)
        if control == "random":
            drawn = [self._measured(handle, subject.random_like(handle, edit, draw), {}) for draw in range(DRAWS)]
            mean = {case: torch.stack([one.right[case].float() for one in drawn]).mean(0) for case in self.task.tests}
            return Part(mean, {"eta": fmean(one.facts["eta"] for one in drawn), "draws": DRAWS})
        if control == "threshold":
            return self._moved(self.part(self.plain, subject.seed), self.part(preset, subject.seed))
        facts = {SECONDS: edit.info[SECONDS], "neurons": len(edit.neurons), **self._facts(handle, located)}
        return self._measured(handle, edit, facts)

    def _facts(self, handle: Handle, located: Located) -> dict[str, Any]:
        """Of the sets: sizes, overlap, mean layers, and activations where dev is answered rightly and wrongly."""
        sets = {"causal": located.causal_set, "spurious": located.spurious_set}
        facts: dict[str, Any] = {f"{side}_neurons": len(own) for side, own in sets.items()}
        facts["overlap"] = len(located.overlap)
        dev, length = self.task.dev, self.task.max_length
        wrong = right(dev, logits(handle, dev, length)) == 0
        for side, own in sets.items():
            layers = depths(handle, own)
            facts |= {f"{side}_layer": fmean(layers)} if layers else {}
            values = activations(handle, own, dev, length)
            for answer, rows in (("wrong", wrong), ("right", ~wrong)):
                facts |= {f"{side}_activation_{answer}": float(values[rows].mean())} if bool(rows.any()) else {}
        return facts

    def _measured(self, handle: Handle, edit: Edit | None, facts: dict[str, Any], view: View | None = None) -> Part:
        """Logits of all tests under an edit, and eta (Eq. 10) of those at home."""
        task, found, eta = self.task, {}, 0.0
        with nullcontext() if edit is None else edit.applied(handle.model):
            for case, rows in task.tests.items():
                rows = rows if view is None else view(task, rows)
                if case != task.home:
                    found[case] = logits(handle, rows, task.max_length)
                    continue
                how: dict[str, Any] = {"golden": task.golden, "correlation_tokens": MacU.paper().correlation_tokens}
                outcome = Prepared(case, handle, rows, max_length=task.max_length, batch_size=16, **how).run()
                assert outcome.proximity is not None
                found[case], eta = outcome.logits, float(outcome.proximity.double().mean())
        return Part({case: right(task.tests[case], own) for case, own in found.items()}, facts | {"eta": eta}, found)

    def _moved(self, plain: Part, edited: Part) -> Part:
        """The plain model with a constant added to its logits: each label as often as with the edit."""
        cases = list(self.task.tests)
        before, after = (torch.cat([part.logits[case] for case in cases]) for part in (plain, edited))
        wanted = after.argmax(1).bincount(minlength=after.shape[1])
        shift = matched_shift(before.numpy(), wanted.numpy())
        found = {case: torch.from_numpy(moved(plain.logits[case].numpy(), shift)) for case in cases}
        return Part({case: right(self.task.tests[case], own) for case, own in found.items()}, {}, {})


def labels_used(method: str) -> str:
    """Beyond those of the training texts: the paper's localisation and fitness ask for none."""
    name, _, preset = method.partition("+")
    asked = {"nfl-co", "nfl-cp", *WEIGHTS, "macu-paper@counterfactual", "macu-paper@weights"}
    return "class" if name in asked or "macu-best" in (name.partition(":")[0], preset) else "none"
