"""Gradient and swarm search on a target whose best gates are known, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.tiny_models import tiny, tiny_inputs
from spurge.engine.cascade.cascade import Cascade, Rows
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites, widths
from spurge.methods.macu.gated_model import gated_pass
from spurge.methods.macu.objectives import Job
from spurge.methods.macu.search import Climb, swarm_search
from spurge.methods.macu.swarm import Swarm

SWARM = Swarm(particles=6, iterations=5)


def some_neurons(model: Any, count: int = 4) -> NeuronSet:
    return NeuronSet({site.name: range(count) for site in find_sites(model)[1:]})


def job_of(model: Any, family: str, rows: int = 4, labels: int = 2) -> Job:
    """Asks for the first class."""
    inputs = tiny_inputs(family, rows=rows)

    def target(rows: Rows) -> Tensor:
        return rows.logits.log_softmax(1)[:, 0]

    return Job(inputs, target, torch.zeros(rows, dtype=torch.long), torch.ones(rows))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_gated_pass_is_the_edited_model(family: str) -> None:
    model = tiny(family)
    neurons, job = some_neurons(model), job_of(model, family)
    gates = torch.rand(len(neurons)) * 2 - 0.5
    with gated_pass(Handle(model), neurons) as run, torch.no_grad():
        got = run.value(job, gates)
        plain = run.value(job, None)
    with torch.no_grad():
        torch.testing.assert_close(plain, model(**job.inputs).logits.log_softmax(1)[:, 0])
        with NeuronEdit.build(model, neurons, gates).applied(model):
            torch.testing.assert_close(got, model(**job.inputs).logits.log_softmax(1)[:, 0])


def test_gradient_search_climbs_and_leaves_the_model_as_it_was() -> None:
    model = tiny("bert").train()
    for parameter in model.classifier.parameters():
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wants = [parameter.requires_grad for parameter in model.parameters()]
    neurons, job = some_neurons(model), job_of(model, "bert")
    climb = Climb(steps=20, look=5, rate=0.1, low=-0.5, high=1.5, l1=0.0)
    found = climb.maximise(Handle(model), neurons, [job], [job])
    assert found.value > found.history["value"][0]
    assert found.gates.shape == (len(neurons),)
    assert bool((found.gates >= -0.5).all() and (found.gates <= 1.5).all())
    assert found.value == max(found.history["value"])
    assert found.history["step"][0] == 0
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    again = climb.maximise(Handle(model), neurons, [job], [job])
    assert torch.equal(found.gates, again.gates)
    # what it promises holds for the edited model
    with torch.no_grad(), NeuronEdit.build(model.eval(), neurons, found.gates).applied(model):
        value = model(**job.inputs).logits.log_softmax(1)[:, 0].mean()
    assert abs(float(value) - found.value) < 1e-5


def test_the_pull_to_1_is_a_soft_threshold() -> None:
    model = tiny("bert")
    neurons, job = some_neurons(model), job_of(model, "bert")

    def nothing(rows: Rows) -> Tensor:
        return rows.logits[:, 0] * 1e-12

    flat = Job(job.inputs, nothing, job.labels, job.weights)
    loose = Climb(steps=1, look=1, l1=0.0, high=2.0).maximise(Handle(model), neurons, [job], [job])
    tight = Climb(steps=1, look=1, l1=0.5, high=2.0).maximise(Handle(model), neurons, [job], [job])
    assert float((loose.gates - 1).abs().max()) == pytest.approx(0.1, rel=1e-3)  # Adam's first step is its rate
    assert float((tight.gates - 1).abs().max()) == pytest.approx(0.05, rel=1e-3)
    still = Climb(steps=5, look=1, l1=0.5).maximise(Handle(model), neurons, [flat], [flat])
    assert float((still.gates - 1).abs().max()) < 0.06


def test_no_better_gates_leaves_all_at_1() -> None:
    model = tiny("bert")
    neurons, job = some_neurons(model), job_of(model, "bert")
    worse = Job(job.inputs, lambda rows: -job.target(rows), job.labels, job.weights)
    found = Climb(steps=8, look=2).maximise(Handle(model), neurons, [job], [worse])
    assert torch.equal(found.gates, torch.ones(len(neurons)))
    assert found.info["best_step"] == 0


def test_gradient_search_reads_attention() -> None:
    model = tiny("bert")
    neurons, job = some_neurons(model), job_of(model, "bert")
    seen: list[Rows] = []

    def target(rows: Rows) -> Tensor:
        seen.append(rows)
        return rows.attention[:, 1]

    looking = Job(job.inputs, target, job.labels, job.weights)
    with torch.no_grad():
        predicted = model(**job.inputs).logits.argmax(1)
    found = Climb(steps=6, look=3, rate=0.3, l1=0.0, low=-1.0, high=2.0).maximise(
        Handle(model), neurons, [looking], [looking], attention=True
    )
    assert found.value > found.history["value"][0]
    assert all(torch.equal(rows.predicted, predicted) for rows in seen)  # of the unedited model, whatever the gates


def test_an_exception_leaves_no_hook() -> None:
    model = tiny("bert")
    neurons, job = some_neurons(model), job_of(model, "bert")

    def stop(rows: Rows) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Climb().maximise(Handle(model), neurons, [Job(job.inputs, stop, job.labels, job.weights)], [job])
    with pytest.raises(KeyboardInterrupt):
        Climb().maximise(Handle(model), neurons, [job], [Job(job.inputs, stop, job.labels, job.weights)])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradient_search_refuses() -> None:
    model = tiny("bert")
    neurons, job = some_neurons(model), job_of(model, "bert")
    for arguments in ((NeuronSet(), [job], [job]), (neurons, [], [job]), (neurons, [job], [])):
        with pytest.raises(ValueError, match="search: need neurons and texts"):
            Climb().maximise(Handle(model), *arguments)
    steps = Job(job.inputs, lambda rows: (rows.logits[:, 0] > 0).float(), job.labels, job.weights)
    with pytest.raises(ValueError, match="not differentiable by the gates; use search='pso'"):
        Climb().maximise(Handle(model), neurons, [steps], [steps])
    nan = Job(job.inputs, lambda rows: rows.logits[:, 0] * torch.nan, job.labels, job.weights)
    with pytest.raises(ValueError, match="not finite at step 1"):
        Climb().maximise(Handle(model), neurons, [nan], [nan])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: need at least 1"),
        ({"look": 1.5}, TypeError, "look: expected an integer"),
        ({"rate": 0}, ValueError, "rate: must be above 0"),
        ({"rate": "fast"}, TypeError, "rate: expected a number"),
        ({"low": 1.5}, ValueError, "the box must contain 1"),
        ({"high": float("nan")}, ValueError, "high: must be finite"),
        ({"l1": 1.0}, ValueError, "l1: must be"),
        ({"drop": -0.1}, ValueError, "drop: must be"),
        ({"seed": -1}, ValueError, "seed: need at least 0"),
    ],
)
def test_bad_settings(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Climb(**given)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.floats(0.0, 0.9))
def test_gates_stay_in_the_box(seed: int, steps: int, l1: float) -> None:
    model = tiny("bert", layers=2)
    neurons, job = some_neurons(model, 2), job_of(model, "bert", rows=2)
    climb = Climb(steps=steps, look=1, rate=1.0, low=0.5, high=1.2, l1=l1, seed=seed)
    found = climb.maximise(Handle(model), neurons, [job], [job])
    assert bool((found.gates >= 0.5).all() and (found.gates <= 1.2 + 1e-6).all())


def test_swarm_search_erases_moves_and_improves() -> None:
    model = tiny("bert")
    job, every = job_of(model, "bert"), some_neurons(model)
    erased = NeuronSet({every.sites[0]: [0, 1]})
    free = every - erased
    found = swarm_search(Cascade(model, path="layer"), [job], free, erased, SWARM)
    both = list(free | erased)
    assert len(found.gates) == len(both)
    assert all(found.gates[i] == 0 for i, ref in enumerate(both) if ref in erased)
    assert found.info == {"evaluations": 30, "guard_met": True}
    assert len(found.history["best"]) == 5

    # the fitness is the edited model's own, and no worse than the two known starts
    def value(gates: Tensor) -> float:
        with torch.no_grad(), NeuronEdit.build(model, free | erased, gates).applied(model):
            return float(model(**job.inputs).logits.log_softmax(1)[:, 0].mean())

    assert abs(value(found.gates) - found.value) < 1e-5
    ones = torch.tensor([float(ref in free) for ref in both])
    assert found.value >= max(value(ones), value(torch.zeros(len(both)))) - 1e-6


def test_the_guard_refuses_what_costs_accuracy() -> None:
    model = tiny("bert")
    neurons, job = NeuronSet.all(widths(find_sites(model))), job_of(model, "bert", rows=6)
    with torch.no_grad():
        predicted = model(**job.inputs).logits.argmax(1)
    against = Job(
        job.inputs,
        lambda rows: -rows.logits.log_softmax(1).gather(1, predicted[rows.example][:, None])[:, 0],
        predicted,
        job.weights,
    )
    loose = swarm_search(Cascade(model, path="layer"), [against], neurons, NeuronSet(), SWARM)
    tight = swarm_search(Cascade(model, path="layer"), [against], neurons, NeuronSet(), SWARM, guard=0.0)

    def agreement(gates: Tensor) -> float:
        with torch.no_grad(), NeuronEdit.build(model, neurons, gates).applied(model):
            return float((model(**job.inputs).logits.argmax(1) == predicted).float().mean())

    assert agreement(loose.gates) < 1
    assert agreement(tight.gates) == 1
    assert tight.info["guard_met"]


def test_swarm_search_refuses() -> None:
    model = tiny("bert")
    job, neurons = job_of(model, "bert"), some_neurons(model)
    with pytest.raises(ValueError, match="need neurons and texts"):
        swarm_search(Cascade(model, path="layer"), [job], NeuronSet(), neurons, SWARM)
    with pytest.raises(ValueError, match="free and erased neurons must differ"):
        swarm_search(Cascade(model, path="layer"), [job], neurons, neurons, SWARM)
    nameless = Job(job.inputs, job.target, job.labels - 1, job.weights)
    with pytest.raises(ValueError, match="guard: the texts have no labels"):
        swarm_search(Cascade(model, path="layer"), [nameless], neurons, NeuronSet(), SWARM, guard=1.0)
