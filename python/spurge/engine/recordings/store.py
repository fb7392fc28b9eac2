"""The files of a recording: a JSON header, and one tensor file for each block of rows, whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spurge.engine.base.checks import choice, instance, integer, shaped, warn
from spurge.engine.base.files import (
    FileError,
    PathLike,
    canonical_json,
    fingerprint,
    reading_json,
    remove_drafts,
    spurge_version,
    structured,
    write_json,
)
from spurge.engine.base.tensor_files import Contents, read_tensors, write_tensors

SCHEMA = 1
"""Version of the header; a folder with a higher one is refused."""

STORAGE = ("float16", "bfloat16", "float32")
"""Types of the numbers on disk."""

_HEADER = "recording.json"
_AGAIN = "call record with the same arguments to make it anew"


class Store:
    """A folder with rows of several tensors, written and read in blocks.

    The header says what all blocks are made from; each block carries the header's SHA-256, so that blocks of two
    recordings cannot mix. Made by :meth:`begin` and :meth:`open`.

    Attributes:
        folder: where the files are.
        header: ``made`` (what decides the content, by name), ``prompts``, and what is there for information only.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder, self.header = folder, header
        self._checked: dict[int, dict[str, str]] = {}

    @classmethod
    def begin(cls, folder: PathLike, header: dict[str, Any]) -> Store:
        """A folder to write to: new, or begun before with the same header but for what is only information.

        Raises:
            ValueError: the folder holds a recording of something else. `FileError` for a damaged header.
            OSError: the folder cannot be written.
        """
        path = Path(folder)
        if (path / _HEADER).exists():
            remove_drafts(path)
            store = cls.open(path)
            _compare(path, store.header, header)
            return store
        header = {"kind": "recording", "schema": SCHEMA, "spurge": spurge_version(), **header}
        header = json.loads(canonical_json(header))
        header["sha256"] = fingerprint(canonical_json(header))
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / _HEADER, header)
        return cls(path, header)

    @classmethod
    def open(cls, folder: PathLike) -> Store:
        """A folder as it is, whole or not.

        Raises:
            FileError: not a recording, a damaged header, or one of a newer schema.
            OSError: the header cannot be read.
        """
        path = Path(folder) / _HEADER
        if not path.exists():
            raise FileError(f"{folder}: not the folder of a recording: it has no {_HEADER}")
        with reading_json(path, "the header of a recording", kind="recording", schema=SCHEMA) as header:
            content = {key: value for key, value in header.items() if key != "sha256"}
            if header.get("sha256") != fingerprint(canonical_json(content)):
                raise FileError(f"{path}: changed since it was written: its SHA-256 does not fit its content")
            _check_header(header)
            return cls(Path(folder), header)

    def __len__(self) -> int:
        """Blocks of a whole recording."""
        return -(-len(self.header["prompts"]) // int(self.header["made"]["block"]))

    def rows(self, number: int) -> range:
        """Rows of a block."""
        size = int(self.header["made"]["block"])
        return range(number * size, min(len(self.header["prompts"]), (number + 1) * size))

    def path(self, number: int) -> Path:
        """File of a block."""
        return self.folder / f"block-{number:05d}.safetensors"

    def missing(self) -> list[int]:
        """Blocks without a file."""
        return [number for number in range(len(self)) if not self.path(number).exists()]

    def unfinished(self) -> list[int]:
        """Blocks without a file, and, with a warning, those whose file is damaged; the others have been checked."""
        found = set(self.missing())
        for number in set(range(len(self))) - found:
            try:
                self.check(number)
            except FileError as error:
                warn(f"recording: made anew: {str(error).removesuffix(f'; {_AGAIN}')}")
                found.add(number)
        return sorted(found)

    def write(self, number: int, tensors: Mapping[str, Tensor], texts: list[str] | None) -> None:
        """Writes a block: tensors ``[n, ...]`` and, where there are any, a text for each row.

        Raises:
            OSError: the file cannot be written.
        """
        metadata = {"kind": "recording-block", "recording": self.header["sha256"], "block": str(number)}
        if texts is not None:
            metadata["texts"] = canonical_json(texts)
        write_tensors(self.path(number), tensors, metadata)
        self._checked.pop(number, None)

    def check(self, number: int) -> dict[str, str]:
        """Metadata of a block; the first time, its SHA-256 is verified.

        Raises:
            FileError: missing, damaged, or a block of another recording.
        """
        if number not in self._checked:
            path = self.path(number)
            try:
                contents = read_tensors(path, "recording-block")
            except FileNotFoundError as error:
                raise FileError(f"{path}: is missing; {_AGAIN}") from error
            except FileError as error:
                raise FileError(f"{error}; {_AGAIN}") from error
            metadata = contents.texts
            if (metadata.get("recording"), metadata.get("block")) != (self.header["sha256"], str(number)):
                raise FileError(f"{path}: is a block of another recording, or another block; {_AGAIN}")
            with structured(path, "a block of this recording"):
                self._check_block(contents, len(self.rows(number)))
            self._checked[number] = metadata
        return self._checked[number]

    def _check_block(self, contents: Contents, rows: int) -> None:
        """Refuses a block without the tensors, or the texts, that the header promises."""
        made = self.header["made"]
        dtype = getattr(torch, choice("storage", made["storage"], STORAGE))
        for site in self.header["sites"]:
            for name, width in (("outputs", site["hidden"]), *[("neurons", site["width"])] * bool(made["neurons"])):
                shaped(f"{name}/{site['name']}", contents.tensors.get(f"{name}/{site['name']}"), dtype, rows, width)
        if made["generate"]:
            texts = contents.value("texts", list)
            if len(texts) != rows or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"texts: expected one for each of {rows} prompts")

    def read(self, name: str, width: int, part: slice | None = None) -> Tensor:
        """Columns of a tensor ``[N, width]`` of all blocks, float32; a block's other numbers stay on the disk.

        Raises:
            ValueError: a step. `FileError` as :meth:`check`.
            OSError: a file cannot be read.
        """
        start, stop, step = (part or slice(None)).indices(width)
        if step != 1:
            raise ValueError(f"part: expected a slice without a step, got {part}")
        found = torch.empty(len(self.header["prompts"]), max(0, stop - start))
        if not found.shape[1]:
            return found
        for number in range(len(self)):
            self.check(number)
            rows = self.rows(number)
            with safe_open(self.path(number), "pt") as file:
                found[rows.start : rows.stop] = file.get_slice(name)[:, start:stop]
        return found

    def texts(self) -> tuple[str, ...]:
        """The text of each row. Raises `FileError` as :meth:`check`."""
        return tuple(text for number in range(len(self)) for text in json.loads(self.check(number)["texts"]))

    def fingerprint(self) -> str:
        """SHA-256 over header and blocks. Raises `FileError` as :meth:`check`."""
        prints = [self.check(number)["sha256"] for number in range(len(self))]
        return fingerprint(canonical_json([self.header["sha256"], prints]))


def _check_header(header: Mapping[str, Any]) -> None:
    """Refuses a header without what the blocks are read by; KeyError, TypeError and ValueError say what is wrong."""
    made = instance("made", header["made"], dict)
    integer("block", made["block"], 1)
    integer("generate", made["generate"], 0)
    instance("neurons", made["neurons"], bool)
    instance("model", made["model"] or "", str)
    choice("storage", made["storage"], STORAGE)
    integer("rows", header["rows"], 1)
    if not instance("prompts", header["prompts"], list):
        raise ValueError("prompts: expected at least 1, got 0")
    for prompt in header["prompts"]:
        instance("prompts", prompt, str)
    for site in instance("sites", header["sites"], list):
        instance("sites", instance("sites", site, dict)["name"], str)
        for size in ("width", "hidden"):
            integer(f"sites: {size}", site[size], 1)


def _compare(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses to go on with a recording of something else."""
    advice = "give another folder, or read this one with Recording.open"
    if held["prompts"] != wanted["prompts"]:
        counts = len(held["prompts"]), len(wanted["prompts"])
        if counts[0] != counts[1]:
            raise ValueError(f"prompts: {folder} holds a recording of {counts[0]} prompts, got {counts[1]}; {advice}")
        pairs = zip(held["prompts"], wanted["prompts"], strict=True)
        row = next(row for row, (old, new) in enumerate(pairs) if old != new)
        raise ValueError(f"prompts: {folder} holds a recording of other prompts, the first at {row}; {advice}")
    made = json.loads(canonical_json(wanted["made"]))
    for name, old in held["made"].items():
        new = made.get(name)
        if new == old and (name, old) != ("model", None):
            continue
        if name == "model":
            known = "another model, or of this one in another state or under other versions of its libraries"
            what = f"holds a recording of {known}" if old and new else "cannot be gone on with: see the warning"
            raise ValueError(f"model: {folder} {what}; {advice}")
        if name == "tokens":
            raise ValueError(f"tokenizer: makes other tokens than for the recording in {folder}; {advice}")
        raise ValueError(f"{name}: the recording in {folder} was begun with {_short(old)}, got {_short(new)}; {advice}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
