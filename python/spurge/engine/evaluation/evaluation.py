"""What an edit did: accuracy, worst group and proximity on every test set, with the controls beside it.

Controls answer what a reader asks of any edit: would moving the threshold have done as well (``threshold``), would
erasing the same neurons (``zero-all``), would any neurons or weights (``random``, drawn ``draws`` times), and would
deleting the words from the texts (``deleted``)? Without an edit there is nothing to control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from spurge.engine.base.checks import integer
from spurge.engine.base.temporary import Temporaries
from spurge.engine.data.cues import Cue
from spurge.engine.data.examples import Examples
from spurge.engine.data.words import CorrelationTokens
from spurge.engine.edits.edit_files import EditMismatch
from spurge.engine.edits.gates import gates_on, is_gated, suspended
from spurge.engine.edits.neuron_edits import NeuronEdit, sites_of_widths
from spurge.engine.edits.overwrites import is_overwritten, lifted, overwrites_on
from spurge.engine.edits.parameter_edits import ParameterEdit
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.evaluation.evaluated import UNTOUCHED, Asked, Evaluation
from spurge.engine.evaluation.prediction import Golden, accuracy, predict
from spurge.engine.evaluation.report import ALL, AVERAGE, CONTROLS, NONE, Measure, Report
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import alone
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.parameters import bare_name
from spurge.engine.models.sites import Units

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
    beside: Mapping[str, NeuronEdit | ParameterEdit] | None = None,
    cue: Sequence[str] = (),
    untouched: Examples | None = None,
    changed: int = 0,
    cross_groups: bool = False,
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

    Methods: ``none`` (the model without the edit), ``name`` (with it), those of ``beside``, and the controls

    - ``threshold``: no edit, but a constant added to the logits of all rows of all sets, so that each label is answered
      as often as with the edit (`spurge.engine.evaluation.threshold`); the report says so where this mostly explains
      what the edit changes;
    - ``zero-all``: all located neurons erased, of an edit of neurons;
    - ``random``: of an edit of neurons its gates on other neurons, the same number in each site (where a site has too
      few others, on any of it); of single weights (FCR, NeuronTune) the same changes in other columns of the same rows,
      a bias as in the edit;
    - ``deleted``: no edit, but the texts without the words of ``cue``;
    - ``NAME: threshold`` of each edit of ``beside``, and ``NAME: random`` where that changes the last layer alone,
      which takes no pass of the model for each draw.

    Inside ``with edit.applied(model)`` the applied edit is the one that is measured.

    Metrics: accuracy over all rows, the mean of the groups' accuracies, and the lowest of them; the change of accuracy
    against the first method, on the same examples, with p by paired bootstrap, adjusted over the sets (Holm); of two
    labels the area under the curve, of all rows and within each group, which a moved threshold leaves as it is; how
    many of the changed answers a moved threshold explains; side effects, where nothing should change (``untouched``,
    and rows without a word of ``cue``): how many answers stay, and KL(unedited, edited) in nats; with ``golden``

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
        controls: with ``threshold``, ``zero-all`` and ``random``.
        draws: of random neurons or weights; below 20 their spread says little.
        beside: other edits by name, such as a repair without swaps, FCR's or a new last layer: measured like the edit.
        cue: words, or phrases of several, that the model should not lean on; upper and lower case count as the same.
        untouched: texts that the edit should leave as they are.
        changed: of each set so many random texts whose answer the edit changes are kept in ``report.changed``, with
            what each of their words does to it.
        cross_groups: judge every label in every group, ``label/group``, as the worst group of a shortcut is meant;
            areas under the curve, which need both labels, stay within the groups.
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
    bootstrap, seed, changed = (
        integer(name, value, 0) for name, value in (("bootstrap", bootstrap), ("seed", seed), ("changed", changed))
    )
    if edit is not None and not isinstance(edit, (NeuronEdit, ParameterEdit)):
        raise TypeError(f"edit: expected a NeuronEdit, WeightEdit or WeightDeltas, got {type(edit).__name__}")
    others = _checked_others(name, beside)
    _check_untouched(untouched, sets)
    with alone(model), Temporaries() as changes:
        edit = _edit_now(model, edit)
        changes.enter_context(suspended(model))
        changes.enter_context(lifted(model))
        handle = Handle(model, tokenizer)
        handle.check_single_label("model")
        neurons, settings = _neurons_of(located, edit), _settings(located, edit)
        _check_origin(handle, located, settings.get("units", "neurons"), force)
        asked = Asked(
            edit=edit,
            name=name,
            beside=others,
            located=neurons,
            units=settings.get("units"),
            draws=draws if controls else 0,
            cue=Cue(cue) if isinstance(cue, str) or len(cue) else None,
            untouched=untouched,
            changed=changed,
            cross_groups=cross_groups,
            seed=seed,
            bootstrap=bootstrap,
            force=force,
        )
        reading: dict[str, Any] = {
            "batch_size": batch_size,
            "max_length": max_length,
            "golden": golden,
            "correlation_tokens": None if golden is None else _correlation_tokens(settings, top_k),
            "memory": memory,
        }
        return Evaluation(handle, sets, asked, reading).report(progress)


def _neurons_of(located: Any, edit: NeuronEdit | ParameterEdit | None) -> NeuronSet | None:
    """The neurons that a control of an edit erases."""
    neurons = located if isinstance(located, NeuronSet) else getattr(located, "spurious_set", located)
    if neurons is not None and not isinstance(neurons, NeuronSet):
        raise TypeError(f"located: expected a NeuronSet or Located, got {type(located).__name__}")
    if neurons is not None and not isinstance(edit, NeuronEdit):
        raise ValueError("located: is a control of an edit of neurons, and there is none")
    return neurons


def _edit_now(model: nn.Module, edit: NeuronEdit | ParameterEdit | None) -> NeuronEdit | ParameterEdit | None:
    """The edit that is given, or the one that is applied to the model."""
    if not is_gated(model) and not is_overwritten(model):
        return edit
    if edit is not None:
        raise ValueError("edit: another is applied to the model now; leave its `with` block, or give none")
    return _applied(model)


def _checked_others(name: str, beside: Mapping[str, NeuronEdit | ParameterEdit] | None) -> dict[str, Any]:
    """The edits beside the one of ``name``, once all are some and have names of their own."""
    others = dict(beside or {})
    for own, other in others.items():
        if not isinstance(other, (NeuronEdit, ParameterEdit)):
            raise TypeError(f"beside: expected name to an edit, got {own!r}: {type(other).__name__}")
    for argument, own in (("name", name), *(("beside", own) for own in others)):
        if not isinstance(own, str) or own in ("", NONE, *CONTROLS) or (argument == "beside" and own == name):
            taken = f"{', '.join((NONE, *CONTROLS[:-1]))} and {CONTROLS[-1]}"
            raise ValueError(f"{argument}: expected a name other than {taken}, got {own!r}")
    return others


def _check_untouched(untouched: Any, sets: Mapping[str, Examples]) -> None:
    if untouched is None:
        return
    if not isinstance(untouched, Examples):
        raise TypeError(f"untouched: expected Examples, got {type(untouched).__name__}")
    if UNTOUCHED in sets:
        raise ValueError(f"tests: a set cannot be called {UNTOUCHED!r} beside untouched=")


def _check_origin(handle: Handle, located: NeuronSet | LocatedNeurons | None, units: Units, force: bool) -> None:
    """Refuses neurons that were located in another model, where they say in which, unless forced."""
    prints = None if located is None or isinstance(located, NeuronSet) else located.info.get("model")
    if not force and prints is not None and _by_bare_name(prints) != _by_bare_name(handle.fingerprints(units)):
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
        if case == AVERAGE or not case or (case == ALL and len(tests) > 1):
            raise ValueError(f"tests: a set cannot be called {case!r}")
    return dict(tests)
