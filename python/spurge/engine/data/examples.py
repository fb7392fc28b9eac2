"""Labelled texts from lists, pandas, Hugging Face ``datasets``, CSV, TSV or JSONL, checked row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.files import canonical_json, fingerprint
from spurge.engine.data.rows import (
    check_names,
    chosen_rows,
    class_name,
    class_names,
    infer_names,
    label_index,
    of_file,
    read_column,
    read_fields,
    read_label,
    renumbered,
    split_groups,
    text_fault,
)


@dataclass(frozen=True)
class Example:
    """One labelled text, or pair of texts.

    ``label`` counts from 0. ``group`` names a part of the data to be judged on its own (worst group), or several such
    parts that the text is in; :attr:`groups` has them as a tuple in any case.

    Raises:
        TypeError: a field of another type.
        ValueError: a text without a visible character or that is not valid Unicode, a negative label, or a group twice.
    """

    text: str
    label: int
    pair: str | None = None
    group: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.group, (tuple, list)):
            names = tuple(self.group)
            object.__setattr__(self, "group", names if len(names) > 1 else names[0] if names else None)
        for name, value in (("text", self.text), ("pair", self.pair), *(("group", group) for group in self.groups)):
            if not isinstance(value, str) and (value is not None or name != "pair"):
                raise TypeError(f"{name}: expected str, got {type(value).__name__}")
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"{name}: is empty")
            fault = None if value is None else text_fault(value)
            if fault is not None:
                raise ValueError(f"{name}: {fault}")
        if len(set(self.groups)) < len(self.groups):
            raise ValueError(f"group: is named twice, got {self.group!r:.60}")
        if not isinstance(self.label, int) or isinstance(self.label, bool):
            raise TypeError(f"label: expected int, got {type(self.label).__name__}")
        if self.label < 0:
            raise ValueError(f"label: counts from 0, got {self.label}")

    @property
    def groups(self) -> tuple[str, ...]:
        """All groups that the text is in."""
        return self.group if isinstance(self.group, tuple) else () if self.group is None else (self.group,)

    @property
    def segments(self) -> list[str]:
        """The text, or both texts of a pair."""
        return [self.text] if self.pair is None else [self.text, self.pair]


class Examples(Sequence[Example]):
    """Labelled texts with the names of their labels; never changes.

    Args:
        rows: the examples; all of them pairs, or none.
        labels: name of each label, at least one more than the largest label used.

    Raises:
        TypeError: a row that is no :class:`Example`.
        ValueError: no rows, a label without a name, names that repeat, or pairs among single texts.
    """

    def __init__(self, rows: Iterable[Example], labels: Sequence[str]) -> None:
        self._rows = tuple(rows)
        self.labels = check_names(labels)
        if not self._rows:
            raise ValueError("rows: need at least 1 example, got 0")
        for number, row in enumerate(self._rows, 1):
            if not isinstance(row, Example):
                raise TypeError(f"row {number}: expected an Example, got {type(row).__name__}")
            if row.label >= len(self.labels):
                raise ValueError(f"row {number}: label {row.label}, but only {len(self.labels)} labels: {self.labels}")
            if (row.pair is None) != (self._rows[0].pair is None):
                raise ValueError(f"row {number}: either all rows are pairs or none is, row 1 differs")

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        text: str = "text",
        pair: str | None = None,
        label: str = "label",
        group: str | None = None,
        group_separator: str | None = None,
        split: str | None = None,
        labels: Sequence[str] | None = None,
        limit: int | None = None,
        quoting: bool | None = None,
    ) -> Examples:
        """Reads and checks labelled texts.

        Labels may be whole numbers from 0, or names. Without ``labels``, numbers name themselves, and names
        are numbered in alphabetical order: give ``labels`` in the order of the model's outputs where that
        differs. Where the source names its numbers (``ClassLabel``, :class:`Examples`), the names count, not
        the numbers, unless one side only counts ("LABEL_0").

        Args:
            source: a path to a file (CSV and TSV with a header line, JSONL with one object a line; plain or
                ``.gz``, ``.xz``, ``.bz2``), a pandas DataFrame, a Hugging Face ``Dataset`` or ``DatasetDict``,
                :class:`Examples`, or a list of :class:`Example`, dict, ``(text, label)`` or ``(text, pair, label)``.
            text, pair, label, group: names of the columns; ``pair`` and ``group`` are read only where named.
            group_separator: what stands between names where a row is in several groups ("black;female"); blanks beside
                it do not count, and an empty field is no group. A list of names needs none.
            split: keep the rows whose column ``split`` has this value; of a ``DatasetDict``, this member.
            labels: names of the labels, in order.
            limit: keep the first ``limit`` rows.
            quoting: of CSV and TSV: whether a field may stand in double quotes, and then run over line breaks;
                False: quotes are text. None: it may, but not over line breaks in TSV.

        Raises:
            ValueError: a missing column, a missing or non-text text, text that is not valid Unicode, a label out
                of range, names that do not match those of the source, no rows; the message has the file and the
                number of the row, counted from 1. `files.FileError` for a damaged file.
            TypeError: a source of another kind.
            OSError: the file cannot be read.
        """
        columns = {"text": text, "label": label, "pair": pair, "group": group}
        label_names, group_names = (class_names(source, column, split) for column in (label, group))
        found: list[tuple[int, Example | dict[str, Any]]] = []
        with of_file(source):
            for number, row in chosen_rows(source, split, limit, quoting):
                if not isinstance(row, Example):  # an Example needs no reading
                    if isinstance(row, Mapping) and group in row:
                        parts = split_groups(row[group], group_separator)
                        row = row if parts is None else {**row, group: parts}
                    if group_names is not None:
                        row = {**row, group: class_name(read_column(row, str(group), number), group_names, number)}
                    row = read_fields(row, columns, number)
                    row["label"] = read_label(row["label"], number)
                found.append((number, row))
            known = source.labels if isinstance(source, Examples) else label_names
            return cls._numbered(found, known, None if labels is None else check_names(labels))

    @classmethod
    def _numbered(
        cls,
        found: Sequence[tuple[int, Example | dict[str, Any]]],
        known: tuple[str, ...] | None,
        names: tuple[str, ...] | None,
    ) -> Examples:
        """Examples of numbered rows. ``known``: what the source calls its numbers, ``names``: what they are to be."""
        values = [row.label if isinstance(row, Example) else row["label"] for _, row in found]
        if names is None:
            names = infer_names(values) if known is None else known
        places = None if known is None else renumbered(known, names)
        rows = []
        for (number, row), value in zip(found, values, strict=True):
            if known is not None and places is not None:
                name = class_name(value, known, number)
                place = places[value]
                if place is None:
                    raise ValueError(f"row {number}: label {name!r:.60} is none of {names}")
            elif isinstance(row, Example):
                place = row.label
            else:
                place = label_index(value, names, number)
            rows.append(replace(row, label=place) if isinstance(row, Example) else Example(**{**row, "label": place}))
        return cls(rows, names)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        return Examples(self._rows[index], self.labels) if isinstance(index, slice) else self._rows[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Examples) and (self._rows, self.labels) == (other._rows, other.labels)

    def __hash__(self) -> int:
        return hash((self._rows, self.labels))

    def __repr__(self) -> str:
        return f"Examples({len(self)} rows, labels {', '.join(self.labels)})"

    @property
    def texts(self) -> list[str | tuple[str, str]]:
        """The texts, or the pairs, as tokenizers take them."""
        return [row.text if row.pair is None else (row.text, row.pair) for row in self._rows]

    @property
    def targets(self) -> Tensor:
        """The labels, int64 ``[N]``."""
        return torch.tensor([row.label for row in self._rows])

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, sorted; empty where no row has one. A row may be in several."""
        return tuple(sorted({group for row in self._rows for group in row.groups}))

    def subset(self, indices: Iterable[int]) -> Examples:
        """The rows with these numbers (from 0), in this order.

        Raises:
            ValueError: none, or one out of range.
        """
        chosen = [int(index) for index in indices]
        bad = [index for index in chosen if not 0 <= index < len(self)]
        if bad:
            raise ValueError(f"indices: must lie in 0 to {len(self) - 1}, got {bad[0]}")
        if not chosen:
            raise ValueError("indices: need at least 1, got 0")
        return Examples([self._rows[index] for index in chosen], self.labels)

    def in_group(self, group: str) -> Examples:
        """The rows of one group.

        Raises:
            ValueError: no row is in it.
        """
        rows = [row for row in self._rows if group in row.groups]
        if not rows:
            raise ValueError(f"group: no row is in {group!r}, the groups are {list(self.groups)}")
        return Examples(rows, self.labels)

    def sample(self, n: int, seed: int = 0) -> Examples:
        """``n`` different rows in random order; ``sample(len(examples))`` shuffles.

        Raises:
            ValueError: ``n`` below 1 or above the number of rows.
        """
        return self.subset(self.draw(n, seed))

    def draw(self, n: int, seed: int = 0) -> list[int]:
        """Numbers of the rows that :meth:`sample` takes, in its order: for what else is known of them.

        Raises:
            ValueError: ``n`` below 1 or above the number of rows.
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"n: must lie in 1 to {len(self)}, got {n}")
        drawn: list[int] = np.random.default_rng(seed).permutation(len(self))[:n].tolist()
        return drawn

    def batches(self, size: int) -> Iterator[Examples]:
        """Consecutive runs of ``size`` rows; the last may be shorter.

        Raises:
            ValueError: ``size`` below 1.
        """
        if size < 1:
            raise ValueError(f"size: need at least 1, got {size}")
        return (self[start : start + size] for start in range(0, len(self), size))

    def fingerprint(self) -> str:
        """SHA-256 of labels and rows, in hexadecimal: the same for the same data from any source."""
        rows = [[row.text, row.label, row.pair, row.group] for row in self._rows]
        return fingerprint(canonical_json([self.labels, rows]))


class Inputs(dict[str, Tensor]):
    """What a model is called with, ``[B, T]`` each; ``encodings`` is what a fast tokenizer knows of words."""

    encodings: Sequence[Any] | None = None

    def to(self, device: torch.device | str) -> Inputs:
        """The same on a device."""
        moved = Inputs({name: value.to(device) for name, value in self.items()})
        moved.encodings = self.encodings
        return moved


def encode(
    tokenizer: Any,
    examples: Sequence[Example] | Sequence[str] | Sequence[tuple[str, str]],
    *,
    max_length: int | None = None,
    device: torch.device | str | None = None,
) -> Inputs:
    """Tokenizes B texts and pads them to the longest, T tokens.

    Texts longer than ``max_length`` are cut (default: the tokenizer's own limit, where it has one).

    Returns:
        ``input_ids``, ``attention_mask`` and what else the tokenizer makes, int64 ``[B, T]``, on ``device``.

    Raises:
        ValueError: no examples, pairs among single texts, text that is not valid Unicode, a limit that special tokens
            fill, or a tokenizer without a padding token where one is needed.
        TypeError: rows of another kind.
    """
    texts = _encodable(examples)
    pairs = not isinstance(texts[0], str)
    if len(texts) > 1 and tokenizer.pad_token is None:
        raise ValueError(
            "tokenizer: has no padding token, so texts of different length cannot share a batch; set "
            "tokenizer.pad_token = tokenizer.eos_token and model.config.pad_token_id = tokenizer.eos_token_id"
        )
    limit = max_length if max_length is not None else getattr(tokenizer, "model_max_length", None)
    known = limit is not None and limit < 1_000_000  # transformers writes 1e30 for "no limit"
    if limit is not None and known:
        _check_room(tokenizer, limit, pairs)
    made = tokenizer(
        [text[0] for text in texts] if pairs else texts,
        [text[1] for text in texts] if pairs else None,
        padding=len(texts) > 1,
        truncation=known,
        max_length=limit if known else None,
        return_tensors="pt",
    )
    inputs = Inputs(made)
    inputs.encodings = made.encodings
    return inputs if device is None else inputs.to(device)


def _encodable(examples: Sequence[Any]) -> list[Any]:
    """What :func:`encode` is given as texts or as pairs, checked row by row, from 0."""
    texts: list[Any] = []
    for number, row in enumerate(examples):
        row = (row.text if row.pair is None else (row.text, row.pair)) if isinstance(row, Example) else row
        parts = row if isinstance(row, tuple) and len(row) == 2 else (row,)
        for part in parts:
            if not isinstance(part, str):
                raise TypeError(f"examples: expected Example, str or a pair of str, got {type(part).__name__}")
            fault = text_fault(part)
            if fault is not None:
                raise ValueError(f"examples: text {number} (from 0) {fault}")
        if texts and isinstance(texts[0], str) != isinstance(row, str):
            raise ValueError(f"examples: either all rows are pairs or none is, row {number} (from 0) differs")
        texts.append(row)
    if not texts:
        raise ValueError("examples: need at least 1, got 0")
    return texts


def _check_room(tokenizer: Any, limit: int, pairs: bool) -> None:
    """Refuses a limit that leaves no room for a text: a tokenizer would then not cut at all, or keep no word."""
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if limit <= special:
        why = (
            f"; {special} special tokens around {'a pair' if pairs else 'a text'} leave no room for it"
            if special
            else ""
        )
        raise ValueError(f"max_length: need at least {special + 1}, got {limit}{why}")


def checked_texts(name: str, texts: Any) -> list[str]:
    """``texts`` as a list; empty texts are texts.

    Raises:
        TypeError: one text instead of several, or a row that is no str.
        ValueError: no texts, or one that is not valid Unicode.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise TypeError(f"{name}: expected a sequence of str, got {type(texts).__name__}")
    found = list(texts)
    for row, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected str, got {type(text).__name__} at row {row}")
        fault = text_fault(text)
        if fault is not None:
            raise ValueError(f"{name}: {fault} at row {row}")
    if not found:
        raise ValueError(f"{name}: need at least 1, got 0")
    return found
