"""Units switched off or scaled by gates, exactly: one forward row for each setting, from the unedited pass on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.cascade.attribution import target_values
from spurge.engine.cascade.partial_forward import PartialForward, Target, Trace
from spurge.engine.models.projections import RowGates

Unit = tuple[int, int]  # a site, by its number, and a neuron of it


def ablated(
    forward: PartialForward,
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
        opened = {i: _without(forward, i, trace, torch.tensor(ks)) for i, ks in columns.items()}
        value = target_values(target, forward.run(trace, opened)).unflatten(0, (len(chosen), trace.batch))
        effects[chosen] = full - value
    return effects.permute(2, 1, 0)


def _without(forward: PartialForward, i: int, trace: Trace, columns: Tensor) -> Tensor:
    """Rows ``[n * B, T, H]`` in the place of the site's anchor, each with one unit off."""
    seen = trace.sites[i]
    columns = columns.to(seen.z.device)
    z = seen.z[..., columns].movedim(-1, 0)[..., None]  # [n, B, T, 1]
    w = forward.sites[i].projection.columns(columns).t()[:, None, None]  # [n, 1, 1, H]
    return torch.addcmul(seen.anchor[None], z, w, value=-1).flatten(0, 1)


def gated(
    forward: PartialForward, trace: Trace, target: Target, units: Sequence[Unit], gates: Tensor, at_once: int
) -> Tensor:
    """Targets under each setting of the units' gates, ``[P, B, Q]``.

    Args:
        gates: ``[P, n]``.
        at_once: settings that go into one pass.
    """
    members: dict[int, list[int]] = {}  # site -> positions in `units`
    for j, (i, _) in enumerate(units):
        members.setdefault(i, []).append(j)
    device = {i: trace.sites[i].z.device for i in members}
    columns = {i: torch.tensor([units[j][1] for j in js], device=device[i]) for i, js in members.items()}
    entries = _entries(forward, trace, sorted(members))
    results = []
    for setting in gates.to(torch.float32).split(at_once):
        on = {i: RowGates(columns[i], setting[:, js].contiguous().to(device[i])) for i, js in members.items()}
        opened = _moved(forward, trace, {i: on.pop(i) for i in entries})
        value = target_values(target, forward.run(trace, {entries[0]: opened}, inside=on))
        results.append(value.unflatten(0, (len(setting), trace.batch)))
    return torch.cat(results)


def _entries(forward: PartialForward, trace: Trace, sites: list[int]) -> list[int]:
    """Which gated sites of the first block open the rows: one that runs the block again, gated inside, else all."""
    block_of = forward.block_of
    first = [i for i in sites if block_of[i] == block_of[sites[0]]]
    return [i for i in first if trace.anatomy.placements[i].kind == "replay"][:1] or first


def _moved(forward: PartialForward, trace: Trace, gates: Mapping[int, RowGates]) -> Tensor:
    """Rows ``[P * B, T, H]`` in the place of the sites' common anchor, each with some of their units gated."""
    rows = trace.sites[min(gates)].anchor
    for i, on in gates.items():
        z = trace.sites[i].z
        change = z[..., on.columns] * (on.values[:, None, None] - 1).to(z.dtype)
        rows = rows + change @ forward.sites[i].projection.columns(on.columns).t()
    return rows.flatten(0, 1)
