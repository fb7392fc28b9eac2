"""Accuracy by group and by class, and last layers held side by side on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.checks import checked_labels, integer
from spurge.engine.evaluation.numbers import Answers, Judged, class_difference, summarize, threshold_of
from spurge.engine.evaluation.report import Report
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head

Answer = Head | Callable[[Features], Tensor] | Tensor


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
        return float(class_difference(self.classes.numpy()[None])[0])

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
    controls: bool = True,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Report:
    """Accuracy, worst group, gap, worst class and class difference of last layers on the same test sets.

    With two classes also the area under the curve, of all rows and within groups. Intervals are 95 % percentile
    bootstrap intervals over rows, the same resamples for all methods, so that the change against the first method is
    paired; its p is adjusted over the sets (Holm).

    Args:
        tests: one set, or sets by name. Those with groups also get a case ``set/group`` for each
            that has rows.
        methods: name to a layer; to a function from a set to its logits ``[N, O]`` or predicted classes ``[N]``; or,
            for one set, to these themselves. Several under one name are draws of one method: their mean and spread.
        labels_used: name to what the method used beyond the model: none, class or group.
        controls: beside each other method that has logits, the first one with a moved threshold, as
            ``"NAME: threshold"``: a constant added to its logits so that it answers each class as often as that method
            (`spurge.engine.evaluation.threshold`), and how many of the changed answers this explains.
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
    drawn = [name for name, answer in methods.items() if not _is_single(answer)]
    found: dict[str, dict[str, list[Answers]]] = {case: {} for case in sets}
    thresholds = {}
    first = next(iter(methods))
    for name, answer in methods.items():
        draws: Any = [answer] if name not in drawn else answer
        if not draws:
            raise ValueError("methods: a method needs at least 1 draw, got 0")
        for case, features in sets.items():
            found[case][name] = [_answers(name, one, features) for one in draws]
        if controls and name != first and name not in drawn and first not in drawn:
            threshold, _ = threshold_of(found, name)
            if threshold is not None:
                thresholds[name] = threshold
    for name, threshold in thresholds.items():
        used[f"{name}: threshold"] = used.get(first, "none")
        for case in sets:
            found[case][f"{name}: threshold"] = [threshold[case]]
    judged = {case: _judged(features) for case, features in sets.items()}
    how: dict[str, Any] = {"drawn": drawn, "thresholds": thresholds}
    measures = summarize(judged, found, used, bootstrap, seed, **how)
    prints = {case: {"n": len(features), "data": features.fingerprint()} for case, features in sets.items()}
    return Report(tuple(measures), {"sets": prints, "seed": seed, "bootstrap": bootstrap})


def _is_single(answer: Any) -> bool:
    return isinstance(answer, (Head, Tensor)) or callable(answer)


def _answers(name: str, answer: Any, features: Features) -> Answers:
    """What a method answers to a set."""
    if isinstance(answer, Head):
        answer = answer.logits(features.values)
    elif callable(answer):
        answer = answer(features)
    if not isinstance(answer, Tensor):
        raise TypeError(f"methods: {name!r} must be or give a tensor, got {type(answer).__name__}")
    if answer.shape not in ((len(features),), (len(features), len(features.names))):
        raise ValueError(
            f"methods: {name!r} must give logits ({len(features)}, {len(features.names)}) or predictions "
            f"({len(features)},), got {tuple(answer.shape)}"
        )
    values = answer.detach().cpu().numpy()
    return Answers.of(values) if values.ndim == 2 else Answers(values)


def _judged(features: Features) -> Judged:
    groups = {}
    if features.groups is not None:
        own = features.groups.cpu().numpy()
        rows = {name: own == number for number, name in enumerate(features.group_names)}
        groups = {name: member for name, member in rows.items() if member.any()}
    return Judged(features.labels.cpu().numpy(), groups, classes=len(features.names))
