"""What a computation takes: the bytes of the tensors it holds, and the operations of its matrix products."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from spurge.engine.base.temporary import shielded
from spurge.engine.base.tensor_parallel import local

Formula = Callable[..., int]


class Meter(TorchDispatchMode):
    """Counts what runs inside the block, on any device, backward passes included.

    Args:
        operations: count these, too.

    Attributes:
        live: bytes of tensors that were made inside and are still held, each storage once.
        peak: the most of these since :meth:`restart`.
        flops: floating-point operations of matrix products, convolutions and attention, 2 for each multiply-add.

    Scratch memory inside an operator is not seen.
    """

    def __init__(self, *, operations: bool = False) -> None:
        super().__init__()
        self._operations = operations
        self.live = self.peak = self.flops = 0
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> int:
        """Forgets the peak; returns the bytes that are live now."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_storage(tensor)._cdata for tensor in _tensors([*args, *kwargs.values()])}
        out = func(*args, **kwargs)
        formula = _formula(func) if self._operations else None
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in _tensors([out]):
            storage = _storage(tensor)
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._held:
                self.live += size
                self._held[key] = weakref.ref(storage, partial(self._freed, key, size))
        self.peak = max(self.peak, self.live)
        return out

    @shielded
    def _freed(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        del self._held[key]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """A tensor's memory on this rank."""
    return local(tensor).untyped_storage()


def _formula(func: Any) -> Formula | None:
    """Operations of one call of an operator; None where it multiplies no matrices."""
    return flop_registry.get(func._overloadpacket) or _MORE.get(str(func._overloadpacket))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _grouped(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """``[N, K]`` by ``[E, K, M]``, each row by the matrix of its own group."""
    return 2 * rows.numel() * weight.shape[-1]


def _grouped_backward(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _grouped(rows, weight)


# What torch's table lacks: a CPU's fused attention, and products by the matrices of experts.
_MORE: dict[str, Formula] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten._grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": _grouped_backward,
}
