"""Effects of switching every neuron off, one forward row for each: what estimates of them are held against.

A question is a batch, a model and targets; their exact effects are kept layer by layer under a key of all that they
depend on, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from localisation.jobs import make_job

TOKENS, SENTENCES = 32, 8
SMOLLM2_NEURONS = 72  # of each of 30 layers


@dataclass(frozen=True)
class Asked:
    """A target to estimate, and by what single units are measured.

    ``target`` is differentiable; ``path`` is what methods that integrate along a path are asked, and ``measured`` the
    one whose exact effects count.
    """

    target: Callable[[Any], Tensor]
    path: Callable[[Any], Tensor]
    measured: Callable[[Any], Tensor]

    @classmethod
    def of(cls, target: Callable[[Any], Tensor]) -> Asked:
        """The three are one."""
        return cls(target, target, target)


@dataclass(frozen=True, eq=False)
class Question:
    """B texts of T tokens, without padding, and what is asked of a model about them."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    targets: dict[str, Asked]
    neurons: dict[str, Tensor]  # site -> int64 [n], those that are measured
    attention: bool  # whether some target reads it

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"]


def logit(rows: Any) -> Tensor:
    """Of the class (the next token) that the unedited model predicts, ``[R]``."""
    return rows.logits.gather(1, rows.predicted[:, None])[:, 0]


class LogProbability:
    """Of the same class, ``[R]``: saturated where the model is sure."""

    reads = "logits"

    def __call__(self, rows: Any) -> Tensor:
        return rows.logits.log_softmax(1).gather(1, rows.predicted[:, None])[:, 0]


def minilm(folder: Path, texts: Path, *, tokens: int, sentences: int, seed: int, proximity: bool) -> Question:
    """A classifier with its tokenizer from ``folder``, and ``sentences`` texts that fill ``tokens``, drawn by ``seed``.

    Args:
        proximity: ask for soft and hard proximity, too; golden words are proposed from the texts and their labels.

    Raises:
        ValueError: too few of the texts are as long.
    """
    from spurge.engine.data.examples import Examples
    from spurge.engine.models.handle import Handle

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    model = model.eval().requires_grad_(False)
    handle = Handle(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    every = Examples.load(texts)
    long = [i for i, text in enumerate(every.texts) if len(handle.tokenizer(text)["input_ids"]) >= tokens]
    if len(long) < sentences:
        raise ValueError(f"texts: expected at least {sentences} of {tokens} tokens, got {len(long)}")
    chosen = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed))[:sentences].tolist()
    examples = every.subset(long[i] for i in chosen)
    encoded = handle.encode(examples, tokens)
    targets = {"logit": Asked.of(logit), "logprob": Asked.of(LogProbability())}
    if proximity:
        targets |= _proximity(handle, every, examples, encoded)
    neurons = {site.name: torch.arange(site.width) for site in handle.sites}
    name = f"minilm-{tokens}x{sentences}" + ("" if seed == 0 else f" batch {seed}")
    return Question(name, model, dict(encoded), targets, neurons, proximity)


def _proximity(handle: Any, every: Any, examples: Any, encoded: Any) -> dict[str, Asked]:
    """Causal minus spurious proximity of each text, with the golden words that the corpus proposes (MacU Eq. 6, 7)."""
    from spurge.engine.data.words import CorrelationTokens, Vocabulary
    from spurge.methods.golden.golden import GoldenTokens
    from spurge.methods.macu.proximity import Proximity, ProximityGap

    golden, vocabulary, tokens = GoldenTokens.from_corpus(every), Vocabulary(), CorrelationTokens()
    units = tokens.units(handle.tokenizer, encoded, examples.texts, vocabulary, golden.phrases())
    bitmap = golden.bitmap(vocabulary)
    soft = ProximityGap(Proximity(units, bitmap, form="soft"))
    hard = ProximityGap(Proximity(units, bitmap, form="hard"))
    return {"soft": Asked.of(soft), "hard": Asked(soft, hard, hard)}  # a gradient of the soft one estimates both


def smollm2(*, tokens: int, neurons: int, seed: int = 0) -> Question:
    """SmolLM2-135M's next token after one text, and ``neurons`` of each layer drawn by ``seed``."""
    job = make_job(f"smollm2-{tokens}x1")
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randperm(job.model.get_submodule(name).in_features, generator=generator)[:neurons].sort().values
        for name in job.sites
    }
    return Question(job.name, job.model, job.inputs, {"logit": Asked.of(logit)}, drawn, False)


def exact_effects(question: Question, cache: Path | None) -> dict[str, Tensor]:
    """Of each target, the effects of switching single neurons off, ``[B, n of all sites]`` float64 in order of sites.

    Args:
        cache: folder to keep them in, a file for each site.
    """
    from spurge.engine.cascade.cascade import Cascade
    from spurge.engine.models.neurons import NeuronSet

    def every(rows: Any) -> Tensor:
        return torch.stack([asked.measured(rows) for asked in question.targets.values()], 1)

    digest, parts, prompt = _fingerprint(question), [], None
    cascade = Cascade(question.model, path="neuron", attention=question.attention)
    for i, (site, indices) in enumerate(question.neurons.items()):
        path = None if cache is None else cache / f"{question.name.replace(' ', '-')}-{digest}-{i}.safetensors"
        if path is not None and path.exists():
            parts.append(load_file(path)["effects"])
            continue
        prompt = cascade.read(question.inputs) if prompt is None else prompt
        print(f"{question.name}: {len(indices)} neurons of {site} switched off, one by one", flush=True)
        found = cascade.ablate(prompt, every, NeuronSet({site: indices})).double().cpu().contiguous()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"effects": found}, path)
        parts.append(found)
    return dict(zip(question.targets, torch.cat(parts, 2).unbind(0), strict=True))


def _fingerprint(question: Question) -> str:
    """16 digits that change with the weights, the texts, the targets and the neurons."""
    asked = {name: value.tolist() for name, value in (question.inputs | question.neurons).items()}
    digest = hashlib.sha256(repr((sorted(question.targets), asked)).encode())
    for name, weight in question.model.state_dict().items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def flat(values: Mapping[str, Tensor], question: Question) -> Tensor:
    """``[B, n of all sites]`` float64 of one target's values ``[B, F]``, for the neurons of the question."""
    return torch.cat([values[site].double().cpu()[:, own] for site, own in question.neurons.items()], 1)
