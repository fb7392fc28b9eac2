"""Tables in files, CSV, TSV and JSONL, as one dict a row; a file that cannot be read is refused by its line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spurge.engine.base.checks import warn
from spurge.engine.base.files import FileError, opened, parse_json
from spurge.engine.base.temporary import temporary

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_FORMATS = ".csv, .tsv or .jsonl, also with .gz, .xz or .bz2 behind"
_LONGEST_ROW = 2**24  # characters: a compressed file of a few KB may hold lines of many GB


def read_records(path: str | os.PathLike[str], quoting: bool | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a CSV or TSV file with a header line, or of a JSONL file, plain or compressed; one dict each.

    Args:
        quoting: whether a field may stand in double quotes, and then hold delimiters and line breaks (RFC 4180). False:
            quotes are text like any other. None: they enclose, but a TSV field that begins with a quote and runs over
            a line break is refused, and in CSV lines that would be whole rows without their quotes bring a warning.

    Raises:
        FileError: a format that is not known, or a damaged file; the message has the line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    opener = _OPENERS.get(suffixes[-1]) if suffixes else None
    kind = (suffixes[:-1] if opener else suffixes)[-1:]
    if kind not in ([".csv"], [".tsv"], [".jsonl"]):
        raise FileError(f"{path}: format not known, expected {_FORMATS}")
    line = 0
    try:
        with opened(path) as packed, opener(packed) if opener else packed as stream:
            data = _Lines(path, io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
            if kind == [".jsonl"]:
                for line, content in enumerate(data, 1):
                    data.taken()
                    if content.strip():
                        yield _json_row(path, line, content)
            else:
                with _long_fields():
                    yield from _table(path, data, "," if kind == [".csv"] else "\t", quoting)
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8, near line {line + 1}") from error
    except (EOFError, MemoryError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of gzip or bz2
            raise
        raise FileError(f"{path}: the compressed file is truncated or damaged: {error}") from error


def _json_row(path: Path, line: int, content: str) -> dict[str, Any]:
    try:
        row = parse_json(content, nan=True)
    except ValueError as error:
        raise FileError(f"{path}: line {line} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise FileError(f"{path}: line {line}: expected a JSON object, got {type(row).__name__}")
    return row


class _Lines:
    """The lines of a file, of which those since the last :meth:`taken` are remembered: the lines of a row."""

    def __init__(self, path: Path, text: io.TextIOBase) -> None:
        self._path, self._text, self._since = path, text, list[str]()
        self._number = self._length = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(_LONGEST_ROW + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self._length += len(line)
        if self._length > _LONGEST_ROW:
            raise FileError(f"{self._path}: line {self._number}: the row has more than {_LONGEST_ROW} characters")
        self._since.append(line)
        return line

    def taken(self) -> list[str]:
        found, self._since, self._length = self._since, [], 0
        return found


@temporary
def _long_fields() -> Iterator[None]:
    """The csv module refuses fields above a process-wide limit (128 KiB); a long document is no error here."""
    before = csv.field_size_limit(2**31 - 1)
    yield
    csv.field_size_limit(before)


def _table(path: Path, lines: _Lines, delimiter: str, quoting: bool | None) -> Iterator[dict[str, Any]]:
    """Rows of a table whose first line names the columns."""
    ambiguous = list[int]()
    try:
        reader = csv.reader(
            lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE if quoting is False else csv.QUOTE_MINIMAL
        )
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header):
            raise FileError(f"{path}: line 1: two columns have the same name: {header}")
        lines.taken()
        for number, row in enumerate(reader, 1):
            own = lines.taken()
            first = reader.line_num - len(own) + 1
            if quoting is None and len(own) > 1:
                if delimiter == "\t":
                    raise FileError(
                        f"{path}: row {number}: a field that begins with a quote on line {first} runs on to line "
                        f"{reader.line_num}; quoting=False takes quotes as text, quoting=True joins these lines"
                    )
                if all(len(fields) == len(header) for fields in csv.reader(own, quoting=csv.QUOTE_NONE)):
                    ambiguous.append(first)
            if row and len(row) != len(header):
                raise FileError(f"{path}: line {reader.line_num}: {len(row)} fields, but {len(header)} columns")
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        advice = "a quote inside a quoted field is written twice; where quotes are text: quoting=False"
        raise FileError(f"{path}: line {reader.line_num}: {error} ({advice})") from error
    finally:
        if ambiguous:
            warn(
                f"{path}: {len(ambiguous)} rows have a quoted field that runs over line breaks, the first on line "
                f"{ambiguous[0]}, and each of their lines would be a row by itself; where quotes are text: "
                "quoting=False, where they are not: quoting=True"
            )
