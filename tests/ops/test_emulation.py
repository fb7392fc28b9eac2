"""The CUDA kernels as the host runs them: what only they can get wrong, races, and whether every barrier is missed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spurge
from helpers import emulated
from spurge import ops

pytestmark = pytest.mark.skipif(not emulated.AVAILABLE, reason="built without SPURGE_EMULATION")

F64 = torch.float64
CSRC = Path(__file__).resolve().parents[2] / "csrc"
RACES = Path(spurge.__file__).parent / "spurge_races"


@pytest.fixture
def core():
    return emulated.Emulated()


@pytest.mark.parametrize("at_end", [False, True])
def test_memory_beyond_an_argument_ends_the_process(at_end):
    code = (
        "import sys, ctypes, torch; from helpers.emulated import Room\n"
        "at_end = sys.argv[1] == 'True'; x = Room(100).copy(torch.ones(25), at_end)\n"
        "print(x.sum().item(), flush=True)\n"
        "ctypes.c_float.from_address(x.data_ptr() + (x.nbytes if at_end else -4)).value"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CSRC.parent / "tests"), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code, str(at_end)], env=environment, capture_output=True, text=True)
    assert done.stdout == "25.0\n"
    assert done.returncode == -signal.SIGSEGV


# ---- what only CUDA can get wrong ------------------------------------------------------------------------------------


def test_an_error_that_others_left_is_not_blamed_on_a_launch(core):
    emulated.leave_error()
    out = torch.empty(8)
    core.node_sum(out, torch.ones(1, 8), [2.0], 1)
    assert out.eq(2).all()


def test_a_trap_ends_the_call(core):
    with pytest.raises(RuntimeError, match=r"gate_columns_kernel.*: trap"):
        core.gate_columns(torch.ones(1, 2, 8), torch.tensor([8]), torch.ones(1, 1), 1)
    z = torch.ones(1, 2, 8)
    core.gate_columns(z, torch.tensor([7]), torch.zeros(1, 1), 1)  # and the next one runs
    assert z[0, :, 7].eq(0).all()


@pytest.mark.parametrize(
    "starts", [[0, 4, 2, 6], [-1, 2, 4, 6], [0, 2, 4, 99], [1, 2, 4, 6], [0, 2, 4, 5], [0, 9, 9, 6]]
)
def test_borders_that_do_not_ascend_give_nan(device, starts):
    if device.type == "cpu" and not isinstance(ops._balance._core, emulated.Emulated):
        pytest.skip("the CPU looks first")
    borders = torch.tensor(starts, device=device)
    wide = [torch.zeros(3, 5, dtype=F64, device=device) for _ in range(3)]
    picked, active = torch.zeros(3, 5, device=device), torch.zeros(4, 5, dtype=F64, device=device)
    one = torch.ones(6, dtype=F64, device=device)
    classes = torch.tensor([2, 0, 1], device=device)
    features, gradients = torch.ones(6, 5, device=device), torch.ones(6, 3, device=device)
    ops.associate_(*wide, picked, active, features, gradients, borders, classes, one[:3], unfinished=True)
    assert all(x.isnan().all() for x in (*wide, picked, active))

    values, third = torch.arange(12.0, device=device).view(2, 6), one[:3] / 3
    arguments = values, borders, one, third, one.new_full((2, 3), 3.0), None, one[:, None], one.new_zeros(2, 4)
    dual, averages, report, status = ops.balance_strata(*arguments)
    assert status.tolist() == [3, 3]
    assert all(x.isnan().all() for x in (dual, averages, report[:, :3]))

    medians = ops.segment_medians(features, torch.arange(6, device=device), borders)
    for begin, end, found in zip(starts, starts[1:], medians, strict=False):
        assert bool(found.isnan().all()) != (0 <= begin < end <= 6)


@pytest.mark.parametrize("samples", [6, 1500], ids=["one part", "two parts"])
@pytest.mark.parametrize(
    ("classes", "borders"),
    [([0, 4], (2, None)), ([-1, 2], (2, None)), ([0, 1], (9000, None)), ([0, 1], (2, 4))],
    ids=str,
)
def test_wrong_segments_give_nan(classes, borders, samples, device):
    if device.type == "cpu" and not isinstance(ops._balance._core, emulated.Emulated):
        pytest.skip("the CPU looks first")
    wide = [torch.zeros(3, 5, dtype=F64, device=device) for _ in range(3)]
    picked, active = torch.zeros(3, 5, device=device), torch.zeros(4, 5, dtype=F64, device=device)
    starts = torch.tensor([0, borders[0], borders[1] or samples], device=device)
    block = torch.ones(samples, 5, device=device), torch.ones(samples, 3, device=device), starts
    scales = torch.ones(2, dtype=F64, device=device)
    ops.associate_(*wide, picked, active, *block, torch.tensor(classes, device=device), scales)
    assert all(x.isnan().all() for x in (*wide[:2], picked, active))


# ---- races, and barriers ---------------------------------------------------------------------------------------------

BARRIERS = {  # each and the ops that it stands in
    f"{path.name}:{number}": path.name.split("_cuda")[0].removesuffix("_device.cuh")
    for path in sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")])
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"__sync(threads|warp)\(\)", line)
}


def races(op: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """The kernels of one op under ThreadSanitizer, which fails where memory is laid out at random."""
    if not RACES.exists():
        pytest.skip("built without spurge_races")
    fixed = ["setarch", "-R"]  # where that is allowed
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "SPURGE_EMULATION_WITHOUT": without}
    return subprocess.run([*fixed, RACES, op], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("op", sorted({*BARRIERS.values()} - {"balance"}))
def test_threads_do_not_race(op):
    done = races(op)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_noticed(barrier):
    done = races(BARRIERS[barrier], without=barrier)
    assert done.returncode != 0
    assert re.search("data race|barrier|outside|left", done.stderr), done.stderr
