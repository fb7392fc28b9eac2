"""What a search found: a table that a person reviews, and what becomes of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base import files
from spurge.engine.base.checks import choice
from spurge.engine.base.files import PathLike
from spurge.engine.base.tables import Table, aligned, folded, page, width_of
from spurge.engine.data.examples import Examples
from spurge.engine.data.rows import check_names, of_file, read_column, read_text
from spurge.engine.data.table_files import read_records
from spurge.engine.data.words import split_words
from spurge.methods.find.candidates import KINDS, WORDED, presence
from spurge.methods.find.roles import ROLES, Role
from spurge.methods.golden.corpus_words import is_kept
from spurge.methods.golden.golden import GoldenTokens

_WIDTH = 80
_LEAST_DOUBT = 0.1  # that a candidate is a cause


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate of the table.

    Attributes:
        word: its name: words, a mark, ``"at least 12 words"``, ``"column = value"``.
        kind, place: see `spurge.methods.find.candidates.Candidate`.
        label: the one it goes with.
        role, reason: what is proposed, and why.
        keep: whether it counts; a person changes it, and ``role`` and ``label``.
        causal: the score of a cause, 0 to 1.
        count: texts that have it.
        share: of these, percent with its label.
        log_odds: of its label, with it against without.
        q: false discovery rate of being bound to the label (of all units) and leaned on (of those that are measured),
            the larger of the two, among candidates that are no cause; of causes, among these.
        q_data: of being bound to the label alone, among all units of the texts.
        lean, low, high: rise of the label's log-odds by it in nats, with a 95 % interval.
        delete, swap, insert: the same, by each change; NaN where it cannot be made.
        flips: percent of the texts with it whose answer changes without it.
        measured: by exact passes of changed texts; False: from texts as they are.
        against: accuracy in percent where it stands with another label; NaN where it never does.
        against_count: how many such texts.
        examples: texts with it.
    """

    word: str
    kind: str
    place: str = ""
    label: str
    role: Role
    keep: str = "yes"
    reason: str = ""
    causal: float = 0.5
    count: int = 0
    share: float = float("nan")
    log_odds: float = float("nan")
    q: float = float("nan")
    q_data: float = float("nan")
    lean: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    delete: float = float("nan")
    swap: float = float("nan")
    insert: float = float("nan")
    flips: float = float("nan")
    measured: bool = False
    against: float = float("nan")
    against_count: int = 0
    examples: tuple[str, ...] = ()

    @property
    def weight(self) -> float:
        """What ranks it: how much the model surely leans on it over all texts, as far as it is no cause.

        A whole class of words can be a shortcut, and then looks like causes: none is taken for wholly one.
        """
        lean = 0.0 if np.isnan(self.low) else max(0.0, self.low)
        return lean * self.count * max(_LEAST_DOUBT, 1 - self.causal)


_NAMES = tuple(one.name for one in fields(Row))
_NUMBERS = tuple(one.name for one in fields(Row) if one.type in ("float", "int"))


@dataclass(frozen=True, repr=False)
class Found:
    """Candidates, those that most likely are shortcuts and are leaned on first. Made by :func:`spurge.find`.

    Attributes:
        rows: of the table.
        labels: names of the model's outputs, in order.
        info: how it was found, JSON-able.
    """

    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        roles = ", ".join(f"{len(self.of_role(role))} {role}" for role in ROLES)
        return f"Found({len(self)} candidates: {roles})"

    def of_role(self, role: Role) -> tuple[Row, ...]:
        """The rows that are kept and have this role, in order.

        Raises:
            ValueError: no such role.
        """
        choice("role", role, ROLES)
        return tuple(row for row in self.rows if row.role == role and is_kept(row.keep))

    def top(self, n: int = 10) -> Found:
        """The first ``n`` rows."""
        return replace(self, rows=self.rows[:n])

    def table(self, n: int = 15) -> str:
        """The first ``n`` rows, at most 80 columns wide."""
        head = ["candidate", "label", "role", "n", "%", "q", "lean", "flips"]
        lines = [head, *(_cells(row) for row in self.rows[:n])]
        room = _WIDTH - max(map(width_of, aligned([line[1:] for line in lines], left=2))) - 2
        lines = [[_cut(line[0], max(room, 12)), *line[1:]] for line in lines]
        return "\n".join(folded(lines, left=3, width=_WIDTH, rule=True))

    def __str__(self) -> str:
        reasons = [f"{row.word}: {row.role}, {row.reason}" for row in self.rows[:3]]
        return "\n".join([self.table(), "", *(_cut(reason, _WIDTH) for reason in reasons)])

    def _repr_html_(self) -> str:
        texts, numbers = ["word", "kind", "label", "role"], ["count", "share", "q", "lean", "low", "high", "flips"]
        names = [*texts, "reason", *numbers, "against"]
        lines = [names, *([_text(getattr(row, name)) for name in names] for row in self.rows)]
        return page([Table("", lines, left=len(texts) + 1)])

    # Files

    def save(self, path: PathLike) -> None:
        """Writes the table for review, ``.tsv``: all columns of `Row`, examples joined by " | ".

        ``role``, ``keep`` and ``label`` are to be changed; `load` and `GoldenTokens.load` read it back.

        Raises:
            ValueError: another ending.
            OSError: the file cannot be written.
        """
        if Path(path).suffix.lower() != ".tsv":
            raise ValueError(f"path: expected a file that ends in .tsv, got {str(path)!r}")
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(_NAMES)
        for row in self.rows:
            writer.writerow([_plain(getattr(row, name)) for name in _NAMES])
        files.write_bytes(path, stream.getvalue().encode("utf-8"))

    @classmethod
    def load(cls, path: PathLike, labels: Sequence[str] | None = None) -> Found:
        """Reads a table that :meth:`save` wrote, as a person left it; rows may be taken out or added.

        Needed are ``word``, ``kind``, ``label``, ``role`` and ``keep``.

        Args:
            path: the file.
            labels: names of the model's outputs in order; default those of the file in alphabetical order.

        Raises:
            ValueError: a missing column, an unknown kind, role, label or ``keep``; the message has the row.
            OSError: the file cannot be read.
        """
        with of_file(path):
            rows = [_row(raw, number) for number, raw in enumerate(read_records(path), 1)]
        if not rows:
            raise ValueError(f"{path}: no rows")
        names = check_names(labels) if labels is not None else tuple(sorted({row.label for row in rows}))
        for number, row in enumerate(rows, 1):
            if row.label not in names:
                raise ValueError(f"{path}: row {number}: label {row.label!r:.60} is none of {names}")
        return cls(tuple(rows), names, {"file": Path(path).name, "reviewed": True})

    def reviewed(self, *, spurious: Iterable[str] = (), causal: Mapping[str, Iterable[str]] | None = None) -> Found:
        """The table as a person leaves it who names what counts, in the place of changing its file.

        Args:
            spurious: candidates that ought not to decide.
            causal: label to words that ought to decide for it, candidates or not; with it, proposed causes that are not
                among them become undecided.

        Raises:
            ValueError: a spurious word that is no candidate, no such label, or a word named twice.
        """
        named: dict[str, tuple[Role, str | None]] = dict.fromkeys(spurious, ("spurious", None))
        candidates = {row.word for row in self.rows}
        if strange := [word for word in named if word not in candidates]:
            first = f", the first is {self.rows[0].word!r:.60}" if self.rows else ": there are none"
            raise ValueError(f"spurious: {strange[0]!r:.60} is no candidate{first}")
        for label, words in (causal or {}).items():
            choice("causal", label, self.labels)
            for word in words:
                if word in named:
                    raise ValueError(f"causal: {word!r:.60} is named twice")
                named[word] = ("causal", label)
        rows = []
        for row in self.rows:
            role, own = named.get(row.word, (row.role, None))
            if row.word not in named and row.role == "causal" and causal is not None:
                role = "undecided"
            changed = role != row.role or own not in (None, row.label)
            reason = f"reviewed; proposed: {row.role}" if changed else row.reason
            rows.append(replace(row, role=role, label=own or row.label, reason=reason))
        for word, (_, own) in named.items():
            if own is not None and word not in candidates:
                kind = WORDED[len(split_words(word)) > 1]
                rows.append(Row(word=word, kind=kind, label=own, role="causal", causal=1.0, reason="reviewed; added"))
        return replace(self, rows=tuple(rows), info={**self.info, "reviewed": True})

    # What becomes of it

    def golden(self, *, irrelevant: Iterable[str] = ()) -> GoldenTokens:
        """Golden words: causal ones of each label, and spurious ones as irrelevant; words and phrases that are kept.

        Args:
            irrelevant: more words that say nothing of any label.

        Raises:
            ValueError: a label without a causal word.
        """
        causal = {
            label: [r.word for r in self.of_role("causal") if r.kind in WORDED and r.label == label]
            for label in self.labels
        }
        listed = {word for words in causal.values() for word in words}
        spurious = [row.word for row in self.of_role("spurious") if row.kind in WORDED and row.word not in listed]
        info = {"source": "find", **{name: self.info[name] for name in ("file", "reviewed") if name in self.info}}
        return GoldenTokens(self.labels, causal, [*spurious, *irrelevant], info)

    def feature(self, word: str, examples: Examples, columns: Mapping[str, Sequence[Any]] | None = None) -> Tensor:
        """Which texts have a candidate, bool ``[N]``: the feature that `FCR` removes.

        Args:
            word: of a row.
            examples: any texts.
            columns: those of the search, of these texts, for a candidate that is a column.

        Raises:
            ValueError: no such row, or a candidate that these texts do not tell.
        """
        row = next((row for row in self.rows if row.word == word), None)
        if row is None:
            raise ValueError(f"word: {word!r:.60} is no candidate, the first is {self.rows[0].word!r:.60}")
        return torch.from_numpy(presence(row.kind, row.word, row.place, examples, columns))

    def groups(
        self,
        examples: Examples,
        words: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Examples:
        """The examples in groups of their label and of the spurious candidate that they have.

        A text with several is in the group of the first; ``"negative, near the old station"``, ``"negative, none"``.

        Args:
            words: candidates, by default the spurious ones that are kept, topics left out.
            columns: as :meth:`feature`.

        Raises:
            ValueError: no spurious candidate, or what :meth:`feature` refuses.
        """
        if words is None:
            words = [row.word for row in self.of_role("spurious") if row.kind != "topic"]
        if not words:
            raise ValueError("words: no candidate is spurious; name some")
        having = torch.stack([self.feature(word, examples, columns) for word in words], 1)
        names = [words[int(own.int().argmax())] if bool(own.any()) else "none" for own in having]
        rows = [
            replace(row, group=f"{examples.labels[row.label]}, {name}")
            for row, name in zip(examples, names, strict=True)
        ]
        return Examples(rows, examples.labels)


def _row(raw: Mapping[str, Any], number: int) -> Row:
    """A row of a reviewed file."""
    values: dict[str, Any] = {
        name: read_text(read_column(raw, name, number), name, number).strip()
        for name in ("word", "kind", "label", "role", "keep")
    }
    values["role"], values["keep"] = values["role"].lower(), values["keep"].lower()
    for name, allowed in (("kind", KINDS), ("role", ROLES)):
        if values[name] not in allowed:
            raise ValueError(f"row {number}: {name} is one of {allowed}, got {values[name]!r:.40}")
    try:
        is_kept(values["keep"])
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    for name in _NAMES:
        text = str(raw.get(name) or "").strip()
        if name in values or not text:
            continue
        if name in _NUMBERS:
            try:
                values[name] = int(text) if name.endswith("count") else float(text)
            except ValueError as error:
                raise ValueError(f"row {number}: its {name} must be a number, got {text!r:.40}") from error
        else:
            values[name] = (
                tuple(text.split(" | ")) if name == "examples" else text == "True" if name == "measured" else text
            )
    return Row(**values)


def _plain(value: Any) -> str:
    """A cell of the file; numbers with six digits, no line breaks."""
    if isinstance(value, tuple):
        value = " | ".join(value)
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return " ".join(str(value).split())


def _cells(row: Row) -> list[str]:
    lean = "" if np.isnan(row.lean) else f"{row.lean:+.2f} ±{row.high - row.lean:.2f}"
    mark = "" if row.measured else "?"
    flips = "" if np.isnan(row.flips) else f"{row.flips:.0f}"
    share = "" if np.isnan(row.share) else f"{row.share:.0f}"
    return [row.word, _cut(row.label, 12), row.role, str(row.count), share, _small(row.q), lean + mark, flips]


def _small(q: float) -> str:
    return "" if np.isnan(q) else "<.001" if q < 0.001 else f"{q:.3f}".removeprefix("0")


def _text(value: Any) -> str:
    return ("" if np.isnan(value) else f"{value:.3g}") if isinstance(value, float) else str(value)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
