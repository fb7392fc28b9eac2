"""The CUDA kernels on the host: `_core_emulated`, with each call repeated in ways that no result may depend on.

Every call runs three times on copies of its arguments, at the end (or the beginning) of memory beyond which nobody may
touch: blocks and threads forward, backward and shuffled, shared memory full of other bytes, grids cut shorter. All bits
of all arguments have to be the same afterwards; NaN may be any NaN.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spurge.ops import _association, _balance, _gate, _ig, _median, _proximity, _swarm, _sweep

try:
    from spurge import _core_emulated  # type: ignore[attr-defined]
except ImportError:
    _core_emulated = None

AVAILABLE = _core_emulated is not None
PAGE = mmap.PAGESIZE


class Policy(NamedTuple):
    order: str
    seed: int
    poison: int
    most_blocks: int
    staged: int


POLICIES = (
    Policy("forward", 1, 0xFF, 65535, 40 * 1024),
    Policy("backward", 2, 0x00, 3, 40 * 1024),
    Policy("shuffled", 3, 0x7E, 2, 64),
)

_libc = ctypes.CDLL(None, use_errno=True)


class Room:
    """Memory between two pages that end the process when they are touched."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // PAGE) * PAGE
        self.map = mmap.mmap(-1, self.size + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        for page in (start, start + PAGE + self.size):
            if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def copy(self, x: Tensor, at_end: bool) -> Tensor:
        """A contiguous copy of x at one end of this."""
        offset = PAGE + (self.size - x.nbytes if at_end else 0)
        found = torch.frombuffer(self.map, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
        return found.copy_(x)


_rooms: dict[tuple[int, int], Room] = {}


def _guarded(arguments: tuple[Any, ...], at_end: bool) -> list[Any]:
    out = []
    for number, x in enumerate(arguments):
        if not isinstance(x, Tensor) or not x.numel():
            out.append(x)
            continue
        size = 1 << max(x.nbytes - 1, 1).bit_length()
        if (number, size) not in _rooms:
            _rooms[number, size] = Room(size)
        out.append(_rooms[number, size].copy(x.detach(), at_end))
    return out


def same_bits(x: Tensor, y: Tensor) -> bool:
    """NaN may be any NaN."""
    if not x.is_floating_point():
        return torch.equal(x, y)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return bool(((x.view(whole) == y.view(whole)) | (x.isnan() & y.isnan())).all())


def _run(name: str, arguments: tuple[Any, ...]) -> None:
    first: list[Any] | None = None
    for number, policy in enumerate(POLICIES):
        _core_emulated.set_policy(*policy)
        given = _guarded(arguments, at_end=number != 1)
        getattr(_core_emulated, name)(*given)
        found = [x.clone() if isinstance(x, Tensor) else x for x in given]
        for position, (x, y) in enumerate(zip(first or found, found, strict=True)):
            assert not isinstance(x, Tensor) or same_bits(x, y), f"{name}: argument {position} depends on {policy}"
        first = first or found
    for x, y in zip(arguments, first or [], strict=True):
        if isinstance(x, Tensor) and not same_bits(x.detach(), y):
            x.detach().copy_(y)


class Emulated:
    """In the place of `_core`, for the modules of ``spurge.ops``."""

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(_core_emulated, name)
        if name.endswith("_workspace") or not callable(kernel):
            return kernel
        return lambda *arguments: _run(name, arguments)

    def _with_room(self, name: str, size: int, results: int, arguments: tuple[Any, ...]) -> None:
        """Ops give no workspace on the CPU."""
        room = torch.full((size,), torch.nan, dtype=torch.float64)
        _run(name, (*arguments[:results], room, *arguments[results + 1 :]))

    def associate(self, *arguments: Any) -> None:
        features, gradients = arguments[5:7]
        size = _core_emulated.associate_workspace(*features.shape, gradients.shape[1])
        self._with_room("associate", size, 14, arguments)

    def balance_sweep(self, *arguments: Any) -> None:
        size = _core_emulated.balance_sweep_workspace(*arguments[4].shape)
        self._with_room("balance_sweep", size, 3, arguments)

    def balance_batch(self, *arguments: Any) -> None:
        size = _core_emulated.balance_batch_workspace(*arguments[5].shape)
        self._with_room("balance_batch", size, 4, arguments)

    def balance_strata(self, *arguments: Any) -> None:
        size = _core_emulated.balance_strata_workspace(*arguments[5].shape, len(arguments[8]))
        self._with_room("balance_strata", size, 4, arguments)


def run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of a test, ops on the CPU run the CUDA kernels."""
    for module in (_association, _balance, _gate, _ig, _median, _proximity, _swarm, _sweep):
        monkeypatch.setattr(module, "_core", Emulated())


def leave_error() -> None:
    """As if another library had left an error of CUDA behind."""
    _core_emulated.leave_error()
