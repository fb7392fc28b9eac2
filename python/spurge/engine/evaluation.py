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
from spurge.engine.gates import attached, is_gated
from spurge.engine.measures import TITLES, Measure, Report
from spurge.engine.neurons import NeuronSet
from spurge.engine.prediction import Golden, Outcome, Prepared, accuracy, predict
from spurge.engine.sites import Site, find_sites

__all__ = ["Golden", "Measure", "Report", "accuracy", "evaluate", "predict"]

AVERAGE = "average"
_LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
_BLOCK = 4_000_000  # resampling counts held at once


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tests: Examples | Mapping[str, Examples],
    *,
    edit: NeuronEdit | None = None,
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

    Methods: ``none`` (the model as it comes; ``applied`` if gates are attached to it), ``name`` (with the edit),
    ``zero-all`` (all its neurons erased), ``random`` (its gates on other neurons, the same number in each site; where
    a site has too few others, on any of it).

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
        edit: what to measure.
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
            golden sets that do not fit, or a number out of range.
        EditMismatch: the edit does not fit the model.
    """
    sets = _named(tests)
    draws = integer("draws", draws, 2)
    bootstrap, seed = integer("bootstrap", bootstrap, 0), integer("seed", seed, 0)
    if edit is not None and not isinstance(edit, NeuronEdit):
        raise TypeError(f"edit: expected a NeuronEdit, got {type(edit).__name__}")
    base = "applied" if is_gated(model) else "none"
    if not isinstance(name, str) or name in ("", base, "zero-all", "random"):
        raise ValueError(f"name: expected a name other than {base}, zero-all and random, got {name!r}")
    sites = {} if edit is None else edit.fit(model, force=force)
    prepared = {
        case: Prepared(
            case,
            model,
            tokenizer,
            examples,
            batch_size=batch_size,
            max_length=max_length,
            golden=golden,
            top_k=top_k,
            memory=memory,
        )
        for case, examples in sets.items()
    }
    passes: list[tuple[str, dict[str, Tensor]]] = [(base, {})]
    random: list[dict[str, Tensor]] = []
    if edit is not None:
        passes.append((name, edit.full()))
        if controls:
            passes.append(("zero-all", edit.with_gates(0.0).full()))
            random = [_random_gates(edit, _draw_seed(seed, draw)) for draw in range(draws)]
    moving = edit is not None and bool((edit.vector() != 1).any())
    cascade = _cascade(model, sites, memory, golden is not None) if random and moving and base == "none" else None
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
    labels = {base: "none", **dict.fromkeys((name, "zero-all", "random"), _labels(edit))}
    measures = _measures(sets, found, base, labels, bootstrap, seed)
    settings = {
        "sets": {case: {"n": len(examples), "data": examples.fingerprint()} for case, examples in sets.items()},
        "edit": None if edit is None else edit.info,
        "draws": draws if edit is not None and controls else 0,
        "top_k": top_k if golden is not None else None,
        "seed": seed,
        "bootstrap": bootstrap,
        "max_length": max_length,
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


def _sums(values: np.ndarray, bootstrap: int, rng: np.random.Generator) -> np.ndarray:
    """Sums over examples of ``[N, M]``, then over each bootstrap resample of the examples: ``[1 + bootstrap, M]``.

    A resample is how often each example was drawn, so all its sums are one matrix product.
    """
    n = len(values)
    sums = [values.sum(0, keepdims=True)]
    block = max(1, _BLOCK // n)
    for start in range(0, bootstrap, block):
        rows = min(block, bootstrap - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        sums.append(counts.astype(np.float64) @ values)
    return np.concatenate(sums)


Numbers = dict[tuple[str, str], dict[str, np.ndarray]]  # (case, metric) -> method -> [passes, 1 + resamples]


def _of_set(
    case: str,
    examples: Examples,
    found: Mapping[str, list[np.ndarray]],
    base: str,
    bootstrap: int,
    rng: np.random.Generator,
) -> Numbers:
    """All numbers of one set; ``random`` has passes and no resamples, the others one pass and its resamples."""
    groups = examples.groups
    group = np.array([row.group or "" for row in examples])
    member = np.stack([np.ones(len(examples)), *(group == name for name in groups)])  # [1 + groups, N]
    singles = [method for method in found if method != "random"]
    numbers: Numbers = {}

    def enter(methods: list[str], outcomes: np.ndarray, bootstrap: int) -> None:
        """``outcomes`` ``[passes, 1 or 2, N]``; the passes are those of each method, or all of one."""
        right = 100 * outcomes[:, 0, None] * member  # [passes, 1 + groups, N]
        columns = np.concatenate([right.reshape(-1, len(examples)), member, *outcomes[:, 1:].swapaxes(0, 1)])
        sums = _sums(columns.T, bootstrap, rng).T  # [columns, 1 + resamples]
        passes, cells = right.shape[:2]
        sizes = sums[passes * cells : (passes + 1) * cells]
        with np.errstate(invalid="ignore"):  # a resample can miss a small group
            means = sums[: passes * cells].reshape(passes, cells, -1) / sizes
        near = sums[(passes + 1) * cells :] / len(examples)
        for number, method in enumerate(methods):
            rows = slice(number, number + 1) if len(methods) == passes else slice(None)
            numbers.setdefault((case, "accuracy"), {})[method] = means[rows, 0]
            for cell, name in enumerate(groups, 1):
                numbers.setdefault((f"{case}/{name}", "accuracy"), {})[method] = means[rows, cell]
            if groups:
                numbers.setdefault((case, "worst_group"), {})[method] = np.fmin.reduce(means[rows, 1:], axis=1)
            if len(near):
                numbers.setdefault((case, "eta"), {})[method] = near[rows]

    enter(singles, np.stack([found[method][0] for method in singles]), bootstrap)
    if "random" in found:
        enter(["random"], np.stack(found["random"]), 0)
    plain = numbers[case, "accuracy"][base]
    changes = {
        method: values - plain[:, : values.shape[1]]
        for method, values in numbers[case, "accuracy"].items()
        if method != base
    }
    return numbers | ({(case, "change"): changes} if changes else {})


def _measures(
    sets: Mapping[str, Examples],
    found: Mapping[str, Mapping[str, list[np.ndarray]]],
    base: str,
    labels: Mapping[str, str | None],
    bootstrap: int,
    seed: int,
) -> list[Measure]:
    numbers: Numbers = {}
    sizes = {AVERAGE: len(sets)}
    for index, (case, examples) in enumerate(sets.items()):
        sizes[case] = len(examples)
        for row in examples:
            if row.group is not None:
                sizes[f"{case}/{row.group}"] = sizes.get(f"{case}/{row.group}", 0) + 1
        numbers |= _of_set(case, examples, found[case], base, bootstrap, np.random.default_rng((seed, index)))
    first = next(iter(sets))
    for metric in ("accuracy", "change", "eta"):
        if len(sets) > 1 and (first, metric) in numbers:
            numbers[AVERAGE, metric] = {
                method: np.mean([numbers[case, metric][method] for case in sets], axis=0)
                for method in numbers[first, metric]
            }
    return [
        _measure(case, method, metric, values, sizes[case], labels[method])
        for metric in TITLES
        for (case, found_metric), by_method in numbers.items()
        if found_metric == metric
        for method, values in by_method.items()
    ]


def _measure(case: str, method: str, metric: str, values: np.ndarray, size: int, labels: str | None) -> Measure:
    unit = {"change": "points", "eta": ""}.get(metric, "percent")
    if method == "random":
        draws = values[:, 0]
        mean, spread = float(draws.mean()), float(draws.std(ddof=1))
        return Measure(case, method, metric, mean, spread, None, None, len(draws), unit, labels)
    point, resamples = float(values[0, 0]), values[0, 1:]
    resamples = resamples[~np.isnan(resamples)]
    if len(resamples) < 2:
        return Measure(case, method, metric, point, None, None, None, size, unit, labels)
    low, high = map(float, np.percentile(resamples, _LEVEL))
    return Measure(case, method, metric, point, float(resamples.std(ddof=1)), low, high, size, unit, labels)
