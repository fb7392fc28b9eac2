"""What is measured of one kernel at one size: inputs, the bytes it must move, and the ways to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIB = 1 << 20
TOKENS, HIDDEN, NEURONS, NODES = 32, 384, 1536, 4
SIZES = {  # MiB moved: within the first cache that one core owns, beyond it, beyond all caches
    "cpu": {"cache": 1, "middle": 32, "memory": 256},
    "cuda": {"cache": 8, "middle": 128, "memory": 1024},
}
Function = Callable[..., Any]


@dataclass
class Case:
    """One kernel, dtype and size.

    Attributes:
        kernel: its name among the cases.
        shape: of its largest input, for people.
        dtype: of the values that it reads.
        traffic: bytes: every input read once and every output written once; temporaries are the method's own affair.
        inputs: of all functions.
        calls: name -> function of ``inputs``, which returns what it computed. ``spurge`` is the kernel; ``torch`` the
            fastest eager form we know; ``torch-usual``, where it differs, what people write first.
        usual: what ``torch.compile`` gets, since it is for that.
        elements: of a kernel that computes more than it moves: how many numbers its largest input has.
        wanted: what ``spurge`` has to compute; by default what ``torch`` does.
    """

    kernel: str
    shape: str
    dtype: torch.dtype
    traffic: int
    inputs: tuple[Any, ...]
    calls: dict[str, Function]
    usual: Function
    elements: int | None = None
    wanted: Function | None = None

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    def outputs(self, function: Function) -> list[Tensor]:
        """What ``function`` computes, on copies of the inputs: some work in place."""
        out = function(*(x.clone() if isinstance(x, Tensor) else x for x in self.inputs))
        return [out] if isinstance(out, Tensor) else list(out)


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def examples(traffic: int, bytes_each: int) -> int:
    """How many come nearest to `traffic` bytes, at least 1."""
    return max(1, round(traffic / bytes_each))


def normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)
