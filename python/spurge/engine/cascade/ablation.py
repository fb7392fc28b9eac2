"""Units switched off or scaled by gates, exactly: one forward row for each setting, from the unedited pass on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.cascade.attribution import target_values
from spurge.engine.models.projections import RowGates
from spurge.engine.passes.trace import Off, Target, Trace

Unit = tuple[int, int]  # a site, by its number, and a neuron of it


def ablated(
    trace: Trace, target: Target, units: Tensor, owners: Tensor, at_once: int, *, progress: bool = False
) -> Tensor:
    """What the target of one example each loses by switching off one unit, ``[Q, n]``.

    Args:
        units: sites and neurons of them, int64 ``[n, 2]`` on the CPU.
        owners: the examples, int64 ``[n]`` on the CPU.
        at_once: rows that go into one pass.
    """
    full = target_values(target, trace.rows)
    effects = full.new_empty(len(units), full.shape[1])
    blocks = units[:, 0].argsort(stable=True).split(at_once)
    for rows in tqdm(blocks, desc="ablate", unit="block", disable=not progress or len(blocks) == 1):
        sites = units[rows, 0]
        off = {i: rows[sites == i] for i in sites.unique().tolist()}
        kept = trace.forward.without(trace, {i: Off(units[own, 1], owners[own]) for i, own in off.items()})
        where = rows.to(full.device)
        effects[where] = full[owners[rows].to(full.device)] - target_values(target, kept)
    return effects.t()


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
