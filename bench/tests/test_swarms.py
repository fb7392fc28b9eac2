"""The swarms that are compared do the same work."""

from __future__ import annotations

import pytest
import torch

from kernel_rates.swarms import FUNCTIONS, Kernels
from peers.swarms import NumpySwarm, TorchSwarm


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_minimum_is_zero_at_the_origin(name):
    function, box = FUNCTIONS[name]
    assert function(torch.zeros(2, 32)).abs().max() < 1e-5
    assert (function(torch.full((2, 32), box / 3)) > 1).all()


@pytest.mark.parametrize("kind", [Kernels, TorchSwarm, NumpySwarm])
def test_every_swarm_stays_in_the_box_and_keeps_its_best(kind):
    swarm, places = kind(6, 8), []
    fitness = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.4, 0.5])
    given = fitness.numpy() if kind is NumpySwarm else fitness
    for _ in range(3):
        swarm.step(given)
        places.append(torch.as_tensor(swarm.position).clone())
    assert torch.stack(places).abs().max() <= 1
    assert not torch.equal(places[0], places[1])
    assert torch.equal(torch.as_tensor(swarm.best), places[0])  # no later fitness was better
    assert torch.equal(torch.as_tensor(swarm.leader), places[0][1])
