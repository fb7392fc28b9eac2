"""Tables as text, and as HTML: what notebooks show of results. HTML is escaped, and loads nothing."""

from __future__ import annotations

import shutil
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_LEAST_NAME = 16  # columns that the names at a line's beginning keep, however wide the rest is


def width_of(text: str) -> int:
    """Columns that a text takes in a terminal: wide characters two, marks that combine with another none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )


def terminal_width() -> int:
    """Columns of the terminal, or of ``COLUMNS``; 80 where neither is known."""
    return max(20, shutil.get_terminal_size((80, 24)).columns)


def wrapped(text: str, indent: str = "  ", width: int | None = None) -> str:
    """Sentences, one a line, broken where they are wider than the terminal; what goes on is indented."""
    width = terminal_width() if width is None else width
    return "\n".join(
        line if len(line) <= width else textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)
        for line in text.split("\n")
    )


def aligned(lines: Sequence[Sequence[str]], *, left: int = 1, gap: int = 2, least: Sequence[int] = ()) -> list[str]:
    """Lines of cells as texts in which columns stand below each other, without blanks at their ends.

    Args:
        lines: all of the same number of cells, C.
        left: how many columns are flush left; the others are flush right.
        gap: blanks between two columns.
        least: width of each column at least, C numbers; by default the widest cell's decides alone.

    >>> aligned([["edit", "accuracy"], ["none", "78.5"]])
    ['edit  accuracy', 'none      78.5']
    """
    widths = _widths(lines, least)
    out = []
    for line in lines:
        cells = [
            cell + blank if i < left else blank + cell
            for i, (cell, wide) in enumerate(zip(line, widths, strict=True))
            for blank in [" " * (wide - width_of(cell))]
        ]
        out.append((" " * gap).join(cells).rstrip())
    return out


def _widths(lines: Sequence[Sequence[str]], least: Sequence[int]) -> list[int]:
    widths = [max(map(width_of, column)) for column in zip(*lines, strict=True)]
    return list(map(max, widths, least)) if least else widths


def folded(
    lines: Sequence[Sequence[str]],
    *,
    left: int = 1,
    gap: int = 2,
    least: Sequence[int] = (),
    width: int | None = None,
    rule: bool = False,
) -> list[str]:
    """:func:`aligned` within a width: columns that have no room go on below, each part with the first column again.

    A first column that leaves the others no room is broken over several lines, and a part of one column that is still
    too wide is, too.

    Args:
        lines, left, gap, least: as of `aligned`; the first line is the head.
        width: columns of the text; default those of the terminal, 80 where there is none.
        rule: whether a line is drawn below each head.

    >>> folded([["edit", "accuracy", "worst group"], ["none", "78.5", "40.0"]], width=20)
    ['edit  accuracy', 'none      78.5', '', 'edit  worst group', 'none         40.0']
    """
    width = terminal_width() if width is None else width
    widths = _widths(lines, least)
    widest = max(widths[1:], default=0)
    first = min(widths[0], max(_LEAST_NAME, width - gap - widest, 1)) if len(widths) > 1 else widths[0]
    first = min(first, width)
    parts: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        used = first + sum(gap + min(widths[other], width - first - gap) for other in parts[-1])
        if parts[-1] and used + gap + widths[column] > width:
            parts.append([])
        parts[-1].append(column)
    out: list[str] = []
    for part in parts:
        chosen = [0, *part]
        limits = [first, *(max(1, min(widths[column], width - first - gap)) for column in part)]
        body, heads = [], 0
        for number, line in enumerate(lines):
            rows = _broken([line[column] for column in chosen], limits)
            heads = len(rows) if number == 0 else heads
            body += rows
        own_least = [min(least[column], limit) for column, limit in zip(chosen, limits, strict=True)] if least else ()
        text = aligned(body, left=sum(column < left for column in chosen), gap=gap, least=own_least)
        if rule:
            text.insert(heads, "-" * max(map(width_of, text)))
        out += ["", *text] if out else text
    return out


def _broken(cells: Sequence[str], limits: Sequence[int]) -> list[list[str]]:
    """One line of cells as several, none of them wider than its limit."""
    columns = [_pieces(cell, limit) for cell, limit in zip(cells, limits, strict=True)]
    height = max(map(len, columns))
    return [[column[row] if row < len(column) else "" for column in columns] for row in range(height)]


def _pieces(cell: str, limit: int) -> list[str]:
    if width_of(cell) <= limit:
        return [cell]
    wide = width_of(cell) > len(cell)  # textwrap counts characters
    return textwrap.wrap(cell, max(1, limit // 2 if wide else limit), break_on_hyphens=False) or [""]


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: above it; may be empty.
        lines: the head, then the others, all of the same number of cells.
        foot: lines below it.
        left: how many columns are flush left.
    """

    title: str
    lines: Sequence[Sequence[str]]
    foot: Sequence[str] = ()
    left: int = 1

    def html(self) -> str:
        """``<table>``, with its title as caption and its footnotes behind it."""
        head, *body = self.lines
        caption = f"<caption>{isolated(self.title)}</caption>" if self.title else ""
        rows = "".join(f"<tr>{self._cells(line, 'td')}</tr>" for line in body)
        foot = "".join(f"<p>{isolated(line)}</p>" for line in self.foot)
        return f"<table>{caption}<thead><tr>{self._cells(head, 'th')}</tr></thead><tbody>{rows}</tbody></table>{foot}"

    def _cells(self, line: Sequence[str], tag: str) -> str:
        side = ("left", "right")
        return "".join(
            f'<{tag} style="text-align:{side[column >= self.left]}">{isolated(cell)}</{tag}>'
            for column, cell in enumerate(line)
        )


def isolated(text: str) -> str:
    """A text as HTML; where it could turn the reading direction of what follows, it is kept to itself."""
    plain = escape(text)
    return plain if all(ord(one) < 0x590 for one in text) else f"<bdi>{plain}</bdi>"


def page(tables: Iterable[Table], notes: Iterable[str] = ()) -> str:
    """Tables, and sentences below them."""
    parts = [table.html() for table in tables]
    parts += [f"<p>{isolated(note)}</p>" for note in notes]
    return f"<div>{''.join(parts)}</div>"
