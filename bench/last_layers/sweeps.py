"""The sweep part of ``run.py last-layer``: accuracies of an edited layer at 1,000 rates, all at once or one by one.

The edit is FCR's (Eq. 8): the largest weight of one row, or of every row, moved on the line that ends where the row is
orthogonal to what it was. The library's time is for the exact accuracies at all rates and for looking up the same
1,000. The limit is one reading of the logits and of what the edit adds to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from common.comparison import Case, Method
from common.harness import compare, peak_of_call
from peers import sweeps as peers
from peers.sca import make_layer

WIDTH, RATES = 512, 1_000
SHAPES = [(10_000, 2), (50_000, 10), (20_000, 1_000)]  # N, C
QUICK_SHAPES = [(500, 2), (500, 10)]
LOOKED_AT = 500_000_000  # logits that a peer may look at; it does fewer rates where all of them would be more
MULTIPLIED = 50_000_000_000  # multiply-adds of the peer that runs the head
LEAST = 10  # rates
CHECKED = 50  # every so many rates' accuracies are computed in float64, for the others to be compared with


def make_edit(samples: int, classes: int, edited: int, *, width: int = WIDTH, device: str = "cpu") -> peers.Edit:
    """Logits, the edit of the first ``edited`` rows, and two groups in each class."""
    features, labels, weight, bias = make_layer(samples, classes, width, device=device)
    rows = torch.arange(edited, device=device)
    largest, columns = weight[:edited].max(1)
    steps = -(weight[:edited].square().sum(1) + 1) / largest
    attribute = torch.rand(samples, generator=torch.Generator().manual_seed(1)) < 0.2
    groups = 2 * labels + attribute.to(device)
    logits = torch.addmm(bias, features, weight.T)
    shifts = features[:, columns] * steps
    return peers.Edit(features, weight, bias, logits, shifts, rows, columns, steps, labels, groups)


def spurge_sweep(edit: peers.Edit, rates: Tensor) -> tuple[Tensor, Tensor]:
    """The library's."""
    from spurge.engine.last_layer.rate_sweep import sweep

    found = sweep(edit.logits, edit.shifts, edit.rows, edit.labels, edit.groups)
    plateaus = torch.searchsorted(found.rates, rates, right=True) - 1
    return found.average[plateaus], found.worst[plateaus]


def methods(edit: peers.Edit, rates: Tensor) -> dict[str, Method]:
    """Every method; the slow ones for some of the rates, evenly spread, where all would take too long."""
    samples, outputs = edit.logits.shape
    looked, multiplied = samples * outputs, samples * outputs * edit.features.shape[1]
    found = {"spurge": Method(partial(spurge_sweep, edit, rates))}
    for name, function, most in (
        ("cached-logits", peers.cached_logits, LOOKED_AT // looked),
        ("cached-logits-tuned", peers.cached_logits_tuned, LOOKED_AT // (samples * len(edit.rows))),
        ("head", peers.forward, MULTIPLIED // multiplied),
    ):
        count = min(len(rates), max(LEAST, most))
        some = rates if count == len(rates) else rates[:: -(-len(rates) // count)]
        note = "" if len(some) == len(rates) else f"extrapolated from {len(some)} of {len(rates)} rates"
        call = partial(function, edit, some.tolist())
        found[name] = Method(
            call, scale=len(rates) / len(some), once=name == "head" or looked * len(rates) > 1 << 28, note=note
        )
    return found


def agreement(exact: tuple[Tensor, Tensor], answer: tuple[Tensor, Tensor]) -> Mapping[str, tuple[float, str]]:
    """Largest difference of the averages and of the worst groups' accuracies, in percent points, at some rates."""
    names = ("average_difference", "worst_difference")
    pairs = zip(names, exact, answer, strict=True)
    return {name: (float((a - b[::CHECKED]).abs().max()), "percent points") for name, a, b in pairs}


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Each shape with one edited row, and with all."""
    for samples, classes in QUICK_SHAPES if quick else SHAPES:
        for edited in (1, classes):
            edit = make_edit(samples, classes, edited, device=device)
            rates = torch.linspace(0, 1, 100 if quick else RATES, dtype=torch.float64, device=device)
            arrays = (edit.logits, edit.shifts)
            calls = {"read": lambda arrays=arrays: [array.sum() for array in arrays]}
            read = compare(calls, repeats=7, sample_seconds=0.02, device=device)["read"].seconds
            size = 4 * sum(array.numel() for array in arrays)
            double = edit._replace(logits=edit.logits.double(), shifts=edit.shifts.double())
            exact = peers.cached_logits_tuned(double, rates[::CHECKED].tolist())
            del double
            found = methods(edit, rates)
            yield Case(
                f"sweep of {len(rates):,} rates, N={samples:,} C={classes:,}, {edited:,} edited",
                found,
                partial(agreement, exact),
                {"limit": (read, f"one reading at {size / read / 1e9:.1f} GB/s")},
                ("sweeps", str(samples), str(classes), str(edited)),
                tuple(found) if not quick and edited == classes == SHAPES[-1][1] else (),
            )


def peak(rest: list[str]) -> int:
    """Bytes beyond logits and features at the peak of one call. For ``run.py child``: N C edited method."""
    rates = torch.linspace(0, 1, 20, dtype=torch.float64)  # memory does not depend on how many
    methods(make_edit(40, 3, 1, width=8), rates)[rest[3]].call()
    return peak_of_call(methods(make_edit(*map(int, rest[:3])), rates)[rest[3]].call)
