"""Rows from any kind of source, checked one by one: every refusal names its row or line, counted from 1."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from spurge.engine.base.checks import choice
from spurge.engine.base.files import FileError
from spurge.engine.base.temporary import temporary

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_FORMATS = ".csv, .tsv or .jsonl, also with .gz, .xz or .bz2 behind"
_MOST_LABELS = 100_000
_WHOLE = re.compile(r"([+-]?\d{1,18})(?:\.0*)?")


def read_records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Rows of a CSV or TSV file with a header line, or of a JSONL file, plain or compressed; one dict each.

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
        with (opener or open)(path, "rb") as stream:
            data = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            if kind == [".jsonl"]:
                for line, content in enumerate(data, 1):
                    if content.strip():
                        yield _json_row(path, line, content)
            else:
                with _long_fields():
                    yield from _table(path, data, "," if kind == [".csv"] else "\t")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8, near line {line + 1}") from error
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise FileError(f"{path}: the compressed file is truncated or damaged: {error}") from error


def _json_row(path: Path, line: int, content: str) -> dict[str, Any]:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: line {line} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise FileError(f"{path}: line {line}: expected a JSON object, got {type(row).__name__}")
    return row


def _table(path: Path, data: Iterable[str], delimiter: str) -> Iterator[dict[str, Any]]:
    """Rows of a table whose first line names the columns."""
    try:
        reader = csv.reader(data, delimiter=delimiter, strict=True)
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header):
            raise FileError(f"{path}: line 1: two columns have the same name: {header}")
        for row in reader:
            if row and len(row) != len(header):
                raise FileError(f"{path}: line {reader.line_num}: {len(row)} fields, but {len(header)} columns")
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        advice = f"{error} (a quote inside a quoted field is written twice)"
        raise FileError(f"{path}: line {reader.line_num}: {advice}") from error


@temporary
def _long_fields() -> Iterator[None]:
    """The csv module refuses fields above a process-wide limit (128 KiB); a long document is no error here."""
    before = csv.field_size_limit(2**31 - 1)
    yield
    csv.field_size_limit(before)


def _module(source: Any) -> str:
    """Top package of the type of ``source``: optional packages are recognised, never imported."""
    return type(source).__module__.partition(".")[0]


def is_dataset_dict(source: Any) -> bool:
    """True for a Hugging Face ``DatasetDict``, whose members are the splits."""
    return _module(source) == "datasets" and isinstance(source, Mapping)


def each_row(source: Any, split: str | None) -> Iterator[Any]:
    """Every row of any kind of source."""
    if isinstance(source, (str, os.PathLike)):
        yield from read_records(source)
    elif is_dataset_dict(source):
        choice("split", split, sorted(source))
        yield from source[split]
    elif _module(source) == "pandas" and hasattr(source, "columns"):
        yield from source.to_dict("records")
    elif isinstance(source, Iterable) and not isinstance(source, (Mapping, bytes)):
        yield from source
    else:
        kinds = "a path, a DataFrame, a datasets.Dataset or a list of rows"
        raise TypeError(f"source: expected {kinds}, got {type(source).__name__}")


def chosen_rows(source: Any, split: str | None, limit: int | None) -> Iterator[tuple[int, Any]]:
    """Rows of one split, at most ``limit`` of them, each with its number in the source, from 1.

    Args:
        split: keep the rows whose column ``split`` has this value; of a ``DatasetDict``, this member.

    Raises:
        ValueError: a row without the column ``split``, or no rows.
    """
    splits: set[str] = set()
    count = 0
    for number, row in enumerate(each_row(source, split), 1):
        if split is not None and not is_dataset_dict(source):
            value = str(read_column(row, "split", number))
            splits.add(value)
            if value != split:
                continue
        yield number, row
        count += 1
        if count == limit:
            return
    if not count:
        name = source if isinstance(source, (str, os.PathLike)) else "source"
        seen = f" with split {split!r}, the splits are {sorted(splits)}" if splits else ""
        raise ValueError(f"{name}: no rows{seen}")


def is_missing(value: Any) -> bool:
    """True for None, NaN, and the marks that pandas has for both."""
    if value is None or (isinstance(value, (float, np.floating)) and value != value):
        return True
    return _module(value) == "pandas" and type(value).__name__ in ("NAType", "NaTType")


def read_column(row: Any, name: str, number: int) -> Any:
    """Value of one column.

    Raises:
        ValueError: the row has no such column.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number}: has no column {name!r}, being a {type(row).__name__}")
    if name not in row:
        raise ValueError(f"row {number}: no column {name!r}, the columns are {sorted(map(str, row))}")
    return row[name]


def read_fields(row: Any, columns: Mapping[str, str | None], number: int) -> dict[str, Any]:
    """Text, label, pair and group of one row: the texts are checked, the label is as it came.

    Args:
        row: a mapping, or a tuple ``(text, label)`` or ``(text, pair, label)``.
        columns: where to find ``text``, ``label``, ``pair`` and ``group``; None leaves a field out.

    Raises:
        ValueError: a missing column, or a text that is missing, empty or not text.
        TypeError: a row of another type.
    """
    if isinstance(row, tuple) and len(row) in (2, 3):
        out = {"text": row[0], "label": row[-1]} | ({"pair": row[1]} if len(row) == 3 else {})
    elif isinstance(row, Mapping):
        out = {name: read_column(row, key, number) for name, key in columns.items() if key is not None}
    else:
        raise TypeError(f"row {number}: expected dict, Example or (text, label), got {type(row).__name__}")
    if isinstance(out.get("group"), Integral):
        out["group"] = str(int(out["group"]))
    for name in out.keys() - {"label"}:
        value = out[name]
        if is_missing(value):
            raise ValueError(f"row {number}: its {name} is missing")
        if not isinstance(value, str):
            raise ValueError(f"row {number}: its {name} must be text, got {type(value).__name__} {value!r:.40}")
        if not value.strip():
            raise ValueError(f"row {number}: its {name} is empty")
        out[name] = str(value)
    return out


def read_label(value: Any, number: int) -> int | str:
    """A label as a whole number or a name; texts that are whole numbers ("1", "1.0") count as numbers.

    Raises:
        ValueError: missing, or of another type.
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"row {number}: its label is missing")
    if isinstance(value, str):
        whole = _WHOLE.fullmatch(value.strip())
        return int(whole[1]) if whole else str(value)
    if isinstance(value, (np.bool_, Integral)) or (isinstance(value, Real) and float(value).is_integer()):
        return int(value)  # type: ignore[arg-type]
    raise ValueError(f"row {number}: a label is a whole number or a name, got {type(value).__name__} {value!r:.40}")


def check_names(labels: Sequence[str]) -> tuple[str, ...]:
    """``labels`` as a tuple of names.

    Raises:
        TypeError: not a sequence of str.
        ValueError: none, or one twice.
    """
    if isinstance(labels, str) or not all(isinstance(name, str) and name.strip() for name in labels):
        raise TypeError(f"labels: expected a sequence of names (str), got {labels!r:.60}")
    names = tuple(labels)
    if not names:
        raise ValueError("labels: need at least 1 name, got 0")
    if len(set(names)) != len(names):
        raise ValueError(f"labels: names must differ, got {names}")
    return names


def dataset_labels(source: Any, label: str) -> tuple[str, ...] | None:
    """Names that a Hugging Face ``Dataset`` or ``DatasetDict`` gives the labels in this column."""
    if is_dataset_dict(source):
        source = next(iter(source.values()), None)
    if _module(source) != "datasets":
        return None
    names = getattr((source.features or {}).get(label), "names", None)
    return check_names(names) if names else None


def infer_names(labels: Sequence[int | str]) -> tuple[str, ...]:
    """Names of labels from the labels themselves: 0, 1, ... up to the largest number, or the names in order.

    Raises:
        ValueError: a number so large that it can hardly be a label.
    """
    numbers = [value for value in labels if isinstance(value, int)]
    if len(numbers) < len(labels):
        return tuple(sorted({str(value) for value in labels}))
    if max(numbers) >= _MOST_LABELS:
        raise ValueError(f"label: numbers go up to {max(numbers)}; is this column the label? If so, give labels=")
    return tuple(map(str, range(max(0, max(numbers)) + 1)))


def label_index(label: int | str, names: tuple[str, ...], number: int) -> int:
    """Position of a label: of its name where it is one ("3" among "1" to "5" stars), else the number itself.

    Raises:
        ValueError: neither a name, whatever its case, nor a number in range.
    """
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, str):
        folded = [i for i, name in enumerate(names) if name.casefold() == label.strip().casefold()]
        if len(folded) == 1:
            return folded[0]
        raise ValueError(f"row {number}: label {label!r:.60} is none of {names}")
    if not 0 <= label < len(names):
        raise ValueError(f"row {number}: label {label} is out of range, the {len(names)} labels are {names}")
    return label
