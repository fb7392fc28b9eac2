"""Random edits of the kind of one that is measured: other neurons, or other weights, changed as much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.data.examples import Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.overwrites import Changes, original
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.features.extraction import extract
from spurge.engine.models.handle import Handle
from spurge.engine.models.heads import Head, find_head
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.parameters import Place

MOST_WEIGHTS = 1_000_000  # an edit of more is none of single weights: other columns of it say nothing


def draw_seed(seed: int, draw: int) -> int:
    """The seed of one draw."""
    return int(np.random.SeedSequence((seed, draw)).generate_state(1)[0])


def random_gates(edit: NeuronEdit, seed: int) -> dict[str, Tensor]:
    """The edit's gates in random order on random neurons, per site: on others than its own where there are enough."""
    widths = {site: fingerprint["shape"][1] for site, fingerprint in edit.model.items()}
    own, counts = edit.neurons, edit.neurons.counts()
    exclude = NeuronSet({site: own.indices(site) for site in own.sites if 2 * counts[site] <= widths[site]})
    drawn = own.random_like(widths, seed, exclude)
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for site, (_, values) in edit.gates.items():
        gates[site] = torch.ones(widths[site])
        gates[site][drawn.indices(site)] = values[torch.randperm(len(values), generator=generator)]
    return gates


def can_be_drawn(edit: WeightEdit) -> bool:
    """Whether there are other weights to change: some of a matrix, and no more than a million."""
    count = sum(len(indices) for indices, _ in edit.changes.values())
    return 0 < count <= MOST_WEIGHTS and any(len(edit.model[name]["shape"]) > 1 for name in edit.changes)


def random_weights(edit: WeightEdit, places: Mapping[str, Place], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The edit's changes of each row in other columns of that row, where there are enough; else in any of them.

    Args:
        edit: whose changes they are.
        places: of the parameters in the model, which lies unedited.
        seed: of the columns.

    Returns:
        Parameter name to flat indices ``[n]`` and new values ``[n]``; parameters without columns, such as a bias, are
        changed as in the edit.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (indices, values) in edit.changes.items():
        old = original(places[name]).detach().cpu()
        if old.dim() < 2:
            found[name] = (indices, values)
            continue
        flat, changes = old.reshape(-1), values.double() - old.reshape(-1)[indices].double()
        drawn, order = _in_other_columns(indices, old.shape[-1], generator)
        found[name] = (drawn, (flat[drawn].double() + changes[order]).to(values.dtype))
    return found


def random_heads(before: Head, after: Head, draws: int, seed: int) -> list[Head]:
    """Last layers with the changes of each row in other columns of it, where there are enough; the bias of ``after``.

    Raises:
        ValueError: layers of other shapes, or no draw.
    """
    if before.weight.shape != after.weight.shape or draws < 1:
        shapes = tuple(before.weight.shape), tuple(after.weight.shape)
        raise ValueError(f"after, draws: expected layers of one shape and at least 1 draw, got {shapes} and {draws}")
    changes = (after.weight.double() - before.weight.double()).view(-1)
    indices = changes.nonzero()[:, 0]
    heads = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw_seed(seed, draw))
        drawn, order = _in_other_columns(indices, before.width, generator)
        weight = before.weight.clone()
        weight.view(-1)[drawn] += changes[indices[order]].to(weight.dtype)
        heads.append(after.with_(weight=weight))
    return heads


def _in_other_columns(indices: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Other flat indices of the same rows, ascending, and which of the ``indices`` each stands for."""
    rows, columns = indices // width, indices % width
    drawn = torch.empty_like(indices)
    for row in rows.unique():
        own = rows == row
        drawn[own] = row * width + _others(columns[own], width, generator)
    order = drawn.argsort()
    return drawn[order], order


def _others(columns: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """As many random columns: none of these, where there are enough others."""
    free = torch.ones(width, dtype=torch.bool)
    if 2 * len(columns) <= width:
        free[columns] = False
    left = free.nonzero()[:, 0]
    return left[torch.randperm(len(left), generator=generator)[: len(columns)]]


def of_last_layer(handle: Handle, places: Mapping[str, Place]) -> bool:
    """Whether an edit of these places changes the model's last layer alone, one that makes its logits."""
    try:
        _, layer = find_head(handle.model)
    except ValueError:  # there is none
        return False
    return all(place.module is layer for place in places.values())


def read_last_layers(
    handle: Handle, sets: Mapping[str, Examples], **reading: Any
) -> dict[str, tuple[Tensor, Head]] | None:
    """By set what the last layer reads, and that layer: one pass for all draws. None where it makes no logits.

    Args:
        handle: of the unedited model.
        sets: the texts.
        reading: further arguments of `spurge.extract`.
    """
    try:
        head = Head.of(handle.model)
        how = {"tokenizer": handle.tokenizer, "progress": False, **reading}
        found = {}
        for case, rows in sets.items():
            alone = Examples([replace(row, group=None) for row in rows], rows.labels)  # features want one group or none
            found[case] = extract(handle.model, alone, **how).values, head
        return found
    except ValueError:  # more stands behind that layer
        return None


def last_layer_logits(
    read: tuple[Tensor, Head], places: Mapping[str, Place], draws: Iterable[Changes]
) -> Iterator[Tensor]:
    """Logits ``[N, Y]`` of one set under each of several changes of the last layer."""
    values, head = read
    for changes in draws:
        new = {"weight": head.weight.clone(), **({} if head.bias is None else {"bias": head.bias.clone()})}
        for name, (indices, entries) in changes.items():
            new[places[name].key].view(-1)[indices] = entries.to(head.weight.dtype)
        yield head.with_(**new).logits(values)
