"""The arguments and results of a call of a model or a block, per row, and what a model can be given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.device_checks import require


def first(output: Any) -> Tensor:
    """The hidden states in a block's output: older blocks wrap them in a tuple, or in a list."""
    return output[0] if isinstance(output, (tuple, list)) else output


def like(output: Any, hidden: Tensor) -> Any:
    """A block's output of the same form as ``output`` with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden


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


def cut(value: Any, was: Any, batch: int, total: int, rows: slice) -> Any:
    """Some rows of every per-row tensor: one whose first dimension was ``batch`` and has become ``total``.

    Or a multiple of either: Bloom's position biases lead with rows times heads.
    """
    if torch.is_tensor(value):
        if not was or was % batch or not value.dim() or value.shape[0] != was // batch * total:
            return value
        each = was // batch
        return value[each * rows.start : each * rows.stop]
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
        TypeError: no mapping, such as a text, or lists instead of tensors.
    """
    if not isinstance(inputs, Mapping):
        advice = "; tokenize it: tokenizer(text, return_tensors='pt')" if isinstance(inputs, str) else ""
        raise TypeError(
            f"inputs: expected keyword arguments of the model, tensors [B, ...], got {type(inputs).__name__}{advice}"
        )
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        value = inputs.get(name)
        if isinstance(value, (list, tuple)):
            raise TypeError(f"inputs: {name} is a {type(value).__name__}, expected a tensor; use return_tensors='pt'")
        if torch.is_tensor(value):
            if not len(value):
                raise ValueError(f"inputs: {name} has no example, got shape {tuple(value.shape)}")
            return value
    raise ValueError(f"inputs: expected input_ids, inputs_embeds or pixel_values, got {sorted(inputs)}")


@dataclass(frozen=True)
class Limits:
    """Sizes of a model's input embeddings; None for one that it lacks, or that does not say.

    Attributes:
        ids: tokens it has a vector for.
        positions: tokens of a text that it has positions for; None also where positions are computed (rotary).
        segments: values of ``token_type_ids``.
    """

    ids: int | None = None
    positions: int | None = None
    segments: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Limits:
        """Those of a model of ``transformers``; its position and segment embeddings stand beside those of its words."""
        try:
            words = model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return cls()
        if not isinstance(words, nn.Embedding):
            return cls()
        beside: dict[str, nn.Embedding] = {}
        for module in model.modules():
            children = dict(module.named_children())
            if any(child is words for child in children.values()):
                beside = {name: child for name, child in children.items() if isinstance(child, nn.Embedding)}
                break
        positions = [_positions(part) for name, part in beside.items() if "position" in name or name == "wpe"]
        segments = [part.num_embeddings for name, part in beside.items() if "token_type" in name]
        return cls(words.num_embeddings, min(positions, default=None), min(segments, default=None))

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Refuses what would read beyond an embedding.

        Raises:
            ValueError: more tokens than positions, or an id out of range.
        """
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if torch.is_tensor(tokens) and tokens.dim() >= 2:
            self.check_length(tokens.shape[1])
        for name, limit in (("input_ids", self.ids), ("token_type_ids", self.segments)):
            values = inputs.get(name)
            if limit is not None and torch.is_tensor(values) and values.numel() and not values.is_floating_point():
                _check_range(name, values, limit)

    def check_length(self, tokens: int, new: int = 0) -> None:
        """Refuses texts of so many tokens, with ``new`` ones to be generated behind.

        Raises:
            ValueError: there are more of them than positions.
        """
        if self.positions is not None and tokens + new > self.positions:
            behind = f" and {new} new ones" if new else ""
            raise ValueError(
                f"max_length: a text has {tokens} tokens{behind}, the model {self.positions} positions; "
                f"cut texts with max_length={self.positions - new}"
            )


def _positions(table: nn.Embedding) -> int:
    """Tokens that a table of positions is for: some begin to count behind rows of another use (RoBERTa, OPT)."""
    padding = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(getattr(table, "offset", padding))


def _check_range(name: str, values: Tensor, limit: int) -> None:
    outside = (values < 0) | (values >= limit)

    def complaint() -> str:
        row = int(outside.nonzero()[0, 0])
        return (
            f"inputs: {name} has {int(values[outside][0])} in row {row} (from 0), expected 0 to {limit - 1}, which is "
            "what the model has embeddings for; is this the model's own tokenizer?"
        )

    require(~outside.any(), complaint)


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
