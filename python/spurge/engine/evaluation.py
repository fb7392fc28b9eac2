"""What an edit did: accuracy, worst group and proximity on every test set, with the controls beside it.

Controls answer the two questions a reader asks of any edit of neurons: would erasing the same neurons have done as
well (``zero-all``), and would any neurons have done (``random``: the same gates on as many other neurons of each site,
drawn ``draws`` times)? Without an edit there is nothing to control.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spurge.engine.cascade import Cascade
from spurge.engine.checks import integer
from spurge.engine.data import Examples
from spurge.engine.edits import NeuronEdit
from spurge.engine.gates import attached, gates_on, is_gated, suspended
from spurge.engine.measures import Measure, Report
from spurge.engine.neurons import NeuronSet
from spurge.engine.prediction import Golden, Outcome, Prepared, accuracy, predict
from spurge.engine.resampling import AVERAGE, NONE, summarize
from spurge.engine.sites import Site, find_sites

__all__ = ["Golden", "Measure", "Report", "accuracy", "evaluate", "predict"]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tests: Examples | Mapping[str, Examples],
    *,
    edit: NeuronEdit | None = None,
    located: NeuronSet | None = None,
    name: str = "edit",
    controls: bool = True,
    draws: int = 20,
    golden: Golden | None = None,
    top_k: int = 5,
    seed: int = 0,
    bootstrap: int = 1000,
    batch_size: int = 32,
    max_length: int | None = None,
    memory: str | int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Report:
    r"""Measures a classifier on test sets, without an edit, with it, and with its controls.

    Methods: ``none`` (the model without the edit), ``name`` (with it), ``zero-all`` (all located neurons erased),
    ``random`` (its gates on other neurons, the same number in each site; where a site has too few others, on any of
    it). Inside ``with edit.applied(model)`` the applied edit is the one that is measured.

    Metrics: accuracy; its change against the first method, on the same examples; the lowest accuracy of a group; with
    ``golden``

    .. math:: \eta = \frac1N \sum_i \mathrm{prox}(C_i, G_\mathrm{spu}^{\hat y_i})

    the hard proximity (MacU Eq. 6) of example i's ``top_k`` units under the last layer's attention to the spurious set
    of the label the (edited) model predicts. ``average`` is the mean over sets, each with the same weight. Intervals
    are 95 % percentile bootstrap intervals over examples, the same resamples for all methods.

    Args:
        model: a ``transformers`` sequence classifier; comes back as it was.
        tokenizer: its tokenizer, a fast one if ``golden`` is given.
        tests: one set, or sets by name.
        edit: what to measure; by default what is applied to the model now, if anything is.
        located: the neurons the edit was chosen from, which ``zero-all`` erases; by default the edit's own.
        name: what to call it in the report.
        controls: with ``zero-all`` and ``random``.
        draws: of random neurons; below 20 their spread says little.
        golden: sets of tokens for eta.
        top_k: correlation units of an example.
        seed: of draws and resamples; the same seed gives the same report.
        bootstrap: resamples, 0 for no intervals.
        batch_size: rows of a batch; halved while memory runs out.
        max_length: longer texts are cut.
        memory: bytes (``"1 GiB"``) that a batch's activations may take.
        force: apply an edit that was made for other weights.
        progress: show a progress bar.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no set, a label the model has no output for, logits that are not finite (both name the set),
            golden sets that do not fit, a number out of range, or an ``edit`` given while another is applied.
        EditMismatch: the edit does not fit the model.
    """
    sets = _named(tests)
    draws = integer("draws", draws, 2)
    bootstrap, seed = integer("bootstrap", bootstrap, 0), integer("seed", seed, 0)
    if edit is not None and not isinstance(edit, NeuronEdit):
        raise TypeError(f"edit: expected a NeuronEdit, got {type(edit).__name__}")
    if located is not None and not isinstance(located, NeuronSet):
        raise TypeError(f"located: expected a NeuronSet, got {type(located).__name__}")
    if not isinstance(name, str) or name in ("", NONE, "zero-all", "random"):
        raise ValueError(f"name: expected a name other than {NONE}, zero-all and random, got {name!r}")
    if is_gated(model):
        if edit is not None:
            raise ValueError("edit: another is applied to the model now; leave its `with` block, or give none")
        edit = _applied(model)
    if located is not None and edit is None:
        raise ValueError("located: is a control of an edit, and there is none")
    with suspended(model):
        return _evaluate(
            model,
            tokenizer,
            sets,
            edit,
            located,
            name,
            draws if controls else 0,
            seed,
            bootstrap,
            force,
            progress,
            batch_size=batch_size,
            max_length=max_length,
            golden=golden,
            top_k=top_k,
            memory=memory,
        )


def _applied(model: nn.Module) -> NeuronEdit:
    """The gates that are attached to the model now, as an edit."""
    vectors, infos = gates_on(model)
    neurons = NeuronSet({site: (gates != 1).nonzero()[:, 0] for site, gates in vectors.items()})
    gates = [vectors[site][neurons.indices(site)] for site in neurons.sites]
    info = infos[0] if len(infos) == 1 else {"method": "combine", "rule": "multiply", "edits": infos}
    return NeuronEdit.build(model, neurons, torch.cat([torch.empty(0), *gates]), info)


def _evaluate(
    model: nn.Module,
    tokenizer: Any,
    sets: dict[str, Examples],
    edit: NeuronEdit | None,
    located: NeuronSet | None,
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
    prepared = {case: Prepared(case, model, tokenizer, rows, **reading) for case, rows in sets.items()}
    passes: list[tuple[str, dict[str, Tensor]]] = [(NONE, {})]
    random: list[dict[str, Tensor]] = []
    if edit is not None:
        erased = edit.with_gates(0.0) if located is None else NeuronEdit.build(model, located, 0.0)
        sites = edit.fit(model, force=force) | erased.fit(model, force=force)
        passes.append((name, edit.full()))
        if draws:
            passes.append(("zero-all", erased.full()))
            random = [_random_gates(edit, _draw_seed(seed, draw)) for draw in range(draws)]
    moving = edit is not None and bool((edit.vector() != 1).any())
    cascade = _cascade(model, sites, memory, golden is not None) if random and moving else None
    if cascade is None:
        passes += [("random", gates) for gates in random]
    found: dict[str, dict[str, list[np.ndarray]]] = {case: {} for case in sets}
    total = (len(passes) + (0 if cascade is None else draws)) * sum(len(item.batches) for item in prepared.values())
    with tqdm(total=total, desc="evaluate", disable=not progress) as bar:
        for method, gates in passes:
            with attached(sites, gates):
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
        "top_k": reading["top_k"] if golden is not None else None,
        "seed": seed,
        "bootstrap": bootstrap,
        "max_length": reading["max_length"],
    }
    return Report(tuple(measures), settings)


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


def _labels(edit: NeuronEdit | None) -> str | None:
    labels = None if edit is None else edit.info.get("labels")
    return labels if labels in ("none", "class", "group") else None


def _draw_seed(seed: int, draw: int) -> int:
    return int(np.random.SeedSequence((seed, draw)).generate_state(1)[0])


def _random_gates(edit: NeuronEdit, seed: int) -> dict[str, Tensor]:
    """The edit's gates in random order on random neurons, per site: on others than its own where there are enough."""
    widths = {site: print["shape"][1] for site, print in edit.model.items()}
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


def _cascade(model: nn.Module, sites: Mapping[str, Site], memory: Any, attention: bool) -> Cascade | None:
    """Runs all draws at once and shares what lies before the first edited layer; None where the plain way is needed.

    That is where an edit touches something else than the model's own feed-forward layers, where weights are quantised
    or offloaded, or where the model is spread over devices.
    """
    try:
        own = {site.name for site in find_sites(model)}
    except ValueError:
        return None
    weights = [site.weight() for site in sites.values()]
    plain = all(weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta for weight in weights)
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if not sites.keys() <= own or not plain or spread:
        return None
    return Cascade(model, memory=memory, attention=attention)


def _right(prepared: Prepared, outcome: Outcome) -> np.ndarray:
    """Per example: whether it is right, and its proximity if measured, ``[1 or 2, N]``."""
    rows = [(outcome.logits.argmax(1) == prepared.examples.targets).double()]
    if outcome.proximity is not None:
        rows.append(outcome.proximity.double())
    return torch.stack(rows).numpy()
