"""Scores of all neurons over a training set, batch by batch: resumable, checked by completeness and exact ablation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.cascade import Attribution, Cascade, Target
from spurge.engine.files import FileError, PathLike, canonical_json, read_tensors, write_tensors
from spurge.engine.neurons import NeuronSet
from spurge.engine.scores import NeuronScores
from spurge.methods.located import spearman

SIDES = ("causal", "spurious")


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


@dataclass(frozen=True, eq=False)
class Block:
    """What one batch gives: two score maps, and for completeness ``{side_effect, side_gap, side_moved}`` by site."""

    scores: dict[str, NeuronScores]
    completeness: dict[str, dict[str, float]]
    nodes: int

    def save(self, path: PathLike, fingerprint: str) -> None:
        tensors = {f"{side}/{site}": v for side in SIDES for site, v in self.scores[side].values.items()}
        facts = {"completeness": self.completeness, "nodes": self.nodes}
        write_tensors(
            path, tensors, {"kind": "locate block", "facts": canonical_json(facts), "fingerprint": fingerprint}
        )

    @classmethod
    def load(cls, path: PathLike, fingerprint: str) -> Block:
        """Raises FileError for a damaged file, ValueError for one made with other settings, data or model."""
        tensors, metadata = read_tensors(path, "locate block")
        if metadata.get("fingerprint") != fingerprint:
            raise ValueError(f"resume: {path} was made with other settings, data or model; choose another folder")
        try:
            facts = json.loads(metadata["facts"])
            scores = {
                side: NeuronScores(
                    {k.removeprefix(f"{side}/"): t for k, t in tensors.items() if k.startswith(f"{side}/")}
                )
                for side in SIDES
            }
            return cls(scores, facts["completeness"], int(facts["nodes"]))
        except (KeyError, ValueError, TypeError) as error:
            raise FileError(f"{path}: not a block of a localisation: {error}") from error


def screen(
    cascade: Cascade,
    questions: Sequence[Callable[[], Question]],
    *,
    resume: PathLike | None = None,
    fingerprint: str = "",
    progress: bool = False,
) -> list[Block]:
    """The blocks of all questions, in order; those found in the folder ``resume`` are not computed again.

    Questions are made when their turn comes, so that one that is already answered costs nothing.

    Raises:
        ValueError: ``resume`` holds blocks of another job.
        FileError: a block is damaged.
        OSError: the folder cannot be read or written.
    """
    folder = None if resume is None else Path(resume)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    blocks = []
    for number, ask in enumerate(tqdm(questions, desc="locate", unit="batch", disable=not progress)):
        path = None if folder is None else folder / f"block-{number:05d}.safetensors"
        if path is not None and path.exists():
            blocks.append(Block.load(path, fingerprint))
            continue
        question = ask()
        block = _block(cascade.attribute(question.inputs, question.target), question.mix)
        if path is not None:
            block.save(path, fingerprint)
        blocks.append(block)
    return blocks


def _block(found: Attribution, mix: Tensor) -> Block:
    values = {site: torch.einsum("qbf,qbc->cf", v.double(), mix.double()) for site, v in found.values.items()}
    scores = {side: NeuronScores({site: v[c].float() for site, v in values.items()}) for c, side in enumerate(SIDES)}
    completeness: dict[str, dict[str, float]] = {}
    for key, erased in found.erased.items():
        moved = (found.full - erased).double()
        row = completeness[key] = {}
        for c, side in enumerate(SIDES):
            share = mix[..., c].double()
            row[f"{side}_effect"] = float((share * moved).sum())
            row[f"{side}_moved"] = float((share * moved).abs().sum())
            row[f"{side}_missed"] = float((share * found.residual[key].double()).abs().sum())
    return Block(scores, completeness, max(found.nodes.values(), default=0))


def total(blocks: Sequence[Block], side: str, info: Mapping[str, Any]) -> NeuronScores:
    """The scores of one side, added up over the blocks in float64."""
    sums = {site: v.double() for site, v in blocks[0].scores[side].values.items()}
    for block in blocks[1:]:
        for site, v in block.scores[side].values.items():
            sums[site] += v.double()
    return NeuronScores({site: v.float() for site, v in sums.items()}, dict(info))


def completeness(blocks: Sequence[Block]) -> dict[str, dict[str, float]]:
    """By site and side: ``effect`` F(1) - F(0) over all texts, ``gap`` the share of its moves that the scores miss.

    Sums over the texts are weighted as the scores are.
    """
    out: dict[str, dict[str, float]] = {}
    for key in blocks[0].completeness:
        summed = {name: sum(block.completeness[key][name] for block in blocks) for name in blocks[0].completeness[key]}
        out[key] = {}
        for side in SIDES:
            moved = summed[f"{side}_moved"]
            out[key][f"{side}_effect"] = summed[f"{side}_effect"]
            out[key][f"{side}_gap"] = summed[f"{side}_missed"] / moved if moved > 0 else 0.0
    return out


def certify(
    cascade: Cascade, questions: Sequence[Question], scores: Mapping[str, NeuronScores], neurons: NeuronSet
) -> dict[str, Any]:
    """Exact effect of switching off each of ``neurons``, F(1) - F(unit off), a mean over the texts, beside its scores.

    The mean is weighted as the scores are. MacU Eq. 5 along the path of that unit alone, for the hard, set-valued
    proximity too.

    Returns:
        ``{"neurons": [{"neuron", "<side> score", "<name> exact", ...}], "texts", "agreement": {name: Spearman's rank
        correlation of exact effects with the scores of the name's side}}``.
    """
    names = questions[0].names
    effect = torch.zeros(len(names), len(neurons), dtype=torch.float64)
    weight = torch.zeros(len(names), dtype=torch.float64)
    for question in questions:
        exact = cascade.ablate(question.inputs, question.exact, neurons).double()
        mix = question.exact_mix.double()
        effect += torch.einsum("qbn,qbc->cn", exact, mix).cpu()
        weight += mix.abs().sum((0, 1)).cpu()
    effect /= weight.clamp_min(1e-12)[:, None]
    refs = list(neurons)
    known = {side: [float(scores[side].values[ref.site][ref.index]) for ref in refs] for side in SIDES}
    records = []
    for n, ref in enumerate(refs):
        record: dict[str, Any] = {"neuron": str(ref)} | {f"{side} score": known[side][n] for side in SIDES}
        records.append(record | {f"{name} exact": float(effect[i, n]) for i, name in enumerate(names)})
    agreement = {name: spearman(known[name.split()[0]], effect[i]) for i, name in enumerate(names)}
    return {"neurons": records, "texts": sum(len(q.mix[0]) for q in questions), "agreement": agreement}


def parts(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size`` that cover ``count``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
