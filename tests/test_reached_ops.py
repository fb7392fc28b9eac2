"""Every op is reached by a workflow, on the device that the workflow is given: a stand-in, so that no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import emulated, planted_features, planted_texts
from helpers.pretended_devices import stand_in
from helpers.tiny_models import tiny_language, tiny_tokenizer, tokenizer_for
from spurge import _core
from spurge.demo.oracle import oracle
from spurge.engine.base import budgets
from spurge.engine.causal.confounders import Confounders
from spurge.engine.evaluation.evaluation import evaluate
from spurge.engine.recordings.recording import record
from spurge.methods.fcr.fcr import FCR
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.search import Climb
from spurge.methods.macu.swarm import Swarm
from spurge.methods.mediation.mediation import Mediation
from spurge.methods.mediation.mediators import mlp_units, neuron_units
from spurge.methods.neurontune.neurontune import NeuronTune

GPU = torch.device("cuda", 0)
CUDA = torch.cuda.is_available() and _core.built_with_cuda
QUICK: dict[str, Any] = {
    "texts": 12,
    "batch_size": 6,
    "certify": 2,
    "certify_texts": 4,
    "audit": 0,
    "memory": "1 GiB",
    "progress": False,
}
Answer = dict[str, Tensor]
Ran = dict[str, set[torch.device]]


class Recorder(TorchDispatchMode):
    """Notes the devices of each of our ops' tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Ran = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "spurge":
            tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if torch.is_tensor(leaf) and leaf.dim()]
            self.ours.setdefault(func._schema.name.split("::")[1], set()).update(x.device for x in tensors)
        return func(*args, **(kwargs or {}))


@contextmanager
def moved(device: torch.device | None, model: Any = None) -> Iterator[Ran]:
    """The model on ``device``, or on a stand-in where there is none; where it is for None."""
    if device is None:
        yield {}
    elif CUDA:
        if model is not None:
            model.to(device)
        with Recorder() as recorder:
            yield recorder.ours
    else:
        with stand_in(device, *([] if model is None else [model])) as ran:
            yield ran


@pytest.fixture
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free on a device that is not there."""
    if not CUDA:
        monkeypatch.setattr(budgets, "free_bytes", lambda device: 2**30)


def locate(device: torch.device | None, **settings: Any) -> tuple[Answer, Ran]:
    model = planted_texts.model()
    with moved(device, model) as ran:
        found = MacU(**QUICK, **settings).locate(model, tiny_tokenizer(), planted_texts.train(), planted_texts.GOLDEN)
        scores = {"causal": found.causal.values, "spurious": found.spurious.values}
        return {f"{side} {site}": own.cpu() for side, values in scores.items() for site, own in values.items()}, ran


def edit(device: torch.device | None, **settings: Any) -> tuple[Answer, Ran]:
    model = planted_texts.model()
    macu = MacU(**QUICK, edit_texts=16, neurons="all", **settings)
    found = macu.locate(model, tiny_tokenizer(), planted_texts.train(), planted_texts.GOLDEN)
    with moved(device, model) as ran:
        made = macu.edit(model, tiny_tokenizer(), planted_texts.train(), found, planted_texts.GOLDEN)
        return {**made.gates, "value": torch.tensor(made.info["value"])}, ran


def assess(device: torch.device | None) -> tuple[Answer, Ran]:
    """What an evaluation measures with golden words."""
    model = planted_texts.model()
    with moved(device, model) as ran:
        tests = {"test": planted_texts.train().sample(16, 0)}
        report = evaluate(model, tiny_tokenizer(), tests, golden=planted_texts.GOLDEN, progress=False)
        return {"rows": torch.tensor([row["value"] for row in report.rows()], dtype=torch.float64)}, ran


def fcr(device: torch.device | None) -> tuple[Answer, Ran]:
    train, shortcut = planted_features.unit_features(600, 0.9, 0)
    select, _ = planted_features.unit_features(400, 0.5, 1, train.head)
    with moved(device) as ran:
        method = FCR(device=device)
        feature = method.remove_feature(train, shortcut, select=select, criterion="worst_group")
        label = method.remove_class(train, 1)
        blind = FCR.best(device=device).remove_feature(train, shortcut, select=select, criterion="independence")
        return {"feature": feature.head.weight, "class": label.head.weight, "blind": blind.head.weight}, ran


def neurontune(device: torch.device | None) -> tuple[Answer, Ran]:
    train, _ = planted_features.unit_features(600, 0.9, 0)
    identify, _ = planted_features.unit_features(400, 0.9, 1, train.head)
    with moved(device) as ran:
        tuned = NeuronTune(device=device, least_wrong=1).tune(identify, train)
        return {"head": tuned.head.weight, "deltas": tuned.scores.deltas}, ran


def mediate(device: torch.device | None, columns: bool = False, **settings: Any) -> tuple[Answer, Ran]:
    made = oracle(0, rows=240, topics=3)
    confounders = Confounders.of(made.topics, torch.randn(240, generator=torch.Generator().manual_seed(1)).double())
    with moved(device) as ran:
        method = Mediation(resamples=2, device=device, progress=False, **settings)
        found = method.effects(made.units, made.treatment, made.outcome, confounders if columns else made.topics)
        return {"aie": found.adjusted.aie, "draws": found.adjusted.draws, "total": found.adjusted.total}, ran


def mediate_recorded(device: torch.device | None, folder: Path) -> tuple[Answer, Ran]:
    """From a recording that lives on the device."""
    model = tiny_language("gpt2")
    prompts = [f"the film is {word} and {other}" for word in ("good", "bad", "dull", "sad") for other in "abcdefghij"]
    treated, outcome = torch.arange(40) % 2 == 0, torch.arange(40.0)
    recording = record(model, tokenizer_for("gpt2"), prompts, folder / str(device), progress=False)
    with moved(device) as ran:
        recording = recording if device is None else recording.to(device)
        method, answer = Mediation(resamples=2, progress=False), {}
        for name, units in (("mlp", mlp_units(recording, treated)), ("neuron", neuron_units(recording))):
            answer[name] = method.effects(units, treated, outcome, torch.arange(40) // 20).adjusted.aie
        return answer, ran


LOCATING = {"open_rows", "proximity"}
WORKFLOWS: dict[str, tuple[Callable[..., tuple[Answer, Ran]], set[str]]] = {
    "locate by the gradient": (
        partial(locate, path="gradient", exact=4),
        LOCATING | {"proximity_gradient", "first_order", "node_sum"},
    ),
    "locate by gradients alone": (partial(locate, path="gradient", exact=0), {"proximity_gradient", "multiply_sum"}),
    "locate along layers": (partial(locate, nodes=2), LOCATING | {"proximity_gradient", "node_sum", "multiply_sum"}),
    "locate along the joint path": (
        partial(locate, path="joint"),
        {"proximity", "proximity_gradient", "node_sum", "multiply_sum"},
    ),
    "edit by swarm": (
        partial(edit, swarm=Swarm(particles=4, iterations=2)),
        {"proximity", "gate_columns_", "swarm_step_", "swarm_best_"},
    ),
    "edit by gradient": (
        partial(edit, search="gradient", fitness="soft", climb=Climb(steps=4, look=2)),
        {"proximity", "proximity_gradient"},
    ),
    "evaluate": (assess, {"proximity"}),
    "FCR": (fcr, {"associate_", "correct_interval"}),
    "NeuronTune": (neurontune, {"segment_medians"}),
    "mediate under topics": (mediate, {"balance_strata"}),
    "mediate under columns": (partial(mediate, columns=True), {"balance_batch", "balance_sweep"}),
    "mediate by slopes": (partial(mediate, estimator="continuous_unit"), {"balance_batch"}),
    "mediate halves": (partial(mediate, estimator="dichotomised_mediator"), set()),
    "mediate what was recorded": (mediate_recorded, {"balance_strata"}),
}


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_its_ops_where_it_is_told(name: str, tmp_path: Path) -> None:
    """On a GPU where there is one (`bench/device/check.sh`), else on a stand-in."""
    run, expected = WORKFLOWS[name]
    more = {"folder": tmp_path} if run is mediate_recorded else {}
    answer, ran = run(GPU, **more)
    assert expected <= ran.keys(), f"not run: {sorted(expected - ran.keys())}"
    elsewhere = {op for op, devices in ran.items() if devices != {GPU}}
    assert not elsewhere, f"run on other devices: {sorted(elsewhere)}"
    if CUDA and name.startswith("edit"):  # a search may take another way where numbers round otherwise
        assert all(values.isfinite().all() for values in answer.values())
        return
    for key, want in run(None, **more)[0].items():
        near = (
            {"rtol": 1e-2, "atol": 1e-3 * float(want.nan_to_num().abs().max())}
            if CUDA
            else {"rtol": 1e-4, "atol": 1e-6}
        )
        torch.testing.assert_close(answer[key], want, **near, equal_nan=True)


@pytest.mark.skipif(not emulated.AVAILABLE or CUDA, reason="built without SPURGE_EMULATION, or there is a GPU")
@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name != "mediate what was recorded"])  # many units
def test_a_workflow_gets_its_numbers_from_the_cuda_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host runs them."""
    run, _ = WORKFLOWS[name]
    wanted = run(None)[0]
    emulated.run_them(monkeypatch)
    for key, values in run(GPU)[0].items():
        torch.testing.assert_close(values, wanted[key], rtol=1e-3, atol=1e-5, equal_nan=True)


def test_no_op_is_out_of_reach() -> None:
    registered = {op.split("::")[1] for op in torch._C._dispatch_get_all_op_names() if op.startswith("spurge::")}
    reached = set().union(*(ops for _, ops in WORKFLOWS.values()))
    assert not registered - reached, f"no workflow above runs {sorted(registered - reached)}"
    assert not reached - registered, f"there is no op {sorted(reached - registered)}"
