"""Running a model for what its head reads: captured by a hook, one row of numbers for each input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spurge.engine.base.budgets import in_parts, parse_bytes
from spurge.engine.base.temporary import Temporaries, within
from spurge.engine.features.sources import Batch
from spurge.engine.models.call_arguments import Limits
from spurge.engine.models.heads import Head
from spurge.engine.models.hooks import hook, hook_before
from spurge.engine.models.probes import probed_token

CPU_BYTES = 64 * 2**20
"""Activations of a batch on a CPU: beyond, they leave the caches, and the allocator asks for fresh pages every time.

EfficientNet-Lite0 takes 27 ms for an image of 224 x 224 pixels in batches of 4 (this limit), 82 ms in batches of 32.
"""

Token = Literal["auto", "first", "last"]


class Reader:
    """Rows of features ``[B, M]`` on the CPU from batches of inputs.

    Args:
        model: in evaluation mode, not compiled.
        head: its head.
        layer: the head's module in the model.
        check: whether the model's logits must be the head's, as they are where the head was found and not given.
        token: which token's features, where the head reads all ``[B, T, M]``.
        dtype: of mixed precision (autocast), or None.
        storage: type of the features.
        memory: bytes that the activations of a batch may take; a larger batch runs in parts. By default
            :data:`CPU_BYTES` on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        layer: nn.Linear,
        *,
        check: bool,
        token: Token,
        dtype: torch.dtype | None,
        storage: torch.dtype,
        memory: str | int | None,
    ) -> None:
        self.model, self.head, self.layer, self.check = model, head, layer, check
        self.limits = Limits.of(model)
        self.token, self.autocast, self.storage = token, dtype, storage
        self.each: float | None = None  # bytes of activations for each number of input
        floating = [p for p in model.parameters() if p.is_floating_point()]
        self.device = floating[0].device if floating else torch.device("cpu")
        self.dtype = floating[0].dtype if floating else torch.float32
        self.limit = CPU_BYTES if self.device.type == "cpu" else None
        if memory is not None:
            self.limit = parse_bytes(memory)
        main = getattr(model, "main_input_name", None) if hasattr(model, "config") else None
        self.main = main if isinstance(main, str) else None

    def read(self, batch: Batch) -> Tensor:
        """Features ``[B, M]`` of one batch; where memory runs out, in parts, which changes them by rounding only.

        Raises:
            ValueError: tokens or positions that the model lacks, the head is not called once with one vector for each
                row or token, or (with ``check``) its logits are not the model's.
        """
        self.limits.check(batch.named())
        batch = batch.to(self.device, self.dtype)
        return in_parts(len(batch), self._rows(batch), lambda part: self._read(batch.rows(part)))[0]

    def _read(self, batch: Batch) -> Tensor:
        calls: list[Tensor] = []

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.append(args[0] if args else kwargs["input"])

        with hook_before(self.layer, before):
            output = self._call(batch)
        if len(calls) != 1:
            raise ValueError(f"head: layer {self.head.name!r} is called {len(calls)} times for a batch, expected once")
        features = (
            self._token(batch, calls[0]).float() if calls[0].dtype != torch.float64 else self._token(batch, *calls)
        )
        if self.check:
            self._compare(features, output)
            self.check = False  # once for a model
        return features.to("cpu", self.storage)

    def _call(self, batch: Batch) -> Any:
        with within(torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)):
            if isinstance(batch.inputs, dict):
                return self.model(**batch.inputs)
            return self.model(batch.inputs) if self.main is None else self.model(**{self.main: batch.inputs})

    def _token(self, batch: Batch, found: Tensor) -> Tensor:
        """The rows of what the head read, ``[B, M]`` from ``[B, M]`` or ``[B, T, M]``."""
        if found.dim() not in (2, 3) or len(found) != len(batch):
            raise ValueError(
                f"head: layer {self.head.name!r} reads {tuple(found.shape)} for {len(batch)} rows, expected one vector "
                "for each row or token"
            )
        if found.dim() == 2:
            return found
        named = batch.named() if self.main is None or isinstance(batch.inputs, dict) else {self.main: batch.inputs}
        if self.token == "first":
            return found[:, 0]
        if self.token == "last":
            mask = named.get("attention_mask")
            mask = torch.ones(found.shape[:2], device=found.device) if mask is None else (mask != 0).int()
            position = (mask * torch.arange(1, found.shape[1] + 1, device=found.device)).argmax(1)
        elif hasattr(self.model, "config"):
            position = probed_token(self.model, named)
        else:
            raise ValueError("token: the head reads every token of this model; say which counts, 'first' or 'last'")
        return found[torch.arange(len(found), device=found.device), position]

    def _compare(self, features: Tensor, output: Any) -> None:
        """Refuses a head whose logits of the features are not what the model answered."""
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        found = found[0] if isinstance(found, (tuple, list)) and found else found
        advice = f"give head=, the path of the layer to work on (here: {self.head.name!r})"
        shape = (len(features), self.head.outputs)
        if not isinstance(found, Tensor) or found.shape != shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"head: the model should answer with logits {shape}, got {got}; {advice}")
        expected, found = self.head.logits(features).double(), found.double()
        exact = self.autocast is None and self.dtype in (torch.float32, torch.float64)
        # Rounding of TF32 and of half precision; logits of another layer are off by their own size.
        tolerance = (0.02 if exact else 0.1) * max(1e-3, float(expected.abs().max()))
        if not bool(((expected - found).abs() <= tolerance).all()) and bool(found.isfinite().all()):
            raise ValueError(f"head: layer {self.head.name!r} does not make the model's logits; {advice}")

    def _rows(self, batch: Batch) -> int:
        """Rows that run at once, by the four largest outputs inside the model on one row."""
        if self.limit is None:
            return len(batch)
        numbers = sum(value.numel() for value in batch.named().values()) / len(batch)
        if self.each is None:
            sizes: list[int] = []

            def after(module: nn.Module, args: tuple, output: Any) -> None:
                sizes.append(output.nbytes if isinstance(output, Tensor) else 0)

            with Temporaries() as stack:
                for module in self.model.modules():
                    if next(module.children(), None) is None:
                        stack.enter_context(hook(module, after))
                self._call(batch.rows(slice(0, 1)))
            self.each = sum(sorted(sizes)[-4:]) / numbers
        return max(1, min(len(batch), int(self.limit / max(1.0, self.each * numbers))))
