"""Theorems of NeuronTune and FCR, on the models they are stated for.

python bench/experiments/theory.py --json FILE

No data: each seed draws a linear model with a spurious part (NeuronTune 4.2), units that fire for some of the
classes (FCR 1), and rows of weights (FCR 2). Seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import command
from experiments.tables import Table
from spurge.engine.features.features import Features
from spurge.engine.last_layer.association import association
from spurge.engine.last_layer.fitting import fit_head
from spurge.engine.models.heads import Head
from spurge.methods.fcr.orthogonal import orthogonal_weight
from spurge.methods.neurontune.dimensions import score
from spurge.report.results import Results

PURITY = 0.95  # how often the spurious part agrees with the class
UNITS, CORE, SPURIOUS = 16, 8, 8
"""Embedding dimensions, and dimensions of the two parts of an input."""


class Linear(NamedTuple):
    """A drawn model: v = W_core x_core + W_spu x_spu, with x_core = y beta + noise and x_spu = a gamma + noise.

    Attributes:
        weights: ``[M, D]``, columns of the core part first.
        beta, gamma: directions of the two parts.
        noise: standard deviation of the core part, so large that it alone does not decide.
    """

    weights: Tensor
    beta: Tensor
    gamma: Tensor
    noise: float

    @classmethod
    def drawn(cls, generator: torch.Generator) -> Linear:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weights = normal(UNITS, CORE + SPURIOUS) / math.sqrt(CORE + SPURIOUS)
        return cls(weights, normal(CORE), 2 * normal(SPURIOUS), 4.0)

    def features(self, count: int, generator: torch.Generator, head: Head | None = None) -> Features:
        """Rows of either class alike, their spurious part nearly always that of the class; the head fitted or given."""
        labels = torch.randint(2, (count,), generator=generator)
        sign = 2.0 * labels - 1
        agree = 2.0 * (torch.rand(count, generator=generator) < PURITY) - 1
        noise = torch.randn(count, CORE + SPURIOUS, generator=generator, dtype=torch.float64)
        core = sign[:, None] * self.beta + self.noise * noise[:, :CORE]
        spurious = (sign * agree)[:, None] * self.gamma + 0.5 * noise[:, CORE:]
        values = torch.cat([core, spurious], 1) @ self.weights.T
        return Features(values, labels, fit_head(values, labels, 2) if head is None else head)


def sensitivity(seed: int) -> dict[str, float]:
    """Theorem 4.2: how the scores of dimensions, of both classes, follow the pull of the spurious part."""
    generator = torch.Generator().manual_seed(seed)
    model = Linear.drawn(generator)
    train = model.features(4000, generator)
    scores = score(model.features(4000, generator, train.head), signs="raw")
    pull = model.weights[:, CORE:] @ model.gamma
    predicted = 2 * torch.stack([pull, -pull])  # of classes 0 and 1: -2 mu gamma' w, mu = -1 and 1
    return {
        "correlation": float(pearsonr(predicted.flatten(), scores.deltas.flatten())[0]),
        "slope": float((predicted * scores.deltas).sum() / predicted.square().sum()),
        "same_sign_rate": float((predicted * scores.deltas > 0).double().mean()),
    }


def classes_of_units(seed: int) -> dict[str, float]:
    """FCR's theorem 1: units that fire alike often, for 1 to 7 of 8 classes, and what each is worth to a head."""
    generator = torch.Generator().manual_seed(seed)
    classes, count, firing = 8, 600, 420  # 420 shared among 1 to 7 classes
    labels = torch.arange(classes).repeat_interleave(count)
    spans = torch.arange(1, classes).repeat_interleave(4)
    values = 0.3 * torch.rand(len(labels), len(spans), generator=generator, dtype=torch.float64)
    for unit, span in enumerate(spans.tolist()):
        for own in torch.randperm(classes, generator=generator)[:span].tolist():
            values[own * count + torch.randperm(count, generator=generator)[: firing // span], unit] += 1
    head = fit_head(values, labels, classes)
    lost = []
    for unit in range(len(spans)):
        without = head.logits(values.index_fill(1, torch.tensor([unit]), 0.0))
        lost.append(float(F.cross_entropy(without, labels)))
    gradients = association(Features(values, labels, head)).gradient_entropy.mean(0)
    return {
        "classes that fire": float(spearmanr(spans, lost)[0]),
        "entropy of gradients": float(spearmanr(gradients, lost)[0]),
    }


def orthogonality(seed: int) -> dict[str, float]:
    """FCR's theorem 2: the cosine between the normals before and after the edit of one weight, and what else moved."""
    row = torch.randn(512, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    normal = torch.cat([row, -torch.ones(1, dtype=torch.float64)])
    index = int(row.abs().argmax())
    edited = normal.clone()
    edited[index] = orthogonal_weight(row, index)
    cosine = float(F.cosine_similarity(normal, edited, dim=0).abs())
    return {"cosine": cosine, "weights moved": float((normal != edited).sum())}


CHECKS = {
    "NeuronTune 4.2": sensitivity,
    "FCR 1": classes_of_units,
    "FCR 2": orthogonality,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; 2 for a wrong argument or file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=command.positive, default=20, help="draws of each model (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    results = Results("theory", {"seeds": args.seeds})
    for case, check in CHECKS.items():
        table = Table(case, unit="")
        for seed in range(args.seeds):
            table.add("linear model", check(seed), labels="class", note="drawn models")
        table.write(results, range(args.seeds))
        table.show()
    try:
        if args.json is not None:
            results.write(args.json)
    except OSError as error:
        print(f"theory: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
