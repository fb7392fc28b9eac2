"""Language models: their jobs, the peers on them, the converged reference, and what ``run.py latency`` writes."""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from common import language
from common.harness import relative_error
from localisation.accuracy import converged, errors
from localisation.jobs import even_steps, gauss_legendre, make_job, right_riemann
from localisation.latency import QUICK, Measured, Method, Run, _add_headline, add_rows, all_methods, child, table
from peers.knowledge_neurons import knowledge_neurons_loop
from spurge.report.results import Results

SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "methods": ["*"],
    "prompts": 3,
    "budget": 5.0,
    "batch": 2,
    "full": False,
    "exact": 1,
    "exact_tolerance": 1e-2,
    "reference": None,
    "peak": False,
    "quick": True,
}


@pytest.fixture(scope="module", params=["llama-tiny-8x2", "qwen2-tiny-8x2"])
def job(request):
    return make_job(request.param)


def stacked(scores):
    return torch.cat([value.double() for value in scores.values()], 1)


# ------------------------------------------------------------------------------------------------------------- jobs


def test_random_weights_are_born_in_their_type_and_the_same_each_time():
    first, second = (language.random_model("llama-tiny", device="cpu", dtype=torch.bfloat16) for _ in range(2))
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.isfinite(first(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize(
    "kind, layers, hidden, neurons, vocabulary",
    [("llama-7b", 32, 4096, 11008, 32000), ("qwen2-1.5b", 28, 1536, 8960, 151936)],
)
def test_large_shapes_are_what_their_names_say(kind, layers, hidden, neurons, vocabulary):
    config = language.SHAPES[kind].config()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (layers, hidden, neurons)
    assert config.vocab_size == vocabulary
    with torch.device("meta"):
        model = type(language.random_model(kind.split("-")[0] + "-tiny", device="meta", dtype=torch.float32))(config)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx({"llama-7b": 6.74, "qwen2-1.5b": 1.54}[kind], abs=0.01)


def test_prompts_are_different_and_hold_no_special_id(job):
    drawn = job.draw(20)
    assert drawn.shape == (20, 8)
    assert len({tuple(row) for row in drawn.tolist()}) == 20
    assert drawn.min() >= language.FIRST_WORD
    assert torch.equal(job.draw(2), job.ids)


def test_windows_cover_a_text_and_refuse_one_that_is_too_short():
    assert language.windows(torch.arange(10), 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(ValueError, match="at most 5 tokens for 3 prompts, got windows of 4"):
        language.windows(torch.arange(5), 4, 3)


def test_a_rounded_job_keeps_its_labels_and_its_model(job):
    half = job.to(torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert next(job.model.parameters()).dtype == torch.float32
    assert torch.equal(half.labels, job.labels)


# ------------------------------------------------------------------------------------------------------------ peers


def test_peers_ask_the_library_s_question(job):
    captum_lig = pytest.importorskip("peers.captum_lig", exc_type=ImportError)
    from spurge.engine.cascade.cascade import Cascade

    found = Cascade(job.model, nodes=6, path="layer").attribute(job.inputs, job.target).values
    ours = torch.cat([found[site][0].double() for site in job.sites], 1)
    settings = (job.model, job.ids, job.labels)
    assert relative_error(stacked(knowledge_neurons_loop(*settings, *gauss_legendre(6), chunk=3)), ours) < 1e-5
    assert relative_error(stacked(captum_lig.captum_layers(*settings, 6, zero_baseline=True)), ours) < 1e-5
    assert not any(job.model.get_submodule(site)._forward_pre_hooks for site in job.sites)


def test_even_steps_hold_both_ends():
    nodes, weights = even_steps(5)
    assert nodes == [0, 0.25, 0.5, 0.75, 1]
    assert sum(weights) == pytest.approx(1)


# --------------------------------------------------------------------------------------------------------- accuracy


def test_reference_agrees_with_brute_force_where_a_fixed_rule_does_not():
    """A first layer so loud that few nodes miss where its path turns."""
    quiet = make_job("llama-tiny-8x1")
    model = copy.deepcopy(quiet.model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e3)
    loud = replace(quiet, model=model)
    loud = replace(loud, labels=loud.predicted(loud.ids))
    reference = converged(loud, tolerance=1e-2)
    nodes, weights = gauss_legendre(8)
    pieces = list(pairwise([0.0, *(2.0**-k for k in range(12, -1, -1))]))
    alphas = [low + (high - low) * x for low, high in pieces for x in nodes]
    shares = [(high - low) * w for low, high in pieces for w in weights]
    exact = loud.to(torch.float64)
    brute = knowledge_neurons_loop(exact.model, exact.ids, exact.labels, alphas, shares, chunk=26)
    fixed = knowledge_neurons_loop(exact.model, exact.ids, exact.labels, *right_riemann(20))
    assert errors(reference.scores, brute).total < 5e-3
    assert errors(fixed, brute).total > 0.1
    assert reference.residual < 1e-2


def test_reference_is_kept_and_found_again(job, tmp_path):
    first = converged(job, tolerance=0.05, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    again = converged(job, tolerance=0.05, cache=tmp_path)
    assert all(torch.equal(again.scores[site], first.scores[site]) for site in job.sites)
    assert (again.residual, again.change) == (first.residual, first.change)
    assert file.name.startswith(f"{job.name}-0.05-")


def test_errors_by_layer():
    reference = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[0.0, 1.0]]), "c": torch.tensor([[1.0, 0.0]])}
    found = errors(reference | {"a": torch.tensor([[3.0, 3.0]]), "b": torch.tensor([[1.0, 1.0]])}, reference)
    assert (found.median_layer, found.worst_layer, found.worst) == (pytest.approx(0.2), 1.0, "b")
    assert found.total == pytest.approx((2 / 27) ** 0.5)
    assert found.overlap == 100


# ---------------------------------------------------------------------------------------------------------- latency


def test_latency_measures_every_method_and_extrapolates_the_peers():
    pytest.importorskip("captum")
    run = Run("llama-tiny-8x1", argparse.Namespace(**SETTINGS))
    found = {m.method.name: m for m in run.all()}
    assert set(found) == set(QUICK)
    assert all(len(m.seconds) == 3 and m.rate > 0 and m.flops > 0 for m in found.values())
    assert found["knowledge-neurons"].note == "extrapolated from layers 1+2"
    assert not found["spurge-2"].note
    results, rates = Results("latency"), {torch.float32: 100.0, torch.bfloat16: 100.0}
    add_rows(results, "x", run, rates)
    metrics = {row["metric"] for row in results.select(method="spurge-2")}
    assert {"p50_seconds", "p95_seconds", "first_seconds", "prompts_per_second", "error_worst_layer"} <= metrics
    assert results.select(method="reference", metric="residual")[0]["value"] < 1e-2
    (worst,) = results.select(method="spurge-2", metric="error_worst_layer")
    assert worst["note"] in run.job.sites
    assert "extrapolated" in table("x", run, rates)


def test_operations_of_two_layers_stand_for_all():
    settings = SETTINGS | {"methods": ["knowledge-neurons"], "exact": 0, "prompts": 1}
    part = Run("llama-tiny-8x1", argparse.Namespace(**settings))
    whole = Run("llama-tiny-8x1", argparse.Namespace(**settings | {"full": True}))
    (few,), (all_layers,) = part.all(), whole.all()
    assert not all_layers.note
    assert few.flops == pytest.approx(all_layers.flops, rel=1e-3)


def test_a_slow_method_gets_fewer_prompts():
    settings = SETTINGS | {"methods": ["spurge-2"], "exact": 0, "prompts": 5, "budget": 0.0}
    (found,) = Run("llama-tiny-8x1", argparse.Namespace(**settings)).all()
    assert len(found.seconds) == 3


def _measured(name: str, seconds: float, flops: int, error: float | None) -> Measured:
    reference = {"a": torch.ones(1, 4).double()}
    wrong = None if error is None else errors({"a": torch.full((1, 4), 1 + error)}, reference)
    return Measured(Method(name, lambda model: None), seconds=[seconds], rate=1 / seconds, flops=flops, errors=wrong)


@pytest.mark.parametrize("with_errors, chosen", [(True, "spurge-4"), (False, "spurge-2")])
def test_headline_is_the_cheapest_as_accurate_as_the_peers(with_errors, chosen):
    rows = [("captum-zero-baseline", 8, 80, 0.1), ("spurge-2", 1, 10, 0.3), ("spurge-4", 2, 20, 0.1)]
    rows.append(("spurge-radau-4", 3, 30, 0.01))
    results = Results("latency")
    _add_headline(results, "x", [_measured(n, s, f, e if with_errors else None) for n, s, f, e in rows])
    (ratio,) = results.select(method="spurge", metric="times_faster_than_captum-zero-baseline")
    assert ratio["note"] == chosen
    assert ratio["value"] == {"spurge-4": 4, "spurge-2": 8}[chosen]


def test_child_measures_the_peak_of_one_method():
    assert child(["llama-tiny-8x1", "spurge-1", "--threads", "1"])["peak_bytes"] >= 0


def test_method_names_are_unique():
    names = [m.name for m in all_methods(graphs=True)]
    assert len(names) == len(set(names))


def test_a_reference_of_no_prompts_leaves_the_errors_out():
    settings = SETTINGS | {"methods": ["spurge-2"], "exact": 0, "prompts": 1}
    run = Run("qwen2-tiny-8x1", argparse.Namespace(**settings))
    run.all()
    results = Results("latency")
    add_rows(results, "x", run, {torch.float32: 1.0, torch.bfloat16: 1.0})
    assert not results.select(metric="error")
