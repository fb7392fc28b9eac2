"""Files that are either whole or absent, and that are refused when they are not what was expected.

Every file is written to a temporary name in its own folder, synced and renamed, so a crash leaves the old file
or the new one, never half of one. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.temporary import Temporaries
from spurge.engine.base.tensor_parallel import whole

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


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a dense tensor: its own memory where that is on the CPU and contiguous, a copy elsewhere."""
    tensor = whole(tensor.detach()).cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Feeds dtype, shape and the bytes of ``tensor`` to a hash."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(raw_bytes(tensor))


def fingerprint(value: Tensor | bytes | str) -> str:
    """SHA-256 of a tensor (dtype, shape, bytes), of bytes, or of a text's UTF-8, in hexadecimal.

    Raises:
        TypeError: ``value`` is something else.
    """
    digest = hashlib.sha256()
    if isinstance(value, Tensor):
        hash_tensor(digest, value)
    elif isinstance(value, str):
        digest.update(value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        digest.update(value)
    else:
        raise TypeError(f"value: expected a tensor, bytes or str, got {type(value).__name__}")
    return digest.hexdigest()


def write_parts(path: PathLike, parts: Iterable[bytes | memoryview]) -> None:
    """Replaces the file at ``path`` by ``parts``, one behind the other, all or nothing.

    A link is followed. A device or pipe (``/dev/stdout``) is written to directly.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; the old file is then untouched.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        with open(target, "wb") as stream:  # a directory raises IsADirectoryError here
            stream.writelines(parts)
        return
    if not target.parent.is_dir():
        raise FileNotFoundError(f"folder {target.parent} does not exist, so {target.name} cannot be written there")
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with Temporaries() as changes:
        changes.callback(temporary.unlink, missing_ok=True)
        # Mode "x" refuses an existing name and, unlike tempfile, respects the user's umask.
        with open(temporary, "xb") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)


def write_bytes(path: PathLike, data: bytes) -> None:
    """As :func:`write_parts`, all bytes at once."""
    write_parts(path, [data])


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


def check_kind(path: PathLike, found: Mapping[str, Any], kind: str | None, schema: int) -> None:
    """Refuses a file by what it says of itself.

    Args:
        path: the file, for errors.
        found: its ``kind`` and ``schema``, and ``spurge`` if it says by which version it was written.
        kind: the kind that is expected; None accepts any.
        schema: the newest that can be read.

    Raises:
        FileError: another kind, a schema that is no version, or a newer one.
        KeyError: no kind or no schema.
    """
    number = str(found["schema"])
    if not number.isdecimal() or int(number) < 1:
        raise FileError(f"{path}: changed since it was written: schema {number[:20]!r} is no version")
    if int(number) > schema:
        writer = f", written by Spurge {found['spurge']}," if "spurge" in found else ""
        raise FileError(
            f"{path}: schema {number}{writer} is newer than this Spurge {spurge_version()} can read (schema {schema})"
        )
    if kind not in (None, found["kind"]):
        raise FileError(f"{path}: holds {found['kind']!r}, expected {kind!r}")


@contextmanager
def structured(path: PathLike, what: str) -> Iterator[None]:
    """Within the block, whatever a file lacks or has of another type or value is an error of the file.

    Args:
        path: the file, for errors.
        what: it should be: "a removal".

    Raises:
        FileError: in place of the errors that wrong content leads to; the message names the field.
    """
    try:
        yield
    except FileError:
        raise
    except KeyError as error:
        raise FileError(f"{path}: not {what}: {error} is missing") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise FileError(f"{path}: not {what}: {error}") from error


@contextmanager
def reading_json(
    path: PathLike,
    what: str,
    *,
    keys: Collection[str] | None = None,
    kind: str | None = None,
    schema: int = 1,
    by_hand: bool = False,
) -> Iterator[dict[str, Any]]:
    """The object in a JSON file, and a block in which to make something of it, as :func:`structured`.

    Args:
        path: the file.
        what: it should be, for errors.
        keys: that it may have; None for any.
        kind, schema: what its ``kind`` has to be, and the newest ``schema``; without a kind it needs neither.
        by_hand: people write such files too, and may leave kind and schema out.

    Raises:
        FileError: not JSON, no object, an unknown key, another kind, a newer schema, or content that the block refuses.
        OSError: the file cannot be read.
    """
    value = read_json(path)
    with structured(path, what):
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, got {type(value).__name__}")
        if kind is not None:
            check_kind(path, {"kind": kind, "schema": schema} | value if by_hand else value, kind, schema)
        strange = sorted(value.keys() - keys) if keys is not None else ()
        if strange:
            raise ValueError(f"{strange[0]!r} is not known, expected {', '.join(sorted(keys or ()))}")
        yield value
