"""Scores of all neurons over a training set, batch by batch: resumable, checked by completeness and exact ablation.

Batches are shared between the ranks of a job. What is kept of them does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge import ops
from spurge.engine.base import checks
from spurge.engine.base.distributed import ALONE, Message, Ranks
from spurge.engine.base.files import PathLike, canonical_json
from spurge.engine.base.resume import Blocks
from spurge.engine.base.statistics import spearman
from spurge.engine.base.tensor_files import flat, of_group
from spurge.engine.cascade.attribution import join
from spurge.engine.cascade.cascade import Attribution, Cascade, Rows, Target
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.models.neurons import NeuronSet

SIDES = ("causal", "spurious")
Select = Callable[[NeuronScores], NeuronSet]


@dataclass(frozen=True, eq=False)
class Question:
    """A batch of B texts, Q targets, and how their attributions add up to the two scores.

    Attributes:
        inputs: what the model is called with, tensors ``[B, T]``.
        target: rows -> ``[R, Q]``, what is integrated.
        mix: ``[Q, B, 2]``: share of target q of text b in the causal and the spurious score, times the text's weight.
        exact: target of the certificate, rows -> ``[R, Q']``; ``names`` has one name for each.
        exact_mix: ``[Q', B, Q']``.
    """

    inputs: Mapping[str, Tensor]
    target: Target
    mix: Tensor
    exact: Target
    exact_mix: Tensor
    names: tuple[str, ...]

    @property
    def sided(self) -> Sided:
        """Its target as the two scores add it up."""
        return Sided(self.target, self.mix)


@dataclass(frozen=True, eq=False)
class Sided:
    """A target of Q numbers as what each text adds to the causal and to the spurious score, ``[R, 2]``.

    Attributes:
        target: rows -> ``[R, Q]``.
        mix: ``[Q, B, 2]``.
    """

    target: Target
    mix: Tensor

    @property
    def reads(self) -> str | None:
        return getattr(self.target, "reads", None)

    def __call__(self, rows: Rows) -> Tensor:
        value = self.target(rows).reshape(len(rows.logits), -1)
        return torch.einsum("rq,qrc->rc", value, self.mix[:, rows.example].to(value))


class Questions(Protocol):
    """Questions that are made when they are taken, so that one that is already answered costs nothing."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Question: ...


@dataclass(frozen=True, eq=False)
class Block:
    """What one batch gives: two score maps, and for completeness ``{side_effect, side_gap, side_moved}`` by site."""

    scores: dict[str, NeuronScores]
    completeness: dict[str, dict[str, float]]
    nodes: int

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file or a message holds: facts that JSON can write, and tensors ``side/site``."""
        return {"completeness": self.completeness, "nodes": self.nodes}, flat(
            {side: self.scores[side].values for side in SIDES}
        )

    @classmethod
    def of_parts(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Block:
        scores = {side: NeuronScores(values) for side, values in _by_side(tensors).items()}
        completeness = {
            site: {name: checks.number(f"completeness of {site!r}", value) for name, value in numbers.items()}
            for site, numbers in facts["completeness"].items()
        }
        return cls(scores, completeness, checks.integer("nodes", facts["nodes"], 0))


@dataclass(eq=False)
class Screened:
    """What the blocks of a localisation add up to, in their order and in float64.

    Attributes:
        sums: side to site to float64 ``[F]``, the scores.
        chosen: side to site to int32 ``[F]``, in how many blocks a neuron was selected.
        completeness: by site the sums of each number of the blocks.
        blocks: how many there were.
        nodes: the most that one of them took.
    """

    sums: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {side: {} for side in SIDES})
    chosen: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {side: {} for side in SIDES})
    completeness: dict[str, dict[str, float]] = field(default_factory=dict)
    blocks: int = 0
    nodes: int = 0

    def add(self, block: Block, select: Select) -> None:
        """Adds one block; ``select`` names the neurons that it votes for."""
        for side in SIDES:
            selected = select(block.scores[side])
            for site, values in block.scores[side].values.items():
                self.sums[side].setdefault(site, torch.zeros(len(values), dtype=torch.float64)).add_(values)
                votes = self.chosen[side].setdefault(site, torch.zeros(len(values), dtype=torch.int32))
                votes[selected.indices(site)] += 1
        for key, row in block.completeness.items():
            summed = self.completeness.setdefault(key, dict.fromkeys(row, 0.0))
            for name, value in row.items():
                summed[name] += value
        self.blocks += 1
        self.nodes = max(self.nodes, block.nodes)

    def total(self, side: str, info: Mapping[str, Any]) -> NeuronScores:
        """The scores of one side."""
        return NeuronScores({site: values.float() for site, values in self.sums[side].items()}, dict(info))

    def frequent(self, side: str, share: float) -> NeuronSet:
        """Neurons that at least ``share`` of the blocks selected, as :func:`spurge.engine.models.neurons.frequent`."""
        votes = self.chosen[side].items()
        return NeuronSet({site: (times.double() / self.blocks >= share).nonzero()[:, 0] for site, times in votes})

    def gaps(self) -> dict[str, dict[str, float]]:
        """By site and side: ``effect`` F(1) - F(0) over all texts, ``gap`` the share of its moves that the scores miss.

        Sums over the texts are weighted as the scores are.
        """
        out: dict[str, dict[str, float]] = {}
        for key, summed in self.completeness.items():
            out[key] = {}
            for side in SIDES:
                moved = summed[f"{side}_moved"]
                out[key][f"{side}_effect"] = summed[f"{side}_effect"]
                out[key][f"{side}_gap"] = summed[f"{side}_missed"] / moved if moved > 0 else 0.0
        return out

    def message(self) -> Message:
        facts = {"completeness": self.completeness, "blocks": self.blocks, "nodes": self.nodes}
        return Message(facts, flat({"sums": flat(self.sums), "chosen": flat(self.chosen)}))

    @classmethod
    def of_message(cls, message: Message) -> Screened:
        sums, chosen = (_by_side(of_group(name, message.tensors)) for name in ("sums", "chosen"))
        return cls(sums, chosen, **message.facts)


def _by_side(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {side: of_group(side, tensors) for side in SIDES}


def screen(
    cascade: Cascade,
    questions: Questions,
    select: Select,
    *,
    ranks: Ranks = ALONE,
    resume: PathLike | None = None,
    fingerprint: str = "",
    progress: bool = False,
) -> Screened:
    """The sum of the blocks of all questions; those found in the folder ``resume`` are not computed again.

    A question is taken when its turn comes, one that is already answered not at all. Each rank answers one question of
    every round, as many as there are ranks, and rank 0 adds a round's blocks in the order of the questions:
    the same sum for any number of ranks.

    Args:
        select: the neurons that a block's scores vote for.
        ranks: which share the work; each writes its own blocks to ``resume``, a folder that all of them see.

    Raises:
        ValueError: ``resume`` holds blocks of another job, or the ranks have different jobs.
        FileError: a block is damaged.
        OSError: the folder cannot be read or written.
        RankError: another rank ended early.
    """
    blocks = Blocks(resume, "locate block", "a block of a localisation", fingerprint)
    ranks.agree("locate: data, settings and model", [fingerprint, len(questions)])
    screened = Screened()
    with tqdm(total=len(questions), desc="locate", unit="batch", disable=not progress or ranks.rank > 0) as bar:
        for first in range(0, len(questions), ranks.size):
            ranks.doing = f"blocks were gathered ({_so_far(first, len(questions), resume)}"
            number, mine = first + ranks.rank, Message()
            if number < len(questions):
                mine = Message(*_answered(cascade, questions, number, blocks).parts())
            for message in ranks.gather(mine):
                if message.facts is not None:
                    screened.add(Block.of_parts(message.facts, message.tensors), select)
            bar.update(min(ranks.size, len(questions) - first))
    ranks.doing = "the sum of all blocks was sent"
    return Screened.of_message(ranks.broadcast(screened.message()))


def _so_far(done: int, total: int, resume: PathLike | None) -> str:
    """What an error says of the work that is done: the rest of a parenthesis."""
    if resume is None:
        return f"{done} of {total} were done); with a resume folder they would be kept"
    last = f"block {done - 1} is the last one written" if done else "none is written yet"
    return f"{last}); start again with the same resume folder to go on"


def _answered(cascade: Cascade, questions: Questions, number: int, blocks: Blocks) -> Block:
    """The block of one question, from its file where there is one."""
    name = f"block-{number:05d}"
    block = blocks.find(name, lambda file: Block.of_parts(file.value("facts", dict), file.tensors))
    if block is None:
        question = questions[number]
        block = _block(cascade.attribute(question.inputs, question.target), question.mix)
        facts, tensors = block.parts()
        blocks.keep(name, tensors, facts=canonical_json(facts))
    return block


def _block(found: Attribution, mix: Tensor) -> Block:
    wide = {site: value.double().flatten(0, 1) for site, value in found.values.items()}  # [Q * B, F]
    scores = {}
    for side, share in zip(SIDES, mix.double().unbind(2), strict=True):
        weights = share.flatten().tolist()
        scores[side] = NeuronScores({site: ops.node_sum(value, weights).float()[0] for site, value in wide.items()})
    completeness: dict[str, dict[str, float]] = {}
    for key, erased in found.erased.items():
        moved = (found.full - erased).double()
        row = completeness[key] = {}
        for c, side in enumerate(SIDES):
            share = mix[..., c].to(moved)
            row[f"{side}_effect"] = float((share * moved).sum())
            row[f"{side}_moved"] = float((share * moved).abs().sum())
            row[f"{side}_missed"] = float((share * found.residual[key].to(moved)).abs().sum())
    return Block(scores, completeness, max(found.nodes.values(), default=0))


def audited(cascade: Cascade, questions: Questions) -> dict[str, Any]:
    """How well what each text adds to the two scores agrees with the effects of switching each neuron off.

    Args:
        cascade: of the gradient path, with an audit.

    Returns:
        ``{"causal": {"spearman": [value, low, high], "pearson", "error", "error_bound", "missed", "missed_bound",
        "drawn"}, "spurious"}``.
    """
    seed, parts = cascade.effort.seed, []
    for number in range(len(questions)):
        question = questions[number]
        parts.append(cascade.attribute(question.inputs, question.sided, seed=seed + (number << 40)))
    return {side: asdict(own) for side, own in zip(SIDES, join(parts).agreement, strict=False)}


def certify(
    cascade: Cascade, questions: Questions, scores: Mapping[str, NeuronScores], neurons: NeuronSet
) -> dict[str, Any]:
    """Exact effect of switching off each of ``neurons``, F(1) - F(unit off), a mean over the texts, beside its scores.

    The mean is weighted as the scores are. MacU Eq. 5 along the path of that unit alone, for the hard, set-valued
    proximity too.

    Returns:
        ``{"neurons": [{"neuron", "<side> score", "<name> exact", ...}], "texts", "agreement": {name: Spearman's rank
        correlation of exact effects with the scores of the name's side}}``.
    """
    names: tuple[str, ...] = ()
    effect, weight, texts = torch.zeros(()), torch.zeros(()), 0
    for question in (questions[number] for number in range(len(questions))):
        exact = cascade.ablate(question.inputs, question.exact, neurons).double()
        mix = question.exact_mix.to(exact)
        names, texts = question.names, texts + mix.shape[1]
        effect = effect + torch.einsum("qbn,qbc->cn", exact, mix).cpu()
        weight = weight + mix.abs().sum((0, 1)).cpu()
    effect = effect / weight.clamp_min(1e-12)[:, None]
    refs = list(neurons)
    known = {side: [float(scores[side].values[ref.site][ref.index]) for ref in refs] for side in SIDES}
    records = []
    for n, ref in enumerate(refs):
        record: dict[str, Any] = {"neuron": str(ref)} | {f"{side} score": known[side][n] for side in SIDES}
        records.append(record | {f"{name} exact": float(effect[i, n]) for i, name in enumerate(names)})
    agreement = {name: spearman(known[name.split()[0]], effect[i]) for i, name in enumerate(names)}
    return {"neurons": records, "texts": texts, "agreement": agreement}
