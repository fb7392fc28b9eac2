"""How far scores are from converged ones.

A fixed rule is no reference for a language model: where a layer has massive activations, the gradient turns so sharply
near 0 that 48 and 64 Gauss-Legendre nodes still differ by a quarter. The reference halves the intervals of each layer's
path until halving changes nothing. That it is the right integral is known from what needs no rule: its sum over a
layer is F(1) - F(layer erased), and the largest gap is kept beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.harness import relative_error
from localisation.jobs import Job, Scores, fingerprint


@dataclass(frozen=True)
class Reference:
    """Converged scores of the job's texts.

    Attributes:
        scores: site -> ``[B, F]`` float64.
        residual: largest gap between a layer's sum and its effect, over the text's largest layer effect.
        change: largest relative change of a layer's scores by the last halving of an interval.
    """

    scores: Scores
    residual: float
    change: float


@dataclass(frozen=True)
class Errors:
    """Relative 2-norms of the difference from the reference, and how much of the top 1 % of neurons agrees."""

    total: float
    median_layer: float
    worst_layer: float
    worst: str  # site of the worst layer
    overlap: float  # percent


def converged(job: Job, *, tolerance: float, cache: Path | None = None) -> Reference:
    """The reference of a job, in float32.

    Args:
        tolerance: largest relative change of a layer's scores by halving an interval.
        cache: folder to keep the result in. The file's name holds a hash of all it depends on.
    """
    digest = fingerprint(job, "adaptive", tolerance)
    path = None if cache is None else cache / f"{job.name}-{tolerance:g}-{digest}.safetensors"
    if path is not None and path.exists():
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            return Reference(
                {k: file.get_tensor(k) for k in file.keys()},  # noqa: SIM118  # no mapping
                float(facts["residual"]),
                float(facts["change"]),
            )
    from spurge.engine.cascade.cascade import Cascade

    exact = job.to(torch.float32)
    cascade = Cascade(exact.model, nodes=4, tolerance=tolerance, path="layer")
    parts = [cascade.attribute({"input_ids": ids[None]}, _one(exact, i)) for i, ids in enumerate(exact.ids)]
    scores = {site: torch.cat([part.values[site][0].double().cpu() for part in parts]) for site in job.sites}
    residual = max(part.relative_residual() for part in parts)
    change = max(moved for part in parts for moved in part.change.values() if moved is not None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"residual": repr(residual), "change": repr(change)}
        save_file({site: value.contiguous() for site, value in scores.items()}, path, facts)
    return Reference(scores, residual, change)


def _one(job: Job, i: int):  # type: ignore[no-untyped-def]
    """The target of one text of the job alone."""
    return lambda rows: rows.logits[:, job.labels[i]]


def overlap_top1(value: Tensor, reference: Tensor) -> float:
    """Percent of the reference's top 1 % of neurons, summed over sentences, that the method has in its own top 1 %."""
    count = max(1, value.shape[1] // 100)
    mine, theirs = (set(scores.sum(0).topk(count).indices.tolist()) for scores in (value, reference))
    return 100 * len(mine & theirs) / count


def errors(scores: Scores, reference: Scores) -> Errors:
    """Of scores of all layers, ``[B, F]`` each."""
    pairs = {site: (scores[site].double().cpu(), want) for site, want in reference.items()}
    layers = {site: relative_error(got, want) for site, (got, want) in pairs.items()}
    worst = max(layers, key=layers.__getitem__)
    got, want = (torch.cat(side, 1) for side in zip(*pairs.values(), strict=True))
    middle = float(torch.tensor(list(layers.values())).quantile(0.5))
    return Errors(relative_error(got, want), middle, layers[worst], worst, overlap_top1(got, want))
