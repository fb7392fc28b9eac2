"""Results of a command, a benchmark or an experiment: one JSON shape that people and scripts read alike.

``{"name", "created", "spurge", "commit", "device", "versions", "settings", "rows"}``; each row is flat:
``{"case", "method", "metric", "value", "spread", "n", "unit"}`` plus, where it applies, ``"labels"`` (which labels the
step used), ``"seed"`` and ``"note"``. Accuracies are in percent, times in seconds, sizes in bytes, rates in GB/s or
GFLOP/s; rows in other units are refused.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from spurge.engine.base import files
from spurge.engine.base.checks import choice
from spurge.engine.base.tables import Table, page

_HEAD = ("name", "created", "spurge", "commit", "device", "versions", "settings")
_ROW = ("case", "method", "metric", "value", "spread", "n", "unit")
_OPTIONAL = ("labels", "seed", "note")
_LABELS = ("none", "class", "group")

# Ending of a metric's name -> its unit.
_METRIC_UNITS = {"accuracy": "percent", "seconds": "s", "bytes": "bytes"}
# Spellings that would make files differ -> what to write instead.
_UNIT_SPELLINGS = {
    **dict.fromkeys(("%", "pct", "per cent"), "percent"),
    **dict.fromkeys(("seconds", "second", "sec", "secs", "ms", "us", "min", "h"), "s"),
    **dict.fromkeys(("B", "byte", "KB", "MB", "GB", "KiB", "MiB", "GiB"), "bytes"),
    **dict.fromkeys(("MB/s", "GiB/s", "MiB/s", "gb/s", "B/s"), "GB/s"),
    **dict.fromkeys(("GFLOPS", "GFLOPs", "GFlop/s", "TFLOP/s", "TFLOPS", "FLOP/s"), "GFLOP/s"),
}


def describe_device() -> dict[str, Any]:
    """The machine: ``cpu`` (model), ``cores`` this process may use, ``threads`` of torch, ``gpu`` (name or None)."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: what platform knows must do
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": cores, "threads": torch.get_num_threads(), "gpu": gpu}


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of what the numbers depend on; None for a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def commit() -> str | None:
    """Hash of the checkout this code comes from, with ``-dirty`` where files were changed; None where there is none.

    The package runs from the checkout's folder ``python``, or is an installed copy of it and the working directory lies
    in the checkout. A copy with other sources does not count, nor does a checkout of another project.
    """
    package = Path(__file__).resolve().parents[1]
    here = Path.cwd()
    for root in (package.parents[1], here, *here.parents):
        if (root / ".git").exists() and (root / "python" / "spurge").is_dir():
            return _git_describe(root) if _source_files(root / "python" / "spurge") == _source_files(package) else None
    return None


def _source_files(package: Path) -> dict[str, bytes]:
    """Python files of a package by their place in it."""
    return {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*.py")}


def _git_describe(root: Path) -> str | None:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _finite_number(name: str, value: Any) -> int | float | None:
    """A plain number; None where it is missing or not finite, which JSON cannot say otherwise."""
    if hasattr(value, "item"):
        value = value.item()  # a numpy or torch scalar
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _whole_number(name: str, value: Any, least: int) -> int | None:
    """A whole number of at least ``least``, or None."""
    number = _finite_number(name, value)
    if number is None:
        return None
    if not isinstance(number, int):
        raise TypeError(f"{name}: expected a whole number, got {number}")
    if number < least:
        raise ValueError(f"{name}: need at least {least}, got {number}")
    return number


def _text(name: str, value: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a text, got {type(value).__name__}")
    if not empty and not value.strip():
        raise ValueError(f"{name}: is empty")
    return value


def _checked_unit(metric: str, unit: str, value: int | float | None) -> str:
    """The unit, checked against the metric and against other spellings."""
    if unit in _UNIT_SPELLINGS:
        raise ValueError(f"unit: write {_UNIT_SPELLINGS[unit]!r}, got {unit!r}")
    for ending, wanted in _METRIC_UNITS.items():
        if metric.endswith(ending) and unit != wanted:
            raise ValueError(f"unit: {metric!r} is in {wanted!r}, got {unit!r}")
    if metric.endswith("accuracy") and value is not None and not 0 <= value <= 100:
        raise ValueError(f"value: an accuracy is in 0 to 100 percent, got {value}")
    return unit


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


class Results:
    """Named rows of numbers with the settings, the machine and the versions they come from.

    Args:
        name: of the command or experiment.
        settings: JSON-able.

    Raises:
        ValueError, TypeError: settings that are not JSON-able, so that a long run does not fail when it writes.

    >>> results = Results("demo", {"seed": 0})
    >>> results.add("broken", "none", "accuracy", 61.5, n=200, unit="percent")
    >>> results.rows[0]["value"]
    61.5
    """

    def __init__(self, name: str, settings: Mapping[str, Any] | None = None) -> None:
        if settings is not None and not isinstance(settings, Mapping):
            raise TypeError(f"settings: expected a mapping, got {type(settings).__name__}")
        self.head: dict[str, Any] = {
            "name": _text("name", name),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "spurge": files.spurge_version(),
            "commit": commit(),
            "device": describe_device(),
            "versions": describe_versions(),
            "settings": json.loads(files.canonical_json(settings or {})),
        }
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        case: str,
        method: str,
        metric: str,
        value: Any,
        *,
        spread: Any = None,
        n: int | None = None,
        unit: str = "",
        labels: str | None = None,
        seed: int | None = None,
        note: str | None = None,
    ) -> None:
        """Adds one row.

        Args:
            case: what was measured ("broken", "minilm-32x8").
            method: how ("none", "paper", "random", "captum").
            metric: what number it is ("accuracy", "seconds", "peak_bytes").
            value: the number; NaN and infinities become null.
            spread: its spread (standard deviation or distance between quartiles), at least 0.
            n: how many draws, rows or repeats it comes from.
            unit: "percent", "s", "bytes", "GB/s", "GFLOP/s", another unit, or "" for none.
            labels: which labels the step used: "none", "class" or "group".
            seed: of the run.
            note: a remark for people.

        Raises:
            ValueError: an empty name, an accuracy that is not in percent, or another unit than the metric has.
            TypeError: a field of another type.
        """
        number, deviation = _finite_number("value", value), _finite_number("spread", spread)
        if deviation is not None and deviation < 0:
            raise ValueError(f"spread: need at least 0, got {deviation}")
        row: dict[str, Any] = {
            "case": _text("case", case),
            "method": _text("method", method),
            "metric": _text("metric", metric),
            "value": number,
            "spread": deviation,
            "n": _whole_number("n", n, 0),
            "unit": _checked_unit(metric, _text("unit", unit, empty=True), number),
        }
        if labels is not None:
            choice("labels", labels, _LABELS)
            row["labels"] = labels
        if seed is not None:
            row["seed"] = _whole_number("seed", seed, 0)
        if note is not None:
            row["note"] = _text("note", note)
        self.rows.append(row)

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows given as mappings from the names of :meth:`add`'s arguments to values.

        Raises:
            ValueError, TypeError: as :meth:`add`, with the number of the row; rows before it stay added.
        """
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise TypeError(f"row {number}: expected a mapping, got {type(row).__name__}")
            unknown = sorted(map(str, row.keys() - {*_ROW, *_OPTIONAL}))
            missing = [name for name in _ROW[:4] if name not in row]
            if unknown or missing:
                fault = f"{unknown[0]!r} is not known" if unknown else f"no {missing[0]!r}"
                raise ValueError(f"row {number}: {fault}, expected {', '.join(_ROW + _OPTIONAL)}")
            try:
                self.add(**row)
            except (ValueError, TypeError) as error:
                raise type(error)(f"row {number}: {error}") from error

    def select(self, **where: Any) -> list[dict[str, Any]]:
        """The rows whose fields have these values, ``select(case="broken", metric="accuracy")``."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in where.items())]

    def to_json(self) -> dict[str, Any]:
        """The whole shape, as JSON-able values."""
        return {**self.head, "rows": [dict(row) for row in self.rows]}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file, all or nothing.

        Raises:
            OSError: as `files.write_bytes`.
        """
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Reads a results file and checks its shape and every row.

        Raises:
            files.FileError: not JSON, or another shape; the message names the key or the row.
            OSError: the file cannot be read.
        """
        with files.reading_json(path, "results", keys={*_HEAD, "rows"}) as value:
            for name, kinds in (
                *((name, (str,)) for name in ("name", "created", "spurge")),
                *((name, (dict,)) for name in ("device", "versions", "settings")),
                ("commit", (str, type(None))),
                ("rows", (list,)),
            ):
                if not isinstance(value[name], kinds):
                    expected = " or ".join(kind.__name__ for kind in kinds)
                    raise TypeError(f"{name}: expected {expected}, got {type(value[name]).__name__}")
            datetime.fromisoformat(value["created"])
            out = cls.__new__(cls)
            out.head, out.rows = {name: value[name] for name in _HEAD}, []
            out.extend(value["rows"])
            return out

    def __len__(self) -> int:
        return len(self.rows)

    def _repr_html_(self) -> str:
        head = self.head
        title = f"{head['name']}, {head['created']}, spurge {head['spurge']}"
        names = [name for name in (*_ROW, *_OPTIONAL) if any(row.get(name) not in (None, "") for row in self.rows)]
        lines = [names, *([_shown(row.get(name)) for name in names] for row in self.rows)]
        return page([Table(title, lines, left=3)] if names else [], [] if names else [title])

    def __repr__(self) -> str:
        return f"Results({self.head['name']!r}, {len(self.rows)} rows)"
