"""Files that are either whole or absent, and that are refused when they are not whole.

Every file is written to a temporary name in its own folder, synced and renamed, so a crash leaves the old file
or the new one, never half of one. Tensor files are safetensors; their metadata holds the schema version, the kind
of content, the version of Spurge and a SHA-256 over all metadata and tensors, so a loader can refuse a truncated
or changed file in one sentence. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from spurge.engine.base.tensor_parallel import whole

SCHEMA = 1
"""Version of the tensor files written here; files with a higher one are refused."""

_RESERVED = ("schema", "spurge", "sha256")

PathLike = str | os.PathLike[str]


class FileError(ValueError):
    """A file that exists but cannot be used: another kind, truncated, changed, or from a newer Spurge."""


def spurge_version() -> str:
    """Version of the installed package, or ``"0+source"`` when it runs from a source tree."""
    try:
        return importlib.metadata.version("spurge")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


def _plain(value: Any, nan_to_null: bool, where: str) -> Any:
    """``value`` as dict, list, str, int, float, bool and None only; ``where`` is its place, for errors."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: text that is not valid Unicode, {value[:40]!r}") from error
        return str(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if nan_to_null:
            return None
        raise ValueError(f"{where}: JSON has no {value}, expected a finite number")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: JSON keys must be str, got {type(key).__name__} {key!r}")
        return {key: _plain(item, nan_to_null, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, nan_to_null, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where}: cannot be written as JSON, got {type(value).__name__}")


def canonical_json(value: Any, *, nan_to_null: bool = False) -> str:
    """The one JSON text of ``value``: sorted keys, no spaces; equal values give equal texts.

    Tuples, numpy arrays and scalars, and tensors become lists and numbers.

    Args:
        value: nested dict, list, str, number, bool or None.
        nan_to_null: write NaN and infinities as ``null``.

    Raises:
        ValueError: a number is not finite (without ``nan_to_null``), or a text is not valid Unicode.
        TypeError: a key is not a str, or a value has no JSON form.

    >>> canonical_json({"b": (1, 2.5), "a": None})
    '{"a":null,"b":[1,2.5]}'
    """
    plain = _plain(value, nan_to_null, "value")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _update(digest: Any, tensor: Tensor) -> None:
    """Feeds dtype, shape and the bytes of ``tensor`` to a hash."""
    tensor = whole(tensor.detach()).cpu().contiguous()
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def fingerprint(value: Tensor | bytes | str) -> str:
    """SHA-256 of a tensor (dtype, shape, bytes), of bytes, or of a text's UTF-8, in hexadecimal.

    Raises:
        TypeError: ``value`` is something else.
    """
    digest = hashlib.sha256()
    if isinstance(value, Tensor):
        _update(digest, value)
    elif isinstance(value, str):
        digest.update(value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        digest.update(value)
    else:
        raise TypeError(f"value: expected a tensor, bytes or str, got {type(value).__name__}")
    return digest.hexdigest()


def write_bytes(path: PathLike, data: bytes) -> None:
    """Replaces the file at ``path`` by ``data``, all or nothing.

    A link is followed. A device or pipe (``/dev/stdout``) is written to directly.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; the old file is then untouched.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        with open(target, "wb") as stream:  # a directory raises IsADirectoryError here
            stream.write(data)
        return
    if not target.parent.is_dir():
        raise FileNotFoundError(f"folder {target.parent} does not exist, so {target.name} cannot be written there")
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        # Mode "x" refuses an existing name and, unlike tempfile, respects the user's umask.
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: PathLike, value: Any, *, nan_to_null: bool = False) -> None:
    """Writes ``value`` as indented JSON, all or nothing. Keys keep their order.

    Raises:
        ValueError, TypeError: as :func:`canonical_json`; nothing is written then.
        OSError: as :func:`write_bytes`.
    """
    plain = _plain(value, nan_to_null, "value")
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def read_json(path: PathLike) -> Any:
    """The value in a JSON file.

    Raises:
        FileError: not UTF-8, or not JSON; the message has line and column.
        OSError: the file cannot be read.
    """
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not a JSON file: byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise FileError(f"{path}: not a JSON file of ours: nested too deeply") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise FileError(f"{path}: not a JSON file: {error.msg} at {place}") from error
    except ValueError as error:
        raise FileError(f"{path}: not a JSON file: {error}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata (without the hash itself) and over names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    digest.update(canonical_json({key: text for key, text in metadata.items() if key != "sha256"}).encode())
    for name in sorted(tensors):
        digest.update(f"\0{name}\0".encode())
        _update(digest, tensors[name])
    return digest.hexdigest()


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and their metadata as one safetensors file, all or nothing; equal inputs give equal bytes.

    Adds ``schema``, ``spurge`` (version) and ``sha256`` to the metadata.

    Args:
        path: the file.
        tensors: name to tensor, any device, dense.
        metadata: texts, among them ``kind`` (what the file holds). Structures go in as :func:`canonical_json`.

    Raises:
        ValueError: ``kind`` missing, a reserved key given, or a tensor that safetensors cannot store.
        TypeError: a value of the wrong type.
        OSError: as :func:`write_bytes`.
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
    # Own copies: safetensors refuses views that share memory.
    owned = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    complete = {**metadata, "schema": str(SCHEMA), "spurge": spurge_version()}
    complete["sha256"] = _digest(owned, complete)
    try:
        data = safetensors.torch.save(owned, complete)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"tensors: safetensors cannot store them: {error}") from error
    # safetensors writes the metadata in an arbitrary order; a sorted header makes equal files equal bytes.
    end = 8 + int.from_bytes(data[:8], "little")
    header = canonical_json(json.loads(data[8:end])).encode()
    header += b" " * (-len(header) % 8)
    write_bytes(path, len(header).to_bytes(8, "little") + header + data[end:])


def _header(path: PathLike, data: bytes) -> dict[str, Any]:
    """The header of a safetensors file, after a check that all announced bytes are there."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 9 or data[8:9] != b"{" or length > 100_000_000:
        raise FileError(f"{path}: not a safetensors file")
    if 8 + length > len(data):
        raise FileError(f"{path}: truncated: the header has {length} bytes, the file only {len(data) - 8}")
    try:
        header = json.loads(data[8 : 8 + length])
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: changed since it was written: its header cannot be read") from error
    if end > len(data):
        raise FileError(f"{path}: truncated: {end} bytes expected, {len(data)} found")
    return header


def read_tensors(path: PathLike, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a file of :func:`write_tensors` and checks all of it.

    Args:
        path: the file.
        kind: the kind that is expected; None accepts any.

    Returns:
        The tensors, on the CPU, and the whole metadata.

    Raises:
        FileError: not a safetensors file, not written by Spurge, truncated, changed, of another kind, or newer.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    metadata = _header(path, data).get("__metadata__")
    if not isinstance(metadata, dict) or not {"schema", "kind", "sha256"} <= metadata.keys():
        raise FileError(f"{path}: a safetensors file, but not written by Spurge: its metadata is missing")
    schema = str(metadata["schema"])
    if not schema.isdecimal() or int(schema) < 1:
        raise FileError(f"{path}: changed since it was written: schema {schema[:20]!r} is no version")
    if int(schema) > SCHEMA:
        raise FileError(
            f"{path}: schema {schema}, written by Spurge {metadata.get('spurge')}, is newer than this Spurge "
            f"{spurge_version()} can read (schema {SCHEMA})"
        )
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise FileError(f"{path}: changed since it was written: {error}") from error
    if _digest(tensors, metadata) != metadata["sha256"]:
        raise FileError(f"{path}: changed since it was written: its SHA-256 does not fit its content")
    if kind is not None and metadata["kind"] != kind:
        raise FileError(f"{path}: holds {metadata['kind']!r}, expected {kind!r}")
    return tensors, metadata
