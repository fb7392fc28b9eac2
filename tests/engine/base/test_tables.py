from __future__ import annotations

import pytest

from spurge.engine.base.tables import aligned


def test_columns_stand_below_each_other() -> None:
    lines = [["edit", "all", "flags"], ["none", "78.5", ""], ["zero all", "9.25", "x"]]
    assert aligned(lines) == ["edit       all  flags", "none      78.5", "zero all  9.25      x"]
    assert aligned(lines, left=3) == ["edit      all   flags", "none      78.5", "zero all  9.25  x"]
    assert aligned(lines, left=0, gap=1, least=(3, 5, 0)) == [
        "    edit   all flags",
        "    none  78.5",
        "zero all  9.25     x",
    ]


def test_no_lines_and_lines_of_different_length() -> None:
    assert aligned([]) == []
    with pytest.raises(ValueError, match="argument 2 is"):
        aligned([["a", "b"], ["c"]])
