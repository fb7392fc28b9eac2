"""How everything in this folder is timed (as ``spurge bench`` does), its operations counted and its memory measured.

Peak memory is taken in a child process of its own (``peak_of_child``).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from spurge.bench.timing import Call
from spurge.bench.timing import Timing as Timing
from spurge.bench.timing import compare as compare
from spurge.bench.timing import relative_error as relative_error
from spurge.bench.timing import sample as sample
from spurge.bench.timing import synchronize as synchronize
from spurge.bench.timing import threads as threads

BENCH = Path(__file__).resolve().parents[1]


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
