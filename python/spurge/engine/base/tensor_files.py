"""Files of tensors and texts, which tell what they hold and refuse to be read when they were truncated or changed.

They are safetensors; their metadata holds the schema version, the kind of content, the version of Spurge and a SHA-256
over all metadata and tensors. Tensors go to the disk from their own memory, and come from it into their own: a file
needs no memory beside its tensors, however large they are.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor

from spurge.engine.base.checks import instance
from spurge.engine.base.files import (
    FileError,
    PathLike,
    canonical_json,
    check_kind,
    hash_tensor,
    opened,
    parse_json,
    raw_bytes,
    spurge_version,
    structured,
    write_parts,
)

_Kind = TypeVar("_Kind")

SCHEMA = 1
"""Version of the tensor files written here; files with a higher one are refused."""

_RESERVED = ("schema", "spurge", "sha256")
_TYPES = {  # by growing alignment: tensors of the last ones come first in a file
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(_TYPES.values())}
_LONGEST_HEADER = 100_000_000  # bytes
_MOST_DIMENSIONS = 64


class Contents(NamedTuple):
    """What a tensor file holds.

    Attributes:
        tensors: by name, on the CPU.
        texts: the metadata.
    """

    tensors: dict[str, Tensor]
    texts: dict[str, str]

    def value(self, name: str, kind: type[_Kind] = object) -> _Kind:  # type: ignore[assignment]
        """What the JSON of a text says, once it is of the type ``kind``.

        Raises:
            KeyError: there is none of that name.
            ValueError: it is no JSON.
            TypeError: it is of another type.
        """
        try:
            found = parse_json(self.texts[name])
        except ValueError as error:
            raise ValueError(f"{name}: not JSON: {error}") from error
        return instance(name, found, kind)


def flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several groups, by names ``group/name``."""
    return {f"{group}/{name}": tensor for group, own in groups.items() for name, tensor in own.items()}


def of_group(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one group of :func:`flat`."""
    prefix = f"{group}/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


# ---- bytes -----------------------------------------------------------------------------------------------------------


def pack(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> Iterable[bytes | memoryview]:
    """The bytes of a safetensors file, part by part; equal inputs give equal bytes.

    Raises:
        ValueError: a tensor of a type that safetensors cannot store.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise ValueError(f"tensors: safetensors cannot store them: {name!r} is {tensor.dtype}")
    order = sorted(tensors, key=lambda name: (-_PLACES[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = _header_text(header)
    return chain((len(text).to_bytes(8, "little"), text), (raw_bytes(tensors[name]) for name in order))


def _header_text(header: Mapping[str, Any]) -> bytes:
    """The one form in which a header is written."""
    text = canonical_json(header).encode()
    return text + b" " * (-len(text) % 8)


def unpack(stream: BinaryIO, source: PathLike = "message") -> Contents:
    """What :func:`pack` packed; ``source`` is its name in errors.

    Raises:
        FileError: not such bytes, truncated or changed.
    """
    header, size = read_header(stream, source)
    return Contents(_tensors(stream, header, size, source), header.get("__metadata__", {}))


def read_header(stream: BinaryIO, source: PathLike) -> tuple[dict[str, Any], int]:
    """The header of safetensors, and how many bytes follow it; raises as :func:`unpack`."""
    text, size = _read_header_text(stream, source)
    return _parsed(text, source), size


def _read_header_text(stream: BinaryIO, source: PathLike) -> tuple[bytes, int]:
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    begin = stream.read(1)
    if begin != b"{" or not 0 < length <= _LONGEST_HEADER:
        raise FileError(f"{source}: not a safetensors file")
    if 8 + length > size:
        raise FileError(f"{source}: truncated: the header has {length} bytes, the file only {size - 8}")
    return begin + stream.read(length - 1), size - 8 - length


def _parsed(text: bytes, source: PathLike) -> dict[str, Any]:
    """The header that JSON stands for, each of its entries an object."""
    try:
        header = parse_json(text.decode())
        for name, entry in header.items():
            if not isinstance(entry, dict):
                raise ValueError(f"{name!r:.60} is no object")
    except ValueError as error:
        raise FileError(f"{source}: changed since it was written: its header cannot be read: {error}") from error
    return header


def _tensors(stream: BinaryIO, header: Mapping[str, Any], size: int, source: PathLike) -> dict[str, Tensor]:
    """The tensors behind a header, in the order of their bytes, read into their own memory."""
    places = _places(header, size, source)
    try:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in places}
    except (TypeError, RuntimeError, MemoryError) as error:
        raise FileError(f"{source}: its tensors of {size} bytes find no room in memory: {error}") from error
    for name, tensor in tensors.items():
        into = raw_bytes(tensor)
        if stream.readinto(into) < into.nbytes:  # type: ignore[attr-defined]
            raise FileError(f"{source}: truncated while it was read, within {name!r}")
    return tensors


def _places(header: Mapping[str, Any], size: int, source: PathLike) -> list[tuple[str, torch.dtype, list[int]]]:
    """Names, types and shapes of the tensors, in the order of their bytes, which are as many as follow the header."""
    changed = f"{source}: changed since it was written: its header"
    entries = []
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, shape, span = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
            if not (isinstance(dtype, str) and dtype in _TYPES and _sizes(shape, _MOST_DIMENSIONS) and _sizes(span, 2)):
                raise FileError(f"{changed} cannot be read at {name!r:.60}")
            entries.append((span, name, _TYPES[dtype], shape))
    end, places = 0, []
    for span, name, dtype, shape in sorted(entries, key=lambda entry: entry[0]):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        if span != [start, end]:
            raise FileError(f"{changed} has {name!r:.60} at another place than its shape says")
        places.append((name, dtype, shape))
    if end > size:
        raise FileError(f"{source}: truncated: {end} bytes expected behind the header, {size} found")
    if end < size:
        raise FileError(f"{source}: changed since it was written: {size - end} bytes too many")
    return places


def _sizes(value: Any, most: int) -> bool:
    """Whether a value is a list of ``most`` sizes at most, each of them one that 64 bits hold."""
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < 2**63 for n in value)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and their metadata as one safetensors file, all or nothing; equal inputs give equal bytes.

    Adds ``schema``, ``spurge`` (version) and ``sha256`` to the metadata. Tensors that are not contiguous on the CPU are
    copied there, one at a time.

    Args:
        path: the file.
        tensors: name to tensor, any device, dense.
        metadata: texts, among them ``kind`` (what the file holds). Structures go in as :func:`canonical_json`.

    Raises:
        ValueError: ``kind`` missing, a reserved key given, or a tensor that safetensors cannot store.
        TypeError: a value of the wrong type.
        OSError: as :func:`write_parts`.
    """
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata: keys and values must be str, got {key!r}: {type(text).__name__}")
        if key in _RESERVED:
            raise ValueError(f"metadata: {key!r} is written by Spurge itself, choose another name")
    if not metadata.get("kind"):
        raise ValueError("metadata: need 'kind', a text that says what the file holds")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"tensors: expected str to tensor, got {name!r}: {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise ValueError(f"tensors: {name!r} must be dense, got layout {tensor.layout}")
    complete = {**metadata, "schema": str(SCHEMA), "spurge": spurge_version()}
    complete["sha256"] = _digest(tensors, complete)
    write_parts(path, pack(tensors, complete))


def read_tensors(path: PathLike, kind: str | None = None) -> Contents:
    """Reads a file of :func:`write_tensors` and checks all of it.

    Args:
        path: the file.
        kind: the kind that is expected; None accepts any.

    Raises:
        FileError: not a safetensors file, not written by Spurge, truncated, changed, of another kind, or newer.
        OSError: the file cannot be read.
    """
    with opened(path) as stream:
        text, size = _read_header_text(stream, path)
        header = _parsed(text, path)
        texts = _metadata(header, path, kind)
        tensors = _tensors(stream, header, size, path)
    with structured(path, "a file as Spurge writes it"):
        if _digest(tensors, texts) != texts["sha256"] or _header_text(header) != text:
            raise FileError(f"{path}: changed since it was written: its SHA-256 does not fit its content")
    return Contents(tensors, texts)


@contextmanager
def reading(path: PathLike, kind: str, what: str) -> Iterator[Contents]:
    """What a file of :func:`write_tensors` holds, and a block in which to make something of it.

    Args:
        path: the file.
        kind: that it has to be of.
        what: it should be, for errors.

    Raises:
        FileError: as :func:`read_tensors`, or content that the block refuses, as :func:`structured`.
        OSError: the file cannot be read.
    """
    contents = read_tensors(path, kind)
    with structured(path, what):
        yield contents


def kind_of(path: PathLike) -> str:
    """The kind of a file of :func:`write_tensors`, by its header alone.

    Raises:
        FileError: not a safetensors file, not written by Spurge, or newer.
        OSError: the file cannot be read.
    """
    with opened(path) as stream:
        return _metadata(read_header(stream, path)[0], path, None)["kind"]


def _metadata(header: Mapping[str, Any], path: PathLike, kind: str | None) -> dict[str, str]:
    """What a file of Spurge says of itself, once it is of this kind and no newer schema."""
    texts = header.get("__metadata__")
    if not isinstance(texts, dict) or not {"schema", "kind", "sha256"} <= texts.keys():
        raise FileError(f"{path}: a safetensors file, but not written by Spurge: its metadata is missing")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise FileError(f"{path}: changed since it was written: {name!r:.60} in its metadata is no text")
    check_kind(path, texts, kind, SCHEMA)
    return texts


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata (without the hash itself) and over names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    digest.update(canonical_json({key: text for key, text in metadata.items() if key != "sha256"}).encode())
    for name in sorted(tensors):
        digest.update(f"\0{name}\0".encode())
        hash_tensor(digest, tensors[name])
    return digest.hexdigest()
