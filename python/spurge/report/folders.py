"""What lies in the folders of a job: numbers, tables, edits and texts that commands have written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spurge.engine.base.files import FileError, opened, parse_json
from spurge.engine.base.tensor_files import kind_of
from spurge.engine.data.table_files import read_records
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_deltas import WeightDeltas
from spurge.engine.edits.weight_edits import WeightEdit, load_edit
from spurge.methods.fcr.removal import Removal
from spurge.methods.macu.located import Located
from spurge.methods.neurontune.tuned import Tuned
from spurge.report.results import Results

Edit = NeuronEdit | WeightEdit | WeightDeltas

_EDITS = ("edit", "weight-edit", "weight-deltas")
_FOUND = {"word", "kind", "label", "role", "keep"}  # columns of a table of candidates
_CHANGED = {"set", "text", "label", "before", "after", "before_share", "after_share"}


@dataclass(frozen=True)
class FileFacts:
    """A file of the job: its name, what it is, its bytes and their SHA-256."""

    name: str
    what: str
    size: int
    sha256: str


@dataclass
class Job:
    """Everything that was read, each under the name of its file.

    Attributes:
        results: numbers, the oldest first.
        found: tables of candidates, as rows.
        located, edits, removals, tuned: what such files hold.
        changed: texts with another answer.
        files: all of them; also those that are none of these.
        unread: files that could not be read, and why.
    """

    results: dict[str, Results] = field(default_factory=dict)
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    located: dict[str, Located] = field(default_factory=dict)
    edits: dict[str, Edit] = field(default_factory=dict)
    removals: dict[str, Removal] = field(default_factory=dict)
    tuned: dict[str, Tuned] = field(default_factory=dict)
    changed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: list[FileFacts] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing was found that a report could tell of."""
        return not (self.results or self.found or self.located or self.edits or self.removals or self.tuned)


def read_job(folders: Iterable[str | os.PathLike[str]]) -> Job:
    """Reads folders, and files; what lies deeper in a folder is left out.

    Raises:
        ValueError: none, one that does not exist, or nothing in them that commands write.
    """
    job = Job()
    paths: list[tuple[str, Path]] = []
    for given in map(Path, folders):
        if not given.exists():
            raise ValueError(f"folders: {str(given)!r} does not exist")
        inside = sorted(path for path in given.iterdir() if path.is_file()) if given.is_dir() else [given]
        paths += [(given.name if given.is_dir() else "", path) for path in inside]
    several = len({folder for folder, _ in paths}) > 1
    for folder, path in paths:
        _read(job, f"{folder}/{path.name}" if several and folder else path.name, path)
    if job.empty:
        raise ValueError("folders: expected files that spurge wrote (--json, --out), found none")
    job.results = dict(sorted(job.results.items(), key=lambda item: item[1].head["created"]))
    return job


def _read(job: Job, name: str, path: Path) -> None:
    what = "file"
    try:
        if path.suffix == ".json":
            what = _read_json(job, name, path)
        elif path.suffix == ".safetensors":
            what = _read_tensors(job, name, path)
        elif path.suffix in (".tsv", ".jsonl"):
            what = _read_table(job, name, path)
    except (FileError, ValueError, OSError) as error:
        job.unread[name] = str(error).replace(f"{path}: ", "")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(2**20), b""):
            digest.update(block)
    job.files.append(FileFacts(name, what, path.stat().st_size, digest.hexdigest()))


def _read_json(job: Job, name: str, path: Path) -> str:
    with opened(path) as stream:
        value = parse_json(stream.read().decode("utf-8"))
    if not isinstance(value, Mapping) or not {"name", "rows", "versions"} <= value.keys():
        return "file"  # golden words, a model's configuration
    job.results[name] = Results.load(path)
    return f"numbers of {job.results[name].head['name']}"


def _read_tensors(job: Job, name: str, path: Path) -> str:
    kind = kind_of(path)
    if kind in _EDITS:
        job.edits[name] = load_edit(path)
        return "edit"
    if kind == "located":
        job.located[name] = Located.load(path)
        return "located neurons"
    if kind == "removal":
        job.removals[name] = Removal.load(path)
        return "removal"
    if kind == "neurontune":
        job.tuned[name] = Tuned.load(path)
        return "tuned layer"
    return kind


def _read_table(job: Job, name: str, path: Path) -> str:
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(read_records(path)):
        if number == 0 and not (row.keys() >= _FOUND or row.keys() >= _CHANGED):
            return "file"
        rows.append(dict(row))
    if rows and rows[0].keys() >= _FOUND:
        job.found[name] = rows
        return "candidates"
    if rows:
        job.changed[name] = rows
        return "texts with another answer"
    return "file"
