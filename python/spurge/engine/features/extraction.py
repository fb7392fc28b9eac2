"""Features of a labelled set: one pass of a frozen model, resumable, never taken from a stale file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spurge.engine.base.checks import choice, integer
from spurge.engine.base.files import PathLike, spurge_version
from spurge.engine.base.temporary import Temporaries, temporary
from spurge.engine.data.examples import Examples
from spurge.engine.features.cache import FeatureCache, open_cache
from spurge.engine.features.features import Features
from spurge.engine.features.reader import Reader, Token
from spurge.engine.features.sources import DataBlock, data_blocks, length
from spurge.engine.models.handle import Handle
from spurge.engine.models.heads import Head, find_head
from spurge.engine.models.hooks import frozen

_STORAGE = (torch.float16, torch.float32, torch.float64)


def extract(
    model: nn.Module,
    data: Any,
    *,
    head: str | None = None,
    token: Token = "auto",
    tokenizer: Any = None,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    storage: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    cache: PathLike | None = None,
    block: int = 1024,
    max_length: int | None = None,
    memory: str | int | None = None,
    names: Sequence[str] | None = None,
    group_names: Sequence[str] | None = None,
    progress: bool = True,
) -> Features:
    """What the head of a classifier reads for each row of ``data``, with its labels and groups, on the CPU.

    The model runs once, in evaluation mode and without gradients, and comes back as it was, also after an exception;
    code under ``torch.compile`` runs uncompiled.

    Args:
        model: a classifier of ``transformers`` (text or image), or any module that ends in an ``nn.Linear``.
        data: labelled texts (:class:`~spurge.Examples`) or inputs: see
            :func:`spurge.engine.features.sources.data_blocks`.
        head: path of the linear layer; by default the one that makes the model's logits, checked on the first batch.
        token: whose features, where the head reads every token (GPT-2, LLaMA): ``auto`` the one that transformers'
            classifiers look at, ``first``, or ``last`` that ``attention_mask`` keeps.
        tokenizer: for texts.
        batch_size: rows that run at once; fewer where memory runs out.
        dtype: bfloat16 or float16 for mixed precision; floating inputs become the type of the model's weights.
        storage: type of the features, float32, float16 or float64.
        device: where the model runs; it is moved there and back.
        cache: folder for finished blocks. What was computed before from the same model, settings and inputs is read
            from there, so an interrupted run resumes, and a second one needs no forward pass. A model with foreign
            hooks is not cached.
        block: rows of a block.
        max_length: tokens a text is cut to.
        memory: bytes (``"2 GiB"``) that activations of a batch may take, by default what is fast on a CPU; the split
            of larger batches changes features by rounding only.
        names: of the classes, in the order of the outputs; by default those of ``Examples``, else their numbers.
        group_names: in order; by default the groups' own names, sorted, or their numbers.
        progress: show a progress bar.

    Raises:
        TypeError: an argument of another type.
        ValueError: no rows, a label without an output, labels in another order than the model's outputs, a head that is
            not called once for a batch or does not make the model's logits, or features that are not finite.
        OSError: the cache cannot be written.
    """
    path, layer = find_head(model, head)
    model = getattr(model, "_orig_mod", model)
    if head is None:
        Handle.of(model).check_single_label("model")
    _check_settings(token, storage, dtype, batch_size=batch_size, block=block)
    found = Head.of(model, path)
    settings = {"head": path, "token": token, "autocast": _text(dtype), "storage": _text(storage)}
    source = data_blocks(data, batch_size=batch_size, block=block, tokenizer=tokenizer, max_length=max_length)
    names = _names(data, names, found.outputs)
    if head is None:
        Handle.of(model).check_labels("data" if isinstance(data, Examples) else "names", names)
    with frozen(model, gradients=False), _placed(model, device):
        check = head is None
        reader = Reader(model, found, layer, check=check, token=token, dtype=dtype, storage=storage, memory=memory)
        made = {**settings, "checked": check, "device": reader.device.type}
        cached = None if cache is None else open_cache(cache, model, made)
        values, labels, groups = _read(reader, cached, source, length(data), progress)
    numbers, group_names = _numbered(groups, group_names)
    info = {"method": "extract", "model": type(model).__name__, **settings, "spurge": spurge_version()}
    return Features(
        values=values,
        labels=labels,
        head=found,
        groups=numbers,
        names=names,
        group_names=tuple(group_names),
        info={**info, "torch": str(torch.__version__)},
    )


def _check_settings(token: Any, storage: Any, dtype: Any, **counts: Any) -> None:
    """Refuses settings out of range."""
    for name, count in counts.items():
        integer(name, count, 1)
    choice("token", token, get_args(Token))
    choice("storage", storage, _STORAGE)
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: mixed precision is torch.bfloat16 or torch.float16, got {dtype}")


def _read(
    reader: Reader, cache: FeatureCache | None, source: Iterable[DataBlock], total: int | None, progress: bool
) -> tuple[Tensor, Tensor, list[list[Any] | None]]:
    """Features ``[N, M]`` and labels ``[N]`` of all blocks, and the groups of each block."""
    values: list[Tensor] = []
    labels: list[Tensor] = []
    groups: list[list[Any] | None] = []
    rows = 0
    with tqdm(total=total, desc="extract", unit="rows", disable=not progress) as bar:
        for block in source:
            _check(block, reader.head.outputs, rows, groups)
            values.append(_values(reader, cache, block, rows))
            labels.append(block.labels)
            groups.append(block.groups)
            rows += len(block.labels)
            bar.update(len(block.labels))
    if not values:
        raise ValueError("data: has no rows")
    return _joined(values), torch.cat(labels), groups


def _values(reader: Reader, cache: FeatureCache | None, block: DataBlock, start: int) -> Tensor:
    """Features of one block ``[n, M]`` in the order of its rows, read from the cache or from the model."""
    found = key = None
    if cache is not None:
        key = cache.key(block.batches)
        found = cache.find(key, (len(block.labels), reader.head.width), reader.storage)
    if found is None:
        found = torch.cat([reader.read(batch) for batch in block.batches])
        bad = (~found.isfinite().all(1)).nonzero()[:, 0]
        if len(bad):
            row = start + int(block.order[bad].min())
            advice = " (too large for float16? storage=torch.float32)" if reader.storage == torch.float16 else ""
            raise ValueError(f"model: the features of row {row} are not finite{advice}")
        if cache is not None and key is not None:
            cache.keep(key, found)
    return found[block.order.argsort()]


def _check(block: DataBlock, outputs: int, start: int, before: Sequence[Any]) -> None:
    """Refuses a block before the model spends time on it."""
    wrong = ((block.labels < 0) | (block.labels >= outputs)).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"labels: expected values below {outputs}, got {int(block.labels[row])} at row {start + row}")
    some: list[Any] = list(block.groups or ())
    if (before and (before[0] is None) != (block.groups is None)) or None in some:
        row = some.index(None) if None in some else 0
        raise ValueError(f"groups: either all rows have a group or none has, see row {start + row}")


def _numbered(groups: list[Any], names: Sequence[str] | None) -> tuple[Tensor | None, Sequence[str]]:
    """Groups as int64 ``[N]``, and their names."""
    if groups[0] is None:
        if names:
            raise ValueError(f"group_names: the data has no groups, got {list(names)}")
        return None, ()
    every = [group for part in groups for group in part]
    if all(isinstance(group, int) for group in every):
        return torch.tensor(every, dtype=torch.int64), names or ()
    if not all(isinstance(group, str) for group in every):
        raise TypeError("groups: expected numbers, or names (str)")
    known = {name: number for number, name in enumerate(names or sorted(set(every)))}
    missing = sorted(set(every) - known.keys())
    if missing:
        raise ValueError(f"group_names: {missing[0]!r} of the data is none of {list(known)}")
    return torch.tensor([known[group] for group in every], dtype=torch.int64), tuple(known)


def _names(data: Any, names: Sequence[str] | None, outputs: int) -> tuple[str, ...]:
    """Names of the classes; empty where only their numbers are known."""
    if names is not None:
        return tuple(names)
    if not isinstance(data, Examples) or len(data.labels) == outputs:
        return data.labels if isinstance(data, Examples) else ()
    if len(data.labels) > outputs or not all(name.isdecimal() for name in data.labels):
        raise ValueError(f"names: the head has {outputs} outputs, the data names its labels {data.labels}")
    return ()


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor; each is let go as soon as it is copied, so no more than one stands twice."""
    whole = torch.empty(sum(map(len, parts)), parts[0].shape[1], dtype=parts[0].dtype)
    start = len(whole)
    while parts:
        part = parts.pop()
        start -= len(part)
        whole[start : start + len(part)] = part
    return whole


@temporary
def _placed(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """The model on a device, and back where it was on the way out."""
    before = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if device is None or before <= {torch.device(device)}:
        yield
        return
    if len(before) > 1:
        raise ValueError(f"device: the model is spread over {sorted(map(str, before))}, leave it there")
    with Temporaries() as changes:
        changes.callback(model.to, before.pop())
        model.to(device)
        yield


def _text(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
