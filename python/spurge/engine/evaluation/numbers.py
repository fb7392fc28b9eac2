"""From answers to the measures of a report: means of all rows, of classes and of groups, with their resamples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from spurge.engine.base.statistics import area_under_curve, holm, paired_p, resample_counts, resampled_sums
from spurge.engine.evaluation.report import ALL, AVERAGE, TITLES, UNITS, Measure
from spurge.engine.evaluation.threshold import matched_shift, moved

_COLUMNS = 512  # numbers that are resampled at once
_LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
_AVERAGED = ("accuracy", "change", "auc", "eta")

Numbers = dict[tuple[str, str], dict[str, np.ndarray]]  # (case, metric) -> method -> [passes, 1 + resamples]
Found = Mapping[str, Sequence["Answers"]]  # method -> its one pass, or its draws


@dataclass(frozen=True, eq=False)
class Answers:
    """What one pass answered.

    Attributes:
        predicted: the label of each row, int ``[N]``.
        logits: ``[N, Y]``, or None where only the labels are known.
        proximity: to spurious words, ``[N]``, if measured.
    """

    predicted: np.ndarray
    logits: np.ndarray | None = None
    proximity: np.ndarray | None = None

    @classmethod
    def of(cls, logits: np.ndarray, proximity: np.ndarray | None = None) -> Answers:
        """The first largest logit answers."""
        return cls(logits.argmax(1), logits, proximity)


@dataclass(frozen=True, eq=False)
class Judged:
    """What answers of one set are held against.

    Attributes:
        targets: labels, int ``[N]``.
        groups: name to its rows, bool ``[N]``; a row may be in several, or in none.
        areas: the same of the groups within which areas under the curve are taken; None: these groups.
        classes: Y where classes are judged one by one, 0 where not.
        apart: case to the rows, bool ``[N]``, in which an edit should change nothing.
        right: False where these are all rows, and whether they are right is of no matter.
    """

    targets: np.ndarray
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    areas: Mapping[str, np.ndarray] | None = None
    classes: int = 0
    apart: Mapping[str, np.ndarray] = field(default_factory=dict)
    right: bool = True


def summarize(
    sets: Mapping[str, Judged],
    found: Mapping[str, Found],
    labels: Mapping[str, str | None],
    bootstrap: int,
    seed: int,
    *,
    drawn: Sequence[str] = (),
    thresholds: Mapping[str, Mapping[str, Answers]] | None = None,
) -> list[Measure]:
    """Measures of all sets and methods, with intervals and averages.

    Args:
        sets: what is right, by set.
        found: by set and method one pass, or the draws of a method; the first method is the one that others are
            held against.
        labels: what each method used.
        bootstrap: resamples of each set, the same for all its methods.
        seed: of the resamples.
        drawn: methods whose passes are draws.
        thresholds: method to what :func:`threshold_of` gives for it, by set.
    """
    numbers: Numbers = {}
    sizes: dict[str, int] = {AVERAGE: len(sets)}
    judged = {case: own for case, own in sets.items() if own.right}
    for index, (case, own) in enumerate(sets.items()):
        # The same resamples for every number of a set: each draws them anew from the same seed.
        parts = {**(own.areas or {}), **own.groups}
        sizes |= {case: len(own.targets), **{f"{case}/{name}": int(rows.sum()) for name, rows in parts.items()}}
        sizes |= {name: int(rows.sum()) for name, rows in own.apart.items()}
        if own.right:
            numbers |= _of_set(case, own, found[case], drawn, bootstrap, (seed, index))
        numbers |= _apart(own, found[case], drawn, bootstrap, (seed, index))
    numbers |= _explained(judged, found, thresholds or {}, bootstrap, seed)
    sizes[ALL] = sum(len(own.targets) for own in judged.values())
    if len(judged) > 1:
        sizes[AVERAGE] = len(judged)
        for metric in _AVERAGED:
            if all((case, metric) in numbers for case in judged):
                cases = [numbers[case, metric] for case in judged]
                methods = [method for method in cases[0] if all(method in own for own in cases)]
                numbers[AVERAGE, metric] = {
                    method: np.mean([own[method] for own in cases], axis=0) for method in methods
                }
    order = dict.fromkeys(method for own in found.values() for method in own)
    measures = [
        measure(case, method, metric, values, sizes[case], labels.get(method), draws=method in drawn)
        for metric in TITLES
        for (case, found_metric), by_method in numbers.items()
        if found_metric == metric
        for method in order
        if (values := by_method.get(method)) is not None
    ]
    return _with_p(measures, numbers)


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


def _with_p(measures: list[Measure], numbers: Numbers) -> list[Measure]:
    """Changes with their p: of sets adjusted over these for each method, of the average as it is."""
    changes = {
        (case, method): by
        for (case, metric), all_ in numbers.items()
        if metric == "change"
        for method, by in all_.items()
    }
    p = {key: paired_p(values[0, 1:]) for key, values in changes.items() if len(values) == 1}
    adjusted = {key: value for key, value in p.items() if value is not None and key[0] == AVERAGE}
    for method in dict.fromkeys(method for _, method in p):
        own = {key: value for key, value in p.items() if value is not None and key[1] == method and key[0] != AVERAGE}
        adjusted |= dict(zip(own, map(float, holm(np.array(list(own.values())))), strict=True))
    return [replace(m, p=adjusted.get((m.case, m.method))) if m.metric == "change" else m for m in measures]


def _of_set(
    case: str, judged: Judged, found: Found, drawn: Sequence[str], bootstrap: int, seed: tuple[int, int]
) -> Numbers:
    """All numbers of one set."""
    numbers: Numbers = {}

    def enter(metric: str, method: str, values: np.ndarray, part: str = "") -> None:
        numbers.setdefault((f"{case}/{part}" if part else case, metric), {})[method] = values

    first = next(iter(found))
    for methods, passes in _passes(found, drawn):
        resamples = 0 if methods[0] in drawn else bootstrap
        means = _means(judged, passes, resamples, seed)  # [passes, 1 + resamples, 1 + C + G]
        split = 1 + judged.classes
        for own, of in _apiece(methods, means):
            average, by_class, by_group = of[..., 0], of[..., 1:split], of[..., split:]
            enter("accuracy", own, average)
            for index, name in enumerate(judged.groups):
                enter("accuracy", own, by_group[..., index], name)
            if judged.groups:
                enter("worst_group", own, np.fmin.reduce(by_group, axis=-1))
                enter("mean_group", own, _mean_of_known(by_group))
            if judged.classes:
                if judged.groups:
                    enter("gap", own, average - np.fmin.reduce(by_group, axis=-1))
                enter("worst_class", own, np.fmin.reduce(by_class, axis=-1))
                enter("class_difference", own, class_difference(by_class))
    for method, draws in found.items():
        resamples = 0 if method in drawn else bootstrap
        if draws[0].proximity is not None:
            near = np.stack([one.proximity for one in draws if one.proximity is not None], 1)
            sums = resampled_sums(near, resamples, np.random.default_rng(seed)).T
            enter("eta", method, sums / len(judged.targets))
        for part, values in _areas(judged, draws, resamples, seed):
            enter("mean_group_auc" if part is None else "auc", method, values, part or "")
    base = (
        numbers[case, "accuracy"][first].mean(0, keepdims=True) if first in drawn else numbers[case, "accuracy"][first]
    )
    for method, values in numbers[case, "accuracy"].items():
        if method != first:
            both = min(values.shape[1], base.shape[1])  # draws have no resamples
            numbers.setdefault((case, "change"), {})[method] = values[:, :both] - base[:, :both]
    return numbers


def _passes(found: Found, drawn: Sequence[str]) -> Iterator[tuple[list[str], list[Answers]]]:
    """Names and passes that are resampled together: all methods of one pass, then each that has draws."""
    singles = [method for method in found if method not in drawn]
    if singles:
        yield singles, [found[method][0] for method in singles]
    for method in drawn:
        if method in found:
            yield [method], list(found[method])


def _apiece(methods: list[str], values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each method's own rows of ``[passes, ...]``."""
    if len(methods) == 1:
        yield methods[0], values
    else:
        for index, method in enumerate(methods):
            yield method, values[index : index + 1]


def _means(judged: Judged, passes: list[Answers], bootstrap: int, seed: tuple[int, int]) -> np.ndarray:
    """Percent right of all rows, of each class and of each group, ``[passes, 1 + bootstrap, 1 + C + G]``."""
    right = [100.0 * (answers.predicted == judged.targets) for answers in passes]
    groups = list(judged.groups.values())
    count, size = 1 + judged.classes + len(groups), max(1, _COLUMNS // (len(passes) + 1))
    parts = []
    for start in range(0, count, size):
        member = np.stack([_member(judged, groups, column) for column in range(start, min(start + size, count))], 1)
        columns = np.concatenate([*(own[:, None] * member for own in right), member], 1)
        sums = resampled_sums(columns, bootstrap, np.random.default_rng(seed))
        sums = sums.reshape(len(sums), len(passes) + 1, -1)
        with np.errstate(invalid="ignore"):  # a resample can miss a small group
            parts.append(sums[:, :-1] / sums[:, -1:])
    return np.concatenate(parts, 2).swapaxes(0, 1)


def _member(judged: Judged, groups: list[np.ndarray], column: int) -> np.ndarray:
    """Which rows count for the column-th number, float64 ``[N]``: all of them, a class, or a group."""
    if not column:
        return np.ones(len(judged.targets))
    if column <= judged.classes:
        return (judged.targets == column - 1).astype(np.float64)
    return groups[column - 1 - judged.classes].astype(np.float64)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, -1) / known.sum(-1)


def class_difference(by_class: np.ndarray) -> np.ndarray:
    """Mean distance of two classes of ``[..., C]``; NaN is no class.

    Of k ascending numbers the i-th, from 0, is in :math:`2 i - k + 1` distances more from above than from below.
    """
    ascending = np.sort(by_class, axis=-1)  # NaN comes last
    count = np.isfinite(ascending).sum(-1, keepdims=True)
    shares = np.where(np.isfinite(ascending), 2 * np.arange(by_class.shape[-1]) - count + 1, 0)
    pairs = np.maximum(count[..., 0] * (count[..., 0] - 1) / 2, 1)
    return (shares * np.nan_to_num(ascending)).sum(-1) / pairs


def _areas(
    judged: Judged, draws: Sequence[Answers], bootstrap: int, seed: tuple[int, int]
) -> Iterator[tuple[str | None, np.ndarray]]:
    """Area under the curve of all rows (``""``), of each group, and (None) the mean of the groups', in percent.

    Of two labels; nothing where there are others, and no group in which one of them is missing.
    """
    if any(one.logits is None or one.logits.shape[1] != 2 for one in draws):
        return
    positive = judged.targets == 1
    groups = judged.groups if judged.areas is None else judged.areas
    both = {name: rows for name, rows in groups.items() if 0 < positive[rows].sum() < rows.sum()}
    if not 0 < positive.sum() < len(positive):
        return
    parts: dict[str, list[np.ndarray]] = {"": [], **{name: [] for name in both}}
    for one in draws:
        assert one.logits is not None
        margins = one.logits[:, 1].astype(np.float64) - one.logits[:, 0]
        found: dict[str, list[np.ndarray]] = {name: [] for name in parts}
        for counts in resample_counts(len(positive), bootstrap, np.random.default_rng(seed)):
            found[""].append(area_under_curve(margins, positive, counts))
            for name, rows in both.items():
                found[name].append(area_under_curve(margins[rows], positive[rows], counts[:, rows]))
        for name, blocks in found.items():
            parts[name].append(100 * np.concatenate(blocks))
    areas = {name: np.stack(values) for name, values in parts.items()}
    yield from areas.items()
    if both:
        yield None, _mean_of_known(np.stack([areas[name] for name in both], -1))


def _apart(judged: Judged, found: Found, drawn: Sequence[str], bootstrap: int, seed: tuple[int, int]) -> Numbers:
    """Side effects: how far answers go from those of the first method, where they should not."""
    numbers: Numbers = {}
    first = next(iter(found))
    plain = found[first][0]
    for case, rows in judged.apart.items():
        if not rows.any():
            continue
        for method, draws in found.items():
            if method == first or any(one.logits is None for one in draws):
                continue
            columns = np.stack([_side_effects(plain, one)[:, rows] for one in draws])  # [draws, 2, n]
            resamples = 0 if method in drawn else bootstrap
            flat = columns.reshape(-1, columns.shape[-1]).T
            sums = resampled_sums(flat, resamples, np.random.default_rng(seed)).T / len(flat)
            sums = sums.reshape(len(draws), 2, -1)
            for index, metric in enumerate(("agreement", "divergence")):
                numbers.setdefault((case, metric), {})[method] = sums[:, index]
    return numbers


def _side_effects(plain: Answers, other: Answers) -> np.ndarray:
    """Per row: whether the answer is the same, in percent, and the divergence KL(plain, other) in nats; ``[2, N]``."""
    assert plain.logits is not None
    assert other.logits is not None
    before, after = (_log_softmax(logits.astype(np.float64)) for logits in (plain.logits, other.logits))
    p = np.exp(before)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (before - after), 0.0)
    return np.stack([100.0 * (plain.predicted == other.predicted), np.maximum(terms.sum(1), 0)])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def threshold_of(sets: Mapping[str, Found], method: str) -> tuple[dict[str, Answers] | None, np.ndarray]:
    """By set, what the first method answers with the constant shift that answers each label as often as ``method``.

    One shift for all sets, which comes second; None where a pass has no logits.
    """
    first = next(iter(next(iter(sets.values()))))
    plain = {case: found[first][0].logits for case, found in sets.items()}
    known = [logits for logits in plain.values() if logits is not None]
    if len(known) < len(plain):
        return None, np.zeros(0)
    joined = np.concatenate(known)
    predicted = np.concatenate([found[method][0].predicted for found in sets.values()])
    shift = matched_shift(joined, np.bincount(predicted, minlength=joined.shape[1]))
    return {case: Answers.of(moved(logits, shift)) for case, logits in zip(plain, known, strict=True)}, shift


def _explained(
    judged: Mapping[str, Judged],
    found: Mapping[str, Found],
    thresholds: Mapping[str, Mapping[str, Answers]],
    bootstrap: int,
    seed: int,
) -> Numbers:
    """How many of the changed answers a moved threshold explains, in percent: of each set, and of all together."""
    numbers: Numbers = {}
    for method, moved_answers in thresholds.items():
        sums = {}
        for index, case in enumerate(judged):
            first = next(iter(found[case]))
            edited = found[case][method][0].predicted
            apart = [edited != moved_answers[case].predicted, edited != found[case][first][0].predicted]
            columns = np.stack(apart, 1).astype(np.float64)
            sums[case] = resampled_sums(columns, bootstrap, np.random.default_rng((seed, index)))
        even = _even_parts(judged, found, method, bootstrap, seed)
        if len(sums) > 1:
            sums[ALL] = sum(sums.values(), np.zeros(()))
            if even:
                even[ALL] = sum(even.values(), np.zeros(()))
        for case, (left, changed) in ((case, own.T) for case, own in sums.items()):
            if changed[0]:
                with np.errstate(invalid="ignore", divide="ignore"):
                    share = np.where(changed > 0, 100 * (1 - left / changed), np.nan)
                numbers.setdefault((case, "by_threshold"), {})[method] = share[None]
        for case, parts in even.items():
            if parts[0, -1] > 0:
                rows, squares = parts[:, -2], parts[:, -1]
                constant = 100 * (parts[:, :-2] ** 2).sum(1) / rows / squares
                numbers.setdefault((case, "by_constant"), {})[method] = constant[None]
    return numbers


def _even_parts(
    judged: Mapping[str, Judged], found: Mapping[str, Found], method: str, bootstrap: int, seed: int
) -> dict[str, np.ndarray]:
    """By set the sums, over rows, of the change of the logits ``[Y]``, of 1, and of its square; ``[1 + R, Y + 2]``."""
    out = {}
    for index, case in enumerate(judged):
        first = next(iter(found[case]))
        before, after = found[case][first][0].logits, found[case][method][0].logits
        if before is None or after is None:
            return {}
        change = after.astype(np.float64) - before
        change -= change.mean(1, keepdims=True)
        columns = np.concatenate([change, np.ones((len(change), 1)), (change**2).sum(1, keepdims=True)], 1)
        out[case] = resampled_sums(columns, bootstrap, np.random.default_rng((seed, index)))
    return out
