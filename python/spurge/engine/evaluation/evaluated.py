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
    random_gates,
    random_last_layers,
    random_weights,
)
from spurge.engine.evaluation.report import NONE, Report
from spurge.engine.evaluation.threshold import moved
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import Site, Units, joins_heads

#: The methods of a report that are no edits, and the set that an edit should leave as it is.
CONTROLS = ("threshold", "zero-all", "random", "deleted")
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
    seed: int
    bootstrap: int
    force: bool


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

    def report(self, progress: bool) -> Report:
        asked = self.asked
        passes: Passes = [(NONE, self.plain)]
        named = {} if asked.edit is None else {asked.name: asked.edit}
        passes += [(name, self._applied(edit)) for name, edit in (named | dict(asked.beside)).items()]
        random = self._random_neurons(passes) if isinstance(asked.edit, NeuronEdit) else None
        weights = self._random_weights(passes) if isinstance(asked.edit, WeightEdit) and asked.draws else None
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
        for case, answers in (weights or {}).items():
            self.found[case]["random"] = answers
        if asked.cue is not None:
            with self.plain():
                for case in self.rows:
                    self.found[case]["deleted"] = [self._deleted(case, asked.cue)]
        return self._summary(self._changed(named))

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

    def _random_weights(self, passes: Passes) -> dict[str, list[Answers]] | None:
        """Adds the passes of random weights; of the last layer alone, gives their answers instead."""
        asked, model = self.asked, self.handle.model
        edit = asked.edit
        assert isinstance(edit, WeightEdit)
        if not can_be_drawn(edit):
            return None
        places = edit.fit(model, force=asked.force)
        self.drawn = asked.draws
        draws = [random_weights(edit, places, draw_seed(asked.seed, draw)) for draw in range(asked.draws)]
        read = None
        if self.reading["golden"] is None:
            how = {name: self.reading[name] for name in ("batch_size", "max_length", "memory")}
            read = random_last_layers(self.handle, places, self.rows, **how)
        if read is None:
            edits = [WeightEdit.build(model, {places[name].name: pair for name, pair in own.items()}) for own in draws]
            passes += [("random", partial(own.applied, model)) for own in edits]
            return None
        return {
            case: [Answers.of(logits.cpu().numpy()) for logits in last_layer_logits(own, places, draws)]
            for case, own in read.items()
        }

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

    def _changed(self, named: Mapping[str, NeuronEdit | ParameterEdit]) -> tuple[Changed, ...]:
        """Some texts of each set whose answer the edit changes."""
        asked, out = self.asked, []
        for name, edit in named.items():
            contexts = (self.plain, self._applied(edit))
            for case, rows in self.sets.items():
                plain, edited = self.found[case][NONE][0], self.found[case][name][0]
                chosen = changed_rows(plain, edited, asked.changed, asked.seed)
                reading = self.reading | {"golden": None, "correlation_tokens": None}
                out += changed_texts(self.handle, case, rows, chosen.tolist(), plain, edited, contexts, reading)
        return tuple(out)

    def _summary(self, changed: tuple[Changed, ...]) -> Report:
        asked, thresholds = self.asked, {}
        tested = {case: self.found[case] for case in self.sets}
        if asked.edit is not None and asked.draws:
            threshold, shift = threshold_of(tested, asked.name)
            if threshold is not None:
                thresholds[asked.name] = {case: threshold[case] for case in self.sets}
                for answers in self.found.values():
                    plain = answers[NONE][0].logits
                    assert plain is not None
                    answers["threshold"] = [Answers.of(moved(plain, shift))]
        order = [NONE, asked.name, *asked.beside, *CONTROLS]
        found = {case: {method: own[method] for method in order if method in own} for case, own in self.found.items()}
        labels: dict[str, str | None] = {NONE: "none", "threshold": "none", "deleted": "none"}
        labels |= dict.fromkeys((asked.name, "zero-all", "random"), _labels(asked.edit))
        labels |= {name: _labels(edit) for name, edit in asked.beside.items()}
        measures = summarize(
            {case: self._judged(case) for case in self.rows},
            found,
            labels,
            asked.bootstrap,
            asked.seed,
            drawn=("random",),
            thresholds=thresholds,
        )
        tokens = None if self.reading["golden"] is None else asdict(self.reading["correlation_tokens"])
        settings = {
            "sets": {case: {"n": len(rows), "data": rows.fingerprint()} for case, rows in self.rows.items()},
            "edit": None if asked.edit is None else asked.edit.info,
            "name": asked.name,
            "beside": {name: edit.info for name, edit in asked.beside.items()},
            "cue": None if asked.cue is None else list(asked.cue.words),
            "draws": self.drawn,
            "correlation_tokens": tokens,
            "seed": asked.seed,
            "bootstrap": asked.bootstrap,
            "max_length": self.reading["max_length"],
            "notes": _stated(asked.edit),
        }
        return Report(tuple(measures), settings, changed)

    def _judged(self, case: str) -> Judged:
        rows = self.rows[case]
        groups = {group: np.array([group in row.groups for row in rows]) for group in rows.groups}
        if case == UNTOUCHED and case not in self.sets:
            return Judged(rows.targets.numpy(), apart={case: np.ones(len(rows), bool)}, right=False)
        apart = {f"{case} (no cue)": ~self.holding[case]} if case in self.holding else {}
        return Judged(rows.targets.numpy(), groups, apart=apart)


def _stated(edit: NeuronEdit | ParameterEdit | None) -> list[str]:
    """What a repair says of its own controls, measured on its dev texts when it was made."""
    controls = {} if edit is None else edit.info.get("controls")
    if not isinstance(controls, Mapping):
        return []
    names = {"no-swaps": "the same steps without swaps", "random": "a repair of random neurons"}
    return [
        f"as the edit's file states, {names.get(name, name)}: {own['home']:.1f} % of its dev texts right, "
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
