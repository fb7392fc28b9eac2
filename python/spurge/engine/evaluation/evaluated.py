"""The passes of an evaluation: the model without the edit, with it, and with its controls, over every set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spurge.engine.cascade.cascade import Cascade
from spurge.engine.data.cues import Cue
from spurge.engine.data.examples import Examples
from spurge.engine.edits.gates import attached
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.parameter_edits import ParameterEdit
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.evaluation.changed import Changed, changed_rows, changed_texts
from spurge.engine.evaluation.numbers import Answers, Judged, summarize, threshold_of
from spurge.engine.evaluation.prediction import Outcome, Prepared
from spurge.engine.evaluation.random_edits import (
    can_be_drawn,
    draw_seed,
    last_layer_logits,
    of_last_layer,
    random_gates,
    random_weights,
    read_last_layers,
)
from spurge.engine.evaluation.report import CONTROLS, NONE, Report
from spurge.engine.evaluation.threshold import moved
from spurge.engine.models.handle import Handle
from spurge.engine.models.heads import Head
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.parameters import Place
from spurge.engine.models.sites import Site, Units, joins_heads

#: The set that an edit should leave as it is.
UNTOUCHED = "untouched"


@dataclass(frozen=True, eq=False)
class Asked:
    """Checked arguments of `spurge.evaluate`; no ``draws`` where there are no controls."""

    edit: NeuronEdit | ParameterEdit | None
    name: str
    beside: Mapping[str, NeuronEdit | ParameterEdit]
    located: NeuronSet | None
    units: Units | None
    draws: int
    cue: Cue | None
    untouched: Examples | None
    changed: int
    cross_groups: bool
    seed: int
    bootstrap: int
    force: bool

    @property
    def edits(self) -> dict[str, NeuronEdit | ParameterEdit]:
        """The edit and those beside it, by name."""
        return ({} if self.edit is None else {self.name: self.edit}) | dict(self.beside)

    def control(self, name: str, kind: str) -> str:
        """What a control of one of the edits is called."""
        return kind if name == self.name else f"{name}: {kind}"


Passes = list[tuple[str, Callable[[], AbstractContextManager[Any]]]]


class Evaluation:
    """One evaluation of a model without gates: what is run under which edit, and what came of it."""

    def __init__(self, handle: Handle, sets: dict[str, Examples], asked: Asked, reading: dict[str, Any]) -> None:
        self.handle, self.sets, self.asked, self.reading = handle, sets, asked, reading
        self.rows = sets | ({} if asked.untouched is None else {UNTOUCHED: asked.untouched})
        self.prepared = {case: Prepared(case, handle, rows, **reading) for case, rows in self.rows.items()}
        self.holding = {} if asked.cue is None else {case: asked.cue.hold(rows) for case, rows in self.rows.items()}
        self.found: dict[str, dict[str, list[Answers]]] = {case: {} for case in self.rows}
        # Nothing attached is still eager, as gates are: compiled code rounds otherwise. New weights run as models do.
        self.plain: Callable[[], AbstractContextManager[Any]] = nullcontext
        if not isinstance(asked.edit, ParameterEdit):
            self.plain = partial(attached, {}, {})
        self.drawn = 0
        self.last_layers: dict[str, tuple[Tensor, Head]] | None = None

    def report(self, progress: bool) -> Report:
        asked = self.asked
        passes: Passes = [(NONE, self.plain)]
        passes += [(name, self._applied(edit)) for name, edit in asked.edits.items()]
        random = self._random_neurons(passes) if isinstance(asked.edit, NeuronEdit) else None
        weights = {name: edit for name, edit in asked.edits.items() if isinstance(edit, WeightEdit) and asked.draws}
        layers = {asked.control(name, "random"): self._random_weights(name, e, passes) for name, e in weights.items()}
        batches = sum(len(item.batches) for item in self.prepared.values())
        total = (len(passes) + (0 if random is None else asked.draws)) * batches
        with tqdm(total=total, desc="evaluate", disable=not progress) as bar:
            for method, edited in passes:
                with edited():
                    for case, item in self.prepared.items():
                        self.found[case].setdefault(method, []).append(_answers(item.run(bar.update)))
            if random is not None:
                cascade, neurons, together = random
                for case, item in self.prepared.items():
                    outcomes = item.run_gated(cascade, neurons, together, lambda: bar.update(asked.draws))
                    self.found[case]["random"] = [_answers(outcome) for outcome in outcomes]
        for method, found in layers.items():
            for case, answers in (found or {}).items():
                self.found[case][method] = answers
        if asked.cue is not None:
            with self.plain():
                for case in self.rows:
                    self.found[case]["deleted"] = [self._deleted(case, asked.cue)]
        return self._summary(self._changed())

    def _applied(self, edit: NeuronEdit | ParameterEdit) -> Callable[[], AbstractContextManager[Any]]:
        model, force = self.handle.model, self.asked.force
        if isinstance(edit, NeuronEdit):
            return partial(attached, edit.fit(model, force=force), edit.full())
        edit.fit(model, force=force)
        return partial(edit.applied, model, force=force)

    def _random_neurons(self, passes: Passes) -> tuple[Cascade, NeuronSet, Tensor] | None:
        """Adds the passes of zero-all and, unless all draws run at once, of random neurons; else what these need."""
        asked, model = self.asked, self.handle.model
        edit = asked.edit
        assert isinstance(edit, NeuronEdit)
        own = edit.fit(model, force=asked.force)
        erased = edit.with_gates(0.0) if asked.located is None else _erased(model, asked.located, asked.units, own)
        sites = own | erased.fit(model, force=asked.force)
        if not asked.draws:
            return None
        passes.append(("zero-all", partial(attached, sites, erased.full())))
        self.drawn = asked.draws
        random = [random_gates(edit, draw_seed(asked.seed, draw)) for draw in range(asked.draws)]
        cascade = None
        if bool((edit.vector() != 1).any()):
            cascade = _cascade(self.handle, sites, self.reading["memory"], self.reading["golden"] is not None)
        if cascade is not None:
            return (cascade, *_joined(random))
        passes += [("random", partial(attached, sites, gates)) for gates in random]
        return None

    def _random_weights(self, name: str, edit: WeightEdit, passes: Passes) -> dict[str, list[Answers]] | None:
        """Answers with random weights of the last layer alone; of others adds the passes, but not for those beside."""
        asked, model = self.asked, self.handle.model
        if not can_be_drawn(edit):
            return None
        places = edit.fit(model, force=asked.force)
        draws = [random_weights(edit, places, draw_seed(asked.seed, draw)) for draw in range(asked.draws)]
        read = self._last_layers(places)
        if read is not None:
            self.drawn = asked.draws
            return {
                case: [Answers.of(logits.cpu().numpy()) for logits in last_layer_logits(own, places, draws)]
                for case, own in read.items()
            }
        if name == asked.name:
            self.drawn = asked.draws
            edits = [WeightEdit.build(model, {places[name].name: pair for name, pair in own.items()}) for own in draws]
            passes += [("random", partial(own.applied, model)) for own in edits]
        return None

    def _last_layers(self, places: Mapping[str, Place]) -> dict[str, tuple[Tensor, Head]] | None:
        """What the last layer reads, where an edit of ``places`` changes it alone; the same for all such edits."""
        if self.reading["golden"] is not None or not of_last_layer(self.handle, places):
            return None
        if self.last_layers is None:
            how = {name: self.reading[name] for name in ("batch_size", "max_length", "memory")}
            self.last_layers = read_last_layers(self.handle, self.rows, **how)
        return self.last_layers

    def _deleted(self, case: str, cue: Cue) -> Answers:
        """The unedited model's answers to texts without the cue; where there is none, they stay."""
        plain, rows = self.found[case][NONE][0], np.flatnonzero(self.holding[case])
        if not len(rows):
            return plain
        item = Prepared(case, self.handle, cue.deleted(self.rows[case].subset(rows)), **self.reading)
        found = _answers(item.run())
        assert plain.logits is not None
        logits = plain.logits.copy()
        logits[rows] = found.logits
        proximity = None
        if plain.proximity is not None:
            proximity = plain.proximity.copy()
            proximity[rows] = found.proximity
        return Answers.of(logits, proximity)

    def _changed(self) -> tuple[Changed, ...]:
        """Some texts of each set whose answer the edit changes."""
        asked, out = self.asked, []
        if asked.edit is None:
            return ()
        contexts = (self.plain, self._applied(asked.edit))
        for case, rows in self.sets.items():
            plain, edited = self.found[case][NONE][0], self.found[case][asked.name][0]
            chosen = changed_rows(plain, edited, asked.changed, asked.seed)
            reading = self.reading | {"golden": None, "correlation_tokens": None}
            out += changed_texts(self.handle, case, rows, chosen.tolist(), plain, edited, contexts, reading)
        return tuple(out)

    def _summary(self, changed: tuple[Changed, ...]) -> Report:
        asked, thresholds = self.asked, self._thresholds()
        order = [NONE, asked.name, *asked.beside, *CONTROLS]
        order += [asked.control(name, kind) for name in asked.beside for kind in ("threshold", "random")]
        found = {case: {method: own[method] for method in order if method in own} for case, own in self.found.items()}
        labels: dict[str, str | None] = {NONE: "none", "deleted": "none", "zero-all": _labels(asked.edit)}
        for name, edit in asked.edits.items():
            labels |= {name: _labels(edit), asked.control(name, "random"): _labels(edit)}
            labels[asked.control(name, "threshold")] = "none"
        measures = summarize(
            {case: self._judged(case) for case in self.rows},
            found,
            labels,
            asked.bootstrap,
            asked.seed,
            drawn=[asked.control(name, "random") for name in asked.edits],
            thresholds=thresholds,
        )
        tokens = None if self.reading["golden"] is None else asdict(self.reading["correlation_tokens"])
        settings = {
            "sets": {case: {"n": len(rows), "data": rows.fingerprint()} for case, rows in self.rows.items()},
            "edit": None if asked.edit is None else asked.edit.info,
            "name": asked.name,
            "beside": {name: edit.info for name, edit in asked.beside.items()},
            "cue": None if asked.cue is None else list(asked.cue.words),
            "cross_groups": asked.cross_groups,
            "draws": self.drawn,
            "correlation_tokens": tokens,
            "seed": asked.seed,
            "bootstrap": asked.bootstrap,
            "max_length": self.reading["max_length"],
            "notes": [
                note
                for name, edit in asked.edits.items()
                for note in _stated("the edit" if name == asked.name else name, edit)
            ],
        }
        return Report(tuple(measures), settings, changed)

    def _thresholds(self) -> dict[str, dict[str, Answers]]:
        """Of each edit, by set, what a moved threshold answers; it becomes a method, too."""
        asked, thresholds = self.asked, {}
        for name in asked.edits if asked.draws else ():
            threshold, shift = threshold_of({case: self.found[case] for case in self.sets}, name)
            if threshold is not None:
                thresholds[name] = threshold
                for answers in self.found.values():
                    plain = answers[NONE][0].logits
                    assert plain is not None
                    answers[asked.control(name, "threshold")] = [Answers.of(moved(plain, shift))]
        return thresholds

    def _judged(self, case: str) -> Judged:
        rows = self.rows[case]
        groups = {group: np.array([group in row.groups for row in rows]) for group in rows.groups}
        if case == UNTOUCHED and case not in self.sets:
            return Judged(rows.targets.numpy(), apart={case: np.ones(len(rows), bool)}, right=False)
        apart = {f"{case} (no cue)": ~self.holding[case]} if case in self.holding else {}
        targets = rows.targets.numpy()
        if not self.asked.cross_groups:
            return Judged(targets, groups, apart=apart)
        cells = {
            f"{label}/{group}": own & (targets == number)
            for group, own in groups.items()
            for number, label in enumerate(rows.labels)
        }
        return Judged(targets, {name: own for name, own in cells.items() if own.any()}, groups, apart=apart)


def _stated(which: str, edit: NeuronEdit | ParameterEdit) -> list[str]:
    """What a repair says of its own controls, measured on its dev texts when it was made."""
    controls = edit.info.get("controls")
    if not isinstance(controls, Mapping):
        return []
    names = {"no-swaps": "the same steps without swaps", "random": "a repair of random neurons"}
    return [
        f"as the file of {which} states, {names.get(name, name)}: {own['home']:.1f} % of its dev texts right, "
        f"{own['swapped']:.1f} % of their swaps"
        for name, own in controls.items()
    ]


def _erased(model: nn.Module, located: NeuronSet, units: Units | None, edited: Mapping[str, Site]) -> NeuronEdit:
    """An edit that erases located neurons; these are the units that the edit of ``edited`` sites has, unless said."""
    if units is None and (outputs := [site for site in edited.values() if joins_heads(site)]):
        units = "neurons" if outputs[0].projection.size == 1 else "both"
    erased = NeuronEdit.build(model, located, 0.0, units=units)
    for name in erased.model.keys() & edited.keys():
        if erased.model[name]["shape"][1] != edited[name].width:
            raise ValueError(
                f"located: heads and single coordinates of {name!r} cannot both be meant, here and in the edit"
            )
    return erased


def _labels(edit: NeuronEdit | ParameterEdit | None) -> str | None:
    labels = None if edit is None else edit.info.get("labels")
    return labels if labels in ("none", "class", "group") else None


def _joined(settings: list[dict[str, Tensor]]) -> tuple[NeuronSet, Tensor]:
    """Several settings of the same sites' gates as the neurons that any of them moves, and their gates ``[P, n]``."""
    stacked = {site: torch.stack([gates[site] for gates in settings]) for site in settings[0]}
    neurons = NeuronSet({site: (gates != 1).any(0).nonzero()[:, 0] for site, gates in stacked.items()})
    return neurons, torch.cat([stacked[site][:, neurons.indices(site)] for site in neurons.sites], 1)


def _cascade(handle: Handle, sites: Mapping[str, Site], memory: Any, attention: bool) -> Cascade | None:
    """Runs all draws at once and shares what lies before the first edited layer; None where the plain way is needed.

    That is where an edit touches something else than the model's own feed-forward layers, where weights are quantised
    or offloaded, or where the model lies on several devices.
    """
    try:
        own = {site.name for site in handle.sites}
    except ValueError:
        return None
    weights = [site.parameter for site in sites.values()]
    plain = all(weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta for weight in weights)
    divided = len(set(getattr(handle.model, "hf_device_map", {}).values())) > 1
    if not sites.keys() <= own or not plain or divided:
        return None
    return Cascade(handle, memory=memory, attention=attention)


def _answers(outcome: Outcome) -> Answers:
    proximity = None if outcome.proximity is None else outcome.proximity.double().numpy()
    return Answers.of(outcome.logits.numpy(), proximity)
