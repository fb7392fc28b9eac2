"""An edit card: what an edit of a model is, what it was measured to do, and what it was not, for model hubs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spurge.engine.base.files import PathLike, indented_json, spurge_version, write_bytes
from spurge.engine.evaluation.report import Report
from spurge.report.folders import Job

_METRICS = ("accuracy", "worst_group", "mean_group", "auc", "mean_group_auc", "by_threshold", "agreement", "divergence")


@dataclass(frozen=True)
class Card:
    """The card of a job.

    Attributes:
        title: its heading.
        facts: everything it says, JSON-able.
    """

    title: str
    facts: dict[str, Any]

    def json(self) -> str:
        """As JSON, for machines."""
        return indented_json(self.facts, nan_to_null=True)

    def markdown(self) -> str:
        """As Markdown with a front matter, as model hubs take it."""
        facts = self.facts
        lines = ["---", "library_name: spurge", "tags:", "- model-editing", "- spurious-correlations", "---", ""]
        lines += [f"# {_flat(self.title)}", ""]
        for edit in facts["edits"]:
            used = f"; labels used: {edit['labels']}" if edit["labels"] else ""
            lines.append(f"- `{_code(edit['file'])}`: {_flat(edit['what'])}{used}; SHA-256 `{edit['sha256']}`")
        lines += ["", *(f"> {_flat(note)}" for note in facts["notes"])]
        for measured in facts["measured"]:
            lines += ["", f"## {_flat(measured['file'])}", "", "| case | method | metric | value | interval | n |"]
            lines.append("|---|---|---|---|---|---|")
            for row in measured["rows"]:
                low, high = row["low"], row["high"]
                interval = "" if low is None else f"{low:.3g} to {high:.3g}"
                cells = (
                    _flat(row["case"]),
                    _flat(row["method"]),
                    row["metric"],
                    f"{row['value']:.4g}",
                    interval,
                    row["n"],
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
        if facts["commands"]:
            lines += ["", "## Commands", "", *(f"    {command}" for command in map(_one_line, facts["commands"]))]
        lines += ["", "## What this does not say", "", _LIMITS, ""]
        return "\n".join(lines)

    def save(self, path: PathLike) -> None:
        """Writes the card, all or nothing: Markdown where the name ends in ``.md``, else JSON.

        Raises:
            OSError: the file cannot be written.
        """
        text = self.markdown() if str(path).lower().endswith(".md") else self.json()
        write_bytes(path, text.encode("utf-8"))


_LIMITS = (
    "The numbers hold for the sets that were measured, and intervals cover the choice of examples alone. Groups that "
    "no set names were not looked at."
)


def card_of(job: Job, title: str) -> Card:
    """The card of everything in a job."""
    hashes = {one.name: one.sha256 for one in job.files}
    edits = [
        {
            "file": name,
            "what": repr(edit),
            "method": edit.info.get("method"),
            "labels": edit.info.get("labels"),
            "sha256": hashes[name],
            "model": edit.model,
        }
        for name, edit in job.edits.items()
    ]
    measured, notes = [], []
    for name, results in job.results.items():
        report = Report.of_rows(results.rows, results.head["settings"])
        notes += [f"{name}: {note}" for note in report.notes]
        rows = [
            {
                "case": m.case,
                "method": m.method,
                "metric": m.metric,
                "value": m.value,
                "low": m.low,
                "high": m.high,
                "n": m.n,
                "unit": m.unit,
            }
            for m in report.measures
            if m.metric in _METRICS
        ]
        if rows:
            measured.append({"file": name, "created": results.head["created"], "rows": rows})
    commands = [c for results in job.results.values() if (c := results.head["settings"].get("command"))]
    facts = {
        "title": title,
        "spurge": spurge_version(),
        "edits": edits,
        "notes": notes,
        "measured": measured,
        "commands": commands,
        "limits": _LIMITS,
    }
    return Card(title, facts)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def _flat(text: str) -> str:
    """A text within Markdown: on one line, and of no meaning to it or to HTML."""
    out = _one_line(text)
    for mark in "\\`*_[]|#":
        out = out.replace(mark, f"\\{mark}")
    return out.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    return _one_line(text).replace("`", "'")
