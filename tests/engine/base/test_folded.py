"""Tables keep to a width, and lose nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.base.tables import aligned, folded, terminal_width, width_of

CELLS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), max_size=30)


@given(
    st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=5)),
    st.integers(20, 100),
    st.booleans(),
)
def test_no_line_is_wider_and_no_character_is_lost(lines: list[list[str]], width: int, rule: bool) -> None:
    text = folded(lines, width=width, rule=rule)
    assert max(map(width_of, text)) <= width
    shown = sorted("".join("".join(text).split()))
    for line in lines:
        for cell in line:
            for one in set(cell) - {"-"}:
                assert shown.count(one) >= cell.count(one)


def test_what_fits_stays_as_it_is() -> None:
    lines = [["edit", "accuracy", "worst group"], ["none", "78.5", "40.0"]]
    assert folded(lines, width=80) == aligned(lines)
    assert folded(lines, width=80, rule=True)[1] == "-" * 27


def test_the_terminal_says_how_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "33")
    assert terminal_width() == 33
    assert len(folded([["edit", "accuracy", "worst group"], ["none", "78.5 [70.1, 83.2]", "40.0"]])) == 5
    monkeypatch.setenv("COLUMNS", "1")
    assert terminal_width() == 20
    assert [width_of(text) for text in ("ab", "漢字", "é", "e\u0301")] == [2, 4, 1, 1]
