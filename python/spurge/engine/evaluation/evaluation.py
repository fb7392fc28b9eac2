"""What an edit did: accuracy, worst group and proximity on every test set, with the controls beside it.

Controls answer the two questions a reader asks of any edit of neurons: would erasing the same neurons have done as
well (``zero-all``), and would any neurons have done (``random``: the same gates on as many other neurons of each site,
drawn ``draws`` times)? Without an edit there is nothing to control. An edit of weights is measured beside ``none``
alone: its controls are other choices of weights, which only its method can make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spurge.engine.base.checks import integer
from spurge.engine.base.temporary import Temporaries
from spurge.engine.cascade.cascade import Cascade
from spurge.engine.data.examples import Examples
from spurge.engine.data.words import CorrelationTokens
from spurge.engine.edits.edit_files import EditMismatch
from spurge.engine.edits.gates import attached, gates_on, is_gated, suspended
from spurge.engine.edits.neuron_edits import NeuronEdit, sites_of_widths
from spurge.engine.edits.overwrites import is_overwritten, lifted, overwrites_on
from spurge.engine.edits.parameter_edits import ParameterEdit
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.evaluation.prediction import Golden, Outcome, Prepared, accuracy, predict
from spurge.engine.evaluation.report import AVERAGE, NONE, Measure, Report, summarize
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import alone
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.parameters import bare_name
from spurge.engine.models.sites import Site, Units, joins_heads

__all__ = ["Golden", "Measure", "Report", "accuracy", "evaluate", "predict"]


class LocatedNeurons(Protocol):
    """What evaluation needs of `spurge.Located`: the spurious neurons, and the settings they were located with."""

    @property
    def spurious_set(self) -> NeuronSet: ...

    @property
    def info(self) -> Mapping[str, Any]: ...


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tests: Examples | Mapping[str, Examples],
    *,
    edit: NeuronEdit | ParameterEdit | None = None,
    located: NeuronSet | LocatedNeurons | None = None,
    name: str = "edit",
    controls: bool = True,
    draws: int = 20,
    golden: Golden | None = None,
    top_k: int | None = None,
    seed: int = 0,
    bootstrap: int = 1000,
    batch_size: int = 32,
    max_length: int | None = None,
    memory: str | int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Report:
    r"""Measures a classifier on test sets, without an edit, with it, and with its controls.

    Methods: ``none`` (the model without the edit), ``name`` (with it); for an edit of neurons ``zero-all`` (all located
    neurons erased) and ``random`` (its gates on other neurons, the same number in each site; where a site has too few
    others, on any of it). Inside ``with edit.applied(model)`` the applied edit is the one that is measured.

    Metrics: accuracy; its change against the first method, on the same examples; the lowest accuracy of a group; with
    ``golden``

    .. math:: \eta = \frac1N \sum_i \mathrm{prox}(C_i, G_\mathrm{spu}^{\hat y_i})

    the hard proximity (MacU Eq. 6) of example i's correlation tokens under the last layer's attention to the spurious
    set of the label the (edited) model predicts. ``average`` is the mean over sets, each with the same weight.
    Intervals are 95 % percentile bootstrap intervals over examples, the same resamples for all methods.

    Args:
        model: a ``transformers`` sequence classifier; comes back as it was.
        tokenizer: its tokenizer, a fast one if ``golden`` is given.
        tests: one set, or sets by name.
        edit: what to measure; by default what is applied to the model now, if anything is.
        located: the neurons an edit of neurons was chosen from, which ``zero-all`` erases; by default the edit's own.
            Of a whole `spurge.Located` the spurious ones, and eta reads correlation tokens as its settings do.
        name: what to call it in the report.
        controls: with ``zero-all`` and ``random``.
        draws: of random neurons; below 20 their spread says little.
        golden: sets of tokens for eta.
        top_k: correlation tokens of an example; by default as many as ``located`` has in its settings, or those of
            MacU's edit, or 5.
        seed: of draws and resamples; the same seed gives the same report.
        bootstrap: resamples, 0 for no intervals.
        batch_size: rows of a batch; halved while memory runs out.
        max_length: longer texts are cut.
        memory: bytes (``"1 GiB"``) that a batch's activations may take.
        force: apply an edit that was made for other weights, and take neurons that were located in such.
        progress: show a progress bar.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a model of one output, or of several labels at once; no set, labels in another order than the
            model's outputs, a label the model has no output for,
            logits that are not finite (all three name the set),
            golden sets that do not fit, a number out of range, an ``edit`` given while another is applied, or gates
            and new weights applied at once.
        EditMismatch: the edit does not fit the model, or neurons were located in another.
    """
    sets = _named(tests)
    draws = integer("draws", draws, 2)
    bootstrap, seed = integer("bootstrap", bootstrap, 0), integer("seed", seed, 0)
    if edit is not None and not isinstance(edit, (NeuronEdit, ParameterEdit)):
        raise TypeError(f"edit: expected a NeuronEdit, WeightEdit or WeightDeltas, got {type(edit).__name__}")
    neurons = located if isinstance(located, NeuronSet) else getattr(located, "spurious_set", located)
    if neurons is not None and not isinstance(neurons, NeuronSet):
        raise TypeError(f"located: expected a NeuronSet or Located, got {type(located).__name__}")
    if not isinstance(name, str) or name in ("", NONE, "zero-all", "random"):
        raise ValueError(f"name: expected a name other than {NONE}, zero-all and random, got {name!r}")
    with alone(model), Temporaries() as changes:
        if is_gated(model) or is_overwritten(model):
            if edit is not None:
                raise ValueError("edit: another is applied to the model now; leave its `with` block, or give none")
            edit = _applied(model)
        if neurons is not None and not isinstance(edit, NeuronEdit):
            raise ValueError("located: is a control of an edit of neurons, and there is none")
        changes.enter_context(suspended(model))
        changes.enter_context(lifted(model))
        handle = Handle(model, tokenizer)
        handle.check_single_label("model")
        settings = _settings(located, edit)
        if not force:
            _check_origin(handle, located, settings.get("units", "neurons"))
        return _evaluate(
            handle,
            sets,
            edit,
            neurons,
            settings.get("units"),
            name,
            draws if controls else 0,
            seed,
            bootstrap,
            force,
            progress,
            batch_size=batch_size,
            max_length=max_length,
            golden=golden,
            correlation_tokens=None if golden is None else _correlation_tokens(settings, top_k),
            memory=memory,
        )


def _check_origin(handle: Handle, located: NeuronSet | LocatedNeurons | None, units: Units) -> None:
    """Refuses neurons that were located in another model, where they say in which."""
    prints = None if located is None or isinstance(located, NeuronSet) else located.info.get("model")
    if prints is not None and _by_bare_name(prints) != _by_bare_name(handle.fingerprints(units)):
        raise EditMismatch(
            "located: was found in another model, or in this one with other weights; force=True takes it nevertheless"
        )


def _by_bare_name(prints: Mapping[str, str]) -> dict[str, str]:
    return {bare_name(site): value for site, value in prints.items()}


def _settings(located: NeuronSet | LocatedNeurons | None, edit: NeuronEdit | ParameterEdit | None) -> Mapping[str, Any]:
    """How neurons were located, by what was found or else by what the edit says of it."""
    if located is not None and not isinstance(located, NeuronSet):
        return located.info.get("settings", {})
    if edit is not None and edit.info.get("method") == "MacU":
        return edit.info.get("settings", {})
    return {}


def _correlation_tokens(settings: Mapping[str, Any], top_k: int | None) -> CorrelationTokens:
    """As the neurons were located; ``top_k`` overrides."""
    return CorrelationTokens.of({**settings} | ({} if top_k is None else {"top_k": top_k}))


def _applied(model: nn.Module) -> NeuronEdit | WeightEdit:
    """The gates, or the new weights, that are applied to the model now, as an edit."""
    vectors, infos = gates_on(model)
    sites = sites_of_widths(model, {site: len(gates) for site, gates in vectors.items()})
    if is_overwritten(model):
        if vectors:
            raise ValueError("model: an edit of neurons and one of weights are applied to it now; fold one of them in")
        changes, infos = overwrites_on(model)
        return WeightEdit.build(model, changes, _origin(infos, "last"))
    neurons = NeuronSet({site: (gates != 1).nonzero()[:, 0] for site, gates in vectors.items()})
    gates = [vectors[site][neurons.indices(site)] for site in neurons.sites]
    return NeuronEdit.of_sites(sites, neurons, torch.cat([torch.empty(0), *gates]), _origin(infos, "multiply"))


def _origin(infos: list[Mapping[str, Any]], rule: str) -> Mapping[str, Any]:
    return infos[0] if len(infos) == 1 else {"method": "combine", "rule": rule, "edits": infos}


def _evaluate(
    handle: Handle,
    sets: dict[str, Examples],
    edit: NeuronEdit | ParameterEdit | None,
    located: NeuronSet | None,
    units: Units | None,
    name: str,
    draws: int,
    seed: int,
    bootstrap: int,
    force: bool,
    progress: bool,
    **reading: Any,
) -> Report:
    """:func:`evaluate` of checked arguments on a model without gates; no ``draws`` means no controls."""
    golden, memory = reading["golden"], reading["memory"]
    sites: dict[str, Site] = {}
    prepared = {case: Prepared(case, handle, rows, **reading) for case, rows in sets.items()}
    # Nothing attached is still eager, as gates are: compiled code rounds otherwise. New weights run as the model does.
    plain = nullcontext if isinstance(edit, ParameterEdit) else partial(attached, {}, {})
    passes: list[tuple[str, Callable[[], AbstractContextManager[Any]]]] = [(NONE, plain)]
    random: list[dict[str, Tensor]] = []
    cascade = None
    if isinstance(edit, ParameterEdit):
        edit.fit(handle.model, force=force)
        passes.append((name, partial(edit.applied, handle.model, force=force)))
    elif edit is not None:
        own = edit.fit(handle.model, force=force)
        erased = edit.with_gates(0.0) if located is None else _erased(handle.model, located, units, own)
        sites = own | erased.fit(handle.model, force=force)
        passes.append((name, partial(attached, sites, edit.full())))
        if draws:
            passes.append(("zero-all", partial(attached, sites, erased.full())))
            random = [_random_gates(edit, _draw_seed(seed, draw)) for draw in range(draws)]
        if random and bool((edit.vector() != 1).any()):
            cascade = _cascade(handle, sites, memory, golden is not None)
    if cascade is None:
        passes += [("random", partial(attached, sites, gates)) for gates in random]
    found: dict[str, dict[str, list[np.ndarray]]] = {case: {} for case in sets}
    total = (len(passes) + (0 if cascade is None else draws)) * sum(len(item.batches) for item in prepared.values())
    with tqdm(total=total, desc="evaluate", disable=not progress) as bar:
        for method, edited in passes:
            with edited():
                for case, item in prepared.items():
                    found[case].setdefault(method, []).append(_right(item, item.run(bar.update)))
        if cascade is not None:
            neurons, together = _joined(random)
            for case, item in prepared.items():
                outcomes = item.run_gated(cascade, neurons, together, lambda: bar.update(draws))
                found[case]["random"] = [_right(item, outcome) for outcome in outcomes]
    labels = {NONE: "none", **dict.fromkeys((name, "zero-all", "random"), _labels(edit))}
    measures = summarize(sets, found, labels, bootstrap, seed)
    settings = {
        "sets": {case: {"n": len(examples), "data": examples.fingerprint()} for case, examples in sets.items()},
        "edit": None if edit is None else edit.info,
        "draws": len(random),
        "correlation_tokens": None if golden is None else asdict(reading["correlation_tokens"]),
        "seed": seed,
        "bootstrap": bootstrap,
        "max_length": reading["max_length"],
    }
    return Report(tuple(measures), settings)


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


def _named(tests: Any) -> dict[str, Examples]:
    if isinstance(tests, Examples):
        return {"test": tests}
    if not isinstance(tests, Mapping):
        raise TypeError(f"tests: expected Examples or a dict of them, got {type(tests).__name__}")
    if not tests:
        raise ValueError("tests: need at least 1 set, got 0")
    for case, examples in tests.items():
        if not isinstance(case, str) or not isinstance(examples, Examples):
            raise TypeError(f"tests: expected name to Examples, got {case!r}: {type(examples).__name__}")
        if case == AVERAGE or not case:
            raise ValueError(f"tests: a set cannot be called {case!r}")
    return dict(tests)


def _labels(edit: NeuronEdit | ParameterEdit | None) -> str | None:
    labels = None if edit is None else edit.info.get("labels")
    return labels if labels in ("none", "class", "group") else None


def _draw_seed(seed: int, draw: int) -> int:
    return int(np.random.SeedSequence((seed, draw)).generate_state(1)[0])


def _random_gates(edit: NeuronEdit, seed: int) -> dict[str, Tensor]:
    """The edit's gates in random order on random neurons, per site: on others than its own where there are enough."""
    widths = {site: fingerprint["shape"][1] for site, fingerprint in edit.model.items()}
    own, counts = edit.neurons, edit.neurons.counts()
    exclude = NeuronSet({site: own.indices(site) for site in own.sites if 2 * counts[site] <= widths[site]})
    drawn = own.random_like(widths, seed, exclude)
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for site, (_, values) in edit.gates.items():
        gates[site] = torch.ones(widths[site])
        gates[site][drawn.indices(site)] = values[torch.randperm(len(values), generator=generator)]
    return gates


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


def _right(prepared: Prepared, outcome: Outcome) -> np.ndarray:
    """Per example: whether it is right, and its proximity if measured, ``[1 or 2, N]``."""
    rows = [(outcome.logits.argmax(1) == prepared.examples.targets).double()]
    if outcome.proximity is not None:
        rows.append(outcome.proximity.double())
    return torch.stack(rows).numpy()
