"""Labelled inputs of any kind as blocks of batches: texts, tensors, sequences, data sets and their loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from spurge.engine.base.files import canonical_json, fingerprint
from spurge.engine.data.examples import Examples, encode

BLOCK_BYTES = 64 * 2**20  # of model inputs; large images would otherwise fill the memory a block at a time

_LABELS, _GROUPS, _INPUTS = ("labels", "label"), ("groups", "group"), ("inputs", "input")
_KINDS = (
    "Examples, (inputs [N, ...], labels), a dict with 'labels', a Dataset, a DataLoader, or (input, label) or "
    "(input, label, group) one by one"
)


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model is called with once: one tensor ``[B, ...]``, or keyword arguments that all lead with B."""

    inputs: Tensor | dict[str, Tensor]

    def __post_init__(self) -> None:
        named = self.named()
        for name, value in named.items():
            if not isinstance(value, Tensor) or not value.dim():
                kind = type(value).__name__
                raise TypeError(f"data: {name!r} must be a tensor [B, ...] (texts go in as Examples), got {kind}")
        lengths = {name: len(value) for name, value in named.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"data: inputs must have the same number of rows, at least 1, got {lengths}")

    def named(self) -> dict[str, Tensor]:
        """The tensors by name; a single one is called ``inputs``."""
        return self.inputs if isinstance(self.inputs, dict) else {"inputs": self.inputs}

    def __len__(self) -> int:
        return len(next(iter(self.named().values())))

    def rows(self, part: slice) -> Batch:
        """Some of the rows."""
        if isinstance(self.inputs, Tensor):
            return Batch(self.inputs[part])
        return Batch({name: value[part] for name, value in self.inputs.items()})

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The same rows on a device; floating tensors become ``dtype``."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else value.dtype)

        if isinstance(self.inputs, Tensor):
            return Batch(move(self.inputs))
        return Batch({name: move(value) for name, value in self.inputs.items()})

    def fingerprint(self) -> str:
        """SHA-256 of all that the model would see."""
        bits = {name: fingerprint(value) for name, value in self.named().items()}
        return fingerprint(canonical_json([isinstance(self.inputs, Tensor), bits]))


@dataclass(frozen=True, eq=False)
class DataBlock:
    """n consecutive rows of the data, as batches.

    Attributes:
        batches: the rows, in an order that suits the model.
        order: int64 ``[n]``, for each row of the batches its number in the block.
        labels: int64 ``[n]`` in the order of the block.
        groups: numbers or names in the order of the block, or None.
    """

    batches: list[Batch]
    order: Tensor
    labels: Tensor
    groups: list[int] | list[str] | None


def data_blocks(
    data: Any, *, batch_size: int, block: int, tokenizer: Any = None, max_length: int | None = None
) -> Iterator[DataBlock]:
    """The rows of ``data`` in blocks of about ``block`` rows, fewer where the inputs are large.

    Texts of a block share batches with texts of like length. Batches of a ``DataLoader`` stay as they are.

    Args:
        data: :class:`Examples` (needs ``tokenizer``); tensors ``(inputs, labels)`` or ``(inputs, labels, groups)``; a
            dict with ``labels`` and maybe ``groups``, in which ``inputs`` is the model's first argument and any other
            name a keyword argument; a ``Dataset``, sequence or iterable of such tuples or dicts, row by row; or a
            ``DataLoader`` of them, batch by batch.

    Raises:
        TypeError: data of another kind.
        ValueError: rows without a label, tensors of different length, or groups that only some rows have.
    """
    if isinstance(data, Examples):
        if tokenizer is None:
            raise ValueError("tokenizer: needed to turn texts into inputs")
        return _texts(data, tokenizer, max_length, batch_size, max(1, block // batch_size) * batch_size)
    if isinstance(data, DataLoader):
        return _gather(map(_parts, data), block)
    if _whole(data):
        return _gather(_slices(*_parts(data), batch_size), block)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = map(data.__getitem__, range(len(data)))  # type: ignore[arg-type]
    if isinstance(data, (str, bytes, Tensor)) or not isinstance(data, Iterable):
        raise TypeError(f"data: expected {_KINDS}, got {type(data).__name__}")
    return _gather(_collated(iter(data), batch_size), block)


def length(data: Any) -> int | None:
    """Rows of ``data``, where that is known without reading it."""
    if isinstance(data, DataLoader):
        return length(data.dataset)
    if _whole(data):
        return len(_parts(data)[1])
    try:
        return len(data)
    except TypeError:
        return None


def _whole(data: Any) -> bool:
    """Whether the tensors hold all rows at once."""
    if isinstance(data, Mapping):
        return True
    return isinstance(data, (tuple, list)) and len(data) in (2, 3) and all(isinstance(part, Tensor) for part in data)


_LabelledBatch = tuple[Batch, Tensor, list[Any] | None]


def _texts(examples: Examples, tokenizer: Any, max_length: int | None, size: int, block: int) -> Iterator[DataBlock]:
    for part in examples.batches(block):
        order = sorted(range(len(part)), key=lambda i: len("".join(part[i].text + (part[i].pair or ""))))
        batches = []
        for start in range(0, len(order), size):
            inputs = encode(tokenizer, part.subset(order[start : start + size]), max_length=max_length)
            batches.append(Batch(dict(inputs)))
        named = [" & ".join(row.groups) or None for row in part]  # groups that overlap: each combination is one
        groups: list[Any] | None = None if named == [None] * len(named) else named
        yield DataBlock(batches, torch.tensor(order), part.targets, groups)


def _slices(inputs: Any, labels: Tensor, groups: list[Any] | None, size: int) -> Iterator[_LabelledBatch]:
    batch = Batch(inputs)
    if len(batch) != len(labels) or (groups is not None and len(groups) != len(labels)):
        count = "" if groups is None else f" and {len(groups)} groups"
        raise ValueError(f"data: {len(batch)} inputs, but {len(labels)} labels{count}")
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield batch.rows(part), labels[part], None if groups is None else groups[part]


def _collated(items: Iterator[Any], size: int) -> Iterator[_LabelledBatch]:
    while chosen := list(islice(items, size)):
        rows = [_fields(item) for item in chosen]
        if len({group is None for _, _, group in rows}) > 1:
            raise ValueError("data: either all rows have a group or none has")
        try:
            inputs = default_collate([inputs for inputs, _, _ in rows])
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"data: rows that cannot share a batch: {error}") from error
        groups = None if rows[0][2] is None else [group for _, _, group in rows]
        yield inputs if isinstance(inputs, Batch) else Batch(inputs), _labels([row[1] for row in rows]), _groups(groups)


def _gather(batches: Iterable[Any], block: int) -> Iterator[DataBlock]:
    """Runs of batches until ``block`` rows or :data:`BLOCK_BYTES` are reached."""
    held: list[_LabelledBatch] = []
    rows = size = 0
    for inputs, labels, groups in batches:
        batch = inputs if isinstance(inputs, Batch) else Batch(inputs)
        if len(batch) != len(labels):
            raise ValueError(f"data: a batch of {len(batch)} inputs, but {len(labels)} labels")
        held.append((batch, labels, groups))
        rows, size = rows + len(batch), size + sum(value.nbytes for value in batch.named().values())
        if rows >= block or size >= BLOCK_BYTES:
            yield _joined(held)
            held, rows, size = [], 0, 0
    if held:
        yield _joined(held)


def _joined(held: list[_LabelledBatch]) -> DataBlock:
    labels = torch.cat([labels for _, labels, _ in held])
    if len({groups is None for _, _, groups in held}) > 1:
        raise ValueError("data: either all rows have a group or none has")
    groups = None if held[0][2] is None else [group for _, _, part in held for group in part or ()]
    return DataBlock([batch for batch, _, _ in held], torch.arange(len(labels)), labels, groups)


def _fields(item: Any) -> tuple[Any, Any, Any]:
    """Inputs, label and group of one row or one batch, as they came."""
    if isinstance(item, Mapping):
        rest = dict(item)
        label, group = _pop(rest, _LABELS), _pop(rest, _GROUPS)
        inputs = _pop(rest, _INPUTS)
        if label is None or (inputs is None) == (not rest):
            raise ValueError(f"data: expected 'labels' and inputs, got {sorted(map(str, item))}")
        return (rest if inputs is None else inputs), label, group
    if isinstance(item, Sequence) and not isinstance(item, (str, bytes)) and len(item) in (2, 3):
        return item[0], item[1], item[2] if len(item) == 3 else None
    raise TypeError(f"data: expected {_KINDS}, got a {type(item).__name__}")


def _parts(item: Any) -> tuple[Any, Tensor, list[Any] | None]:
    """Inputs, labels and groups of a batch or of all rows."""
    inputs, labels, groups = _fields(item)
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    return inputs, _labels(labels), _groups(groups)


def _pop(rest: dict[Any, Any], names: tuple[str, ...]) -> Any:
    found = [rest.pop(name) for name in names if name in rest]
    return found[0] if found else None


def _labels(labels: Any) -> Tensor:
    if isinstance(labels, Tensor):
        values = labels.tolist() if labels.dim() == 1 else [labels]
    else:
        values = [value.item() if hasattr(value, "item") else value for value in labels]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"data: a label is a whole number, got {type(value).__name__} {value!r:.40}")
    return torch.tensor([int(value) for value in values], dtype=torch.int64)


def _groups(groups: Any) -> list[Any] | None:
    if groups is None:
        return None
    values = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    return [value.item() if hasattr(value, "item") else value for value in values]
