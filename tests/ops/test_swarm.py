from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tolerance import assert_near
from spurge import _core, ops, reference

SIZES = [(1, 1), (1, 2), (3, 16), (2, 17), (5, 31), (7, 32), (2, 33), (3, 64), (2, 79), (40, 257), (0, 5), (3, 0)]
NUMBERS = {"inertia": 0.5, "cognitive": 1.5, "social": 1.5, "low": -1.0, "high": 1.0, "max_velocity": 0.4}


def swarm(particles, dimensions, device="cpu"):
    """position, velocity, best, leader"""
    position, best = (torch.empty(particles, dimensions).uniform_(-1, 1) for _ in range(2))
    velocity, leader = 0.3 * torch.randn(particles, dimensions), torch.empty(dimensions).uniform_(-1, 1)
    return tuple(x.to(device) for x in (position, velocity, best, leader))


def uniform(particles, dimensions, seed, iteration, which, device="cpu"):
    """r1 or r2, bit for bit: one step from 0 towards 1."""
    position, velocity, best = (torch.full((particles, dimensions), v, device=device) for v in (0.0, 0.0, 1.0))
    ops.swarm_step_(
        position, velocity, best, best.new_ones(dimensions), inertia=0.0, cognitive=float(which == 1),
        social=float(which == 2), low=0.0, high=1.0, max_velocity=1.0, seed=seed, iteration=iteration,
    )  # fmt: skip
    return position


# ---- random numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),  # Random123, kat_vectors, philox4x32 10
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)  # fmt: skip
def test_the_reference_generator_gives_the_published_numbers(counter, key, words):
    assert [int(w) for w in reference.philox(counter, key)] == words


def test_the_first_block_is_the_published_one(device):
    one, two = (uniform(1, 17, 0, 0, which, device)[0].double() * 2**24 for which in (1, 2))
    words = [one[0], two[0], one[16], two[16]]  # block 0 serves dimensions 0 and 16
    assert [int(w) for w in words] == [w >> 8 for w in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1))
def test_random_numbers_are_the_references(particles, dimensions, seed, iteration):
    want = reference.swarm_uniform(particles, dimensions, seed, iteration)
    for which in (1, 2):
        assert torch.equal(uniform(particles, dimensions, seed, iteration, which).double(), want[which - 1])


def test_random_numbers_depend_on_place_seed_and_iteration_only():
    whole = uniform(9, 70, 5, 3, 1)
    assert torch.equal(uniform(4, 70, 5, 3, 1), whole[:4])
    assert torch.equal(uniform(9, 41, 5, 3, 1), whole[:, :41])
    for other in (
        uniform(9, 70, 6, 3, 1),
        uniform(9, 70, 5 + 2**32, 3, 1),
        uniform(9, 70, 5, 4, 1),
        uniform(9, 70, 5, 3, 2),
    ):
        assert not (other == whole).any(1).all()
        assert (other == whole).float().mean() < 0.01


def test_random_numbers_are_uniform():
    x = torch.cat([uniform(100, 200, 1, 0, which).double().flatten() for which in (1, 2)])
    assert 0 <= x.min() < 1e-3
    assert 1 - 1e-3 < x.max() < 1
    n = x.numel()
    assert abs(x.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5  # 5 standard errors
    counts = torch.histc(x, 64, 0, 1)
    assert ((counts - n / 64).square() / (n / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi-squared, 63 degrees
    pairs = torch.stack([x[:-1], x[1:]])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / n**0.5


# ---- the step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_step_matches_the_reference(size, device):
    position, velocity, best, leader = swarm(*size, device)
    want = reference.swarm_step(position, velocity, best, leader, **NUMBERS, seed=3, iteration=9)
    versions = position._version, velocity._version
    ops.swarm_step_(position, velocity, best, leader, **NUMBERS, seed=3, iteration=9)
    assert position._version > versions[0]
    assert velocity._version > versions[1]
    assert_near(position, want[0], terms=8)
    # at the wall the velocity changes its sign, so a rounding may decide it
    edge = ((want[0].abs() - 1).abs() < 1e-6).cpu()
    assert_near(velocity.cpu().abs(), want[1].cpu().abs(), terms=8)
    assert torch.equal(velocity.cpu().sign()[~edge], want[1].cpu().sign().float()[~edge])


def test_by_hand():
    x, v = torch.tensor([[0.0, 0.9, -0.9]]), torch.tensor([[0.2, 0.6, -4.0]])
    ops.swarm_step_(
        x, v, torch.zeros(1, 3), torch.zeros(3), inertia=0.5, cognitive=0.0, social=0.0, low=-1.0, high=1.0,
        max_velocity=0.5, seed=0, iteration=1,
    )  # fmt: skip
    torch.testing.assert_close(x, torch.tensor([[0.1, 1.0, -1.0]]))  # free, at the upper wall, at the lower wall
    torch.testing.assert_close(v, torch.tensor([[0.1, -0.3, 0.5]]))  # kept, turned, limited and turned


def test_the_published_update_without_limits():
    position, velocity, best, leader = swarm(6, 40)
    r1, r2 = reference.swarm_uniform(6, 40, 2, 5)
    v = 0.5 * velocity + 1.5 * r1 * (best - position) + 1.5 * r2 * (leader - position)
    want = position + v
    ops.swarm_step_(
        position, velocity, best, leader, inertia=0.5, cognitive=1.5, social=1.5, low=-100.0, high=100.0,
        max_velocity=float("inf"), seed=2, iteration=5,
    )  # fmt: skip
    assert_near(velocity, v, terms=8)
    assert_near(position, want, terms=8)


def test_nan_stays_with_its_particle_and_dimension(device):
    position, velocity, best, leader = swarm(3, 40, device)
    expected = [x.clone() for x in (position, velocity)]
    ops.swarm_step_(*expected, best, leader, **NUMBERS, seed=0, iteration=0)
    position[1, 20] = torch.nan
    ops.swarm_step_(position, velocity, best, leader, **NUMBERS, seed=0, iteration=0)
    for got, want in zip((position, velocity), expected, strict=True):
        assert got[1, 20].isnan()
        got[1, 20] = want[1, 20]
        assert torch.equal(got, want)


def test_infinite_velocity_is_limited(device):
    position, velocity, best, leader = swarm(2, 33, device)
    velocity[0, 0], velocity[1, 32] = torch.inf, -torch.inf
    ops.swarm_step_(position, velocity, best, leader, **NUMBERS, seed=0, iteration=0)
    assert velocity.abs().max() <= torch.tensor(0.4)
    assert position.abs().max() <= 1


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 100), st.floats(-2, 2), st.floats(0, 3), st.floats(0, 3), st.floats(-5, 5),
    st.floats(0.01, 10), st.floats(0.001, 20), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_step_stays_in_its_limits(particles, dimensions, w, c1, c2, low, width, fastest, seed, iteration):
    torch.manual_seed(0)
    position, velocity, best, leader = (low + width * (x + 1) / 2 for x in swarm(particles, dimensions))
    position, best = position.clamp(low, low + width), best.clamp(low, low + width)
    numbers = {
        "inertia": w, "cognitive": c1, "social": c2, "low": low, "high": low + width, "max_velocity": fastest
    }  # fmt: skip
    want = reference.swarm_step(position, velocity, best, leader, **numbers, seed=seed, iteration=iteration)
    ops.swarm_step_(position, velocity, best, leader, **numbers, seed=seed, iteration=iteration)
    low32, high32, fastest32 = (torch.tensor(x).float() for x in (low, low + width, fastest))
    assert position.min() >= low32
    assert position.max() <= high32
    assert velocity.abs().max() <= fastest32
    assert_near(position, want[0], terms=8, size=200.0)


def test_step_changes_strided_tensors(device):
    position, velocity, best, leader = swarm(4, 40, device)
    strided = [torch.empty(40, 4, device=device).t().copy_(x) for x in (position, velocity, best)]
    far = torch.empty(40, 2, device=device)[:, 0].copy_(leader)
    assert not any(x.is_contiguous() for x in [*strided, far])
    ops.swarm_step_(position, velocity, best, leader, **NUMBERS, seed=1, iteration=1)
    ops.swarm_step_(*strided, far, **NUMBERS, seed=1, iteration=1)
    assert torch.equal(strided[0], position)
    assert torch.equal(strided[1], velocity)


def test_the_gpu_gives_the_same_bits(device):
    if device.type != "cuda":
        pytest.skip("compares a GPU with the CPU")
    for size in SIZES:
        here = swarm(*size)
        there = tuple(x.to(device) for x in here)
        for iteration in range(5):
            for x in (here, there):
                ops.swarm_step_(*x, **NUMBERS, seed=2**40, iteration=iteration)
        assert torch.equal(here[0], there[0].cpu())
        assert torch.equal(here[1], there[1].cpu())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": torch.zeros(3)}, r"position: must have 2 dimensions \[P, D\]"),
        ({"position": torch.zeros(3, 4).double()}, "position: dtype must be float32, got float64"),
        ({"velocity": torch.zeros(3, 5)}, r"velocity: shape must be \(3, 4\), got \(3, 5\)"),
        ({"best": torch.zeros(2, 4)}, r"best: shape must be \(3, 4\), got \(2, 4\)"),
        ({"best": torch.zeros(3, 4).half()}, "best: dtype must be float32, got float16"),
        ({"leader": torch.zeros(3)}, r"leader: shape must be \(4,\), got \(3,\)"),
        ({"inertia": float("nan")}, "inertia: must be finite, got nan"),
        ({"social": float("inf")}, "social: must be finite, got inf"),
        ({"low": 1.0}, "low: must be below high = 1, got 1"),
        ({"max_velocity": 0.0}, "max_velocity: must be positive, got 0"),
        ({"max_velocity": float("nan")}, "max_velocity: must be positive, got nan"),
        ({"seed": -1}, r"seed: must lie in \[0, 2\^63\), got -1"),
        ({"iteration": -1}, r"iteration: must lie in \[0, 2\^32\), got -1"),
        ({"iteration": 2**32}, r"iteration: must lie in \[0, 2\^32\), got 4294967296"),
    ],
)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_step_says_what_is_wrong(change, message, where):
    named = dict(zip(("position", "velocity", "best", "leader"), swarm(3, 4), strict=True))
    arguments = {**named, **NUMBERS, "seed": 0, "iteration": 0, **change}
    tensors = [arguments.pop(name).to(where) for name in named]
    if where == "meta":  # the fake kernel writes numbers and dtypes as Python does
        message = message.replace("got float", "got torch.float").replace("high = 1, got 1", "high = 1.0, got 1.0")
    with pytest.raises(ValueError, match=message):
        ops.swarm_step_(*tensors, **arguments)


# ---- the best ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (2, 0), (5, 33), (300, 7), (1000, 2)], ids=str)
def test_best_matches_the_reference(size, device):
    position, _, best, _ = swarm(*size, device)
    fitness, best_fitness = (torch.randint(-3, 3, (size[0],), device=device).float() for _ in range(2))
    fitness[torch.rand(size[0]) < 0.2] = torch.nan
    best_fitness[torch.rand(size[0]) < 0.2] = -torch.inf
    want = reference.swarm_best(best, best_fitness, position, fitness)
    leader = ops.swarm_best_(best, best_fitness, position, fitness)
    assert leader.shape == ()
    for got, expected in zip((best, best_fitness, leader), want, strict=True):
        assert torch.equal(got, expected)


def test_nan_never_wins_and_equals_go_by_index(device):
    best, best_fitness = torch.zeros(5, 2, device=device), torch.full((5,), -torch.inf, device=device)
    position = torch.arange(10.0, device=device).view(5, 2)
    fitness = torch.tensor([torch.nan, 1.0, 2.0, torch.nan, 2.0], device=device)
    assert ops.swarm_best_(best, best_fitness, position, fitness).item() == 2
    assert best_fitness.tolist() == [-torch.inf, 1, 2, -torch.inf, 2]
    assert torch.equal(best[[0, 3]], torch.zeros(2, 2, device=device))
    assert torch.equal(best[[1, 2, 4]], position[[1, 2, 4]])
    nothing = torch.full((5,), torch.nan, device=device)
    assert ops.swarm_best_(best, best_fitness, position + 1, nothing).item() == 2
    assert torch.equal(best[[1, 2, 4]], position[[1, 2, 4]])
    assert ops.swarm_best_(best, nothing.clone(), position, nothing).item() == 0


def test_an_equal_fitness_keeps_the_old_best():
    best = torch.zeros(2, 3)
    ops.swarm_best_(best, torch.tensor([1.0, 1.0]), torch.ones(2, 3), torch.tensor([1.0, 1.5]))
    assert best.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_best_changes_strided_tensors(device):
    position, _, best, _ = swarm(4, 6, device)
    fitness, best_fitness = torch.randn(4, device=device), torch.zeros(4, device=device)
    far = torch.empty(6, 4, device=device).t().copy_(best)
    far_fitness = torch.zeros(4, 2, device=device)[:, 0]
    index = ops.swarm_best_(best, best_fitness, position, fitness)
    assert torch.equal(ops.swarm_best_(far, far_fitness, position.t().contiguous().t(), fitness), index)
    assert torch.equal(far, best)
    assert torch.equal(far_fitness, best_fitness)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, f, x, g: (b[0], f, x, g), r"best: must have 2 dimensions \[P, D\]"),
        (lambda b, f, x, g: (b[:0], f[:0], x[:0], g[:0]), "best: need at least 1 particle, got 0"),
        (lambda b, f, x, g: (b, f[:2], x, g), r"best_fitness: shape must be \(3,\), got \(2,\)"),
        (lambda b, f, x, g: (b, f, x[:, 1:], g), r"position: shape must be \(3, 4\), got \(3, 3\)"),
        (lambda b, f, x, g: (b, f, x, g[None]), r"fitness: shape must be \(3,\), got \(1, 3\)"),
        (lambda b, f, x, g: (b, f, x, g.double()), "fitness: dtype must be float32, got (torch.)?float64"),
    ],
)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_best_says_what_is_wrong(change, message, where):
    tensors = (torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        ops.swarm_best_(*(x.to(where) for x in change(*tensors)))


# ---- the same bits everywhere ------------------------------------------------------------------------


def test_threads_do_not_change_bits():
    results = []
    for threads in (1, 7):
        torch.manual_seed(0)
        position, velocity, best, leader = swarm(50, 7001)
        _core.swarm_step(position, velocity, best, leader, *NUMBERS.values(), 5, 6, threads=threads)
        index, fitness = torch.zeros((), dtype=torch.int64), torch.zeros(50)
        _core.swarm_best(index, best, fitness, position, torch.randn(50), threads=threads)
        results.append((position, velocity, best, fitness, index))
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


SCRIPT = """
import sys
import numpy as np
from spurge import _core  # takes any array: without torch the test takes a tenth of the time
assert _core.build_config()["isa_selected"] == sys.argv[1]
draw = np.random.default_rng(0)
results = []
for dimensions in (1, 15, 16, 17, 31, 32, 33, 100, 257):
    position, velocity, best = draw.uniform(-1, 1, (3, 5, dimensions)).astype(np.float32)
    leader = draw.uniform(-1, 1, dimensions).astype(np.float32)
    position[0, 0], velocity[1, 0], best[2, 0], velocity[3, 0] = np.nan, np.inf, -np.inf, 1e-41
    for iteration in (0, 1, 2**32 - 1):
        _core.swarm_step(position, velocity, best, leader, 0.5, 1.5, 1.4, -1.0, 1.0, 0.6, 2**62 + 12345, iteration)
    results += [position.ravel(), velocity.ravel()]
np.save(sys.argv[2], np.concatenate(results))
"""


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    found = {}
    for level in _core.build_config()["isa_compiled"]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, level, str(tmp_path / f"{level}.npy")],
            env={**os.environ, "SPURGE_ISA": level}, capture_output=True, text=True,
        )  # fmt: skip
        if "does not support" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        found[level] = np.load(tmp_path / f"{level}.npy")
    for level, result in found.items():
        np.testing.assert_array_equal(result, found["baseline"], err_msg=level)  # NaN is where NaN was
