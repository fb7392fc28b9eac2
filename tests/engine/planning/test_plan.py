"""Plans against what cascades do: rows, passes and operations counted in the run itself, memory by live tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from helpers.tiny_mixtures import batch, mixture
from helpers.tiny_models import tiny, tiny_inputs, tiny_language
from spurge.engine.cascade.cascade import Cascade, Rows
from spurge.engine.cascade.meter import Meter
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.passes.partial_forward import PartialForward
from spurge.engine.planning.plan import Plan, peak_bytes, plan, plan_swarm

TIGHT = 300_000  # bytes: many blocks of a tiny model


def likelihood(rows: Rows) -> Tensor:
    return rows.logits.log_softmax(-1)[..., 0]


def two(rows: Rows) -> Tensor:
    return rows.logits.log_softmax(-1)[..., :2]


class Operations(TorchDispatchMode):
    """torch's own formulas, without its counter's module tracker, which cannot follow ``torch.autograd.grad``."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula is not None else 0
        return out


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The passes of all relays inside the block: what they were and how many rows they had."""
    calls: list[tuple[str, int]] = []
    run, scaled, trace = PartialForward.run, PartialForward.scaled, PartialForward.trace

    def ran(self: PartialForward, seen: Any, openings: Any, **others: Any) -> Rows:
        graded = torch.is_grad_enabled()
        calls.append(("cascade" if graded else "forward", sum(len(rows) for rows in openings.values())))
        return run(self, seen, openings, **others)

    def scaling(self: PartialForward, seen: Any, alphas: Tensor) -> Any:
        calls.append(("cascade" if torch.is_grad_enabled() else "forward", seen.batch * len(alphas)))
        return scaled(self, seen, alphas)

    def tracing(self: PartialForward, *args: Any, **others: Any) -> Any:
        made = trace(self, *args, **others)
        calls.append(("unedited", made.batch))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(PartialForward, "run", ran)
        patch.setattr(PartialForward, "scaled", scaling)
        patch.setattr(PartialForward, "trace", tracing)
        yield calls


def family(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model with a plain attention, whose operations torch can count, and inputs for it."""
    if name == "mixtral":
        return mixture(name, classify=True, attn_implementation="eager", experts_implementation="eager"), batch(5)
    if name == "llama-language":
        return tiny_language("llama", attn_implementation="eager"), tiny_inputs("llama", rows=5)
    return tiny(name, attn_implementation="eager", layers=4), tiny_inputs(name, rows=5)


@pytest.mark.parametrize("settings", [{}, {"rule": "radau"}, {"path": "joint"}, {"completeness": False}, {"nodes": 5}])
@pytest.mark.parametrize("memory", [None, TIGHT])
def test_rows_and_blocks_are_those_of_the_run(
    settings: dict[str, Any], memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = family("bert")
    cascade = Cascade(model, memory=memory, **({"path": "layer"} | settings))
    made = plan(cascade, inputs)
    with counted(monkeypatch) as calls:
        cascade.attribute(inputs, likelihood)
    assert made.blocks == sum(what == "cascade" for what, _ in calls)
    assert made.total_rows == sum(rows for _, rows in calls)
    if memory is not None and settings.get("path") != "joint":
        assert made.blocks > 1


def test_units_are_planned_as_they_are_ablated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("bert", layers=2), tiny_inputs("bert", rows=3)
    cascade = Cascade(model, path="neuron", memory=300_000)
    made = plan(cascade, inputs)
    with counted(monkeypatch) as calls:
        cascade.attribute(inputs, likelihood)
    assert made.blocks == sum(what == "forward" for what, _ in calls)
    assert made.total_rows == sum(rows for _, rows in calls)
    assert (made.path, made.rule, made.nodes) == ("neuron", "", 0)


def test_layers_that_rows_run_through() -> None:
    made = plan(Cascade(tiny("bert", layers=4), nodes=3, path="layer"), tiny_inputs("bert", rows=5))
    assert (made.layers, made.neurons, made.nodes) == (4, 4 * 48, 3)
    assert made.total_rows == 5 * (1 + 4 + 3 * 4)
    assert made.layer_rows == 5 * (4 + (1 + 3) * (3 + 2 + 1 + 0))


@pytest.mark.parametrize("name", ["bert", "deberta_v2", "gpt2", "llama", "glm4", "vit", "mixtral", "llama-language"])
@pytest.mark.parametrize("settings", [{}, {"rule": "radau"}, {"path": "joint"}, {"path": "neuron"}])
def test_operations_are_those_that_torch_counts(name: str, settings: dict[str, Any]) -> None:
    model, inputs = family(name)
    cascade = Cascade(model, nodes=3, **({"path": "layer"} | settings))
    target, targets = (two, 2) if settings else (likelihood, 1)
    made = plan(cascade, inputs, targets=targets)
    with Operations() as counter:
        cascade.attribute(inputs, target)
    assert made.flops == pytest.approx(counter.total, rel=0.03)


def test_the_meter_counts_fused_attention_and_live_bytes() -> None:
    query = torch.ones(2, 3, 5, 8, requires_grad=True)
    with Meter(operations=True) as meter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert meter.flops == 2 * 2 * 3 * 5 * 5 * 8 * 2 * 7 // 2  # the backward pass computes the scores again
    with Meter() as meter:
        held = torch.ones(1000)
        view = held[10:].view(-1)
        torch.ones(500).add_(1)
        assert (meter.live, meter.peak) == (4000, 6000)
        assert meter.restart() == meter.peak == 4000
        del held
        assert meter.live == 4000
        del view
        assert meter.live == 0


@pytest.mark.parametrize("name", ["bert", "llama", "llama-language", "mixtral"])
@pytest.mark.parametrize("settings", [{}, {"rule": "radau"}, {"path": "joint"}, {"path": "neuron"}, {"memory": TIGHT}])
def test_no_run_holds_more_than_planned(name: str, settings: dict[str, Any]) -> None:
    """Live tensors, which no allocator can do without; the plan also knows what allocators add."""
    model, inputs = family(name)
    if name == "mixtral" and "memory" in settings:
        settings = {"memory": 4 * TIGHT}
    cascade = Cascade(model, nodes=4, **({"path": "layer"} | settings))
    made = plan(cascade, inputs, targets=2)
    with Meter() as meter:
        cascade.attribute(inputs, two)
    assert meter.peak < made.bytes_peak < 4 * meter.peak
    assert made.bytes_peak == pytest.approx(peak_bytes(cascade, inputs), rel=0.2)
    if "memory" in settings:
        assert made.bytes_peak < 1.2 * made.budget


def test_calls_add_up() -> None:
    model, inputs = family("llama")
    once, often = (plan(Cascade(model, path="layer"), inputs, examples) for examples in (5, 17))
    rest = plan(Cascade(model, path="layer"), {name: value[:2] for name, value in inputs.items()})
    assert often.examples == 17
    for count in ("total_rows", "layer_rows", "blocks", "flops"):
        assert getattr(often, count) == 3 * getattr(once, count) + getattr(rest, count)
    assert often.bytes_peak == once.bytes_peak


@pytest.mark.parametrize("path", ["layer", "joint"])
def test_a_tolerance_gives_a_lower_bound(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = family("bert")
    cascade = Cascade(model, path=path, tolerance=0.5)
    made = plan(cascade, inputs)
    with counted(monkeypatch) as calls:
        cascade.attribute(inputs, likelihood)
    assert made.least
    assert made.total_rows <= sum(rows for _, rows in calls)
    assert "at least" in str(made)
    assert "at least" in made.summary()
    fixed = plan(Cascade(model, path=path), inputs)
    assert made.total_rows > fixed.total_rows


def test_a_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = family("llama")
    cascade = Cascade(model, path="layer")
    neurons = NeuronSet({cascade.sites[1].name: [0, 3], cascade.sites[2].name: [1]})
    made = plan_swarm(cascade, inputs, neurons, particles=7, iterations=4, group=5, examples=8)
    with counted(monkeypatch) as calls, Operations() as counter:
        for rows in (5, 3):
            part = {name: value[:rows] for name, value in inputs.items()}
            for particles in (5, 2):
                cascade.gated(part, likelihood, neurons, torch.rand(particles, 3))
    assert made.blocks == 4 * sum(what == "forward" for what, _ in calls)
    assert made.total_rows == 4 * sum(rows for _, rows in calls)
    assert made.flops == pytest.approx(4 * counter.total, rel=0.03)
    assert (made.path, made.neurons, made.examples) == ("swarm", 3, 8)


def test_tables_and_rows() -> None:
    made = plan(Cascade(tiny("bert"), memory="1MiB", path="layer"), tiny_inputs("bert"))
    assert made.seconds > 0
    assert 0 <= made.elsewhere <= 1
    fixed = dataclasses.replace(made, seconds=7300.0, flops=2 * 10**12, bytes_peak=3 * 2**30, elsewhere=0.25)
    table = str(fixed)
    for part in ("4 of 9 tokens", "144 neurons", "layer, legendre, 2 nodes", "3.0 GiB", "2.0 TFLOP", "2.0 h", "25 %"):
        assert part in table
    assert fixed.summary() == "about 2.0 h and 3.0 GiB: 4 texts of 9 tokens, 144 neurons, 2.0 TFLOP"
    by_metric = {row["metric"]: row for row in fixed.rows()}
    assert by_metric["seconds"]["value"] == 7300.0
    assert by_metric["budget_bytes"]["value"] == 2**20
    assert all(math.isfinite(row["value"]) and row["unit"] is not None for row in by_metric.values())
    assert isinstance(made, Plan)


def test_bad_calls_are_refused() -> None:
    cascade, inputs = Cascade(tiny("bert"), path="layer"), tiny_inputs("bert")
    with pytest.raises(ValueError, match="examples: "):
        plan(cascade, inputs, 0)
    with pytest.raises(ValueError, match="targets: "):
        plan(cascade, inputs, targets=0)
    with pytest.raises(ValueError, match="has no example"):
        plan(cascade, {name: value[:0] for name, value in inputs.items()})
    with pytest.raises(ValueError, match="memory: "):
        plan(Cascade(tiny("bert"), memory=1000, path="layer"), inputs)
    with pytest.raises(ValueError, match="the model has no neuron"):
        plan_swarm(cascade, inputs, NeuronSet({"nowhere": [0]}), particles=2, iterations=1, group=5)
    with pytest.raises(ValueError, match="group: "):
        plan_swarm(cascade, inputs, NeuronSet({cascade.sites[0].name: [0]}), particles=2, iterations=1, group=0)
