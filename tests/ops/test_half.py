"""All 65,536 numbers of each 16-bit type, as the kernels of every instruction set read and write them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from spurge import _core

SCRIPT = """
import sys, torch
from spurge import ops
F64 = torch.float64
for name in ("float16", "bfloat16"):
    x = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, name))
    one = torch.ones(1)
    found = {
        "balance_sweep": ops.balance_sweep(x[:, None], torch.ones(len(x), dtype=F64), one.double())[0],
        "gate_columns_": ops.gate_columns_(x.clone()[None, None], torch.arange(len(x)), one.expand(1, len(x)))[0, 0],
        "multiply_sum": ops.multiply_sum(x[None, None], torch.ones_like(x)[None, None])[0],
        "node_sum": ops.node_sum(x[None], [1.0])[0],
        "open_rows": ops.open_rows(x[None], torch.zeros_like(x)[None], [0.5])[0],
        "segment_medians": ops.segment_medians(x[None], torch.tensor([0]), torch.tensor([0, 1]))[0],
    }
    for op, got in found.items():
        torch.testing.assert_close(got.double(), x.double(), rtol=0, atol=0, equal_nan=True, msg=f"{op}, {name}")
    sums, logs, activations = (torch.zeros(1, len(x), dtype=F64) for _ in range(3))
    ops.associate_(sums, logs, torch.zeros(0, dtype=F64), sums.float(), activations, x[None], torch.ones(1, 1),
                   torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1, dtype=F64))
    size = x.double().abs()
    size = size.where(~(size < 1.2e-38), 0.0)  # bfloat16's smallest, which associate_ may take for 0
    for got in (sums, activations):
        got = got[0].where(~(got[0] < 1.2e-38), 0.0)
        torch.testing.assert_close(got, size, rtol=0, atol=0, equal_nan=True, msg=f"associate_, {name}")
"""


@pytest.mark.parametrize("level", _core.build_config()["isa_compiled"])
def test_every_half_is_read_and_written(level):
    """In a process of its own: the level is chosen once."""
    environment = os.environ | {"SPURGE_ISA": level}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    if "does not support" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr
