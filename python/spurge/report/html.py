"""A report of a job as one page that needs nothing else: no request leaves it, and it opens from a mail.

Texts come from data and from models: every one of them is escaped and kept to its own reading direction. There is no
script; a policy in the page's head forbids whatever could be loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from spurge.engine.base.files import PathLike, indented_json, spurge_version, write_bytes
from spurge.engine.base.tables import Table, isolated
from spurge.engine.evaluation.report import NONE, Report
from spurge.report.card import Card, card_of
from spurge.report.drawings import STYLE, Kind, Mark, bars, intervals
from spurge.report.folders import Job, read_job
from spurge.report.marks import is_control
from spurge.report.results import Results

_CANDIDATES = 15  # that are drawn, and open to the eye; the table has more, up to
_ROWS = 60
_METHODS = 7  # beside each other in a table
_TEXTS = 60  # with another answer, that are shown
_MEASURES = {"accuracy": "accuracy", "worst_group": "worst group", "mean_group_auc": "area under the curve in groups"}

_PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--soft:#595959;--paper:#fff;--line:#c9c9c9;--edit:#0072b2;
--control:#8a8a8a;--flagged:#d55e00;--other:#009e73;--for:213,94,0;--against:0,114,178;--panel:#f5f5f3}
@media (prefers-color-scheme:dark){:root{--ink:#e8e8e6;--soft:#a8a8a4;--paper:#161616;--line:#444;--edit:#56b4e9;
--control:#9a9a9a;--flagged:#e69f00;--other:#2fbf95;--for:230,159,0;--against:86,180,233;--panel:#222}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.25rem;margin:2rem 0 .5rem;
border-bottom:1px solid var(--line)}h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0}.soft{color:var(--soft);font-size:.875rem}
.verdict{border-left:4px solid var(--flagged);padding:.3rem .8rem;background:var(--panel);margin:.6rem 0}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem 2rem;margin:.6rem 0}
.wide{overflow-x:auto}.wide>p{color:var(--soft);font-size:.875rem}.glance td{white-space:nowrap}
.reasons td:last-child,.reasons th:last-child{text-align:left!important;min-width:12rem}
table{border-collapse:collapse;font-size:.8125rem;font-variant-numeric:tabular-nums;margin:.6rem 0}
caption{text-align:left;font-weight:600;padding:.2rem 0}
th,td{padding:.2rem .6rem;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:normal}
td:last-child{min-width:4rem}.figure text{paint-order:stroke;stroke:var(--paper);stroke-width:3px}
th:first-child,td:first-child{padding-left:0;overflow-wrap:anywhere;min-width:6rem;max-width:20rem}
td.long,.text{overflow-wrap:anywhere}
pre,code{font:.8125rem/1.45 ui-monospace,monospace}
pre{white-space:pre-wrap;background:var(--panel);padding:.6rem;margin:.4rem 0}
summary{cursor:pointer}
.text{background:var(--panel);padding:.4rem .6rem;margin:.2rem 0}
.item{border-top:1px solid var(--line);padding:.5rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:.2rem 1rem}
mark{color:inherit;border-radius:.15rem;-webkit-print-color-adjust:exact;print-color-adjust:exact}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--paper:#fff;--line:#999;--edit:#0072b2;--control:#777;
--flagged:#b34700;--other:#00795a;--for:213,94,0;--against:0,114,178;--panel:#fff}
body{font-size:10pt;max-width:none;padding:0}.wide{overflow:visible}table{font-size:7.5pt}
th,td{padding:.1rem .3rem}th:first-child,td:first-child{min-width:3rem}
svg,.item,tr{break-inside:avoid}h2,h3{break-after:avoid}
details.data::details-content{content-visibility:visible}}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_report(folders: Iterable[PathLike], path: PathLike, *, title: str = "What the model leaned on") -> Card:
    """Writes the report of what commands left in folders, all or nothing, and gives its card.

    Args:
        folders: with files of ``--json`` and ``--out`` of ``find``, ``locate``, ``edit``, ``evaluate``, ``fcr`` and
            ``neurontune``; single files are taken, too.
        path: of the page.
        title: its heading.

    Raises:
        ValueError: a folder that does not exist, or nothing to report.
        OSError: a file that cannot be read or written.
    """
    job = read_job([os.fspath(folder) for folder in folders])
    card = card_of(job, title)
    write_bytes(path, page(job, card).encode("utf-8"))
    return card


def page(job: Job, card: Card) -> str:
    """The whole page."""
    measured = reports(job)
    parts = [
        _summary(job, card, measured),
        _glance(measured),
        _found(job),
        _located(job),
        _edits(job),
        _measured(measured),
        _texts(job),
        _repeat(job, card),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(card.title)}</title><style>{_PAGE_STYLE}{STYLE}</style></head><body>"
    )
    return f"{head}<main>{''.join(filter(None, parts))}</main></body></html>\n"


def reports(job: Job) -> dict[str, Report]:
    """The evaluations of a job by the name of their file."""
    found = {
        name: Report.of_rows(results.rows, results.head["settings"])
        for name, results in job.results.items()
        if results.head["name"] in ("evaluate", "fcr", "neurontune")
    }
    return {name: report for name, report in found.items() if any(m.metric == "accuracy" for m in report.measures)}


def _summary(job: Job, card: Card, measured: Mapping[str, Report]) -> str:
    notes = [
        f'<p class="verdict">{isolated(f"{name}: {note}")}</p>'
        for name, report in measured.items()
        for note in report.notes
    ]
    unread = [f"<p>{isolated(f'{name} could not be read: {why}')}</p>" for name, why in job.unread.items()]
    counted = [
        f"{len(things)} {one if len(things) == 1 else several}"
        for things, one, several in (
            (job.found, "table of candidates", "tables of candidates"),
            (job.located, "set of located neurons", "sets of located neurons"),
            (job.edits, "edit", "edits"),
            (measured, "evaluation", "evaluations"),
        )
        if things
    ]
    line = f"<p class=soft>{escape(', '.join(counted))}; Spurge {escape(spurge_version())}</p>"
    return f"<h1>{isolated(card.title)}</h1>{line}{''.join(notes)}{''.join(unread)}"


def _glance(measured: Mapping[str, Report]) -> str:
    """Of each evaluation that holds an edit against something, what it did, in one table a set."""
    parts = []
    for name, report in measured.items():
        tables = [
            _wide(Table(title, lines, foot), "glance") for title, lines, foot in report.glance() if len(lines) > 2
        ]
        parts += [f"<h3>{isolated(name)}</h3>{''.join(tables)}"] if tables else []
    return f"<h2>At a glance</h2>{''.join(parts)}" if parts else ""


def _found(job: Job) -> str:
    parts = []
    for name, rows in job.found.items():
        drawn = [mark for row in rows[:_CANDIDATES] if (mark := _lean(row)) is not None]
        figure = intervals("what the model leans on", drawn, baseline=0.0, unit="rise of the log-odds, nats")
        parts.append(f"<h3>{isolated(name)}</h3>{_figures([figure])}{_candidates(rows)}")
    return f"<h2>Found</h2>{''.join(parts)}" if parts else ""


def _candidates(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tables of those that are drawn, and of more; reasons come last, so that a narrow screen shows the rest."""
    head = ["candidate", "label", "role", "texts", "%", "q", "lean", "reason"]
    lines = []
    for row in rows[:_ROWS]:
        names = [_text(row, key) for key in ("word", "label", "role")]
        formats = (("count", ".0f"), ("share", ".0f"), ("q", ".3f"), ("lean", "+.2f"))
        numbers = [_formatted(row.get(key), digits) for key, digits in formats]
        lines.append([*names, *numbers, _text(row, "reason")])
    shown, rest = (
        _wide(Table("", [head, *own], left=3), "reasons") for own in (lines[:_CANDIDATES], lines[_CANDIDATES:])
    )
    further = f", {len(rows) - _ROWS} others in the file" if len(rows) > _ROWS else ""
    title = f"{len(lines) - _CANDIDATES} more{further}"
    return shown + (f"<details class=data><summary>{title}</summary>{rest}</details>" if rest else "")


def _lean(row: Mapping[str, Any]) -> Mark | None:
    value, low, high = (_number(row.get(key)) for key in ("lean", "low", "high"))
    if value is None:
        return None
    kinds: dict[str, Kind] = {"spurious": "flagged", "causal": "edit"}
    kind = kinds.get(str(row.get("role")), "control")
    return Mark(f"{row.get('word')} ({row.get('role')})", value, low, high, kind, f"{value:+.2f}")


def _located(job: Job) -> str:
    parts = []
    for name, located in job.located.items():
        rows = located.summary()
        marks = [
            Mark(row["site"], row["spurious"], kind="flagged" if row["spurious"] else "control")
            for row in sorted(rows, key=lambda row: -row["spurious"])[:12]
        ]
        phrases = [
            f"goes with {one['label']}: “{one['text']}” ({one['count']} texts)"
            for one in located.info.get("phrases", [])
        ]
        lines = [["site", "neurons", "causal", "spurious", "both"]]
        lines += [[str(row[key]) for key in ("site", "neurons", "causal", "spurious", "overlap")] for row in rows]
        figure = bars("spurious neurons by site", marks, unit="neurons")
        table = f"<details class=data><summary>all {len(rows)} sites</summary>{_wide(Table('', lines))}</details>"
        sentences = "".join(f"<p>{isolated(text)}</p>" for text in [repr(located), *phrases])
        parts.append(f"<h3>{isolated(name)}</h3>{sentences}{_figures([figure])}{table}")
    return f"<h2>Located</h2>{''.join(parts)}" if parts else ""


def _edits(job: Job) -> str:
    parts = []
    for name, edit in job.edits.items():
        used = edit.info.get("labels")
        sentences = [repr(edit), *([f"labels used: {used}"] if used else [])]
        body = "".join(f"<p>{isolated(text)}</p>" for text in sentences)
        parts.append(f"<h3>{isolated(name)}</h3>{body}{_details('how it was made', edit.info)}")
    for name, removal in job.removals.items():
        parts.append(f'<h3>{isolated(name)}</h3><div class="wide">{removal._repr_html_()}</div>')
    for name, tuned in job.tuned.items():
        parts.append(f'<h3>{isolated(name)}</h3><div class="wide">{tuned._repr_html_()}</div>')
    return f"<h2>Edited</h2>{''.join(parts)}" if parts else ""


def _measured(measured: Mapping[str, Report]) -> str:
    parts = []
    for name, report in measured.items():
        figures = [_drawn(report, case, metric) for case, metric in _panels(report)]
        tables = ["".join(map(_wide, _tables(*table))) for table in report.tables()]
        first, rest = tables[:3], tables[3:]
        more = ""
        if rest:
            more = f"<details class=data><summary>{len(rest)} more tables</summary>{''.join(rest)}</details>"
        parts.append(f"<h3>{isolated(name)}</h3>{_figures(figures)}{''.join(first)}{more}")
    legend = (
        "<p class=soft>Blue: the edit. Green: others beside it. Grey: controls. Dashed: the unedited model. Lines: "
        "95 % bootstrap intervals over examples; of random draws the standard deviation. threshold: no edit, but a "
        "constant added to the logits that answers each label as often as the edit does; zero-all: all located "
        "neurons erased; random: as many others changed as much; deleted: the cue taken out of the texts.</p>"
    )
    return f"<h2>Measured</h2>{legend}{''.join(parts)}" if parts else ""


def _tables(title: str, lines: list[list[str]], foot: list[str]) -> list[Table]:
    """A table in parts that fit on paper, each with the names again; intervals are not broken."""
    found = []
    for start in range(1, len(lines[0]), _METHODS):
        cells = [[cell.replace(", ", ",\u00a0") for cell in line[start : start + _METHODS]] for line in lines]
        last = start + _METHODS >= len(lines[0])
        parts = [[line[0], *own] for line, own in zip(lines, cells, strict=True)]
        found.append(Table(title if start == 1 else "", parts, foot if last else ()))
    return found


def _panels(report: Report) -> list[tuple[str, str]]:
    """What is drawn of an evaluation: of each set, and of their average, at most nine figures."""
    keys = list(dict.fromkeys((m.case, m.metric) for m in report.measures if m.metric in _MEASURES))
    whole = [key for key in keys if "/" not in key[0]]
    return sorted(whole, key=lambda key: list(_MEASURES).index(key[1]) if key[0] != "average" else -1)[:9]


def _drawn(report: Report, case: str, metric: str) -> str:
    found = {m.method: m for m in report.measures if (m.case, m.metric) == (case, metric)}
    own = [found[method] for method, _ in report.grouped(list(found))]
    edit = report.settings.get("name")
    marks = []
    for m in own:
        kind: Kind = "other"
        if m.method in (NONE, own[0].method):
            kind = "base"
        elif is_control(m.method):
            kind = "control"
        elif m.method == edit or edit is None:
            kind = "edit"
        low, high = m.low, m.high
        if low is None and m.spread is not None:
            low, high = m.value - m.spread, m.value + m.spread
        marks.append(Mark(m.method, m.value, low, high, kind))
    return intervals(f"{case}: {_MEASURES[metric]}", marks, baseline=own[0].value, unit="percent")


def _texts(job: Job) -> str:
    parts = []
    for name, rows in job.changed.items():
        shown = "".join(_text_of(row) for row in rows[:_TEXTS])
        parts.append(f"<h3>{isolated(name)}: {len(rows)} texts</h3>{shown}")
    legend = (
        "<p class=soft>Shaded: how much each word speaks for the answer before the edit, by deleting it alone, in the "
        "unedited model (left) and in the edited one (right). "
        "<mark style='background:rgba(var(--for),.5)'>for it</mark> "
        "<mark style='background:rgba(var(--against),.5)'>against it</mark></p>"
    )
    return f"<h2>Texts with another answer</h2>{legend}{''.join(parts)}" if parts else ""


def _text_of(row: Mapping[str, Any]) -> str:
    text, words = str(row["text"]), _words(row.get("words"), len(str(row["text"])))
    most = max((abs(value) for word in words for value in word[2:]), default=0.0)
    right = [" (right)" if row[side] == row["label"] else "" for side in ("before", "after")]
    groups = row.get("groups") or []
    where = f"{row['set']}; label {row['label']}" + (f"; {', '.join(map(str, groups))}" if groups else "")
    pair = f'<p class="text" dir="auto"><bdi>{escape(str(row["pair"]))}</bdi></p>' if row.get("pair") else ""
    sides = []
    for side, place, note in (("before", 2, right[0]), ("after", 3, right[1])):
        share = _number(row.get(f"{side}_share"))
        sure = "" if share is None else f", {100 * share:.0f} %"
        head = f"<p class=soft>{side}: {isolated(str(row[side]))}{sure}{note}</p>"
        shaded = _shaded(text, [(start, end, values[place - 2]) for start, end, *values in words], most)
        sides.append(f'<div>{head}<p class="text" dir="auto"><bdi>{shaded}</bdi></p>{pair}</div>')
    return f"<div class=item><p class=soft>{isolated(where)}</p><div class=pair>{''.join(sides)}</div></div>"


def _words(value: Any, length: int) -> list[tuple[int, int, float, float]]:
    """Words of a text with their two values, in order, as far as they fit it."""
    found: list[tuple[int, int, float, float]] = []
    for word in value if isinstance(value, Sequence) and not isinstance(value, str) else []:
        numbers = [_number(one) for one in word] if isinstance(word, Sequence) else []
        if len(numbers) != 4 or None in numbers:
            continue
        start, end = int(numbers[0] or 0), int(numbers[1] or 0)
        if (found[-1][1] if found else 0) <= start < end <= length:
            found.append((start, end, float(numbers[2] or 0), float(numbers[3] or 0)))
    return found


def _shaded(text: str, words: Sequence[tuple[int, int, float]], most: float) -> str:
    parts, place = [], 0
    for start, end, value in words:
        strength = 0.6 * abs(value) / most if most else 0.0
        parts.append(escape(text[place:start]))
        word = escape(text[start:end])
        if strength >= 0.03:
            side = "for" if value > 0 else "against"
            word = (
                f'<mark title="{value:+.2f} nats" style="background:rgba(var(--{side}),{strength:.2f})">{word}</mark>'
            )
        parts.append(word)
        place = end
    return "".join([*parts, escape(text[place:])])


def _repeat(job: Job, card: Card) -> str:
    commands = card.facts["commands"]
    typed = f"<h3>Commands</h3><pre>{escape(chr(10).join(map(str, commands)))}</pre>" if commands else ""
    settings = "".join(_details(f"settings of {name}", _machine(results)) for name, results in job.results.items())
    lines = [["file", "what", "bytes", "SHA-256"]]
    lines += [[one.name, one.what, f"{one.size:,}", one.sha256] for one in job.files]
    files = f"<details class=data><summary>{len(job.files)} files</summary>{_wide(Table('', lines, left=2))}</details>"
    both = (("edit card, JSON", card.json()), ("edit card, Markdown", card.markdown()))
    cards = "".join(f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in both)
    return f"<h2>To repeat it</h2>{typed}{settings}{files}{cards}"


def _machine(results: Results) -> dict[str, Any]:
    head = results.head
    names = ("created", "spurge", "commit", "device", "versions", "settings")
    return {name: head[name] for name in names}


def _details(title: str, value: Any) -> str:
    text = indented_json(value, nan_to_null=True)
    return f"<details><summary>{isolated(title)}</summary><pre>{escape(text)}</pre></details>"


def _figures(figures: Sequence[str]) -> str:
    drawn = "".join(f"<div>{figure}</div>" for figure in figures if figure)
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def _wide(table: Table, kind: str = "") -> str:
    return f'<div class="{f"wide {kind}".rstrip()}">{table.html()}</div>' if len(table.lines) > 1 else ""


def _text(row: Mapping[str, Any], name: str) -> str:
    return str(row.get(name) or "")


def _number(value: Any) -> float | None:
    """A finite number, which a table may hold as text."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if found - found == 0 else None


def _formatted(value: Any, digits: str) -> str:
    number = _number(value)
    return "" if number is None else f"{number:{digits}}"
