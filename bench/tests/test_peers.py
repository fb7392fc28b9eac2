"""All methods answer the same question: they agree where the rules of integration do."""

from __future__ import annotations

import argparse

import pytest
import torch

from common.harness import relative_error
from localisation.jobs import gauss_legendre, make_job, reference_scores, right_riemann
from localisation.locate import QUICK, add_rows, all_methods, measure_job, table
from peers.hand_loop import collapsed_loop, suffix_loop
from peers.knowledge_neurons import knowledge_neurons_loop


class Collected:
    """Stands for the results file: keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, case, method, metric, value, **more):
        self.rows.append({"case": case, "method": method, "metric": metric, "value": value, **more})


@pytest.fixture(scope="module")
def job():
    return make_job("tiny-8x2")


@pytest.fixture(scope="module")
def reference(job):
    return reference_scores(job)


def stacked(scores):
    return torch.cat([value.double() for value in scores.values()], 1)


def test_reference_is_complete(job, reference):
    """Its sum over a layer's neurons is F(1) - F(layer erased), from plain forward passes in float64."""
    exact = job.to(torch.float64)

    def logit():
        return exact.model(input_ids=job.ids).logits.gather(1, job.labels[:, None]).squeeze(1)

    for i, name in enumerate(job.sites):
        full = logit()
        layer = exact.model.bert.encoder.layer[i]
        handle = layer.output.dense.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))
        erased = logit()
        handle.remove()
        torch.testing.assert_close(reference[name].sum(1), full - erased, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("rule", [gauss_legendre(6), right_riemann(7)], ids=["gauss-legendre", "right-riemann"])
def test_loops_agree_with_each_other(job, rule, chunk):
    exact = job.to(torch.float64)
    settings = (exact.model, job.ids, job.labels, *rule)
    suffix = stacked(suffix_loop(*settings, chunk=chunk))
    assert relative_error(stacked(collapsed_loop(*settings, chunk=chunk)), suffix) < 1e-12
    assert relative_error(stacked(knowledge_neurons_loop(*settings, chunk=chunk)), suffix) < 1e-12


def test_captum_needs_the_way_round_for_a_zero_baseline(job, reference):
    captum_lig = pytest.importorskip("peers.captum_lig", exc_type=ImportError)
    settings = (job.model, job.ids, job.labels, 20)
    want = stacked(reference)
    assert relative_error(stacked(captum_lig.captum_layers(*settings, zero_baseline=True)), want) < 1e-5
    assert relative_error(stacked(captum_lig.captum_layers(*settings)), want) > 0.1
    assert not any(layer.output.dense._forward_pre_hooks for layer in job.model.bert.encoder.layer)


def test_few_layers_are_the_same_as_in_a_full_run(job):
    settings = (job.model, job.ids, job.labels, *gauss_legendre(3))
    torch.testing.assert_close(suffix_loop(*settings, layers=[1])[job.sites[1]], suffix_loop(*settings)[job.sites[1]])


def test_reference_is_kept_and_found_again(job, reference, tmp_path):
    first = reference_scores(job, nodes=3, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert torch.equal(reference_scores(job, nodes=3, cache=tmp_path)[job.sites[0]], first[job.sites[0]])
    assert file.name.startswith("tiny-8x2-3-")


@pytest.mark.parametrize("name", ["minilm", "minilm-32", "unknown-8x2", "tiny-1x2", "tiny-8x0", "tiny-8x2x3"])
def test_wrong_job_names_are_refused(name):
    with pytest.raises(ValueError, match="shapes"):
        make_job(name)


def test_locate_measures_every_method():
    pytest.importorskip("captum")
    settings = {"device": "cpu", "threads": 1, "reference_threads": 1, "reference": None, "quick": True, "full": False}
    args = argparse.Namespace(**settings, methods=["*"], repeats=1, budget=5.0, peak=False)
    found = measure_job("tiny-8x2", args)
    assert {m.method.name for m in found} == set(QUICK)
    results, rates = Collected(), {torch.float32: 100.0, torch.bfloat16: 100.0}
    add_rows(results, "tiny-8x2", found, rates)
    headline = {row["metric"]: row for row in results.rows if row["method"] == "spurge"}
    assert headline["error"]["value"] <= next(m.error for m in found if m.method.name == "hand-written")
    assert headline["times_faster_than_captum"]["note"].startswith("spurge-")
    assert "captum" in table("tiny-8x2", found, rates)


def test_two_layers_stand_for_all_and_say_so(monkeypatch):
    monkeypatch.setattr("localisation.locate.DEEP", 2)
    settings = {"device": "cpu", "threads": 1, "reference_threads": 1, "reference": None, "quick": True, "full": False}
    args = argparse.Namespace(**settings, methods=["hand-written*"], repeats=2, budget=5.0, peak=False)
    part, best = measure_job("tiny-8x2", args)
    assert part.note == "extrapolated from layers 0+1"
    assert best.note == ""
    args.full = True
    (whole, _) = measure_job("tiny-8x2", args)
    assert whole.note == ""
    assert 0.5 < part.flops / whole.flops < 2  # the mean of three layers is not that of the first two


def test_method_names_are_unique():
    names = [m.name for m in all_methods()]
    assert len(names) == len(set(names))
