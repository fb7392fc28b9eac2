"""Ways to score every feed-forward neuron of a model by what it does for an answer: Spurge's, its peers', and controls.

All answer one question, about texts of one length, so that those take part that know no padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spurge.engine.base.temporary import Temporaries
from spurge.engine.cascade.cascade import Cascade
from spurge.engine.data.examples import Examples
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.passes.trace import Rows
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.macu import MacU

STEPS = 20  # of the peers, the field's usual number


@dataclass(frozen=True, eq=False)
class Words:
    """What MacU reads in place of a target: labelled texts, golden words, and which of its two scores is meant."""

    train: Examples
    golden: GoldenTokens
    side: str


@dataclass(frozen=True, eq=False)
class Question:
    """How far one output leads another, over B texts of T tokens without padding: a weighted sum of the leads.

    Attributes:
        inputs: arguments of the model, ``[B, T]``.
        leader, other: outputs (tokens, for a language model) of each text, int64 ``[B]``.
        weight: of each text, ``[B]``.
        few: texts that exact ablation is asked about, the first; None: all.
        words: None where MacU has nothing to read.
        nodes: of the layer and joint paths.
    """

    handle: Handle
    inputs: dict[str, Tensor]
    leader: Tensor
    other: Tensor
    weight: Tensor
    few: int | None = None
    words: Words | None = None
    nodes: int = 4

    def target(self, rows: Rows) -> Tensor:
        """Each row's part of the sum, ``[R]``."""
        own = rows.example
        pair = torch.stack([self.leader, self.other], 1)[own]
        lead, other = rows.logits.gather(1, pair).unbind(1)
        return self.weight[own] * (lead - other)

    def first(self, count: int) -> Question:
        """The same about the first texts."""
        inputs = {name: value[:count] for name, value in self.inputs.items()}
        return Question(self.handle, inputs, self.leader[:count], self.other[:count], self.weight[:count])


Values = dict[str, Tensor]  # site -> [F]


@dataclass(frozen=True)
class Localiser:
    """One way to score neurons; ``labels``: of the texts, that it reads. ``slow``: runs the model for every layer or
    neuron apart.
    """

    scores: Callable[[Question, int], Values]
    note: str
    labels: str = "none"
    words: bool = False
    slow: bool = False


def alike(handle: Handle, texts: Sequence[str], count: int, seed: int) -> list[str]:
    """At most ``count`` of the texts that have the commonest number of tokens, drawn without replacement."""
    sizes = [len(ids) for ids in handle.tokenizer(list(texts))["input_ids"]]
    common = Counter(sizes).most_common(1)[0][0]
    same = [text for text, size in zip(texts, sizes, strict=True) if size == common]
    drawn = torch.randperm(len(same), generator=torch.Generator().manual_seed(seed))[:count]
    return [same[i] for i in drawn.tolist()]


def answers(handle: Handle, inputs: Any) -> Tensor:
    """A classifier's logits, or a language model's after the last token of texts without padding, ``[B, Y]``."""
    logits = handle.model(**inputs).logits
    return (logits[:, -1] if logits.dim() == 3 else logits).float()


def leading(handle: Handle, inputs: Any) -> tuple[Tensor, Tensor]:
    """The output that the model predicts for each text and its runner-up, ``[B]`` each."""
    with frozen(handle.model, gradients=False):
        first, second = answers(handle, inputs).topk(2).indices.unbind(1)
    return first, second


def about(
    handle: Handle, texts: Sequence[str], *, words: Words | None = None, few: int | None = None, nodes: int = 4
) -> Question:
    """How far the predicted output leads its runner-up, a mean over texts of one length."""
    inputs = dict(handle.encode(texts))
    leader, other = leading(handle, inputs)
    weight = torch.full((len(texts),), 1 / len(texts))
    return Question(handle, inputs, leader, other, weight, few=few, words=words, nodes=nodes)


def _cascade(question: Question, seed: int, **settings: Any) -> Values:
    found = Cascade(question.handle, seed=seed, **settings).attribute(question.inputs, question.target)
    return {site: value[0].double().sum(0) for site, value in found.values.items()}


def _path(question: Question, seed: int, path: Any) -> Values:
    return _cascade(question, seed, path=path, nodes=question.nodes, completeness=False)


def _exact(question: Question, seed: int) -> Values:
    few = question if question.few is None else question.first(question.few)
    return _cascade(few, seed, path="neuron")


def _macu(question: Question, seed: int, macu: Callable[..., MacU]) -> Values:
    words, handle = question.words, question.handle
    assert words is not None
    settings = macu(certify=0, progress=False, seed=seed)
    located = settings.locate(handle.model, handle.tokenizer, words.train, words.golden)
    return dict(getattr(located, words.side).values)


def _activation(question: Question, seed: int) -> Values:
    sizes: Values = {}

    def look(name: str, z: Tensor, output: Tensor, rest: Tensor | None) -> None:
        sizes[name] = z.detach().abs().double().mean((0, 1))

    with frozen(question.handle.model, gradients=False), Temporaries() as changes:
        for site in question.handle.sites:
            changes.enter_context(site.projection.watch(partial(look, site.name)))
        answers(question.handle, question.inputs)
    return sizes


def _weight(question: Question, seed: int) -> Values:
    return {site.name: site.projection.column_norms().double() for site in question.handle.sites}


def _random(question: Question, seed: int) -> Values:
    generator = torch.Generator().manual_seed(seed)
    return {site.name: torch.rand(site.width, generator=generator) for site in question.handle.sites}


def _of_leads(question: Question, logit: Callable[[Tensor], Values]) -> Values:
    """Of a peer that knows single logits: the leader's scores less the other's."""
    lead, other = logit(question.leader), logit(question.other)
    weight = question.weight.double()
    return {site: weight @ (lead[site] - other[site]).double() for site in lead}


def _captum(question: Question, seed: int, zero_baseline: bool) -> Values:
    from peers.captum_lig import captum_layers

    model, ids = question.handle.model, question.inputs["input_ids"]
    how: dict[str, Any] = {"rows": 8 * len(ids), "zero_baseline": zero_baseline}
    return _of_leads(question, lambda labels: captum_layers(model, ids, labels, STEPS, **how))


def _knowledge(question: Question, seed: int) -> Values:
    from peers.knowledge_neurons import knowledge_neurons_loop

    model, ids = question.handle.model, question.inputs["input_ids"]
    nodes, weights = [(k + 1) / STEPS for k in range(STEPS)], [1 / STEPS] * STEPS
    return _of_leads(question, lambda labels: knowledge_neurons_loop(model, ids, labels, nodes, weights, chunk=5))


LOCALISERS = {
    "default": Localiser(partial(_cascade), "one gradient, 32 values a text measured, audited: Cascade(model)"),
    "gradient": Localiser(partial(_cascade, exact=0, audit=0), "one gradient, nothing measured"),
    "layer": Localiser(partial(_path, path="layer"), "all neurons of a layer scaled together, 4 nodes (2 of smollm2)"),
    "joint": Localiser(
        partial(_path, path="joint"), "all neurons of all layers scaled together, 4 nodes (2 of smollm2)"
    ),
    "exact": Localiser(_exact, "every neuron switched off alone", slow=True),
    "macu proximity": Localiser(
        partial(_macu, macu=MacU.paper), "scores of MacU.paper(); knows golden words, not the question", words=True
    ),
    "macu counterfactual": Localiser(
        partial(_macu, macu=MacU.best),
        "scores of MacU.best(); knows golden words and labels, not the question",
        labels="class",
        words=True,
    ),
    "captum": Localiser(
        partial(_captum, zero_baseline=False), f"layer by layer, {STEPS} steps, its usual baseline", slow=True
    ),
    "captum zero": Localiser(
        partial(_captum, zero_baseline=True), f"layer by layer, {STEPS} steps, baseline zero", slow=True
    ),
    "knowledge neurons": Localiser(_knowledge, f"layer by layer, {STEPS} steps", slow=True),
    "activation": Localiser(_activation, "mean size of the activation"),
    "weight norm": Localiser(_weight, "norm of the weights that write"),
    "random": Localiser(_random, "drawn at random"),
}
