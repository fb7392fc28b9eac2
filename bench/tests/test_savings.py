"""What is counted is what runs, both sides of a saving answer the same question, and ``run.py savings`` writes rows."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch

from common.harness import count_flops
from localisation import savings
from localisation.counts import Counts
from localisation.jobs import make_job
from localisation.savings import SAVINGS, child, token_calls
from spurge.engine.cascade.cascade import Attribution, Cascade
from spurge.report.results import Results


@pytest.fixture(scope="module", params=["llama-tiny-8x1", "qwen2-tiny-8x1"])
def job(request):
    return make_job(request.param)


@pytest.mark.parametrize("nodes", [1, 3])
def test_counts_of_a_question_are_exact(job, nodes):
    cascade = Cascade(job.model, nodes=nodes, completeness=False, path="layer")
    cascade.attribute(job.inputs, job.target)
    counted = count_flops(lambda: cascade.attribute(job.inputs, job.target))
    assert Counts.of(job.model.config, 8).attribution(nodes) == counted


def test_counts_of_a_forward_pass_are_exact(job):
    counts = Counts.of(job.model.config, 8)
    assert count_flops(lambda: job.model(**job.inputs)) == counts.forward(pruned=False, head=8)


def test_counts_of_halved_intervals_are_exact(job):
    model = copy.deepcopy(job.model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e3)
    cascade = Cascade(model, nodes=2, tolerance=0.1, path="layer")
    nodes = cascade.attribute(job.inputs, job.target).nodes.values()
    assert len(set(nodes)) > 1
    counted = count_flops(lambda: cascade.attribute(job.inputs, job.target))
    assert Counts.of(model.config, 8).adaptive(2, [count // 2 for count in nodes]) == counted


@pytest.mark.parametrize("key", ["last-layer", "head", "swarm"])
def test_counts_of_what_is_switched_off_are_exact(job, key):
    counts = Counts.of(job.model.config, 8)
    (saving,) = SAVINGS[key](job, counts)
    saving.on(), saving.off()
    assert count_flops(saving.off) / count_flops(saving.on) == pytest.approx(saving.predicted, rel=0.01)


@pytest.mark.parametrize("key", [key for key in SAVINGS if key != "adaptive"])
def test_both_sides_answer_the_same_question(job, key):
    for saving in SAVINGS[key](job, Counts.of(job.model.config, 8)):
        on, off = saving.on(), saving.off()
        if isinstance(on, Attribution):
            on, off = (torch.cat([*found.values.values()], 2) for found in (on, off))
        torch.testing.assert_close(on.flatten(), off.flatten(), rtol=1e-3, atol=1e-5)


def test_token_scores_are_those_of_the_full_maps(job):
    calls = token_calls(job, 24)
    torch.testing.assert_close(calls["on"](), calls["off"](), rtol=1e-4, atol=1e-6)
    assert job.model.config._attn_implementation != "eager"


def test_child_measures_the_peak_of_one_side():
    sides = (child(["llama-tiny-8x1", which, "--tokens", "256"])["peak_bytes"] for which in ("on", "off"))
    assert all(peak >= 0 for peak in sides)


def test_savings_writes_predicted_and_measured_rows(monkeypatch):
    monkeypatch.setattr(savings, "copy_bandwidth", lambda traffic, device: 10.0)
    monkeypatch.setattr(savings, "best_matmul_rate", lambda dtype, device, quick: 100.0)
    settings = {"threads": 1, "device": "cpu", "quick": True, "budget": 1.0, "peak": False, "long": 16}
    settings |= {"exact_tolerance": 0.05, "reference": None}
    results = Results("savings")
    args = argparse.Namespace(**settings, shapes=["llama-tiny-8x1"], only=["*"])
    savings.run(args, results, lambda: None)
    measured = results.select(method="saving", metric="measured")
    assert len(measured) == 8
    for row in measured:
        (predicted,) = results.select(case=row["case"], metric="predicted")
        (quotient,) = results.select(case=row["case"], metric="measured_over_predicted")
        assert quotient["value"] == pytest.approx(row["value"] / predicted["value"])


def test_savings_of_classifiers_are_refused():
    args = argparse.Namespace(device="cpu", quick=True, shapes=["tiny-8x2"])
    with pytest.raises(ValueError, match="gated language models, got 'tiny-8x2'"):
        savings.run(args, Results("savings"), lambda: None)
