"""Files that are either whole or absent, and that are refused when they are not what was expected.

Every file is written as a draft in its own folder, synced and renamed, so a crash leaves the old file or the new one,
never half of one. A draft is locked while it is written: one without a lock is of a run that was killed, and is removed
by the next one that writes there. Nothing is ever pickled, and every file that is read comes in by :func:`opened`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.temporary import Temporaries
from spurge.engine.base.tensor_parallel import whole

PathLike = str | os.PathLike[str]

_DRAFT = ".spurge-draft"  # how the names of drafts end
_LEAST_SPARSE = 2**20  # bytes: smaller files may have any holes
_MOST_HOLES = 1000  # times as many bytes as are stored
_LONGEST_REASON = 400  # characters of an error of a file's content


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


def indented_json(value: Any, *, nan_to_null: bool = False) -> str:
    """JSON for people: a line an entry, keys in their order. Raises as :func:`canonical_json`."""
    return json.dumps(_plain(value, nan_to_null, "value"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


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

    A link is followed, and the file keeps its mode and, where that is allowed, its owner. A device or pipe
    (``/dev/stdout``) is written to directly.

    Raises:
        OSError: the folder is missing, folder or file is not writable, the file has several hard links, which a new
            file would part, or the disk is full; the old file is then untouched. It names the file.
    """
    with naming(path):
        target, before = _checked_target(path)
        if before is not None and not stat.S_ISREG(before.st_mode):
            with open(path, "wb") as stream:
                stream.writelines(parts)
            return
        with Temporaries() as changes:
            draft = begin_draft(changes, target)
            with open(draft, "r+b") as stream:
                stream.writelines(parts)
                stream.flush()
                if before is not None:
                    with suppress(PermissionError):
                        os.fchown(stream.fileno(), before.st_uid, before.st_gid)
                    os.fchmod(stream.fileno(), stat.S_IMODE(before.st_mode))
                os.fsync(stream.fileno())
            os.replace(draft, target)


def check_writable(path: PathLike) -> None:
    """Tries whether :func:`write_parts` could write to ``path``, and leaves all as it was; raises as that."""
    with naming(path):
        target, before = _checked_target(path)
        if before is None or stat.S_ISREG(before.st_mode):
            with Temporaries() as changes:
                begin_draft(changes, target)


def _checked_target(path: PathLike) -> tuple[Path, os.stat_result | None]:
    """Where a file is to be written, and the state of what is there, None for nothing."""
    target = Path(os.path.realpath(path))
    try:
        before = os.stat(path)
    except FileNotFoundError:
        if not target.parent.is_dir():
            text = f"folder {target.parent} does not exist, so {target.name} cannot be written there"
            raise FileNotFoundError(text) from None
        return target, None
    fault = None
    if stat.S_ISDIR(before.st_mode):
        fault = errno.EISDIR, "is a folder, expected a file"
    elif not os.access(path, os.W_OK):
        fault = errno.EACCES, "is not writable"
    elif stat.S_ISREG(before.st_mode) and before.st_nlink > 1:
        fault = errno.EMLINK, f"has {before.st_nlink} hard links, which a new file would part; give another name"
    if fault is not None:
        raise OSError(*fault, os.fspath(path))
    return target, before


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Within the block, errors of the system that name no file, such as of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def begin_draft(changes: Temporaries, target: Path, *, folder: bool = False) -> Path:
    """A new empty file or ``folder`` beside ``target``, to be filled and renamed to it, and locked until then.

    Args:
        changes: when they are undone, the draft is unlocked, and removed where it was not renamed.
        target: what it is to become.
        folder: whether that is a folder.

    Raises:
        OSError: it cannot be made. Drafts of runs that were killed are removed first.
    """
    remove_drafts(target.parent)
    name = os.fsencode(target.name)[:100].decode(errors="ignore")
    while True:
        draft = target.with_name(f".{name}.{secrets.token_hex(4)}{_DRAFT}")
        changes.callback(_remove, draft)
        if folder:
            draft.mkdir()
        # An existing name is refused and, unlike by tempfile, the user's umask respected.
        flags = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
        descriptor = os.open(draft, flags, 0o666)
        changes.callback(os.close, descriptor)
        with suppress(OSError):  # a file system without locks: drafts then stay where a run is killed
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # removed before it was locked
            if os.path.samestat(os.fstat(descriptor), os.stat(draft)):
                return draft


def remove_drafts(folder: PathLike) -> None:
    """Removes what runs that were killed left of files and folders that they were writing into ``folder``."""
    drafts: list[Path] = []
    with suppress(OSError):  # not readable
        drafts = [Path(folder, name) for name in os.listdir(folder) if name.startswith(".") and name.endswith(_DRAFT)]
    for draft in drafts:
        with suppress(OSError):  # another's, gone meanwhile, or locked by a run that writes it
            descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(draft)
            finally:
                os.close(descriptor)


def _remove(draft: Path) -> None:
    if draft.is_dir() and not draft.is_symlink():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        draft.unlink(missing_ok=True)


def write_bytes(path: PathLike, data: bytes) -> None:
    """As :func:`write_parts`, all bytes at once."""
    write_parts(path, [data])


def write_json(path: PathLike, value: Any) -> None:
    """Writes :func:`indented_json`, all or nothing; raises as that, before it writes, and as :func:`write_parts`."""
    write_bytes(path, indented_json(value).encode("utf-8"))


@contextmanager
def opened(path: PathLike) -> Iterator[BinaryIO]:
    """The bytes of a file, for reading.

    Raises:
        FileError: a folder, device or pipe, an empty file, or one of holes but for a thousandth of its bytes.
        OSError: the file cannot be read.
    """
    _check_regular(path, os.stat(path))
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        status = os.fstat(stream.fileno())
        _check_regular(path, status)
        if not status.st_size:
            raise FileError(f"{path}: is empty, as if truncated")
        if status.st_size > _LEAST_SPARSE:
            stored = _stored(stream.fileno(), status.st_size)
            if stored * _MOST_HOLES < status.st_size:
                raise FileError(f"{path}: is sparse: of its {status.st_size} bytes only {stored} were ever written")
        yield stream


def _check_regular(path: PathLike, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    raise FileError(f"{path}: is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, expected a file")


def _stored(descriptor: int, size: int) -> int:
    """Bytes that are no holes, of the first extents of a file that are enough of it."""
    found = place = 0
    try:
        while found * _MOST_HOLES < size and place < size:
            start = os.lseek(descriptor, place, os.SEEK_DATA)
            place = os.lseek(descriptor, start, os.SEEK_HOLE)
            found += place - start
    except OSError as error:
        if error.errno != errno.ENXIO:  # no more data; any other: a file system that knows no holes
            found = size
    os.lseek(descriptor, 0, os.SEEK_SET)
    return found


def parse_json(text: str, *, nan: bool = False) -> Any:
    """The value that JSON text stands for; every number is finite, and every field of an object is given once.

    Args:
        text: the JSON.
        nan: whether NaN and Infinity, which are not JSON, are taken as Python writes them.

    Raises:
        ValueError: anything else; `json.JSONDecodeError` has the place.
    """
    constant = None if nan else _no_constant
    try:
        return json.loads(text, parse_constant=constant, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r:.60} is given twice")
    return value


def read_json(path: PathLike) -> Any:
    """The value in a JSON file, as :func:`parse_json` takes it.

    Raises:
        FileError: not UTF-8, or not JSON; the message has line and column.
        OSError: the file cannot be read.
    """
    try:
        with opened(path) as stream:
            return parse_json(stream.read().decode("utf-8-sig"))
    except FileError:
        raise
    except ValueError as error:
        text = str(error)
        if isinstance(error, UnicodeDecodeError):
            text = f"byte {error.start} is not UTF-8"
        elif isinstance(error, json.JSONDecodeError):
            text = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise FileError(f"{path}: not a JSON file: {text}") from error


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
    if not (number.isascii() and number.isdecimal() and len(number) < 10) or int(number) < 1:
        raise FileError(f"{path}: changed since it was written: schema {number[:20]!r} is no version")
    if int(number) > schema:
        writer = f", written by Spurge {found['spurge']}," if "spurge" in found else ""
        raise FileError(
            f"{path}: schema {number}{writer} is newer than this Spurge {spurge_version()} can read (schema {schema})"
        )
    if kind not in (None, found["kind"]):
        raise FileError(f"{path}: holds {found['kind']!r}, expected {kind!r}")


#: What wrong content leads to, also by numbers that overflow, sizes beyond the memory or too deep a nesting.
_OF_CONTENT = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError)


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
    except _OF_CONTENT as error:
        missing = " is missing" if isinstance(error, KeyError) else ""
        raise FileError(f"{path}: not {what}: {error!s:.{_LONGEST_REASON}}{missing}") from error


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
