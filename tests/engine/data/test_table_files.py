"""Quotes in tables: what could be either is refused by its row or said, and both readings can be asked for."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from spurge.engine.base.files import FileError
from spurge.engine.data.examples import Examples
from spurge.engine.data.rows import read_number
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


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packer", PACKERS)
def test_a_damaged_compressed_table_is_refused(tmp_path: Path, packer: str) -> None:
    packed = PACKERS[packer](b'{"text": "a", "label": 0}\n' * 99)
    path = tmp_path / f"a.jsonl{packer}"
    path.write_bytes(packed)
    assert len(texts(path)) == 99
    for damaged in (packed[: len(packed) // 2], packed[:9], b"no", packed[:-9] + bytes(9)):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"a\.jsonl.*the compressed file is truncated or damaged"):
            texts(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.bz2"])
def test_a_row_that_unfolds_a_thousand_times_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACKERS[path.suffix](b"text\n" + b"a" * 2**26))
    assert path.stat().st_size < 2**17
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileError, match=r"line [12].*(not JSON|more than 16777216 characters)"):
        texts(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_a_quoted_field_that_never_ends_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b'text\n"' + b"a\n" * 2**23))
    with pytest.raises(FileError, match=r"line [0-9]+: the row has more than 16777216 characters"):
        texts(path)


@pytest.mark.parametrize(
    "line", ['{"text":"a","text":"b"}', '{"text":"a","x":1e999}', "[" * 5000, '{"x":%s}' % ("9" * 5000)]
)
def test_json_rows_of_two_meanings_are_refused_by_their_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(FileError, match=r"a\.jsonl: line 2 is not JSON: "):
        texts(path)


@pytest.mark.parametrize("label", ["NaN", "1" + "0" * 400, "[1]", "null", "1.5", "-1", "{}"])
def test_a_label_that_is_none_is_refused_by_its_file_and_row(tmp_path: Path, label: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "a", "label": ' + label + "}")
    with pytest.raises(ValueError, match="label"):
        Examples.load(path)


def test_a_number_that_no_float_holds_is_no_number() -> None:
    with pytest.raises(ValueError, match="row 3: its weight must be a finite number, got 1000"):
        read_number(10**400, "weight", 3)


@pytest.mark.parametrize("kind", ["folder", "pipe", "empty"])
def test_what_is_no_table_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.csv"
    {"folder": os.mkdir, "pipe": os.mkfifo, "empty": Path.touch}[kind](path)
    with pytest.raises(FileError, match=f"a.csv: is (a )?{kind}"):
        Examples.load(path)
