"""Figures as inline SVG, of shapes and texts alone: nothing is loaded, and colours follow the page they stand in.

Narrow, so that they can be read on a phone; wide screens show several side by side. The edit is blue (Okabe and Ito's,
which survives colour blindness), controls are grey, and the unedited model's value is a dashed line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from spurge.report.marks import SPIKE

Kind = Literal["base", "edit", "control", "flagged", "other"]

_WIDTH, _LINE, _LEFT, _RIGHT = 360, 34, 6, 354
_MOST_CHARACTERS = 44  # of a label

#: What figures need of a page's style sheet.
STYLE = """
svg.figure{width:100%;max-width:34rem;height:auto;display:block}
.figure text{font:12px system-ui,sans-serif;fill:var(--ink)}
.figure .title{font-weight:600;font-size:13px}
.figure .value{text-anchor:end;font-variant-numeric:tabular-nums}
.figure .tick{font-size:10px;fill:var(--soft)}
.figure .axis{stroke:var(--line);stroke-width:1}
.figure .baseline{stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3}
.figure .base{fill:var(--ink);stroke:var(--ink)}
.figure .edit{fill:var(--edit);stroke:var(--edit)}
.figure .control{fill:var(--control);stroke:var(--control)}
.figure .flagged{fill:var(--flagged);stroke:var(--flagged)}
.figure .other{fill:var(--other);stroke:var(--other)}
.figure .range{stroke-width:2}
"""


@dataclass(frozen=True)
class Mark:
    """One line of a figure: a value and, where it is known, its interval."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    kind: Kind = "other"
    text: str = ""


def intervals(title: str, marks: Sequence[Mark], *, baseline: float | None = None, unit: str = "") -> str:
    """A dot for each mark on a common axis, its interval as a line; a dashed line where ``baseline`` lies."""
    marks = [mark for mark in marks if math.isfinite(mark.value)]
    if not marks:
        return ""
    ends = [end for mark in marks for end in (mark.value, mark.low, mark.high) if end is not None]
    ends += [] if baseline is None else [baseline]
    low, high = _nice(min(ends), max(ends))
    if unit == "percent":
        low, high = max(low, 0.0), min(high, 100.0)
    scale = (_RIGHT - _LEFT) / ((high - low) or 1.0)

    def place(value: float) -> float:
        return round(_LEFT + (min(max(value, low), high) - low) * scale, 1)

    top, parts = 22, [f'<text class="title" x="{_LEFT}" y="14">{_cut(title)}</text>']
    bottom = top + _LINE * len(marks)
    if baseline is not None and math.isfinite(baseline):
        x = place(baseline)
        parts.append(f'<line class="baseline" x1="{x}" y1="{top}" x2="{x}" y2="{bottom}"/>')
    for number, mark in enumerate(marks):
        y = top + _LINE * number
        parts.append(f'<text x="{_LEFT}" y="{y + 13}">{_cut(mark.label)}</text>')
        parts.append(f'<text class="value" x="{_RIGHT}" y="{y + 13}">{escape(mark.text or f"{mark.value:.1f}")}</text>')
        if mark.low is not None and mark.high is not None:
            ends_at = f'x1="{place(mark.low)}" x2="{place(mark.high)}"'
            parts.append(f'<line class="range {mark.kind}" y1="{y + 23}" y2="{y + 23}" {ends_at}/>')
        parts.append(f'<circle class="{mark.kind}" cx="{place(mark.value)}" cy="{y + 23}" r="4.5"/>')
    parts += _axis(bottom, low, high, unit)
    return _svg(title, marks, bottom + 22, parts)


def bars(title: str, marks: Sequence[Mark], *, unit: str = "") -> str:
    """A bar for each mark, from 0; on a logarithmic axis where one value would hide the rest, which the axis says."""
    marks = [mark for mark in marks if math.isfinite(mark.value) and mark.value >= 0]
    if not marks:
        return ""
    known = sorted(mark.value for mark in marks if mark.value > 0)
    most = known[-1] if known else 1.0
    logarithmic = len(known) > 2 and most > SPIKE * known[len(known) // 2]
    shown = (lambda value: math.log1p(value)) if logarithmic else (lambda value: value)
    parts = [f'<text class="title" x="{_LEFT}" y="14">{_cut(title)}</text>']
    for number, mark in enumerate(marks):
        y = 22 + _LINE * number
        length = round((_RIGHT - _LEFT) * shown(mark.value) / shown(most), 1)
        parts.append(f'<text x="{_LEFT}" y="{y + 13}">{_cut(mark.label)}</text>')
        parts.append(f'<text class="value" x="{_RIGHT}" y="{y + 13}">{escape(mark.text or f"{mark.value:g}")}</text>')
        parts.append(f'<rect class="{mark.kind}" x="{_LEFT}" y="{y + 18}" width="{length}" height="9"/>')
    bottom = 22 + _LINE * len(marks)
    note = f"{unit}, logarithmic" if logarithmic else unit
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{_RIGHT}" y2="{bottom}"/>')
    parts.append(f'<text class="tick" x="{_LEFT}" y="{bottom + 13}">{_cut(note)}</text>')
    return _svg(title, marks, bottom + 20, parts)


def _svg(title: str, marks: Sequence[Mark], height: float, parts: Sequence[str]) -> str:
    """The figure, with its numbers in words for who hears it."""
    words = "; ".join(f"{mark.label} {mark.text or f'{mark.value:.3g}'}" for mark in marks)
    head = f'<svg class="figure" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(f"{title}: {words}")}">'
    return f"{head}{''.join(parts)}</svg>"


def _axis(y: float, low: float, high: float, unit: str) -> list[str]:
    parts = [f'<line class="axis" x1="{_LEFT}" y1="{y}" x2="{_RIGHT}" y2="{y}"/>']
    names = (f"{low:g}", unit, f"{high:g}")
    for text, x, side in zip(names, (_LEFT, _WIDTH / 2, _RIGHT), ("start", "middle", "end"), strict=True):
        parts.append(f'<text class="tick" x="{x}" y="{y + 13}" text-anchor="{side}">{escape(text)}</text>')
    return parts


def _nice(low: float, high: float) -> tuple[float, float]:
    """Round ends of an axis that holds both."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1.0) if span / (step * part) <= 12)
    return math.floor(low / step) * step, math.ceil(high / step + 1e-9) * step


def _cut(text: str) -> str:
    short = text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
    return escape(short)
