"""Text tables."""

from __future__ import annotations

from collections.abc import Sequence


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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths = list(map(max, widths, least)) if least else widths
    return [
        (" " * gap)
        .join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        .rstrip()
        for line in lines
    ]
