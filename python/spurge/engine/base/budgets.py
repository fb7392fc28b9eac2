"""Memory budgets: how a person writes them, what is free, and how work is cut to fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_FORM = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]i?)?b?\s*", re.IGNORECASE)
DEFAULT_SHARE = 0.5  # of what is free, so that a caller's own work still fits


def parse_bytes(text: str | int) -> int:
    """Bytes meant by ``"256MiB"``, ``"2 GB"`` or a plain number.

    Raises:
        ValueError: when the text is no size, or the size is below one byte.

    >>> parse_bytes("256 MiB")
    268435456
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(f"memory: expected bytes or a text such as '256MiB', got {text!r}")
    match = _FORM.fullmatch(str(text))
    if match is None:
        raise ValueError(f"memory: expected bytes or a text such as '256MiB', got {text!r}")
    size = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if not 1 <= size < 2**63:
        raise ValueError(f"memory: need at least one byte and less than 2**63, got {text!r:.40}")
    return int(size)


def free_bytes(device: torch.device | str) -> int:
    """Bytes that new tensors on ``device`` can still take."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 * 2**30  # no such file outside Linux: assume a small machine


def in_parts(count: int, rows: int, run: Callable[[slice], Tensor]) -> tuple[Tensor, int]:
    """``run`` over ``count`` rows, ``rows`` at a time and half as many whenever memory runs out.

    Returns:
        The results, joined, and how many rows fit.
    """
    while True:
        try:
            return torch.cat([run(slice(start, start + rows)) for start in range(0, count, rows)]), rows
        except (torch.cuda.OutOfMemoryError, MemoryError):
            if rows == 1:
                raise
            rows = (rows + 1) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def budget(memory: str | int | None, device: torch.device | str) -> int:
    """The bytes a job may take: what is given, else a share of what is free."""
    return parse_bytes(memory) if memory is not None else int(DEFAULT_SHARE * free_bytes(device))
