"""All cases; their check, their timing, and the results as rows and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch

from spurge.bench import balancing, last_layers, layers, searching
from spurge.bench.case import MIB, SIZES, Case
from spurge.bench.timing import Call, Timing, compare, copy_call, relative_error

#: Makes the case of one kernel, from the bytes that it should move, the dtype and the device.
KERNELS: dict[str, Callable[[int, torch.dtype, str], Case]] = {
    "open_rows": layers.open_rows,
    "gate_columns_": layers.gate_all,
    "gate_columns_few": layers.gate_few,
    "node_sum": layers.node_sum,
    "multiply_sum": layers.multiply_sum,
    "first_order": layers.first_order,
    "proximity": searching.proximity,
    "proximity_gradient": searching.proximity_gradient,
    "swarm_step_": searching.swarm_step,
    "swarm_best_": searching.swarm_best,
    "associate_": last_layers.associate,
    "segment_medians": last_layers.segment_medians,
    "correct_interval": last_layers.correct_interval,
    "balance_sweep": balancing.balance_sweep,
    "balance_batch": balancing.balance_batch,
    "balance_strata": balancing.balance_strata,
}
_HALF = (*(name for name in KERNELS if KERNELS[name].__module__ == layers.__name__), "associate_", "segment_medians")
DTYPES = {name: (torch.float32, torch.bfloat16) if name in _HALF else (torch.float32,) for name in KERNELS}
_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}


def chosen(patterns: Sequence[str]) -> list[str]:
    """The kernels that any pattern names (``balance_*``); all without patterns.

    Raises:
        ValueError: a pattern names none.
    """
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in KERNELS):
            raise ValueError(f"kernels: {pattern!r} is none of {', '.join(KERNELS)}")
    return [name for name in KERNELS if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]


def check(case: Case) -> None:
    """Every method of a case computes the same, to what its dtype can hold.

    Raises:
        ValueError: one does not; there is no sense in timing it.
    """
    bound = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
    want = case.outputs(case.wanted or case.calls["torch"])
    for name in ("spurge",) if case.wanted else case.calls:
        for place, (value, reference) in enumerate(zip(case.outputs(case.calls[name]), want, strict=True)):
            error = 0.0 if torch.equal(value, reference) else relative_error(value, reference)  # also where all are 0
            if not error <= bound:
                raise ValueError(
                    f"{case.name}: output {place} of {name} is {error:.1e} from what it should be, above {bound:.0e}"
                )


def measure(
    case: Case, *, device: str, more: Mapping[str, Call] | None = None, repeats: int = 5, budget: float = 0.3
) -> dict[str, Timing]:
    """The timing of each method of a case, of ``more`` calls and, in turn with them, of a ``copy`` of as many bytes."""
    calls: dict[str, Call] = {"copy": copy_call(case.traffic, device=device), **(more or {})}
    calls |= {name: partial(function, *case.inputs) for name, function in case.calls.items()}
    return compare(calls, repeats=repeats, budget=budget, sample_seconds=0.01, device=device)


def rows(case: Case, label: str, timings: Mapping[str, Timing]) -> Iterator[dict[str, Any]]:
    """Flat result rows of a case: seconds, GB/s, the share of a copy's rate and, where it computes, ns per element."""
    for method, timing in timings.items():
        row = {"case": label, "method": method}
        yield {
            **row,
            "metric": "seconds",
            "value": timing.seconds,
            "spread": timing.spread,
            "n": timing.n,
            "unit": "s",
        }
        yield {**row, "metric": "bandwidth", "value": case.traffic / timing.seconds / 1e9, "unit": "GB/s"}
        share = 100 * timings["copy"].seconds / timing.seconds
        yield {**row, "metric": "copy_share", "value": share, "unit": "percent"}
        if case.elements is not None:
            yield {**row, "metric": "ns_per_element", "value": timing.seconds / case.elements * 1e9, "unit": "ns"}


def heads(sizes: Mapping[str, int]) -> list[str]:
    """The lines above the table, 79 columns wide for three sizes."""
    return [
        " " * 28 + "".join(f" {f' {mib} MiB ':-^16}" for mib in sizes.values()),
        f"{'kernel':19}{'type':5}{'unit':4}" + "  rate copy torch" * len(sizes),
    ]


def cells(case: Case, timings: Mapping[str, Timing]) -> str:
    """One size of a kernel: its rate, the share of a copy's, and how many times as fast as eager torch it is."""
    own = timings["spurge"].seconds
    rate = case.traffic / own / 1e9 if case.elements is None else own / case.elements * 1e9
    torch_seconds = min(timing.seconds for name, timing in timings.items() if name in ("torch", "torch-usual"))
    return f" {_short(rate):>5}{100 * timings['copy'].seconds / own:4.0f}%{_short(torch_seconds / own):>5}x"


def _short(value: float) -> str:
    """Five letters at most, below 100,000."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def run(names: Sequence[str], device: str, show: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Measures kernels at three sizes and shows a line for each dtype as soon as it is complete.

    Args:
        names: of `KERNELS`.
        device: the torch device that all run on.
        show: takes the lines.

    Returns:
        Flat result rows, as they come.
    """
    sizes = SIZES[torch.device(device).type]
    for line in heads(sizes):
        show(line)
    for name in names:
        for dtype in DTYPES[name]:
            line = ""
            for size, mib in sizes.items():
                torch.manual_seed(0)
                case = KERNELS[name](mib * MIB, dtype, device)
                if not line:
                    check(case)
                    unit = "GB/s" if case.elements is None else "ns"
                    line = f"{case.kernel:19}{_SHORT[dtype]:5}{unit:4}"
                timings = measure(case, device=device)
                line += cells(case, timings)
                yield from rows(case, f"{case.name} ({size}, {counted(torch.get_num_threads())})", timings)
            show(line)


def counted(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"
