"""Rows from any kind of source, checked one by one: every refusal names its row or line, counted from 1."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import numpy as np

from spurge.engine.base.checks import choice
from spurge.engine.base.files import FileError
from spurge.engine.data.table_files import read_records

_MOST_LABELS = 100_000
_WHOLE = re.compile(r"([+-]?\d{1,18})(?:\.0*)?")
_COUNTED = re.compile(r"(label[_ ]?)?\d+", re.IGNORECASE)


def _module(source: Any) -> str:
    """Top package of the type of ``source``: optional packages are recognised, never imported."""
    return type(source).__module__.partition(".")[0]


def is_dataset_dict(source: Any) -> bool:
    """True for a Hugging Face ``DatasetDict``, whose members are the splits."""
    return _module(source) == "datasets" and isinstance(source, Mapping)


@contextmanager
def of_file(source: Any) -> Iterator[None]:
    """Errors inside that name a row also name the file, where the source is one."""
    try:
        yield
    except ValueError as error:
        if not isinstance(source, (str, os.PathLike)) or not str(error).startswith("row "):
            raise
        raise FileError(f"{source}: {error}") from error


def each_row(source: Any, split: str | None, quoting: bool | None = None) -> Iterator[Any]:
    """Every row of any kind of source; of files as :func:`read_records` reads them."""
    if isinstance(source, (str, os.PathLike)):
        yield from read_records(source, quoting)
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


def chosen_rows(
    source: Any, split: str | None, limit: int | None, quoting: bool | None = None
) -> Iterator[tuple[int, Any]]:
    """Rows of one split, at most ``limit`` of them, each with its number in the source, from 1.

    Args:
        split: keep the rows whose column ``split`` has this value; of a ``DatasetDict``, this member.
        quoting: as :func:`read_records` takes it.

    Raises:
        ValueError: a row without the column ``split``, no rows, or a limit below 1.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit: need at least 1 row, got {limit!r}")
    splits: set[str] = set()
    count, split_names = 0, class_names(source, "split")
    for number, row in enumerate(each_row(source, split, quoting), 1):
        if split is not None and not is_dataset_dict(source):
            value = read_column(row, "split", number)
            value = str(value) if split_names is None else class_name(value, split_names, number)
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
        columns = sorted(map(str, row))
        folded = {column.casefold(): column for column in columns}
        close = difflib.get_close_matches(name.casefold(), folded, n=1)
        meant = f"; did you mean {folded[close[0]]!r}?" if close else ""
        raise ValueError(f"row {number}: no column {name!r}, the columns are {columns}{meant}")
    return row[name]


def text_fault(value: str) -> str | None:
    """What makes a str unfit as text for a tokenizer or a file, None where nothing does."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is not valid Unicode: {value[error.start : error.start + 1]!r} at character {error.start}"
    return None


def read_text(value: Any, name: str, number: int) -> str:
    """A value that has to be text.

    Raises:
        ValueError: missing, not a str, without a visible character, or not valid Unicode.
    """
    if is_missing(value):
        raise ValueError(f"row {number}: its {name} is missing")
    if not isinstance(value, str):
        raise ValueError(f"row {number}: its {name} must be text, got {type(value).__name__} {value!r:.40}")
    if not value.strip():
        raise ValueError(f"row {number}: its {name} is empty")
    fault = text_fault(value)
    if fault is not None:
        raise ValueError(f"row {number}: its {name} {fault}")
    return str(value)


def read_name(value: Any, name: str, number: int) -> str:
    """A value that names something, such as a group: text, or a whole number, which names itself.

    Raises:
        ValueError: as :func:`read_text`.
    """
    return str(int(value)) if isinstance(value, Integral) else read_text(value, name, number)


def split_groups(value: Any, separator: str | None) -> tuple[str, ...] | None:
    """The names of several groups, as a list has them or as they stand in one text; None where it is one name.

    >>> split_groups("black; female", ";"), split_groups(["black"], None), split_groups("black; female", None)
    (('black', 'female'), ('black',), None)
    """
    if isinstance(value, (list, tuple)):
        return tuple(dict.fromkeys(value))
    if separator is None or not (isinstance(value, str) or is_missing(value)):
        return None
    names = [] if is_missing(value) else [name.strip() for name in value.split(separator)]
    return tuple(dict.fromkeys(name for name in names if name))


def read_number(value: Any, name: str, number: int) -> float:
    """A finite number, which may come as text.

    Raises:
        ValueError: missing, no number, or not finite.
    """
    try:
        found = math.nan if is_missing(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"row {number}: its {name} must be a finite number, got {value!r:.40}")
    return found


def read_fields(row: Any, columns: Mapping[str, str | None], number: int) -> dict[str, Any]:
    """Text, label, pair and group of one row: the texts are checked, the label is as it came.

    Args:
        row: a mapping, or a tuple ``(text, label)`` or ``(text, pair, label)``.
        columns: where to find ``text``, ``label``, ``pair`` and ``group``; None leaves a field out.

    Raises:
        ValueError: a missing column, or a text that is missing, empty, not text or not valid Unicode.
        TypeError: a row of another type.
    """
    if isinstance(row, tuple) and len(row) in (2, 3):
        out = {"text": row[0], "label": row[-1]} | ({"pair": row[1]} if len(row) == 3 else {})
    elif isinstance(row, Mapping):
        out = {name: _field(row, name, key, number) for name, key in columns.items() if key is not None}
    else:
        raise TypeError(f"row {number}: expected dict, Example or (text, label), got {type(row).__name__}")
    for name in out.keys() - {"label"}:
        if isinstance(out[name], tuple) and name == "group":
            out[name] = tuple(read_name(value, name, number) for value in out[name])
            continue
        read = read_name if name == "group" else read_text
        out[name] = read(out[name], name, number)
    return out


def _field(row: Mapping[str, Any], name: str, column: str, number: int) -> Any:
    try:
        return read_column(row, column, number)
    except ValueError as error:
        hint = f" ({name}= or --{name}-column names another)" if column == name else ""
        raise ValueError(f"{error}{hint}") from None


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
        ValueError: none, an empty one, or one twice.
    """
    if isinstance(labels, str) or not all(isinstance(name, str) for name in labels):
        raise TypeError(f"labels: expected a sequence of names (str), got {labels!r:.60}")
    names = tuple(labels)
    if not all(name.strip() for name in names):
        raise ValueError(f"labels: a name is empty, got {names}")
    if not names:
        raise ValueError("labels: need at least 1 name, got 0")
    if len(set(names)) != len(names):
        raise ValueError(f"labels: names must differ, got {names}")
    return names


def class_names(source: Any, column: str | None, split: str | None = None) -> tuple[str, ...] | None:
    """Names that a Hugging Face ``Dataset`` or ``DatasetDict`` gives the numbers of a column (``ClassLabel``)."""
    if is_dataset_dict(source):
        source = source.get(split)
    if column is None or _module(source) != "datasets":
        return None
    names = getattr((source.features or {}).get(column), "names", None)
    return check_names(names) if names else None


def class_name(value: Any, names: Sequence[str], number: int) -> str:
    """The name of a number that counts ``names`` from 0.

    Raises:
        ValueError: no such number.
    """
    if not isinstance(value, Integral) or not 0 <= int(value) < len(names):
        raise ValueError(f"row {number}: {value!r:.40} is out of range, the {len(names)} names are {tuple(names)}")
    return names[int(value)]


def same_name(one: str, other: str) -> bool:
    """Whether two names of labels are equal but for case, or one abbreviates the other by 3 letters or more."""
    short, long = sorted((one.casefold(), other.casefold()), key=len)
    return short == long or (len(short) >= 3 and long.startswith(short))


def counted(names: Sequence[str]) -> bool:
    """Whether names only count, as ``"0"`` or ``"LABEL_1"``: then they say nothing but their order."""
    return all(_COUNTED.fullmatch(name) for name in names)


def renumbered(own: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name that a source has for its labels, its place among ``names``; None for one that is not there.

    Names are matched whatever their case, and by abbreviations of 3 letters or more ("neg"). Where either side only
    counts, its order is all that is known of it, and stays.
    """
    if set(own) != set(names) and (counted(own) or counted(names)):
        return list(range(len(own)))
    found: list[int | None] = []
    for name in own:
        exact = [i for i, other in enumerate(names) if other == name]
        alike = exact or [i for i, other in enumerate(names) if same_name(name, other) and other not in own]
        found.append(alike[0] if len(alike) == 1 and alike[0] not in found else None)
    return found


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
