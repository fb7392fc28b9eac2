"""A tiny language model of random weights as a GGUF file, tokenizer and all, as llama.cpp has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WIDTH, NEURONS, LAYERS, HEADS, KEYS = 32, 64, 2, 4, 2


def write_gguf(path: Path, *, seed: int = 0) -> None:
    """A LLaMA with shared keys and tied embeddings, matrices in 8 bits; its tokenizer knows letters and two merges."""
    import gguf

    draw = np.random.default_rng(seed)
    words = [chr(code) for code in range(33, 127)] + ["Ġ", "Ġt", "Ġth", "<s>", "</s>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(words) - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["Ġ t", "Ġt h"])
    writer.add_bos_token_id(len(words) - 2)
    writer.add_eos_token_id(len(words) - 1)

    def add(name: str, *shape: int) -> None:
        values = draw.normal(0, 0.4, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values + 1)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(words), WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        keys = WIDTH // HEADS * KEYS
        for name, *shape in (
            ("attn_norm", WIDTH),
            ("ffn_norm", WIDTH),
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", keys, WIDTH),
            ("attn_v", keys, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", NEURONS, WIDTH),
            ("ffn_up", NEURONS, WIDTH),
            ("ffn_down", WIDTH, NEURONS),
        ):
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
