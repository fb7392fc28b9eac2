"""Tiny mixtures of experts of real `transformers` classes, and their experts written out plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from helpers.tiny_models import drawn

HIDDEN, LAYERS = 32, 3
_ROWS = {
    "vocab_size": 60,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
# family -> name of its classes, number of experts, neurons of one, and its configuration
_FAMILIES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "mixtral": ("Mixtral", 4, 24, {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (  # a shared expert behind a gate of its own
        "Qwen2Moe",
        4,
        16,
        {
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 40,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "olmoe": ("Olmoe", 6, 16, {"intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 3}),
    "gpt_oss": (  # transposed weights, biases, interleaved gates, attention sinks
        "GptOss",
        4,
        24,
        {
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "layer_types": ["full_attention"] * LAYERS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": (  # a plain first layer, a shared expert without a gate
        "DeepseekV3",
        4,
        16,
        {
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}
MIXTURES = tuple(_FAMILIES)
CLASSIFIERS = tuple(family for family in MIXTURES if family != "olmoe")  # the class that transformers does not have
EXPERTS = {family: (experts, width) for family, (_, experts, width, _) in _FAMILIES.items()}


def mixture(family: str, *, classify: bool = False, seed: int = 0, **settings: Any) -> Any:
    """A causal language model (a classifier of 3 labels) with random weights, in evaluation mode.

    Skips the test where `transformers` holds experts in the form it had before version 5, which is refused.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"transformers {transformers.__version__} has experts in another form")
    name, _, _, sizes = _FAMILIES[family]
    task = "ForSequenceClassification" if classify else "ForCausalLM"
    return drawn(name, task, _ROWS | sizes | {"num_labels": 3} | settings, seed)


def batch(examples: int = 3, tokens: int = 7) -> dict[str, Tensor]:
    """Token ids and mask, padded on the right."""
    ids = torch.randint(5, 60, (examples, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, examples):
        mask[row, tokens - row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def plain_experts(
    module: Any, hidden: Tensor, index: Tensor, weights: Tensor, gates: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every expert on every token: the output ``[N, H]`` and the activations ``[N, E, F_e]`` before routing weights.

    ``gates`` ``[N or 1, E, F_e]`` multiply the activations.
    """
    shares = torch.zeros(len(hidden), len(module.down_proj), dtype=weights.dtype)
    shares = shares.scatter(1, index, weights)
    up, down = module.gate_up_proj, module.down_proj
    if not module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    made = torch.einsum("nh,ehf->nef", hidden, up)
    if module.has_bias:
        made = made + module.gate_up_proj_bias
    if type(module).__name__ == "GptOssExperts":
        gate, linear = made[..., ::2].clamp(max=module.limit), made[..., 1::2].clamp(-module.limit, module.limit)
        z = (linear + 1) * gate * torch.sigmoid(module.alpha * gate)
    else:
        gate, linear = made.chunk(2, -1)
        z = nn.functional.silu(gate) * linear
    out = torch.einsum("nef,efh->neh", z if gates is None else z * gates, down)
    if module.has_bias:
        out = out + module.down_proj_bias
    return torch.einsum("ne,neh->nh", shares, out), z * (shares != 0)[..., None]


@contextmanager
def patched(module: Any, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """``module`` gives ``change(hidden, index, weights)`` instead of its own output."""
    module.forward = change
    try:
        yield
    finally:
        del module.forward


@contextmanager
def gated_experts(module: Any, gates: Tensor) -> Iterator[None]:
    """Experts written out plainly, each row's activations times its own ``gates`` ``[R, E * F_e]``."""

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        each = gates.unflatten(1, (len(module.down_proj), -1)).repeat_interleave(len(hidden) // len(gates), 0)
        return plain_experts(module, hidden, index, weights, each)[0]

    with patched(module, forward):
        yield
