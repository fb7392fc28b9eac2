"""Compiled kernels. Private: use :mod:`spurge.ops`. Arrays are anything with DLPack, contiguous, on one device."""

from typing import Any

built_with_cuda: bool

def build_config() -> dict[str, Any]: ...

# gate
def open_rows(out: Any, x: Any, u: Any, alphas: list[float], threads: int = 1, stream: int | None = None) -> None: ...
def gate_columns(z: Any, columns: Any, gates: Any, threads: int = 1, stream: int | None = None) -> None: ...

# ig
def node_sum(out: Any, grads: Any, weights: list[float], threads: int = 1, stream: int | None = None) -> None: ...
def multiply_sum(
    out: Any, p: Any, z: Any, mask: Any | None, threads: int = 1, stream: int | None = None
) -> None: ...
