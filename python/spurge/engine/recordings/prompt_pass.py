"""One forward pass of a batch of prompts for what MLPs read and give, and what has to be known before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spurge.engine.base.budgets import budget
from spurge.engine.base.files import canonical_json, fingerprint
from spurge.engine.base.temporary import Temporaries
from spurge.engine.data.examples import Inputs, encode
from spurge.engine.models.call_arguments import main_input
from spurge.engine.models.handle import Handle
from spurge.engine.models.sites import Site
from spurge.engine.recordings.generation import continuations

Position = Literal["last", "mean"]

_ENCODED = 256  # prompts that are tokenized at once to look at their tokens


class PromptPass:
    """Runs a batch of prompts for what its sites read and give, and for what the model writes next.

    Args:
        handle: of a model in evaluation mode and a tokenizer that pads on the right.
        sites: to record.
        made: settings of `record`: ``neurons``, ``position``, ``storage``, ``max_length`` and ``generate``.
    """

    def __init__(self, handle: Handle, sites: list[Site], made: dict[str, Any]) -> None:
        self.handle, self.sites, self.made = handle, sites, made
        self.storage: torch.dtype = getattr(torch, made["storage"])
        model: Any = handle.model
        below = getattr(model, "base_model", model)  # without the head: no logits of a whole vocabulary
        inside = {id(module) for module in below.modules()}
        self.part = below if all(id(site.down) in inside for site in sites) else model
        takes = inspect.signature(self.part.forward).parameters
        self.settings = {"use_cache": False} if "use_cache" in takes else {}

    def __call__(self, texts: list[str], numbers: Sequence[int]) -> dict[str, Tensor]:
        """Name to ``[n, H]`` and ``[n, F]``, in the type of the storage, on the CPU."""
        inputs = self.handle.encode(texts, self.made["max_length"])
        mask = _mask(inputs)
        kept: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        with Temporaries() as stack:
            for site in self.sites:
                stack.enter_context(site.projection.watch(self._keeper(kept[site.name], mask)))
            self.part(**inputs, **self.settings)
        found: dict[str, Tensor] = {}
        for name, values in kept.items():
            if len(values) != 2:
                raise ValueError(f"sites: {name!r} ran {len(values) // 2} times for a batch, expected once")
            found[f"outputs/{name}"] = self._narrow(values[1], f"outputs of {name!r}", numbers)
            if self.made["neurons"]:
                found[f"neurons/{name}"] = self._narrow(values[0], f"neurons of {name!r}", numbers)
        return found

    def continuations(self, texts: list[str], rows: int) -> list[str] | None:
        """What the model writes after each text, ``rows`` texts at once; None where nothing is to be generated."""
        count, longest = self.made["generate"], self.made["max_length"]
        if not count:
            return None
        return continuations(self.handle, texts, count, batch_size=rows, max_length=longest)

    def _keeper(self, kept: list[Tensor], mask: Tensor) -> Callable[..., None]:
        def keep(z: Tensor, output: Tensor, rest: Tensor | None) -> None:
            kept.extend(_pooled(values, mask, self.made["position"]) for values in (z, output))

        return keep

    def _narrow(self, values: Tensor, name: str, numbers: Sequence[int]) -> Tensor:
        """Values on the CPU in the type of the storage, all finite."""
        found = values.to("cpu", self.storage)
        bad = (~found.isfinite().all(1)).nonzero()[:, 0]
        if len(bad):
            row = min(bad.tolist(), key=lambda row: numbers[row])
            wide = bool(values[row].isfinite().all())
            advice = f" (too large for {self.made['storage']}: storage=torch.float32)" if wide else ""
            raise ValueError(f"model: the {name} are not finite at prompt {numbers[row]}{advice}")
        return found


def _pooled(values: Tensor, mask: Tensor, position: Position) -> Tensor:
    """One vector a prompt, ``[n, D]``, of values ``[n, T, D]`` or ``[n * T, D]``."""
    if values.dim() == 2 and len(values) == mask.numel():
        values = values.unflatten(0, mask.shape)
    if values.shape[:-1] != mask.shape:
        raise ValueError(f"sites: expected values {(*mask.shape, 'D')}, one vector a token, got {tuple(values.shape)}")
    if position == "last":
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return values[torch.arange(len(values), device=values.device), last.to(values.device)]
    mask = mask.to(values.device)
    wide = values if values.dtype == torch.float64 else values.float()
    # where, not a product: what stands at padding need not be finite.
    return torch.where(mask[..., None] != 0, wide, 0.0).sum(1) / mask.sum(1, keepdim=True)


def _mask(inputs: Inputs) -> Tensor:
    """0 at padding and 1 elsewhere, ``[n, T]``."""
    mask = inputs.get("attention_mask")
    if mask is None and len(main_input(inputs)) > 1:
        raise ValueError("tokenizer: says nothing of padding; it has to give an attention_mask")
    return torch.ones_like(main_input(inputs)) if mask is None else mask


def token_print(tokenizer: Any, texts: list[str], max_length: int | None) -> tuple[str, int]:
    """SHA-256 of the tokens of all prompts, and how many the longest has."""
    prints, longest = [], 0
    for start in range(0, len(texts), _ENCODED):
        inputs = encode(tokenizer, texts[start : start + _ENCODED], max_length=max_length)
        mask = _mask(inputs) != 0
        lengths = mask.sum(1)
        if not bool(lengths.all()):
            row = start + int((lengths == 0).nonzero()[0])
            raise ValueError(f"prompts: has no token at row {row}, got {texts[row]!r}")
        prints += [fingerprint(lengths), fingerprint(main_input(inputs)[mask])]
        longest = max(longest, int(lengths.max()))
    return fingerprint(canonical_json(prints)), longest


def check_length(model: nn.Module, longest: int, generate: int) -> None:
    """Refuses prompts beyond the positions that the model knows."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0 and longest + generate > limit:
        new = f" and {generate} new ones" if generate else ""
        raise ValueError(
            f"max_length: the longest prompt has {longest} tokens{new}, the model {limit} positions; cut to at most "
            f"{limit - generate}"
        )


def fitting(handle: Handle, sites: list[Site], longest: int, generate: int, memory: str | int | None) -> int:
    """Prompts that fit in the budget, at least 1.

    What a layer holds at once: z and what it is the product of, eight vectors of the model's width, attention of
    every token to every other. Generation adds keys and values of all layers, and two rows of logits.
    """
    config: Any = getattr(handle.model, "config", None)
    size, hidden = sites[0].parameter.element_size(), max(site.hidden for site in sites)
    heads, layers = getattr(config, "num_attention_heads", 1), getattr(config, "num_hidden_layers", len(sites))
    each = longest * (3 * max(site.width for site in sites) + 8 * hidden + heads * longest)
    if generate:
        each += 2 * layers * hidden * (longest + generate) + 2 * int(getattr(config, "vocab_size", 0))
    return max(1, budget(memory, handle.device) // (each * size))
