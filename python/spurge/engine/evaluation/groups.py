"""Accuracy by group and by class, and last layers held side by side on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.checks import checked_labels, integer
from spurge.engine.base.statistics import resampled_sums
from spurge.engine.evaluation.report import Report, measure
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head

Answer = Head | Callable[[Features], Tensor] | Tensor
_COLUMNS = 256  # of classes and groups that are resampled at once
_METRICS = ("accuracy", "change", "worst_group", "gap", "worst_class", "class_difference")


@dataclass(frozen=True, eq=False)
class Accuracies:
    """Percent of rows that are right.

    Attributes:
        average: of all rows.
        classes: of each class, float64 ``[C]`` on the CPU; NaN for a class without rows.
        groups: of each group, ``[G]``; empty without groups.
    """

    average: float
    classes: Tensor
    groups: Tensor

    @property
    def worst_class(self) -> float:
        """The lowest accuracy of a class that has rows."""
        return float(np.fmin.reduce(self.classes.numpy()))

    @property
    def class_difference(self) -> float:
        """Mean over pairs of classes of how far their accuracies are apart, in points; 0 for one class."""
        return float(_difference(self.classes.numpy()[None])[0])

    @property
    def worst_group(self) -> float:
        """The lowest accuracy of a group that has rows; NaN without groups."""
        return float(np.fmin.reduce(self.groups.numpy())) if len(self.groups) else float("nan")

    @property
    def gap(self) -> float:
        """Average less worst group, in points; NaN without groups."""
        return self.average - self.worst_group


def accuracies(
    answers: Tensor, labels: Tensor, groups: Tensor | None = None, *, classes: int | None = None
) -> Accuracies:
    """Accuracy of all rows, of each class and of each group.

    Args:
        answers: logits ``[N, C]``, of which the first largest counts, or predicted classes ``[N]``.
        labels: whole numbers ``[N]``.
        groups: whole numbers ``[N]``, or None.
        classes: C; default one more than the largest label, or the columns of the logits.

    Raises:
        TypeError: tensors of other types.
        ValueError: shapes that do not fit, no rows, or a number out of range.
    """
    if not isinstance(answers, Tensor):
        raise TypeError(f"answers: expected a tensor, got {type(answers).__name__}")
    rows = labels.numel() if isinstance(labels, Tensor) else 0
    if answers.is_floating_point():
        if answers.dim() != 2:
            raise ValueError(f"answers: expected logits [N, C], got {tuple(answers.shape)}")
        classes = answers.shape[1] if classes is None else classes
        answers = answers.argmax(1)
    labels = checked_labels("labels", labels, rows, classes)
    right = checked_labels("answers", answers, rows).to(labels.device) == labels
    classes = int(labels.max()) + 1 if classes is None else integer("classes", classes, 1)
    by_group = torch.empty(0, dtype=torch.float64)
    if groups is not None:
        groups = checked_labels("groups", groups, rows).to(labels.device)
        by_group = _means(right, groups, int(groups.max()) + 1)
    return Accuracies(100 * float(right.double().mean()), _means(right, labels, classes), by_group)


def _means(right: Tensor, parts: Tensor, count: int) -> Tensor:
    """Percent right in each part, float64 on the CPU."""
    hits = parts.bincount(right.double(), minlength=count)
    return (100 * hits / parts.bincount(minlength=count)).cpu()


def compare(
    tests: Features | Mapping[str, Features],
    methods: Mapping[str, Answer | Sequence[Answer]],
    *,
    labels_used: Mapping[str, str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Report:
    """Accuracy, worst group, gap, worst class and class difference of last layers on the same test sets.

    Intervals are 95 % percentile bootstrap intervals over rows, the same resamples for all methods, so that the change
    against the first method is paired.

    Args:
        tests: one set, or sets by name. Those with groups also get a case ``set/group`` for each
            that has rows.
        methods: name to a layer; to a function from a set to its logits ``[N, O]`` or predicted classes ``[N]``; or,
            for one set, to these themselves. Several under one name are draws of one method: their mean and spread.
        labels_used: name to what the method used beyond the model: none, class or group.
        bootstrap: resamples, 0 for no intervals.
        seed: of the resamples.

    Raises:
        TypeError: an argument of another type.
        ValueError: no sets or methods, answers of another shape, or labels of an unknown kind.
    """
    sets = {"test": tests} if isinstance(tests, Features) else dict(tests)
    bootstrap, seed = integer("bootstrap", bootstrap, 0), integer("seed", seed, 0)
    if not sets or not methods:
        raise ValueError(f"tests, methods: need at least 1 each, got {len(sets)} and {len(methods)}")
    for case, features in sets.items():
        if not isinstance(case, str) or not isinstance(features, Features):
            raise TypeError(f"tests: expected name to Features, got {case!r}: {type(features).__name__}")
    used = dict(labels_used or {})
    for name, kind in used.items():
        if name not in methods or kind not in ("none", "class", "group"):
            raise ValueError(f"labels_used: expected a method and none, class or group, got {name!r}: {kind!r}")
    measures = []
    for index, (case, features) in enumerate(sets.items()):
        base: np.ndarray | None = None
        for name, answer in methods.items():
            single = isinstance(answer, (Head, Tensor)) or callable(answer)
            draws: Any = [answer] if single else answer
            rows = [_right(name, one, features) for one in draws]
            # The same resamples for every method: its numbers are drawn anew from the same seed.
            numbers = _numbers(case, features, rows, bootstrap if single else 0, (seed, index))
            own = numbers[case, "accuracy"]
            if base is None:
                base = own.mean(0, keepdims=True)
            else:
                both = min(own.shape[1], base.shape[1])  # draws have no resamples
                numbers[case, "change"] = own[:, :both] - base[:, :both]
            for (part, metric), values in numbers.items():
                count = _size(part, case, features) if single else len(rows)
                measures.append(measure(part, name, metric, values, count, used.get(name), draws=not single))
    measures.sort(key=lambda measure: _METRICS.index(measure.metric))
    prints = {case: {"n": len(features), "data": features.fingerprint()} for case, features in sets.items()}
    return Report(tuple(measures), {"sets": prints, "seed": seed, "bootstrap": bootstrap})


def _right(name: str, answer: Any, features: Features) -> np.ndarray:
    """Which rows a method gets right, float64 ``[N]``."""
    if isinstance(answer, Head):
        answer = answer.predictions(features.values)
    elif callable(answer):
        answer = answer(features)
    if not isinstance(answer, Tensor):
        raise TypeError(f"methods: {name!r} must be or give a tensor, got {type(answer).__name__}")
    if answer.shape not in ((len(features),), (len(features), len(features.names))):
        raise ValueError(
            f"methods: {name!r} must give logits ({len(features)}, {len(features.names)}) or predictions "
            f"({len(features)},), got {tuple(answer.shape)}"
        )
    predicted = answer.argmax(1) if answer.dim() == 2 else answer
    return (predicted.to(features.labels.device) == features.labels).double().cpu().numpy()


_Numbers = dict[tuple[str, str], np.ndarray]  # (case, metric) -> [draws, 1 + resamples]


def _numbers(
    case: str, features: Features, draws: Sequence[np.ndarray], bootstrap: int, seed: tuple[int, int]
) -> _Numbers:
    if not draws:
        raise ValueError("methods: a method needs at least 1 draw, got 0")
    classes, groups = len(features.names), features.groups
    # Which rows count for which number: all of them, a class, a group, [N, 1 + C + G] in blocks of columns.
    labels = features.labels.cpu().numpy()
    parts = [np.zeros(len(labels), int), 1 + labels]
    if groups is not None:
        parts.append(1 + classes + groups.cpu().numpy())
    count = 1 + classes + (0 if groups is None else len(features.group_names))
    found: list[np.ndarray] = []
    for right in draws:
        blocks = []
        for start in range(0, count, _COLUMNS):
            wanted = np.arange(start, min(start + _COLUMNS, count))
            member = sum((part[:, None] == wanted for part in parts[1:]), parts[0][:, None] == wanted).astype(float)
            sums = resampled_sums(
                np.concatenate([right[:, None] * member, member], 1), bootstrap, np.random.default_rng(seed)
            )
            with np.errstate(invalid="ignore"):  # a resample can miss a small group
                blocks.append(100 * sums[:, : len(wanted)] / sums[:, len(wanted) :])
        found.append(np.concatenate(blocks, 1))
    means = np.stack(found)  # [draws, 1 + resamples, 1 + C + G]
    average, by_class, by_group = means[..., 0], means[..., 1 : 1 + classes], means[..., 1 + classes :]
    numbers = {
        (case, "accuracy"): average,
        (case, "worst_class"): np.fmin.reduce(by_class, axis=-1),
        (case, "class_difference"): _difference(by_class),
    }
    if groups is not None:
        worst = np.fmin.reduce(by_group, axis=-1)
        numbers |= {(case, "worst_group"): worst, (case, "gap"): average - worst}
        for index, name in enumerate(features.group_names):
            if not np.isnan(by_group[0, 0, index]):
                numbers[f"{case}/{name}", "accuracy"] = by_group[..., index]
    return numbers


def _difference(by_class: np.ndarray) -> np.ndarray:
    """Mean distance of two classes of ``[..., C]``; NaN is no class.

    Of k ascending numbers the i-th, from 0, is in :math:`2 i - k + 1` distances more from above than from below.
    """
    ascending = np.sort(by_class, axis=-1)  # NaN comes last
    count = np.isfinite(ascending).sum(-1, keepdims=True)
    shares = np.where(np.isfinite(ascending), 2 * np.arange(by_class.shape[-1]) - count + 1, 0)
    pairs = np.maximum(count[..., 0] * (count[..., 0] - 1) / 2, 1)
    return (shares * np.nan_to_num(ascending)).sum(-1) / pairs


def _size(part: str, case: str, features: Features) -> int:
    if part == case:
        return len(features)
    return int(features.group_counts()[features.group_names.index(part.removeprefix(f"{case}/"))])
