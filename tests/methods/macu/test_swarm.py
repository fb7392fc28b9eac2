from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge import ops
from spurge.engine.base import files
from spurge.methods.macu.swarm import Swarm


def sphere(x):
    return -x.square().sum(1)


def rastrigin(x):
    return -(x.square() - 10 * (2 * math.pi * x).cos() + 10).sum(1)


def ackley(x):
    near = -20 * (-0.2 * x.square().mean(1).sqrt()).exp()
    return -(near - (2 * math.pi * x).cos().mean(1).exp() + 20 + math.e)


def same(a, b):
    return torch.equal(a.position, b.position) and a.fitness == b.fitness and a.history == b.history


# ---- what it finds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "width", "pyswarms"),
    # pyswarms 1.3, GlobalBestPSO with the same settings, measured: 4.30, 135.6, 9.88. Here: 1.5, 96, 8.4.
    [(sphere, 5.12, 4.3), (rastrigin, 5.12, 136), (ackley, 32.0, 9.9)],
)
def test_the_median_of_15_seeds_is_better_than_that_of_pyswarms(function, width, pyswarms):
    swarms = (Swarm(particles=40, low=-width, high=width, seed=seed) for seed in range(15))
    assert statistics.median(-s.maximise(function, dimensions=32).fitness for s in swarms) < pyswarms


def test_finds_an_optimum_in_a_corner():
    found = Swarm(particles=30, iterations=60).maximise(lambda x: x.sum(1), dimensions=5)
    assert found.position.tolist() == [1.0] * 5
    assert found.fitness == 5.0


def test_the_papers_settings():
    paper = Swarm.paper()
    assert (paper.iterations, paper.low, paper.high) == (40, -1.0, 1.0)
    assert (paper.inertia, paper.cognitive, paper.social) == (0.5, 1.5, 1.5)
    assert (paper.max_velocity, paper.launch) == (0.5, 0.0)  # not in the paper: our reading of it
    assert Swarm.paper(particles=8, seed=3).maximise(sphere, dimensions=3).evaluations == 320


# ---- what it does ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 7), st.integers(1, 5), st.integers(1, 40), st.floats(0, 1.2), st.floats(0, 3), st.floats(-5, 5),
    st.floats(0.1, 9), st.floats(0.01, 2), st.floats(0, 1), st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_any_swarm(particles, iterations, dimensions, w, c, low, width, fastest, launch, seed):
    swarm = Swarm(
        particles=particles, iterations=iterations, inertia=w, cognitive=c, social=c, low=low, high=low + width,
        max_velocity=fastest, launch=launch, seed=seed,
    )  # fmt: skip
    seen = []

    def fitness(x):
        assert not torch.is_grad_enabled()
        seen.append(x.clone())
        return sphere(x)

    found = swarm.maximise(fitness, dimensions=dimensions)
    assert [x.shape for x in seen] == [(particles, dimensions)] * iterations  # once per iteration, all particles
    every = torch.cat(seen)
    assert every.min() >= torch.tensor(low).float()
    assert every.max() <= torch.tensor(low + width).float()
    assert found.fitness == sphere(every).max().item() == found.history["best"][-1]
    assert sphere(found.position[None]).item() == found.fitness
    assert found.history["best"] == sorted(found.history["best"])
    assert all(len(column) == iterations for column in found.history.values())
    assert found.evaluations == particles * iterations
    for step in (b - a for a, b in itertools.pairwise(seen)):
        assert step.abs().max() <= fastest * width * (1 + 1e-6) + 1e-6


def test_history_tells_mean_and_spread():
    seen = []
    found = Swarm(particles=5, iterations=3).maximise(lambda x: (seen.append(x.clone()), sphere(x))[1], dimensions=4)
    for i, x in enumerate(seen):
        assert found.history["mean"][i] == pytest.approx(sphere(x).mean().item(), rel=1e-6)
        away = (x - x.mean(0)).square().mean().sqrt().item() / 2  # the box is 2 wide
        assert found.history["spread"][i] == pytest.approx(away, rel=1e-5)


def test_starts_where_it_is_told_then_anywhere():
    seen = []

    def fitness(x):
        seen.append(x.clone())
        return sphere(x)

    start = torch.stack([torch.ones(200), torch.zeros(200), torch.full((200,), -0.5)])
    Swarm(particles=50).maximise(fitness, start)
    assert torch.equal(seen[0][:3], start)
    others = seen[0][3:]
    assert -1 <= others.min() < -0.99
    assert 0.99 < others.max() <= 1
    assert others.unique().numel() > 9000
    first = (seen[1] - seen[0]).abs()
    assert first.max() <= 0.5 * (1 + 1e-6)
    assert torch.equal(start, torch.stack([torch.ones(200), torch.zeros(200), torch.full((200,), -0.5)]))


def test_at_rest_only_the_pulls_move_it():
    seen = []
    swarm = Swarm(particles=4, iterations=2, launch=0.0, social=0.0)  # and p = x at the beginning
    swarm.maximise(lambda x: (seen.append(x.clone()), sphere(x))[1], dimensions=6)
    assert torch.equal(seen[0], seen[1])


def test_more_particles_or_dimensions_keep_the_random_numbers_of_the_others():
    first = []
    for particles, dimensions in ((4, 33), (9, 50)):
        swarm = Swarm(particles=particles, iterations=1, seed=4)
        swarm.maximise(lambda x: (first.append(x.clone()), sphere(x))[1], dimensions=dimensions)
    assert torch.equal(first[0], first[1][:4, :33])


def test_the_same_seed_gives_the_same_swarm_on_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 5):
            torch.set_num_threads(count)
            results.append(Swarm(particles=32, iterations=4, seed=9).maximise(lambda x: x[:, 0], dimensions=9000))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].position, results[1].position)
    assert results[0].fitness == results[1].fitness
    assert not same(results[0], Swarm(particles=32, iterations=4, seed=8).maximise(lambda x: x[:, 0], dimensions=9000))


def test_the_same_swarm_on_cpu_and_gpu(device):
    corner = torch.linspace(-1, 1, 40)
    swarm = Swarm(seed=2)

    def fitness(x):  # exact, so that no rounding of a sum decides
        return (x.cpu().double() - corner).abs().lt(0.3).sum(1)

    here, there = (swarm.maximise(fitness, dimensions=40, device=d) for d in ("cpu", device))
    assert there.position.device.type == device.type
    assert torch.equal(here.position, there.position.cpu())
    assert here.history["best"] == there.history["best"]


def test_memory_does_not_grow_with_the_iterations(monkeypatch):
    places = set()
    step = ops.swarm_step_

    def watched(position, *rest, **named):
        if named["iteration"] > 0:
            places.add((position.data_ptr(), rest[0].data_ptr(), rest[1].data_ptr()))
        step(position, *rest, **named)

    monkeypatch.setattr(ops, "swarm_step_", watched)
    Swarm(iterations=30).maximise(sphere, dimensions=100)
    assert len(places) == 1  # the same three tensors in every iteration


# ---- fitness that misbehaves -------------------------------------------------------------------------


def test_nan_never_wins():
    def fitness(x):
        return torch.where(x[:, 0] > 0, torch.nan, sphere(x))

    found = Swarm(seed=1).maximise(fitness, dimensions=3)
    assert found.position[0] <= 0
    assert math.isfinite(found.fitness)
    assert all(map(math.isfinite, found.history["mean"]))


def test_nan_later_on_keeps_what_was_found():
    calls = []

    def fitness(x):
        calls.append(x)
        return sphere(x) if len(calls) == 1 else torch.full((len(x),), torch.nan)

    found = Swarm(iterations=3).maximise(fitness, dimensions=3)
    assert len(set(found.history["best"])) == 1
    assert found.fitness == found.history["best"][0]


@pytest.mark.parametrize(("value", "what"), [(math.nan, "NaN"), (-math.inf, "NaN or minus infinity")])
def test_no_number_at_all_is_an_error(value, what):
    with pytest.raises(ValueError, match=f"fitness: need a number for at least one particle, got {what} for all 20"):
        Swarm().maximise(lambda x: torch.full((len(x),), value), dimensions=3)


@pytest.mark.parametrize(
    ("fitness", "error", "message"),
    [
        (lambda x: 1.0, TypeError, r"fitness: expected a tensor \[P\], got float"),
        (lambda x: x, ValueError, r"fitness: must return shape \(20,\), got \(20, 3\)"),
        (lambda x: sphere(x.zero_()), ValueError, "fitness: must not change the positions"),
    ],
)
def test_a_wrong_fitness_is_refused(fitness, error, message):
    with pytest.raises(error, match=message):
        Swarm().maximise(fitness, dimensions=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_fitness_of_any_number_type(dtype):
    found = Swarm(iterations=3).maximise(lambda x: (10 * sphere(x)).to(dtype), dimensions=3)
    assert found.fitness == max(found.history["best"])


# ---- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"particles": 1}, ValueError, "particles: must be at least 2 .* got 1"),
        ({"particles": 2.0}, TypeError, "particles: expected int, got float"),
        ({"iterations": 0}, ValueError, "iterations: must be at least 1 .* got 0"),
        ({"iterations": True}, TypeError, "iterations: expected int, got bool"),
        ({"seed": -1}, ValueError, "seed: must be at least 0 .* got -1"),
        ({"seed": 2**63}, ValueError, "seed: .* got 9223372036854775808"),
        ({"inertia": math.nan}, ValueError, "inertia: must be finite, got nan"),
        ({"inertia": -0.1}, ValueError, "inertia: must not be negative, got -0.1"),
        ({"social": "1"}, TypeError, "social: expected float, got str"),
        ({"low": 1.0}, ValueError, "low: must be below high = 1.0, got 1.0"),
        ({"high": math.inf}, ValueError, "high: must be finite, got inf"),
        ({"max_velocity": 0.0}, ValueError, "max_velocity: must be positive, got 0.0"),
        ({"max_velocity": math.nan}, ValueError, "max_velocity: must be finite, got nan"),
        ({"launch": 1.5}, ValueError, r"launch: must lie in \[0, 1\], got 1.5"),
    ],
)
def test_nonsense_is_refused_at_birth(change, error, message):
    with pytest.raises(error, match=message):
        Swarm(**change)


def test_settings_are_frozen_and_named():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Swarm().particles = 3
    with pytest.raises(TypeError):
        Swarm(20)
    assert Swarm(max_velocity=math.inf).maximise(sphere, dimensions=2).fitness <= 0


@pytest.mark.parametrize(
    ("start", "dimensions", "error", "message"),
    [
        (None, None, ValueError, "dimensions: must be given where start is not"),
        (None, 0, ValueError, "dimensions: need at least 1, got 0"),
        (torch.zeros(2, 0), None, ValueError, "dimensions: need at least 1, got 0"),
        (torch.zeros(2, 3), 4, ValueError, "dimensions: start has 3, got 4"),
        (torch.zeros(3), None, ValueError, r"start: must have 2 dimensions \[n, D\], got shape \(3,\)"),
        (torch.zeros(21, 3), None, ValueError, "start: at most 20 particles, got 21"),
        (torch.full((1, 3), 1.5), None, ValueError, r"start: must lie in \[-1.0, 1.0\], got 1.5"),
        (torch.full((1, 3), torch.nan), None, ValueError, r"start: must lie in \[-1.0, 1.0\], got nan"),
        ([[0.0]], None, TypeError, r"start: expected a tensor \[n, D\], got list"),
    ],
)
def test_a_wrong_start_is_refused(start, dimensions, error, message):
    with pytest.raises(error, match=message):
        Swarm().maximise(sphere, start, dimensions)


# ---- interrupted and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_interrupted_search_goes_on_as_if_it_had_not_stopped(tmp_path, stop):
    calls = []

    def interrupted(x):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(x)
        return rastrigin(x)

    swarm, path = Swarm(iterations=7, seed=3), tmp_path / "swarm.safetensors"
    with pytest.raises(KeyboardInterrupt):
        swarm.maximise(interrupted, dimensions=9, checkpoint=path)
    assert path.exists() == (stop > 0)
    more = []
    resumed = swarm.maximise(lambda x: (more.append(x), rastrigin(x))[1], dimensions=9, checkpoint=path)
    assert len(more) == 7 - stop
    assert same(resumed, swarm.maximise(rastrigin, dimensions=9))
    assert same(resumed, swarm.maximise(lambda x: 1 / 0, dimensions=9, checkpoint=path))  # done: nothing is evaluated
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_finished_search_can_be_prolonged(tmp_path):
    path = tmp_path / "swarm"
    Swarm(iterations=3).maximise(sphere, dimensions=5, checkpoint=path)
    longer = Swarm(iterations=8).maximise(sphere, dimensions=5, checkpoint=path)
    assert same(longer, Swarm(iterations=8).maximise(sphere, dimensions=5))
    with pytest.raises(ValueError, match="holds 8 iterations, more than the 3 asked for"):
        Swarm(iterations=3).maximise(sphere, dimensions=5, checkpoint=path)


@pytest.mark.parametrize(
    ("changes", "dimensions", "fingerprint", "message"),
    [
        ({"seed": 1}, 5, "model a", "has seed = 0, this swarm has 1"),
        ({"max_velocity": math.inf}, 5, "model a", "has max_velocity = 0.25, this swarm has 'infinity'"),
        ({"particles": 21}, 5, "model a", "has particles = 20, this swarm has 21"),
        ({}, 6, "model a", "has dimensions = 5, this swarm has 6"),
        ({}, 5, "model b", "has fingerprint = 'model a', this swarm has 'model b'"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(tmp_path, changes, dimensions, fingerprint, message):
    path = tmp_path / "swarm"
    Swarm(iterations=1).maximise(sphere, dimensions=5, checkpoint=path, fingerprint="model a")
    with pytest.raises(ValueError, match=message):
        Swarm(**changes).maximise(sphere, dimensions=dimensions, checkpoint=path, fingerprint=fingerprint)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "swarm"
    Swarm(iterations=1).maximise(sphere, dimensions=5, checkpoint=path)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(files.FileError, match="changed"):
        Swarm().maximise(sphere, dimensions=5, checkpoint=path)


def test_a_search_with_nan_means_can_be_saved(tmp_path):
    calls = []

    def fitness(x):
        calls.append(x)
        return sphere(x) if len(calls) == 1 else torch.full((len(x),), torch.nan)

    path = tmp_path / "swarm"
    Swarm(iterations=3).maximise(fitness, dimensions=2, checkpoint=path)
    resumed = Swarm(iterations=3).maximise(fitness, dimensions=2, checkpoint=path)
    assert math.isnan(resumed.history["mean"][2])


def test_progress_is_shown_only_on_request(capsys):
    Swarm(iterations=2).maximise(sphere, dimensions=2)
    assert capsys.readouterr().err == ""
    Swarm(iterations=2).maximise(sphere, dimensions=2, progress=True)
    assert "swarm: 100%" in capsys.readouterr().err


def test_says_what_it_is():
    assert repr(Swarm(iterations=2).maximise(lambda x: 0 * x[:, 0] + 1.5, dimensions=3)) == (
        "SwarmResult(fitness=1.5, dimensions=3, iterations=2, evaluations=40)"
    )
