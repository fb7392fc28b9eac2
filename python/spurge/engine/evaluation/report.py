"""The numbers of an evaluation, and the tables that they are read in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spurge.engine.base.tables import Table, folded, page, wrapped
from spurge.engine.evaluation.glance import glance, grouped
from spurge.engine.evaluation.threshold import EVENLY, MOSTLY

if TYPE_CHECKING:
    from spurge.engine.evaluation.changed import Changed

AVERAGE, ALL, NONE = (
    "average",
    "all",
    "none",
)  # the mean over sets, all rows of all sets, and the method that is no edit
CONTROLS = ("threshold", "zero-all", "random", "deleted")  # methods that are no edits
TITLES = {
    "accuracy": "accuracy, percent",
    "change": "change of accuracy, points",
    "worst_group": "worst group's accuracy, percent",
    "mean_group": "mean of the groups' accuracies, percent",
    "gap": "average less worst group's accuracy, points",
    "worst_class": "worst class's accuracy, percent",
    "class_difference": "mean difference of two classes' accuracies, points",
    "auc": "area under the curve, percent",
    "mean_group_auc": "mean area under the curve within groups, percent",
    "by_threshold": "changed answers that a moved threshold explains, percent",
    "by_constant": "change of the logits that a constant explains, percent",
    "agreement": "answers that stay as they were where nothing should change, percent",
    "divergence": "divergence from the unedited answers where nothing should change, nats",
    "eta": "eta, mean proximity to spurious words (0 to 2)",
}
UNITS = {
    "change": "points",
    "gap": "points",
    "class_difference": "points",
    "divergence": "nats",
    "eta": "",
}  # else percent
_DIGITS = {"eta": 3, "divergence": 3}
_MOST_COLUMNS = 8  # of methods
_SURE = 0.05  # p below which a change is marked
_FOOT = "* p < 0.05: paired bootstrap, Holm over sets"


@dataclass(frozen=True)
class Measure:
    """One number of a report.

    Attributes:
        case: test set, ``set/group`` for one group of it, ``average`` over the sets, or ``all`` for their rows
            together; of side effects also ``untouched`` and ``set (no cue)``.
        method: ``none``, the edit's name, or a control; of last layers, as they were called.
        metric: ``accuracy`` (over all rows), ``mean_group`` (over groups, each with the same weight), ``worst_group``,
            ``change`` (of accuracy, against the first method on the same examples), ``auc``, ``mean_group_auc``,
            ``by_threshold``,
            ``by_constant``, ``agreement``, ``divergence``, ``eta``; of last layers also ``gap``, ``worst_class`` and
            ``class_difference``.
        value: the number; for ``random``, and for several layers under one name, the mean over draws.
        spread: standard error by bootstrap; for draws their standard deviation.
        low, high: 95 % bootstrap interval over examples; None for draws.
        n: examples; sets for ``average``; draws for ``random``.
        unit: percent, points, nats, or empty.
        labels: labels that the method used to make its edit: none, class or group; None if it does not say.
        p: of ``change``, that there is none: two-sided, by paired bootstrap, adjusted over the sets (Holm); None of
            other numbers, of draws, and without resamples.
    """

    case: str
    method: str
    metric: str
    value: float
    spread: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    labels: str | None
    p: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """Measures of one evaluation, in reading order; prints as tables, and shows as such in a notebook.

    Attributes:
        measures: all numbers.
        settings: what the evaluation was asked for, with fingerprints of the sets; JSON-able.
        changed: texts whose answer the edit changes, where they were asked for.
    """

    measures: tuple[Measure, ...]
    settings: dict[str, Any]
    changed: tuple[Changed, ...] = ()

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> Report:
        """The report that gave such rows (:meth:`rows`); rows of other metrics are left out."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in rows:
            metric, _, end = row["metric"].rpartition("_")
            if metric not in TITLES or end not in ("low", "high", "p"):
                metric, end = row["metric"], "value"
            if metric in TITLES and row["value"] is not None:
                own = found.setdefault((row["case"], row["method"], metric), {})
                own[end] = row["value"]
                if end == "value":
                    own |= {name: row.get(name) for name in ("spread", "n", "unit", "labels")}
        measures = []
        for (case, method, metric), own in found.items():
            if "value" in own:
                rest = {name: own.get(name) for name in ("low", "high", "spread", "labels", "p")}
                count, unit = own.get("n") or 0, own.get("unit") or ""
                measures.append(Measure(case, method, metric, own["value"], n=count, unit=unit, **rest))
        return cls(tuple(measures), dict(settings))

    def value(self, case: str, method: str, metric: str = "accuracy") -> float:
        """One number.

        Raises:
            ValueError: the report has none of that name.
        """
        for m in self.measures:
            if (m.case, m.method, m.metric) == (case, method, metric):
                return m.value
        raise ValueError(f"case, method, metric: the report has no {case!r}, {method!r}, {metric!r}")

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows ``case, method, metric, value, spread, n, unit, labels, seed``.

        The ends of an interval are rows of their own, with ``_low`` and ``_high`` behind the metric's name, and so is
        p, with ``_p``, which has no unit.
        """
        rows = []
        for m in self.measures:
            rest = {"n": m.n, "unit": m.unit, "labels": m.labels, "seed": self.settings["seed"]}
            name = {"case": m.case, "method": m.method}
            rows.append({**name, "metric": m.metric, "value": m.value, "spread": m.spread, **rest})
            for end, value in (("low", m.low), ("high", m.high), ("p", m.p)):
                if value is not None:
                    own = rest | {"unit": ""} if end == "p" else rest
                    rows.append({**name, "metric": f"{m.metric}_{end}", "value": value, "spread": None, **own})
        return rows

    def to_frame(self) -> Any:
        """The measures as a pandas DataFrame; needs pandas."""
        import pandas as pd

        return pd.DataFrame([vars(m) for m in self.measures])

    @property
    def notes(self) -> list[str]:
        """What the numbers say in words: of each method whose changed answers a moved threshold mostly explains."""
        found = []
        shares = {(m.case, m.method): m for m in self.measures if m.metric == "by_threshold"}
        constant = {(m.case, m.method): m.value for m in self.measures if m.metric == "by_constant"}
        for method in dict.fromkeys(method for _, method in shares):
            case = ALL if (ALL, method) in shares else next(case for case, own in shares if own == method)
            share = shares[case, method].value
            if share > MOSTLY:
                which = "this edit" if method == self.settings.get("name") else method
                even = constant.get((case, method))
                start = f"a constant added to the logits explains {share:.0f} %"
                if even is None or even > EVENLY:
                    of_logits = "" if even is None else f", and {even:.0f} % of the change of the logits"
                    text = f"{which} mostly moves the threshold: {start} of the answers it changes"
                    text += of_logits
                else:
                    text = (
                        f"{start} of the answers that {which} changes, but only {even:.0f} % of the change "
                        "of the logits: a moved threshold does nearly as well on these texts, and is not what it does"
                    )
                found.append(text)
        return found + list(self.settings.get("notes", ()))

    def __str__(self) -> str:
        found = [*self.tables(), *(self.glance() if self.settings.get("beside") else ())]
        tables = ["\n".join([title, *folded(lines, gap=2), *map(wrapped, foot)]) for title, lines, foot in found]
        return "\n\n".join([*tables, *([wrapped("\n".join(self.notes))] if self.notes else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return page([Table(title, lines, foot) for title, lines, foot in self.tables()], self.notes)

    def tables(self) -> Iterator[tuple[str, list[list[str]], list[str]]]:
        """Title, lines of cells and footnotes of each metric's table: a line a case, a column a method.

        The other way round where there are many methods, which no width has room for.
        """
        for metric, title in TITLES.items():
            own = [m for m in self.measures if m.metric == metric]
            if not own:
                continue
            methods = list(dict.fromkeys(m.method for m in own))
            cells: dict[str, dict[str, str]] = {}
            for m in own:
                cells.setdefault(m.case, {})[m.method] = _cell(m)
            lines = [["", *(self._head(method) for method in methods)]]
            lines += [[case, *(row.get(method, "") for method in methods)] for case, row in cells.items()]
            if len(methods) > _MOST_COLUMNS:
                lines = [list(column) for column in zip(*lines, strict=True)]
            yield title, lines, [_FOOT] if any(m.p is not None and m.p < _SURE for m in own) else []

    def glance(self) -> Iterator[tuple[str, list[list[str]], list[str]]]:
        """As :meth:`tables`, one for each set: a line for each edit, its controls below it, and what a threshold is."""
        return glance(self)

    def grouped(self, methods: Sequence[str]) -> list[tuple[str, str]]:
        """These methods, every edit before its controls, each with the edit that it is a control of, or ""."""
        return grouped(methods, self.settings.get("name"), CONTROLS[:-1])  # deleted words are a control of all edits

    def _head(self, method: str) -> str:
        drawn = method.endswith("random") and "draws" in self.settings  # last layers may be called so, too
        return f"{method} ({self.settings['draws']} draws)" if drawn else method


def _cell(m: Measure) -> str:
    digits = _DIGITS.get(m.metric, 1)
    sign = "+" if m.metric == "change" else ""
    text = f"{m.value:{sign}.{digits}f}"
    sure = " *" if m.p is not None and m.p < _SURE else ""
    if m.low is not None and m.high is not None:
        return f"{text} [{m.low:{sign}.{digits}f}, {m.high:{sign}.{digits}f}]{sure}"
    return text if m.spread is None else f"{text} ± {m.spread:.{digits}f}"
