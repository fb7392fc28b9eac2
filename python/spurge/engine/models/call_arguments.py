"""The arguments and results of a block's call, per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def first(output: Any) -> Tensor:
    """The hidden states in a block's output: older blocks wrap them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def like(output: Any, hidden: Tensor) -> Any:
    """A block's output of the same form as ``output`` with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def repeat_rows(value: Any, batch: int, times: int) -> Any:
    """``value`` with a leading dimension of ``batch`` repeated ``times`` times; anything else as it is."""
    if torch.is_tensor(value) and value.dim() and value.shape[0] == batch:
        return value.repeat(times, *[1] * (value.dim() - 1))
    return value


def take(inputs: Mapping[str, Any], examples: slice) -> dict[str, Any]:
    """Some of the examples of a batch of model inputs."""
    batch = len(main_input(inputs))
    per_example = {k for k, v in inputs.items() if torch.is_tensor(v) and v.dim() and v.shape[0] == batch}
    return {key: value[examples] if key in per_example else value for key, value in inputs.items()}


def leading(value: Any) -> Any:
    """The first dimension of every tensor in a call's arguments, in the same nesting."""
    if torch.is_tensor(value):
        return value.shape[0] if value.dim() else None
    if isinstance(value, (tuple, list)):
        return tuple(leading(item) for item in value)
    if isinstance(value, dict):
        return {key: leading(item) for key, item in value.items()}
    return None


def cut(value: Any, was: Any, batch: int, total: int, rows: int) -> Any:
    """The first ``rows`` of every per-row tensor: one whose first dimension was ``batch`` and has become ``total``.

    Or a multiple of either: Bloom's position biases lead with rows times heads.
    """
    if torch.is_tensor(value):
        if not was or was % batch or not value.dim() or value.shape[0] != was // batch * total:
            return value
        return value[: was // batch * rows]
    if isinstance(value, (tuple, list)):
        same = isinstance(was, tuple) and len(was) == len(value)
        return type(value)(cut(v, was[i] if same else None, batch, total, rows) for i, v in enumerate(value))
    if isinstance(value, dict):
        return {key: cut(v, was.get(key) if was else None, batch, total, rows) for key, v in value.items()}
    return value


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory in the same shape: a module handed its input on, or another's output."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def at(hidden: Tensor, position: Tensor) -> Tensor:
    """``[R, T, H]`` -> ``[R, 1, H]``: each row's token ``position[r]``; a single token stays.

    With positions ``[R, K]``: ``[R, K, H]``.
    """
    position = position.to(hidden.device)
    row = torch.arange(len(hidden), device=hidden.device)
    if position.dim() == 2:
        return hidden[row[:, None], position]
    return hidden if hidden.shape[1] == 1 else hidden[row, position][:, None]


def main_input(inputs: Mapping[str, Any]) -> Tensor:
    """The tensor that says how many examples there are.

    Raises:
        ValueError: when there is none, or it has no example.
    """
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        value = inputs.get(name)
        if torch.is_tensor(value):
            if not len(value):
                raise ValueError(f"inputs: {name} has no example, got shape {tuple(value.shape)}")
            return value
    raise ValueError(f"inputs: expected input_ids, inputs_embeds or pixel_values, got {sorted(inputs)}")


def logits_of(output: Any) -> Tensor:
    """``[R, Y]`` logits of a model's output.

    Raises:
        ValueError: when the output has none, or not one vector per row.
    """
    logits = getattr(output, "logits", None)
    if not torch.is_tensor(logits) or logits.dim() != 2:
        found = tuple(logits.shape) if torch.is_tensor(logits) else type(output).__name__
        advice = "; a language model classifies by label words: see spurge.Verbalizer" if _is_sequence(logits) else ""
        raise ValueError(f"model: expected logits [rows, classes] in its output, got {found}{advice}")
    return logits


def _is_sequence(logits: Any) -> bool:
    return torch.is_tensor(logits) and logits.dim() == 3


def split_call(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """A block's hidden states and the rest of its arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest
