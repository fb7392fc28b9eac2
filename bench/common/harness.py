"""How everything in this folder is timed, and its memory measured.

A time is the median over repeats after a warm-up; its spread is the distance between the quartiles. Calls that
are to be compared take turns in the same process (``compare``), so that a slow minute of the machine falls on
all of them, and only ratios between them mean much. Peak memory is taken in a child process of its own
(``peak_of_child``).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Call = Callable[[], Any]
BENCH = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, distance between the quartiles, and how many calls or samples they come from."""

    seconds: float
    spread: float
    n: int
    cpu_seconds: float  # of all threads of the process: steadier than the wall clock on a machine that others use too


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with ``count`` intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all that was asked of it. The CPU has already."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Call, calls: int, device: torch.device | str) -> tuple[float, float]:
    """Seconds of one of ``calls`` calls, and of the process's CPU time; the device has finished at both ends."""
    synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _summary(samples: Sequence[tuple[float, float]]) -> Timing:
    wall = [sample[0] for sample in samples]
    low, high = (quantiles(wall, n=4, method="inclusive")[0::2]) if len(wall) > 1 else (0.0, 0.0)
    return Timing(median(wall), high - low, len(wall), median(sample[1] for sample in samples))


def compare(
    calls: Mapping[str, Call],
    *,
    repeats: int = 5,
    budget: float = 30.0,
    sample_seconds: float = 0.0,
    first: Mapping[str, float] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time several calls against each other: one after the other, ``repeats`` rounds of it.

    Args:
        calls: name -> what to time.
        repeats: samples of each call. The call made before them warms up and is not counted.
        budget: seconds for one call's samples; a slow call gets fewer of them, but at least one.
        sample_seconds: a call shorter than this is repeated inside a sample until the sample lasts as long.
        first: seconds of a run of each call that warmed it up already; without it the calls are warmed up here.
        device: where the calls work; the clock is read after it has finished.
    """
    once = {name: sample(call, 1, device)[0] for name, call in calls.items()} if first is None else dict(first)
    inner = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        if sample_seconds > once[name] / 100:  # the first call also paid for allocation and compilation: ask again
            once[name] = sample(call, 1, device)[0]
            inner[name] = max(1, round(sample_seconds / max(once[name], 1e-7)))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            if turn == 0 or (turn + 1) * inner[name] * once[name] <= budget:
                samples[name].append(sample(call, inner[name], device))
    return {name: _summary(taken) for name, taken in samples.items()}


class _FlopCounter(TorchDispatchMode):
    """torch's formulas, without the module tracker of its own counter, which cannot follow ``torch.autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        aten = torch.ops.aten  # the CPU's fused attention is missing in torch's table
        self.formulas = {
            **flop_registry,
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _attention(query, key, value, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad, query, key, value, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def count_flops(call: Call) -> int:
    """Floating-point operations in the matrix products and the attention of one call, backward included.

    2 for each multiply-add. Elementwise work is not counted: the figure is for comparison with the machine's rate of
    matrix products.
    """
    with _FlopCounter() as counter:
        call()
    return counter.total


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """``|value - reference| / |reference|`` in the 2-norm over all elements, in float64. NaN stays NaN."""
    reference = reference.double()
    return float((value.double() - reference).norm() / reference.norm())


# --------------------------------------------------------------------------------------------- memory of a process


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no field {field}; peak memory can be measured on Linux only")


def reset_peak() -> int:
    """Forget the peak so far and return the bytes this process holds now (VmRSS)."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # only glibc has it; what its heap keeps for later would hide a new peak
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: reset VmHWM to the present VmRSS (man 5 proc)
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most bytes this process held since ``reset_peak`` (VmHWM)."""
    return _status("VmHWM")


def peak_of_call(call: Call, device: torch.device | str = "cpu") -> int:
    """Bytes that one call needs above what was held before it; on CUDA counted by torch's allocator."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = reset_peak()
    call()
    return max(0, peak_bytes() - before)


def peak_of_child(arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``run.py child ARGUMENTS`` in a process of its own and return the JSON of its last line.

    Raises:
        RuntimeError: the child failed; the end of what it wrote is in the message.
    """
    command = [sys.executable, str(BENCH / "run.py"), "child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy(), check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
