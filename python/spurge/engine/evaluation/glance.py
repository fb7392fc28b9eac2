"""A report at a glance: one line for each edit, its controls below it, and whether it only moves the threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from spurge.engine.evaluation.threshold import EVENLY, MOSTLY

if TYPE_CHECKING:
    from spurge.engine.evaluation.report import Measure, Report

_COLUMNS = {"accuracy": "average", "worst_group": "worst group", "mean_group_auc": "AUC in groups"}
_FOOT = (
    "threshold: percent of the changed answers that a constant added to all logits explains, and of the change of the "
    "logits; where most of both, the edit mostly moves the threshold, where most of the first alone, a moved threshold "
    "would do nearly as well on these texts; labels: used beyond those of training"
)


def verdict(share: float | None, even: float | None) -> str:
    """What the shares of the changed answers, and of the change of the logits, that a constant explains say together.

    >>> verdict(84.0, 92.0), verdict(84.0, 20.0), verdict(10.0, 20.0), verdict(None, None)
    ('mostly moves the threshold', 'like a threshold, unevenly', 'does more', 'changes no answer')
    """
    if share is None:
        return "changes no answer"
    if share <= MOSTLY:
        return "does more"
    return "like a threshold, unevenly" if even is not None and even <= EVENLY else "mostly moves the threshold"


def grouped(methods: Sequence[str], name: str | None, controls: Sequence[str]) -> list[tuple[str, str]]:
    """Methods in reading order, each with the edit that it is a control of, or "": every edit before its controls.

    Args:
        methods: as they come; the first is no edit.
        name: of the edit that ``controls`` belong to.
        controls: methods that are its controls.

    >>> grouped(["none", "a", "b", "random", "b: random", "deleted"], "a", ["random"])
    [('none', ''), ('a', ''), ('random', 'a'), ('b', ''), ('b: random', 'b'), ('deleted', '')]
    """
    of = {}
    for method in methods:
        owner, colon, _ = method.rpartition(": ")
        of[method] = owner if colon and owner in methods else name if method in controls and name in methods else None
    found: list[tuple[str, str]] = []
    for method in methods:
        if of[method] is None:
            found += [(method, ""), *((control, method) for control in methods if of[control] == method)]
    return found


def glance(report: Report) -> Iterator[tuple[str, list[list[str]], list[str]]]:
    """Title, lines of cells and footnotes of a table for each set: a line a method."""
    found = {(m.case, m.method, m.metric): m for m in report.measures}
    sets = report.settings.get("sets", {})
    cases = list(dict.fromkeys(m.case for m in report.measures if m.metric == "accuracy" and m.case in sets))
    for case in cases:
        methods = list(dict.fromkeys(m.method for m in report.measures if (m.case, m.metric) == (case, "accuracy")))
        metrics = [metric for metric in _COLUMNS if (case, methods[0], metric) in found]
        lines = [["", *(_COLUMNS[metric] for metric in metrics), "threshold", "verdict", "labels"]]
        for method, owner in report.grouped(methods):
            own = [found.get((case, method, metric)) for metric in metrics]
            share, even = (found.get((case, method, metric)) for metric in ("by_threshold", "by_constant"))
            judged = not owner and method != methods[0] and f"{method}: threshold" in methods
            judged |= method == report.settings.get("name") and "threshold" in methods
            said = [_shares(share, even), verdict(_value(share), _value(even))] if judged else ["", ""]
            label = f"· {method.removeprefix(f'{owner}: ')}" if owner else method
            lines.append([label, *map(_number, own), *said, (own[0].labels if own[0] else None) or ""])
        foot = [_FOOT] if any(line[-2] for line in lines[1:]) else []
        yield f"{case} at a glance, percent", lines, foot


def _number(measure: Measure | None) -> str:
    return "" if measure is None else f"{measure.value:.1f}"


def _value(measure: Measure | None) -> float | None:
    return None if measure is None else measure.value


def _shares(share: Measure | None, even: Measure | None) -> str:
    return "" if share is None else f"{share.value:.0f}" + ("" if even is None else f", {even.value:.0f}")
