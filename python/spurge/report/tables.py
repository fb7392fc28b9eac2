"""Plain-text tables from flat result rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spurge.engine.base.tables import folded

Row = Mapping[str, Any]


def grid(lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lines of cells in aligned columns within the terminal's width, a rule below the first line.

    Args:
        lines: the head and at least no further line, all of the same number of cells.
        left: how many columns are flush left; the others are flush right.

    Raises:
        ValueError: no lines, or lines of different length.
    """
    if not lines or not lines[0]:
        raise ValueError("lines: need a head with at least 1 cell")
    for number, line in enumerate(lines):
        if len(line) != len(lines[0]):
            raise ValueError(f"lines: line {number} has {len(line)} cells, the head has {len(lines[0])}")
    return "\n".join(folded(lines, left=left, rule=True))


def pivot(
    rows: Iterable[Row],
    metric: str = "accuracy",
    *,
    base: str | None = "none",
    methods: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    digits: int = 1,
) -> str:
    """One metric with a line for each method and a column for each case.

    A cell is the value, its change against the method `base` in the same case, and how sure it is: the interval from
    the rows ``{metric}_low`` and ``{metric}_high`` where there are such, else ± the spread.

    Args:
        rows: flat rows ``{"case", "method", "metric", "value", ...}``.
        metric: what to show.
        base: the method to compare with; None shows no changes.
        methods, cases: which and in what order; default as they come.
        digits: behind the decimal point.

    Raises:
        ValueError: a row lacks a field, no row has the metric, or two rows are about the same number.
    """
    numbers: dict[tuple[str, str], dict[str, Row]] = {}
    names = {metric: "value", f"{metric}_low": "low", f"{metric}_high": "high"}
    for row in rows:
        missing = [name for name in ("case", "method", "metric", "value") if name not in row]
        if missing:
            raise ValueError(f"rows: a row has no {missing[0]!r}: {dict(row)}")
        if row["metric"] in names:
            cell = numbers.setdefault((row["method"], row["case"]), {})
            if cell.setdefault(names[row["metric"]], row) is not row:
                raise ValueError(f"rows: two rows for {row['case']!r}, {row['method']!r}, {row['metric']!r}")
    numbers = {key: cell for key, cell in numbers.items() if "value" in cell}
    if not numbers:
        raise ValueError(f"metric: no row has {metric!r}")
    methods = list(dict.fromkeys(method for method, _ in numbers)) if methods is None else list(methods)
    cases = list(dict.fromkeys(case for _, case in numbers)) if cases is None else list(cases)
    unit = next(iter(numbers.values()))["value"].get("unit")
    head = [f"{metric}, {unit}" if unit else metric, *cases]
    lines = [head]
    for method in methods:
        line = [method]
        for case in cases:
            own, base_cell = numbers.get((method, case)), numbers.get((base or "", case))
            reference = None if base_cell is None or method == base else float(base_cell["value"]["value"])
            line.append("" if own is None else _format_cell(own, reference, digits))
        lines.append(line)
    return grid(_align_parts(lines))


def _format_cell(cell: Mapping[str, Row], reference: float | None, digits: int) -> str:
    value, spread = float(cell["value"]["value"]), cell["value"].get("spread")
    change = "" if reference is None else f"{value - reference:+.{digits}f}"
    if "low" in cell and "high" in cell:
        uncertainty = f"[{float(cell['low']['value']):.{digits}f}, {float(cell['high']['value']):.{digits}f}]"
    else:
        uncertainty = "" if spread is None else f"± {float(spread):.{digits}f}"
    return f"{value:.{digits}f}\t{change}\t{uncertainty}"


def _align_parts(lines: list[list[str]]) -> list[list[str]]:
    """Cells of three parts, each part as wide as the widest of its column."""
    out = [list(line) for line in lines]
    for column in range(1, len(lines[0])):
        parts = [[*line[column].split("\t"), "", ""][:3] for line in lines[1:]]
        widths = [max((len(part[i]) for part in parts), default=0) for i in range(3)]
        for line, (value, change, sure) in zip(out[1:], parts, strict=True):
            text = value.rjust(widths[0])
            text += f" {change.rjust(widths[1])}" if widths[1] else ""
            text += f" {sure.ljust(widths[2])}" if widths[2] else ""
            line[column] = text
    return out


def seconds(value: float) -> str:
    """A duration for people.

    >>> seconds(0.25), seconds(42.0), seconds(125.0)
    ('0.2 s', '42.0 s', '2 min 5 s')
    """
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"
