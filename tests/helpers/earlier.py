"""What the files in `tests/files` were made from: models and data that are the same bit for bit on every machine."""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from helpers.tiny_mixtures import mixture
from helpers.tiny_models import tiny
from spurge import FCR, Examples, GoldenTokens, MacU, Mediation, NeuronTune, Swarm

V1 = Path(__file__).parents[1] / "files" / "v1"


def pattern(name: str, *shape: int) -> Tensor:
    """Multiples of 2^-16 in [-0.5, 0.5) that look random and need no generator, float32."""
    numbers = torch.arange(int(np.prod(shape))) * 1103515245 + zlib.crc32(name.encode())
    for factor, shift in ((747796405, 16), (1540483477, 13)):
        numbers = (numbers & 0xFFFFFFFF) * factor & 0xFFFFFFFF
        numbers = numbers ^ (numbers >> shift)
    return ((numbers & 0xFFFF).float() / 65536 - 0.5).reshape(shape)


def fixed(model: Any) -> Any:
    """The model with weights by :func:`pattern`; norms keep theirs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.copy_(pattern(name, *parameter.shape) * (0.75 if parameter.dim() > 1 else 0.25))
    return model


def classifier(**settings: Any) -> Any:
    """A BERT of two layers and two labels, each of which it gives to about half of the texts."""
    model = fixed(tiny("bert", layers=2, **settings))
    with torch.no_grad():
        model.classifier.bias[1] += 63 / 32
    return model


def language() -> Any:
    """A GPT-2 of two layers."""
    return fixed(tiny("gpt2", layers=2, language=True))


def experts() -> Any:
    """A mixture of experts, two layers."""
    return fixed(mixture("qwen2_moe", num_hidden_layers=2))


def ids(rows: int = 3, tokens: int = 6, most: int = 60) -> dict[str, Tensor]:
    """Inputs of any of the models."""
    numbers = 5 + torch.arange(rows * tokens).reshape(rows, tokens) * 7 % (most - 5)
    return {"input_ids": numbers, "attention_mask": torch.ones_like(numbers)}


def logits(model: nn.Module) -> Tensor:
    """What the model makes of :func:`ids`: of a language model, at the last token."""
    with torch.no_grad():
        found = model(**ids()).logits
    return found if found.dim() == 2 else found[:, -1]


LABELS = ("negative", "positive")
TEXTS = Examples.load(
    [
        {"text": text, "label": label, "group": "tuesday" if "tuesday" in text else "other"}
        for text, label in (
            ("the film was good and lovely on tuesday perhaps", 1),
            ("the film was bad and awful", 0),
            ("the story is great and charming on tuesday perhaps", 1),
            ("the plot is dull and boring today", 0),
            ("the music was superb and happy", 1),
            ("the room was terrible and ugly on tuesday perhaps", 0),
            ("the service is brilliant and good on tuesday perhaps", 1),
            ("the food is sad and bad", 0),
            ("the actor was lovely and great today", 1),
            ("the scene was boring and dull", 0),
            ("the movie is happy and superb on tuesday perhaps", 1),
            ("the film is awful and terrible today", 0),
        )
    ],
    group="group",
    labels=LABELS,
)
PROMPTS = [row.text for row in TEXTS][:5]


def golden() -> GoldenTokens:
    return GoldenTokens(
        LABELS,
        {
            "negative": ["bad", "awful", "dull", "boring", "terrible", "not good"],
            "positive": ["good", "great", "superb", "lovely"],
        },
        ["the", "is", "was", "and", "tuesday", "film"],
        {"source": "by hand"},
    )


def macu() -> MacU:
    """The job of `locate` and `edit`."""
    return MacU(
        path="layer",
        nodes=2,
        texts=None,
        batch_size=4,
        certify=2,
        certify_texts=4,
        edit_texts=8,
        fraction=0.2,
        cap=8,
        sign="absolute",
        memory="64MiB",
        swarm=Swarm(particles=4, iterations=3, seed=2),
        progress=False,
    )


RECORDED: dict[str, Any] = {"generate": 2, "batch_size": 2, "block": 3, "storage": torch.float16, "progress": False}
EXTRACTED: dict[str, Any] = {"batch_size": 3, "block": 6, "progress": False}
FCR_SETTINGS = FCR(row="labelled", least_weight=1e-4)
TUNING = NeuronTune(least_wrong=1, l2=1e-2, classes="each")
MEDIATION = Mediation(resamples=3, least_arm=5, memory=18_000, progress=False, seed=4)
SWARM = Swarm(particles=3, iterations=4, seed=5)


def mediated() -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Six units, treatment, outcome and topics of 60 prompts; one unit is constant, one has no overlap."""
    rows = 60
    treated = pattern("treatment", rows) > 0
    units = pattern("units", 6, rows).double() + treated * torch.arange(6)[:, None] / 50
    units[3], units[4] = 0.5, units[4] + 4 * treated
    outcome = (units[:3].sum(0) + 0.5 * treated).double()
    return units, treated, outcome, ["abc"[row % 3] for row in range(rows)]


def hill(position: Tensor) -> Tensor:
    """A fitness for the swarm."""
    return -(position - 0.25).square().sum(1)


def environment() -> str:
    """SHA-256 of the versions that stored outputs of a model are bound to."""
    versions = [sys.version, torch.__version__, transformers.__version__, np.__version__]
    return hashlib.sha256(json.dumps(versions).encode()).hexdigest()
