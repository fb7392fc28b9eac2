"""How faithful a model stays that keeps only the neurons of highest score: the measures of the MIB benchmark.

Mueller et al. 2025 (arXiv 2504.13151). Of a model N, its part C that is kept and the empty part, with m the mean lead
of the answer over the runner-up: ``f(C) = (m(C) - m(empty)) / (m(N) - m(empty))``. CPR is the area under f over the
share of neurons that are kept, CMD the area between f and 1; both by trapezoids over `FRACTIONS`, so that a part that
does all at any size has CPR 0.999 and CMD 0. CPR asks for what helps, neurons are kept by signed score; CMD for what
matters either way, they are kept by its size. What is not kept is zero, or what it is on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.localisers import Values, answers, leading
from spurge.engine.base.temporary import Temporaries
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen, hook_before
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import widths

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ABLATIONS = ("zero", "mean")


@dataclass(frozen=True)
class Areas:
    """CPR and CMD, with the faithfulness at each of `FRACTIONS` that each is made of."""

    cpr: float
    cmd: float
    signed: tuple[float, ...]
    sized: tuple[float, ...]


def areas(signed: Sequence[float], sized: Sequence[float]) -> Areas:
    """Of faithfulness at each of `FRACTIONS`, with neurons by signed score and by its size."""
    shares = torch.tensor(FRACTIONS, dtype=torch.float64)
    under = torch.trapezoid(torch.tensor(signed, dtype=torch.float64), shares)
    apart = torch.trapezoid((1 - torch.tensor(sized, dtype=torch.float64)).abs(), shares)
    return Areas(float(under), float(apart), tuple(signed), tuple(sized))


class Faithfulness:
    """Of parts of a model, on batches of texts.

    Args:
        batches: arguments of the model each.
        means: mean activation of every neuron by site, ``[F]``; None: neurons that are not kept are 0.

    Attributes:
        whole, empty: m of the model, and of the model without any neuron.
    """

    def __init__(self, handle: Handle, batches: Sequence[Any], means: Values | None = None) -> None:
        self.handle, self.batches = handle, batches
        self.pairs = [torch.stack(leading(handle, batch), 1) for batch in batches]
        sites = handle.sites
        self.means = {site.name: torch.zeros(site.width) for site in sites} if means is None else means
        self.whole = self.lead(NeuronSet.all(widths(sites)))
        self.empty = self.lead(NeuronSet())

    def lead(self, kept: NeuronSet) -> float:
        """Mean lead of the unedited model's answer over its runner-up with these neurons alone."""
        leads = []
        with frozen(self.handle.model, gradients=False), Temporaries() as changes:
            for site in self.handle.sites:
                lost = torch.ones(site.width, dtype=torch.bool).index_fill(0, kept.indices(site.name), False)
                if lost.any():
                    own = self.means[site.name].to(site.parameter)
                    changes.enter_context(hook_before(site.down, partial(_replaced, lost, own)))
            for batch, pair in zip(self.batches, self.pairs, strict=True):
                lead, other = answers(self.handle, batch).gather(1, pair).double().unbind(1)
                leads.append(lead - other)
        return float(torch.cat(leads).mean())

    def of(self, kept: NeuronSet) -> float:
        """f of a part."""
        return (self.lead(kept) - self.empty) / (self.whole - self.empty)

    def curve(self, scores: NeuronScores) -> list[float]:
        """f of the neurons of highest score, at each of `FRACTIONS`; counts are rounded down."""
        order = [ref for ref, _ in scores.ranking()]
        counts = [int(share * len(order)) for share in FRACTIONS]
        return [1.0 if count == len(order) else self.of(NeuronSet.from_refs(order[:count])) for count in counts]

    def areas(self, values: Values) -> Areas:
        """CPR and CMD of a localiser's scores."""
        scores = NeuronScores(values)
        signed, sizes = self.curve(scores), scores.magnitudes()
        same = scores.ranking() == sizes.ranking()
        return areas(signed, signed if same else self.curve(sizes))


def _replaced(lost: Tensor, own: Tensor, module: Any, args: Any, kwargs: Any) -> Any:
    return (torch.where(lost, own, args[0]), *args[1:]), kwargs


def mean_activations(handle: Handle, batches: Sequence[Any]) -> Values:
    """Of every neuron over all real tokens of the texts, by site, ``[F]``."""
    sums = {site.name: torch.zeros(site.width, dtype=torch.float64) for site in handle.sites}
    count = 0

    def look(name: str, mask: Tensor, z: Tensor, output: Tensor, rest: Tensor | None) -> None:
        sums[name] += z[mask].double().sum(0)

    for batch in batches:
        mask = batch["attention_mask"].bool()
        with frozen(handle.model, gradients=False), Temporaries() as changes:
            for site in handle.sites:
                changes.enter_context(site.projection.watch(partial(look, site.name, mask)))
            answers(handle, batch)
        count += int(mask.sum())
    return {name: (total / count).float() for name, total in sums.items()}
