"""Tiny models of real `transformers` classes with random weights, and a tiny tokenizer; no downloads."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

HIDDEN, WIDTH, LAYERS, HEADS = 32, 48, 3, 4
MAX_TOKENS = 64

_TEXT = (
    "the a an is was it this that and or not of in on to we i film movie story plot actor scene music food room "
    "service good great superb lovely brilliant happy charming bad awful dull boring terrible sad ugly fail hate "
    "love like very quite so never always table chair tuesday window paper street clearly perhaps today well"
)
WORDS = _TEXT.split()
PIECES = ["##s", "##ed", "##ing", "##ly", "##er", "##ness", "un", "re", "walk", "talk", "play", "paint"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [
    *SPECIAL,
    *".,!?;'-",
    *"abcdefghjklmnopqrstuvwxyz",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
]
VOCABULARY = list(dict.fromkeys([*VOCABULARY, *WORDS, *PIECES]))

# family -> name of its class and of its configuration, and what the configuration calls its sizes
_ROWS = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": MAX_TOKENS,
}
_GROUPED = dict(_ROWS, num_key_value_heads=2, head_dim=HIDDEN // HEADS)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _ROWS),
    "distilbert": (
        "DistilBert",
        {
            "dim": HIDDEN,
            "hidden_dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_position_embeddings": MAX_TOKENS,
        },
    ),
    "roberta": ("Roberta", dict(_ROWS, max_position_embeddings=MAX_TOKENS + 2)),
    "electra": ("Electra", dict(_ROWS, embedding_size=16)),
    "deberta_v2": (
        "DebertaV2",
        dict(
            _ROWS,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=16,
            norm_rel_ebd="layer_norm",
        ),
    ),
    "gpt2": (
        "GPT2",
        {"n_embd": HIDDEN, "n_inner": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": MAX_TOKENS},
    ),
    "gpt_neox": ("GPTNeoX", _ROWS),
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", _GROUPED),
    "qwen2": ("Qwen2", {k: v for k, v in _GROUPED.items() if k != "head_dim"}),
    "gemma": ("Gemma", _GROUPED),
    "phi": ("Phi", {k: v for k, v in _GROUPED.items() if k != "head_dim"}),
    "glm4": ("Glm4", _GROUPED),
    "vit": (
        "ViT",
        dict({k: v for k, v in _ROWS.items() if k != "max_position_embeddings"}, image_size=16, patch_size=4),
    ),
}
FAMILIES = tuple(_FAMILIES)
_FAMILIES["gemma2"] = ("Gemma2", _GROUPED)
_FAMILIES["bloom"] = ("Bloom", {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS})
ENCODERS = ("bert", "distilbert", "roberta", "electra", "deberta_v2")
DECODERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "gemma", "phi", "glm4")

# causal language models: name -> family, and what differs from its usual configuration
LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in DECODERS},
    "gemma2": ("gemma2", {"sliding_window": 4}),  # every other layer; logits and attention are capped
    "mistral-window": ("mistral", {"sliding_window": 4}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "llama-all-heads": ("llama", {"num_key_value_heads": HEADS}),
    "llama-one-key": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "bloom": ("bloom", {}),  # position biases that lead with rows times heads
}


def tiny(
    family: str,
    *,
    labels: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = LAYERS,
    language: bool = False,
    **settings: Any,
) -> Any:
    """A classifier (a causal language model) of the family's real class, random weights, in evaluation mode.

    Weights are drawn wider than `transformers` would (deviation 0.2), so that predictions differ
    between inputs and an edited neuron moves them. `settings` go to the configuration.
    """
    name, sizes = _FAMILIES[family]
    task = "ForImageClassification" if family == "vit" else "ForSequenceClassification"
    if language:
        task = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    sizes = {k: layers if k in ("num_hidden_layers", "n_layers", "n_layer") else v for k, v in sizes.items()}
    if family != "vit":
        sizes |= {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return drawn(name, task, sizes | {"num_labels": labels} | settings, seed).to(dtype)


def drawn(name: str, task: str, sizes: dict[str, Any], seed: int) -> Any:
    """A model of the class `name` + `task` of `transformers` with random weights, in evaluation mode."""
    config = getattr(transformers, f"{name}Config")(**sizes)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = getattr(transformers, f"{name}{task}")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.2)
    finally:
        torch.set_rng_state(state)
    return model.eval()


def tiny_language(name: str, **settings: Any) -> Any:
    """A causal language model of `LANGUAGE`; `settings` as for :func:`tiny`."""
    family, own = LANGUAGE[name]
    return tiny(family, language=True, **(own | settings))


@cache
def tiny_tokenizer(
    *, decoder: bool = False, padding_side: str = "right", segments: bool = True
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer over `VOCABULARY`; encoders get [CLS], [SEP] and segment ids, decoders none of them.

    Words outside the vocabulary split into pieces and letters: "walking" is `walk ##ing`.
    """
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if not decoder:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        padding_side=padding_side,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", *["token_type_ids"] * (segments and not decoder), "attention_mask"],
    )


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer that makes what the family's model takes."""
    return tiny_tokenizer(decoder=family in DECODERS, segments=family != "distilbert")


def tiny_inputs(
    family: str, *, rows: int = 4, tokens: int = 9, seed: int = 0, pad: bool = True
) -> dict[str, torch.Tensor]:
    """Random inputs of a family: ids and mask, rows of falling length padded on the right; pixels for ViT."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids = torch.randint(len(SPECIAL), len(VOCABULARY), (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if pad:
        for row in range(rows):
            mask[row, tokens - min(row, tokens - 2) :] = 0
    if family in ENCODERS:
        ids[:, 0] = VOCABULARY.index("[CLS]")
    return {"input_ids": ids * mask, "attention_mask": mask}
