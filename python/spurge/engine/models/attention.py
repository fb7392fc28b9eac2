"""The attention row of one token, without the attention map.

Fused attention kernels return no probabilities, and a full map ``[R, heads, T, T]`` is too much to keep for one row of
it. ``AttentionRow`` therefore computes that one row beside (or in place of) the kernel, from the same queries and keys.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from spurge.engine.base.temporary import Temporaries, Temporary, temporary, within
from spurge.engine.base.tensor_parallel import added, mesh_of
from spurge.engine.models.hooks import hook, hook_before, replaced_forward

_NAME = "spurge_attention_row"  # what the private attention function is called in transformers' table
_PROBABILITIES = ("dropout", "attn_dropout", "attention_dropout")  # receives the probabilities in models' own code
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_HEAD_WIDTHS = ("v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_VALUES = ("value", "value_proj", "v_proj", "v_lin")

_open_rows: weakref.WeakKeyDictionary[nn.Module, AttentionRow] = weakref.WeakKeyDictionary()


class AttentionRow(Temporary["AttentionRow"]):
    r"""Attention of one query row, captured during each forward of one attention module in this thread while open.

    .. math:: p_{r,h,j} = \operatorname{softmax}_j\bigl(c\, q_{r,h,i(r)} \cdot k_{r,h,j} + m_{r,h,i(r),j}\bigr)

    with the scale c, mask m and key sharing of the model itself; differentiable, softmax in float32. Works for every
    function of transformers' attention table (eager, sdpa, flash; not flex), for modules that call
    ``scaled_dot_product_attention`` themselves, and for modules with their own code (DeBERTa-v2), whose full
    probabilities are read on their way through dropout. Attention dropout is not applied to the row.

    Args:
        attention: the module handed to the attention function, ``Site.attention``.
        position: number of rows R -> the probed position of each row, int64 ``[R]``.
        prune: compute nothing but the probed row; the module's attention output is that row at every position
            (stride 0), so only the probed position of the layer's output means anything. Own code ignores it.
        keep_values: keep the value vectors too.

    Attributes:
        probabilities: ``[R, heads, T]`` of the last forward, float32 (float64 for a float64 model), else None.
        values: ``[R, key-value heads, T, head width]`` of the last forward if kept, else None.

    Raises:
        TypeError: ``attention`` is no module or ``position`` cannot be called.
        RuntimeError: on entering, when a row of this module is already being captured.
        ValueError: during the forward, when the module hides its attention or is given something unsupported.
    """

    def __init__(
        self,
        attention: nn.Module,
        position: Callable[[int], Tensor],
        *,
        prune: bool = False,
        keep_values: bool = False,
    ):
        if not isinstance(attention, nn.Module):
            raise TypeError(f"attention: expected a module, got {type(attention).__name__}")
        if not callable(position):
            raise TypeError(f"position: expected a function of the number of rows, got {type(position).__name__}")
        self.attention = attention
        self.position = position
        self.prune = prune
        self.keep_values = keep_values
        self.probabilities: Tensor | None = None
        self.values: Tensor | None = None
        self._thread = threading.get_ident()
        super().__init__()

    def row(self) -> Tensor:
        """Mean over heads of the last forward's probabilities, ``[R, T]`` float32.

        Raises:
            RuntimeError: no forward has run since opening.
        """
        if self.probabilities is None:
            raise RuntimeError("no attention row yet: run the model while AttentionRow is open")
        mesh, shown = mesh_of(self.attention), self.probabilities.shape[1]
        heads = getattr(getattr(self.attention, "config", None), "num_attention_heads", shown)
        if mesh is None or shown == heads:
            return self.probabilities.mean(1).float()
        return added(self.probabilities.sum(1) / heads, mesh).float()  # each rank shows its own heads

    def _begin(self) -> Iterator[AttentionRow]:
        if self.attention in _open_rows:
            raise RuntimeError(f"a row of this {type(self.attention).__name__} is already being captured")
        self._thread = threading.get_ident()
        self.probabilities = self.values = None
        with Temporaries() as changes:
            changes.callback(_open_rows.pop, self.attention, None)
            _open_rows[self.attention] = self
            private = _private_config if _uses_table(self.attention) else self._own_code
            changes.enter_context(private(self.attention))
            yield self

    @property
    def here(self) -> bool:
        """Whether this thread opened the row."""
        return self._thread == threading.get_ident()

    def take(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float | None,
        causal: bool,
        window: int | None = None,
        softcap: float | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | None:
        """Compute and keep the row; the attention function's side of this class.

        Args:
            query: ``[R, heads, T, D]``; key, value: ``[R, key-value heads, T, D]``, heads sharing one in order.
            mask: ``[R|1, heads|1, T|1, T]``, boolean (True: attended) or added to the logits; or ``[R, T]`` of keys.
            scale: factor of the logits, None for ``D ** -0.5``.
            causal: no key after the probed position, for masks that do not say so themselves.
            window: likewise, only that many keys up to the probed position.
            softcap: logits are squashed by ``c tanh(logit / c)``.
            bias: added to the logits, shaped as a mask.
            sinks: ``[heads]``, logits of a key without a value: what it attends to is lost.

        Returns:
            The probed row of the attention output, ``[R, heads, D]``, if pruning.
        """
        rows, heads, _, depth = query.shape
        position = self._position(rows, query.device)
        shared = key.shape[1]  # heads h * group .. (h + 1) * group - 1 read key head h
        picked = query[torch.arange(rows, device=query.device), :, position].view(rows, shared, heads // shared, depth)
        wide = torch.promote_types(query.dtype, torch.float32)
        logits = (picked @ key.transpose(2, 3)).to(wide) * (depth**-0.5 if scale is None else scale)
        logits = logits.reshape(rows, heads, -1)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + _probed(bias, position, logits.shape[2])
        hidden = torch.finfo(wide).min
        if mask is not None and mask.dim() == 4:
            probed = _probed(mask, position, logits.shape[2])
            logits = logits.masked_fill(~probed, hidden) if probed.dtype == torch.bool else logits + probed
        else:
            keys = torch.arange(logits.shape[2], device=logits.device)
            seen = torch.ones(rows, len(keys), dtype=torch.bool, device=logits.device)
            if mask is not None:
                seen = mask.bool()
            if causal:
                seen = seen & (keys <= position[:, None])
            if window is not None:
                seen = seen & (keys > position[:, None] - window)
            logits = logits.masked_fill(~seen[:, None], hidden)
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(wide)[None, :, None].expand(rows, -1, -1)], -1)
        self.probabilities = torch.softmax(logits, dim=-1)[..., : key.shape[2]]
        self.values = value if self.keep_values else None
        if not self.prune:
            return None
        grouped = self.probabilities.to(value.dtype).view(rows, shared, heads // shared, -1)
        return (grouped @ value).reshape(rows, heads, -1)

    def _position(self, rows: int, device: torch.device) -> Tensor:
        position = self.position(rows)
        if not torch.is_tensor(position) or position.shape != (rows,) or position.is_floating_point():
            found = f"{position.dtype} {tuple(position.shape)}" if torch.is_tensor(position) else repr(position)
            raise ValueError(f"position: expected {rows} integers for {rows} rows, got {found}")
        return position.to(device)

    @temporary
    def _own_code(self, attention: nn.Module) -> Iterator[None]:
        """Watch a module that does not ask transformers' table for its attention function."""
        forward = attention.forward
        projected: list[Tensor] = []

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.probabilities = self.values = None
            projected.clear()
            with within(_FusedCalls(self)):
                output = forward(*args, **kwargs)
            if self.probabilities is None:
                raise ValueError(
                    f"attention: {type(self.attention).__name__} does not show its attention probabilities; load the "
                    "model with attn_implementation='eager'"
                )
            if projected and self.values is None:
                value = projected[0]  # [R, T, heads * D]
                self.values = value.unflatten(2, (self.probabilities.shape[1], -1)).transpose(1, 2)
            return output

        def from_dropout(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if args and args[0].dim() == 4:  # [R, heads, T, T]
                full = args[0]
                position = self._position(len(full), full.device)
                row = full[torch.arange(len(full), device=full.device), :, position]
                self.probabilities = row.to(torch.promote_types(row.dtype, torch.float32))

        with Temporaries() as stack:
            stack.enter_context(replaced_forward(attention, watched))
            for name, child in attention.named_children():
                if name in _PROBABILITIES:
                    stack.enter_context(hook_before(child, from_dropout))
                if name in _VALUES and self.keep_values:
                    stack.enter_context(hook(child, lambda module, args, output: projected.append(output)))
            yield


class _FusedCalls(TorchFunctionMode):
    """Sees the calls of ``scaled_dot_product_attention`` made below one attention module."""

    def __init__(self, row: AttentionRow):
        super().__init__()
        self.row = row

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        if query.dim() == 4:
            mask = attn_mask if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
            pruned = self.row.take(query, key, value, mask, scale=kwargs.get("scale"), causal=is_causal)
            if pruned is not None:
                return pruned[:, :, None].expand(-1, -1, query.shape[2], -1)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)


def _attention_row(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function under our private name in transformers' table."""
    config: Any = module.config
    name = getattr(config, "spurge_original", config._attn_implementation)
    eager = name in (None, "eager")  # eager code knows no causality or window but the mask's
    home = _table_home(module)
    original = home.eager_attention_forward if eager else home.ALL_ATTENTION_FUNCTIONS[name]
    row = _open_rows.get(module)
    if row is None or not row.here:
        return original(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and not torch.is_tensor(attention_mask):
        raise ValueError(
            f"attention: a mask of type {type(attention_mask).__name__} is not supported; load the model with "
            "attn_implementation='sdpa'"
        )
    if kwargs.get("head_mask") is not None:
        raise ValueError("attention: head_mask is not supported while an attention row is captured")
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    scale = kwargs.get("scaling")
    if eager and scale is None and hasattr(module, "scale_attn_weights"):  # GPT-2 of transformers 4
        scale = query.shape[-1] ** -0.5 if module.scale_attn_weights else 1.0
        scale = scale / (module.layer_idx + 1) if module.scale_attn_by_inverse_layer_idx else scale  # type: ignore
    pruned = row.take(
        query,
        key,
        value,
        attention_mask,
        scale=scale,
        causal=bool(causal) and not eager,
        window=None if eager else kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        bias=kwargs.get("position_bias"),
        sinks=kwargs.get("s_aux"),  # GPT-OSS
    )
    if pruned is not None:
        return pruned[:, None].expand(-1, query.shape[2], -1, -1), None
    return original(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _attention_row)


def head_width(attention: nn.Module | None, inputs: int) -> int | str:
    """Coordinates of one (query) head in what goes into the output projection, or what keeps them from being told.

    The module says how many heads it has, or how wide they are, and its configuration may: all have to fit together.

    Args:
        attention: the module that computes attention, ``Site.attention``.
        inputs: of its output projection.
    """
    if attention is None:
        return "no attention module was found"
    name = type(attention).__name__
    if isinstance(attention, nn.MultiheadAttention):
        return f"{name} multiplies by its output projection without calling it"
    counts, widths = (_whole_numbers(attention, names) for names in (_HEAD_COUNTS, _HEAD_WIDTHS))
    if not counts and not widths:
        return f"{name} says neither how many heads it has nor how wide they are"
    counts |= _whole_numbers(getattr(attention, "config", None), ("num_attention_heads",))
    counts = counts or {inputs // width for width in widths}
    fitting = {count for count in counts if inputs % count == 0 and (not widths or inputs // count in widths)}
    if len(fitting) != 1:
        return (
            f"{name} speaks of {_listed(counts)} heads, {_listed(widths)} wide, and its output projection has {inputs} "
            "inputs"
        )
    return inputs // fitting.pop()


def _whole_numbers(holder: Any, names: Sequence[str]) -> set[int]:
    found = (getattr(holder, name, None) for name in names)
    return {value for value in found if type(value) is int and value > 0}


def _listed(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values))) or "unknown"


def _table_home(attention: nn.Module) -> Any:
    """The Python module in which ``attention``'s class looks up transformers' attention table, or None."""
    for kind in type(attention).__mro__:
        home = sys.modules.get(kind.__module__)
        if hasattr(home, "ALL_ATTENTION_FUNCTIONS"):
            return home
    return None


def _uses_table(attention: nn.Module) -> bool:
    return hasattr(getattr(attention, "config", None), "_attn_implementation") and _table_home(attention) is not None


@temporary
def _private_config(attention: nn.Module) -> Iterator[None]:
    """Give one module a copy of the configuration that names our function; the model's masks stay as they are."""
    config: Any = attention.config
    private = copy.copy(config)
    private.spurge_original = config._attn_implementation
    private._attn_implementation_internal = _NAME  # the property would write through to nested configurations
    attention.config = private
    yield
    attention.config = config


def _probed(mask: Tensor, position: Tensor, keys: int) -> Tensor:
    """``[R|1, heads|1, T|1, T]`` -> the probed rows ``[R, heads|1, keys]``."""
    if mask.shape[2] == 1:
        return mask[:, :, 0, :keys]
    rows = torch.arange(len(position), device=mask.device)
    return mask.expand(len(position), -1, -1, -1)[rows, :, position, :keys]
