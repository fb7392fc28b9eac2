"""Bootstrap intervals, and the step from outcomes of examples to the numbers of a report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spurge.engine.data import Examples
from spurge.engine.measures import TITLES, UNITS, Measure

AVERAGE, NONE = "average", "none"  # the case that is the mean over sets, and the method that is no edit
_LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
_BLOCK = 4_000_000  # resampling counts held at once


def resampled_sums(values: np.ndarray, bootstrap: int, rng: np.random.Generator) -> np.ndarray:
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


_Numbers = dict[tuple[str, str], dict[str, np.ndarray]]  # (case, metric) -> method -> [passes, 1 + resamples]


def _of_set(
    case: str,
    examples: Examples,
    found: Mapping[str, list[np.ndarray]],
    bootstrap: int,
    rng: np.random.Generator,
) -> _Numbers:
    """All numbers of one set; ``random`` has passes and no resamples, the others one pass and its resamples."""
    groups = examples.groups
    group = np.array([row.group or "" for row in examples])
    member = np.stack([np.ones(len(examples)), *(group == name for name in groups)])  # [1 + groups, N]
    singles = [method for method in found if method != "random"]
    numbers: _Numbers = {}

    def enter(methods: list[str], outcomes: np.ndarray, bootstrap: int) -> None:
        """``outcomes`` ``[passes, 1 or 2, N]``; the passes are those of each method, or all of one."""
        right = 100 * outcomes[:, 0, None] * member  # [passes, 1 + groups, N]
        columns = np.concatenate([right.reshape(-1, len(examples)), member, *outcomes[:, 1:].swapaxes(0, 1)])
        sums = resampled_sums(columns.T, bootstrap, rng).T  # [columns, 1 + resamples]
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
    plain = numbers[case, "accuracy"][NONE]
    changes = {
        method: values - plain[:, : values.shape[1]]
        for method, values in numbers[case, "accuracy"].items()
        if method != NONE
    }
    return numbers | ({(case, "change"): changes} if changes else {})


def summarize(
    sets: Mapping[str, Examples],
    found: Mapping[str, Mapping[str, list[np.ndarray]]],
    labels: Mapping[str, str | None],
    bootstrap: int,
    seed: int,
) -> list[Measure]:
    """Measures of all sets and methods, with intervals and averages.

    Args:
        sets: the examples by set.
        found: by set and method the passes, per example whether it is right and, if measured, its proximity,
            ``[1 or 2, N]`` each; one pass a method, several of ``random``.
        labels: what each method used.
        bootstrap: resamples of each set, the same for all its methods.
        seed: of the resamples.
    """
    numbers: _Numbers = {}
    sizes = {AVERAGE: len(sets)}
    for index, (case, examples) in enumerate(sets.items()):
        sizes[case] = len(examples)
        for row in examples:
            if row.group is not None:
                sizes[f"{case}/{row.group}"] = sizes.get(f"{case}/{row.group}", 0) + 1
        numbers |= _of_set(case, examples, found[case], bootstrap, np.random.default_rng((seed, index)))
    first = next(iter(sets))
    for metric in ("accuracy", "change", "eta"):
        if len(sets) > 1 and (first, metric) in numbers:
            numbers[AVERAGE, metric] = {
                method: np.mean([numbers[case, metric][method] for case in sets], axis=0)
                for method in numbers[first, metric]
            }
    return [
        measure(case, method, metric, values, sizes[case], labels[method], draws=method == "random")
        for metric in TITLES
        for (case, found_metric), by_method in numbers.items()
        if found_metric == metric
        for method, values in by_method.items()
    ]


def measure(
    case: str, method: str, metric: str, values: np.ndarray, size: int, labels: str | None, *, draws: bool = False
) -> Measure:
    """One number of ``values [1, 1 + resamples]``, with their interval; of ``[draws, ...]`` with the draws' spread."""
    unit = UNITS.get(metric, "percent")
    if draws:
        mean = float(values[:, 0].mean())
        spread = float(values[:, 0].std(ddof=1)) if len(values) > 1 else None
        return Measure(case, method, metric, mean, spread, None, None, len(values), unit, labels)
    point, resamples = float(values[0, 0]), values[0, 1:]
    resamples = resamples[~np.isnan(resamples)]
    if len(resamples) < 2:
        return Measure(case, method, metric, point, None, None, None, size, unit, labels)
    low, high = map(float, np.percentile(resamples, _LEVEL))
    return Measure(case, method, metric, point, float(resamples.std(ddof=1)), low, high, size, unit, labels)
