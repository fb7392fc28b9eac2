"""Units switched off or scaled by gates, exactly: one forward row for each setting, from the unedited pass on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.cascade.attribution import target_values
from spurge.engine.models.projections import RowGates
from spurge.engine.passes.trace import Target, Trace

Unit = tuple[int, int]  # a site, by its number, and a neuron of it


def ablated(
    trace: Trace,
    target: Target,
    units: Sequence[Unit],
    at_once: int,
    *,
    progress: bool = False,
) -> Tensor:
    """What the target loses by switching off each unit alone, ``[Q, B, n]``.

    Args:
        at_once: units that go into one pass.
    """
    order = sorted(range(len(units)), key=units.__getitem__)
    full = target_values(target, trace.rows)
    effects = full.new_empty(len(units), *full.shape)
    blocks = range(0, len(order), at_once)
    for start in tqdm(blocks, desc="ablate", unit="block", disable=not progress or len(blocks) == 1):
        chosen = order[start : start + at_once]
        columns: dict[int, list[int]] = {}
        for j in chosen:
            columns.setdefault(units[j][0], []).append(units[j][1])
        off = trace.forward.without(trace, {i: torch.tensor(ks) for i, ks in columns.items()})
        value = target_values(target, off).unflatten(0, (len(chosen), trace.batch))
        effects[chosen] = full - value
    return effects.permute(2, 1, 0)


def gated(trace: Trace, target: Target, units: Sequence[Unit], gates: Tensor, at_once: int) -> Tensor:
    """Targets under each setting of the units' gates, ``[P, B, Q]``.

    Args:
        gates: ``[P, n]``.
        at_once: settings that go into one pass.
    """
    members: dict[int, list[int]] = {}  # site -> positions in `units`
    for j, (i, _) in enumerate(units):
        members.setdefault(i, []).append(j)
    columns = {i: torch.tensor([units[j][1] for j in members[i]]) for i in sorted(members)}
    results = []
    for setting in gates.to(torch.float32).split(at_once):
        on = {i: RowGates(own, setting[:, members[i]].contiguous()) for i, own in columns.items()}
        value = target_values(target, trace.forward.gated(trace, on))
        results.append(value.unflatten(0, (len(setting), trace.batch)))
    return torch.cat(results)
