"""Plain-text tables of flat rows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spurge.report.tables import grid, pivot, seconds


def row(case: str, method: str, value: float, metric: str = "accuracy", **rest: object) -> dict[str, object]:
    return {"case": case, "method": method, "metric": metric, "value": value, "unit": "percent", **rest}


ROWS = [
    row("broken", "none", 60.0),
    row("broken", "none", 55.5, "accuracy_low"),
    row("broken", "none", 64.0, "accuracy_high"),
    row("broken", "best", 97.25),
    row("broken", "best", 95.0, "accuracy_low"),
    row("broken", "best", 99.0, "accuracy_high"),
    row("broken", "random", 59.0, spread=2.5),
    row("kept", "none", 100.0),
    row("kept", "best", 99.5),
    row("kept", "best", 0.4, "eta"),
]


def test_pivot_shows_value_change_and_interval() -> None:
    head, rule, none, best, random = pivot(ROWS).splitlines()
    assert head.split() == ["accuracy,", "percent", "broken", "kept"]
    assert set(rule) == {"-"}
    assert none.split() == ["none", "60.0", "[55.5,", "64.0]", "100.0"]
    assert best.split() == ["best", "97.2", "+37.2", "[95.0,", "99.0]", "99.5", "-0.5"]
    assert random.split() == ["random", "59.0", "-1.0", "±", "2.5"]


def test_pivot_columns_line_up() -> None:
    lines = pivot(ROWS).splitlines()
    assert lines[2].index("60.0") == lines[3].index("97.2") == lines[4].index("59.0")
    assert lines[2].index("[55.5") == lines[3].index("[95.0")


def test_pivot_picks_and_orders() -> None:
    text = pivot(ROWS, methods=["best", "none"], cases=["kept"], base=None)
    assert [line.split() for line in text.splitlines()[2:]] == [["best", "99.5"], ["none", "100.0"]]
    assert "eta" in pivot(ROWS, "eta", base=None)


def test_pivot_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="metric: no row has 'seconds'"):
        pivot(ROWS, "seconds")
    with pytest.raises(ValueError, match="rows: two rows for 'kept', 'none', 'accuracy'"):
        pivot([*ROWS, row("kept", "none", 1.0)])
    with pytest.raises(ValueError, match="rows: a row has no 'value'"):
        pivot([{"case": "kept", "method": "none", "metric": "accuracy"}])


def test_grid_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="lines: need a head"):
        grid([])
    with pytest.raises(ValueError, match="lines: line 1 has 1 cells, the head has 2"):
        grid([["a", "b"], ["c"]])


CELLS = st.text(st.characters(codec="ascii", exclude_categories=("C", "Z")), min_size=1, max_size=8)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_grid_keeps_every_cell_in_its_place(lines: list[list[str]]) -> None:
    text = grid(lines).splitlines()
    assert len(text) == len(lines) + 1
    del text[1]
    assert [line.split() for line in text] == lines
    assert all(len(line) <= len(text[0]) or len(lines) > 1 for line in text)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1, unique=True), st.floats(0, 100))
def test_pivot_shows_every_row(keys: list[tuple[str, str]], value: float) -> None:
    text = pivot([row(case, method, value) for case, method in keys], base=None)
    assert text.count(f"{value:.1f}") >= len(keys)
    assert not math.isnan(value)


def test_seconds() -> None:
    assert [seconds(value) for value in (0.04, 59.94, 61.0, 3599.6)] == ["0.0 s", "59.9 s", "1 min 1 s", "60 min 0 s"]
