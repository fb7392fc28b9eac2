"""Quotes in tables: what could be either is refused by its row or said, and both readings can be asked for."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from spurge.engine.base.files import FileError
from spurge.engine.data.examples import Examples
from spurge.engine.data.table_files import read_records

STRAY = 'text{0}label\n" wonderful film{0}1\nbad film{0}0\nshe said great "{0}1\n'
INCHES = 'text{0}label\n"wonderful" film{0}1\n'


def table(folder: Path, content: str, suffix: str) -> Path:
    path = folder / f"a{suffix}"
    path.write_text(content.format({".tsv": "\t", ".csv": ","}[suffix]))
    return path


def texts(path: Path, quoting: bool | None = None) -> list[str]:
    return [row["text"] for row in read_records(path, quoting)]


def test_a_tsv_field_that_runs_over_a_line_break_is_refused_by_its_row(tmp_path: Path) -> None:
    path = table(tmp_path, STRAY, ".tsv")
    message = r"a.tsv: row 1: a field that begins with a quote on line 2 runs on to line 4; quoting=False takes quotes"
    with pytest.raises(FileError, match=message):
        Examples.load(path)
    kept = Examples.load(path, quoting=False)
    assert [(row.text, row.label) for row in kept] == [
        ('" wonderful film', 1),
        ("bad film", 0),
        ('she said great "', 1),
    ]
    assert texts(path, True) == [" wonderful film\t1\nbad film\t0\nshe said great "]


def test_csv_lines_that_could_be_rows_by_themselves_bring_a_warning(tmp_path: Path) -> None:
    path = table(tmp_path, STRAY, ".csv")
    with pytest.warns(UserWarning, match=r"1 rows have a quoted field .* the first on line 2, .* quoting=False"):
        assert len(texts(path)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(texts(path, True)) == 1
        assert len(texts(path, False)) == 3
        path.write_text('text,label\n"a film,\nin two lines, and more",1\n')  # no line of it is a row
        assert texts(path) == ["a film,\nin two lines, and more"]


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_quotes_inside_a_line_are_read_as_asked(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path, INCHES, suffix)
    with pytest.raises(FileError, match=r"line 2: .*where quotes are text: quoting=False"):
        texts(path)
    assert texts(path, False) == ['"wonderful" film']
