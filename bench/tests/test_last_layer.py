"""The methods that are compared answer the same question, and ``run.py last-layer`` measures them."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from common import comparison
from common.comparison import Case, Method, measure
from common.harness import Timing
from last_layers import associations, last_layer, medians, sweeps
from peers import medians as median_peers
from peers import sweeps as sweep_peers
from peers.sca import Scores, Tuned, autograd_loop, class_einsum, make_layer, residuals, streaming, vmap_grad
from spurge.report.results import Results

QUESTIONS = list(associations.QUESTIONS)
FORMS = {
    "tuned": Tuned(block=50, tile=1 << 8),
    "streaming": streaming,
    "class-einsum": class_einsum,
    "vmap-grad": vmap_grad,
    "autograd-loop": autograd_loop,
}


def plain(layer, target=None, row=None):
    """The formulas in float64, by autograd on one sample after the other."""
    x, y, weight, bias = (t.double() if t.is_floating_point() else t for t in layer)
    classes = len(weight)
    counts = torch.bincount(y, minlength=classes).clamp_min(1)
    gradients, activations = x.new_zeros(classes, *weight.shape), x.new_zeros(classes, x.shape[1])
    for n in range(len(y)):
        parameter = weight.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(x[n] @ parameter.T + bias, y[n])
        gradients[y[n]] += torch.autograd.grad(loss, parameter)[0].abs() / counts[y[n]]
        activations[y[n]] += x[n].abs() / counts[y[n]]

    def entropy(values):
        return torch.special.entr(values / values.sum(0)).nansum(0)

    ca = entropy(gradients) / entropy(activations).clamp_min(1e-6 * math.log(classes))
    every = torch.arange(classes)
    picked = gradients[every, every] if target is None else gradients[target]
    sca = ca * picked * (activations if target is None else activations[target])
    return Scores(ca, sca) if row is None else Scores(ca[row : row + 1], sca[row : row + 1])


@pytest.fixture(scope="module")
def layer():
    found = make_layer(97, 5, 72)
    found.features[:, 7] = 0  # a dead unit
    return found


@pytest.mark.parametrize("asked", QUESTIONS)
@pytest.mark.parametrize("name", [*FORMS, "spurge"])
def test_every_form_of_the_scores_is_the_formula(layer, name, asked):
    question = associations.QUESTIONS[asked]
    form = associations.spurge_scores if name == "spurge" else FORMS[name]
    found, exact = form(layer, **question), plain(layer, **question)
    torch.testing.assert_close(found.ca.double(), exact.ca, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found.sca.double(), exact.sca, rtol=1e-5, atol=1e-12)


def test_the_answer_that_others_are_compared_with_is_exact(layer):
    found, exact = Tuned(dtype=torch.float64)(layer), plain(layer)
    torch.testing.assert_close(found.sca, exact.sca, rtol=1e-11, atol=0)
    agreement = associations.agreement(exact, found)
    assert agreement["same_argmax"] == (100.0, "percent")
    assert agreement["sca_difference"][0] < 1e-11


def test_forms_take_float16(layer):
    half = layer._replace(features=layer.features.half())
    exact = plain(half)
    torch.testing.assert_close(Tuned()(half).sca.double(), exact.sca, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(streaming(half).sca.double(), exact.sca, rtol=1e-5, atol=1e-12)


def test_tuned_form_is_what_the_kernel_sums(layer):
    """Its sums are those of `reference.associate`, one block at a time."""
    from spurge import reference

    order = layer.labels.argsort(stable=True)
    x, y = layer.features[order].double(), layer.labels[order]
    d = residuals(x, y, layer.weight.double(), layer.bias.double())
    counts = torch.bincount(y, minlength=5)
    empty = torch.zeros(5, 72, dtype=torch.float64)
    state = (empty, empty, torch.zeros(0, dtype=torch.float64), empty, empty)
    starts, scales = torch.nn.functional.pad(counts.cumsum(0), (1, 0)), 1 / counts.double()
    sums, logs, _, picked, activations = reference.associate(*state, x, d, starts, torch.arange(5), scales)
    entropy = (sums.log() - logs / sums).nan_to_num(0.0)
    shares = torch.special.entr(activations / activations.sum(0)).nansum(0)
    expected = entropy / shares.clamp_min(1e-6 * math.log(5)) * picked * activations
    torch.testing.assert_close(Tuned(dtype=torch.float64)(layer).sca, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", list(medians.PEERS))
def test_every_form_of_the_medians_agrees(name, dtype):
    features, order, starts = medians.make_segments(83, 9, 2, dtype, "cpu")
    rows = order.split(starts.diff().tolist())
    exact = torch.stack([features[of].double().quantile(0.5, 0) for of in rows]).float()
    found = medians.PEERS[name](features, rows)
    if name == "torch-median":
        odd = [len(of) % 2 == 1 for of in rows]
        found, exact = found[odd], exact[odd]
    rtol = 1e-3 if name == "numpy-median" and dtype == torch.float16 else 1e-6  # numpy takes the mean in float16
    torch.testing.assert_close(found, exact, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(
        medians.spurge_medians(features, order, starts), medians.PEERS["torch-sort"](features, rows)
    )


def test_kthvalue_knows_the_middle_two_when_they_are_equal():
    features = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 4.0], [5.0, 5.0]])
    assert median_peers.torch_kthvalue(features, [torch.arange(4)]).tolist() == [[1.0, 3.0]]


def test_quantile_takes_few_columns_at_once(monkeypatch):
    features = torch.rand(12, 7)
    whole = median_peers.torch_quantile(features, [torch.arange(12)])
    monkeypatch.setattr(median_peers, "QUANTILE_MOST", 24)
    assert torch.equal(median_peers.torch_quantile(features, [torch.arange(12)]), whole)


@pytest.mark.parametrize("edited", [1, 2, 4])
def test_every_form_of_the_sweep_agrees(edited):
    edit = sweeps.make_edit(200, 4, edited, width=16)
    rates = torch.linspace(0, 1, 21, dtype=torch.float64)
    exact = sweeps.spurge_sweep(edit, rates)
    for form in (sweep_peers.cached_logits, sweep_peers.cached_logits_tuned, sweep_peers.forward):
        found = form(edit, rates.tolist())
        for value, expected in zip(found, exact, strict=True):
            assert value.shape == (21,)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)
    assert exact[0][0] != exact[0][-1]  # the edit does something


def test_slow_ways_do_a_part_and_say_so(monkeypatch):
    monkeypatch.setattr(sweeps, "MULTIPLIED", 1)
    edit = sweeps.make_edit(20, 3, 1, width=8)
    found = sweeps.methods(edit, torch.linspace(0, 1, 100, dtype=torch.float64))
    assert found["head"].note == "extrapolated from 10 of 100 rates"
    assert found["head"].scale == 10
    assert found["cached-logits"].scale == 1


def test_a_way_that_does_not_fit_has_a_row_that_says_so():
    results = Results("test")
    fits = Method(lambda: 1.0, scale=3.0, once=True, note="a third")
    case = Case("job", {"small": fits, "large": Method(lambda: pytest.fail("ran"), needs=11, note="G alone has 3")})
    timings = measure(case, results, free=10, threads=1, repeats=1, budget=1.0, device="cpu")
    assert list(timings) == ["small"]
    (row,) = results.select(method="large")
    assert (row["metric"], row["value"]) == ("needed_bytes", 11)
    assert "does not run" in row["note"]
    assert results.select(method="small", metric="seconds")[0]["note"] == "a third"


def test_what_is_done_however_small_the_part_is_not_multiplied(monkeypatch):
    seconds = {"part": 3.0, "rest": 2.0}
    monkeypatch.setattr(comparison, "_first", lambda of, device: (None, Timing(seconds[of.call()], 0.0, 1, 1.0)))
    method = Method(lambda: "part", scale=100.0, rest=lambda: "rest", once=True)
    case, results = Case("job", {"a": method}), Results("test")
    timing = measure(case, results, free=0, threads=1, repeats=1, budget=1.0, device="cpu")["a"]
    assert timing.seconds == 2 + 100
    assert timing.cpu_seconds == 1


@pytest.mark.parametrize("form", [vmap_grad, autograd_loop])
def test_slow_forms_can_do_nothing(layer, form):
    assert form(layer, samples=0).sca.shape == (5, 72)


def test_the_whole_tensor_of_the_large_shape_is_counted():
    layer = make_layer(4, 3, 2)
    wide = layer._replace(weight=torch.empty(1000, 2048, device="meta"))
    assert associations.methods(wide, {})["class-einsum"].needs == 4 * 1000 * 1000 * 2048 * 4
    assert associations.methods(wide, {"row": 3})["class-einsum"].needs == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_last_layer_measures_every_part(monkeypatch, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(associations, "QUICK_SHAPES", {"middle": (60, 4, 16)})
    monkeypatch.setattr(associations, "PEAKS_QUICK", ())
    monkeypatch.setattr(associations, "show_limit", lambda *args, **kwargs: None)
    monkeypatch.setattr(medians, "QUICK_SHAPES", [(50, 8, 2)])
    monkeypatch.setattr(sweeps, "QUICK_SHAPES", [(50, 2)])
    monkeypatch.setattr(sweeps, "WIDTH", 8)
    results, saved = Results("test"), []
    args = argparse.Namespace(device=device, threads=1, quick=True, only=["*"])
    last_layer.run(args, results, lambda: saved.append(len(results)))
    parts = {row["case"].split(",")[0].split(" of ")[0] for row in results.rows}
    assert parts == {"association", "medians", "sweep"}
    assert len(saved) == 4 + 2 + 2
    assert saved == sorted(saved)
    assert results.select(method="limit", metric="seconds")
    assert all(row["value"] == 100 for row in results.select(metric="same_argmax"))
    assert all(row["value"] < 1e-4 for row in results.select(metric="sca_difference"))
    args.only = ["nothing"]
    with pytest.raises(ValueError, match="only"):
        last_layer.run(args, results, lambda: None)


def test_peak_of_a_way_is_that_of_its_own_arrays():
    """200,000 samples' logits alone are more than nothing."""
    peak = last_layer.child(["1", "association", "200000", "10", "8", "float32", "own rows", "class-einsum"])[
        "peak_bytes"
    ]
    ours = last_layer.child(["1", "association", "200000", "10", "8", "float32", "own rows", "spurge"])["peak_bytes"]
    assert peak > 200_000 * 10 * 4
    assert ours > 0
