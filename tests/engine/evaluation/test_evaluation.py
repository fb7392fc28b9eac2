"""Every number of a report against a plain loop, the controls against their definition, and odd sets and models."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_models import DECODERS, ENCODERS, WORDS, tiny, tiny_tokenizer, tokenizer_for
from spurge import reference
from spurge.engine.base import statistics
from spurge.engine.cascade.scores import NeuronSet
from spurge.engine.data.examples import Example, Examples, encode
from spurge.engine.data.words import Vocabulary, as_phrase, split_units, unit_scores
from spurge.engine.edits.gates import attached
from spurge.engine.edits.neuron_edits import EditMismatch, NeuronEdit
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.evaluation import evaluated, random_edits
from spurge.engine.evaluation.evaluation import Report, accuracy, evaluate, predict
from spurge.engine.evaluation.prediction import Prepared
from spurge.engine.models.handle import Handle
from spurge.engine.models.probes import token_scores
from spurge.engine.models.sites import find_sites

LABELS = ("negative", "positive")


def examples(n=24, seed=0, groups=(), labels=LABELS, used=None):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = rng.choice(WORDS, size=rng.integers(2, 12))
        label = int(rng.integers(used or len(labels)))
        rows.append(Example(" ".join(words), label, group=groups[i % len(groups)] if groups else None))
    return Examples(rows, labels)


def edit_of(model, per_site=6, seed=0, **info):
    widths = {site.name: site.width for site in find_sites(model)}
    neurons = NeuronSet({site: range(per_site) for site in widths}).random_like(widths, seed)
    gates = torch.randn(len(neurons), generator=torch.Generator().manual_seed(seed))
    return NeuronEdit.build(model, neurons, gates, info)


class Words:
    """A golden set of the kind `evaluate` expects."""

    def __init__(self, labels=LABELS, spurious=((*WORDS[:40], "movie was"), (*WORDS[20:], "so never"))):
        self.labels, self.spurious = labels, spurious

    def phrases(self):
        return {as_phrase(entry) for words in self.spurious for entry in words}

    def bitmap(self, vocabulary):
        bits = np.zeros((2, len(self.labels), max(1, -(-len(vocabulary) // 32))), np.uint32)
        for label, words in enumerate(self.spurious):
            for word in words:
                number = vocabulary.find(word)
                if number is not None:
                    bits[1, label, number // 32] |= np.uint32(1 << (number % 32))
        return torch.from_numpy(bits.view(np.int32))


MODEL, TOKENIZER = tiny("bert"), tiny_tokenizer()
QUICK = {"progress": False, "bootstrap": 50}


def slowly(model, tokenizer, rows):
    """Logits one example at a time, without padding."""
    with torch.no_grad():
        return torch.cat([model(**encode(tokenizer, [row])).logits for row in rows])


# ---- predict


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "deberta_v2"])
def test_predict_is_one_at_a_time(family):
    model, tokenizer, rows = tiny(family), tokenizer_for(family), examples(9)
    expected = slowly(model, tokenizer, rows)
    for size in (1, 2, 4, 32):
        found = predict(model, tokenizer, rows, batch_size=size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    percent = 100 * float((expected.argmax(1) == rows.targets).double().mean())
    assert accuracy(model, tokenizer, rows, batch_size=2) == pytest.approx(percent)


def test_predict_leaves_the_model_as_it_was():
    model = tiny("bert")
    model.train()
    model.bert.encoder.layer[1].eval()
    before = [module.training for module in model.modules()]
    first, second = (predict(model, TOKENIZER, examples(5)) for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert [module.training for module in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert first.dtype == torch.float32


def test_pairs_and_half_precision():
    rows = Examples([Example("good movie", 1, pair="the plot was dull"), Example("bad", 0, pair="a")], LABELS)
    assert predict(MODEL, TOKENIZER, rows).shape == (2, 2)
    half = predict(tiny("bert", dtype=torch.bfloat16), TOKENIZER, rows)
    torch.testing.assert_close(half, predict(MODEL, TOKENIZER, rows), rtol=0.1, atol=0.1)


class Small:
    """Makes a model run out of memory above so many rows."""

    def __init__(self, model, most, error=MemoryError):
        self.model, self.most, self.error, self.sizes = model, most, error, []

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(self.look, with_kwargs=True)
        return self.sizes

    def look(self, module, args, kwargs):
        rows = len(kwargs["input_ids"])
        if rows > self.most:
            raise self.error("no memory left")
        self.sizes.append(rows)

    def __exit__(self, *error):
        self.handle.remove()


@pytest.mark.parametrize("error", [MemoryError, torch.cuda.OutOfMemoryError])
def test_batches_are_halved_while_memory_runs_out(error):
    rows = examples(20)
    expected = predict(MODEL, TOKENIZER, rows)
    with Small(MODEL, 5, error) as sizes:
        found = predict(MODEL, TOKENIZER, rows, batch_size=16)
    assert max(sizes) == 4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with Small(MODEL, 0, error), pytest.raises(error):
        predict(MODEL, TOKENIZER, rows)
    with Small(MODEL, 5, RuntimeError), pytest.raises(RuntimeError, match="no memory left"):
        predict(MODEL, TOKENIZER, rows, batch_size=16)


def test_a_memory_budget_makes_smaller_batches():
    rows = examples(20)
    with Small(MODEL, 20) as sizes:
        small = predict(MODEL, TOKENIZER, rows, memory="150 kB")
    assert 1 <= max(sizes) < 20
    torch.testing.assert_close(small, predict(MODEL, TOKENIZER, rows), rtol=1e-5, atol=1e-6)
    with Small(MODEL, 1) as sizes:
        predict(MODEL, TOKENIZER, rows, memory=1)


# ---- evaluate


def test_zero_all_erases_what_was_located():
    model, tests = tiny("bert"), {"a": examples(30, 1)}
    edit = edit_of(model)
    located = edit.neurons | NeuronSet({find_sites(model)[1].name: range(40)})
    report = evaluate(model, TOKENIZER, tests, edit=edit, located=located, draws=2, **QUICK)
    with NeuronEdit.build(model, located, 0.0).applied(model):
        right = slowly(model, TOKENIZER, tests["a"]).argmax(1) == tests["a"].targets
    assert report.value("a", "zero-all") == pytest.approx(100 * float(right.double().mean()))
    with pytest.raises(ValueError, match="located: is a control of an edit"):
        evaluate(model, TOKENIZER, tests, located=located, **QUICK)
    with pytest.raises(TypeError, match="located: expected a NeuronSet or Located, got list"):
        evaluate(model, TOKENIZER, tests, edit=edit, located=[1], **QUICK)


def test_every_number_against_a_plain_loop():
    tests = {"a": examples(30, 1, groups=("x", "y", "z")), "b": examples(17, 2)}
    model = tiny("bert")
    edit = edit_of(model)
    report = evaluate(model, TOKENIZER, tests, edit=edit, draws=4, batch_size=7, seed=3, **QUICK)

    def percent():
        """Accuracy of a, of its groups, and of b, with the gates that are attached now."""
        right = {c: (slowly(model, TOKENIZER, rows).argmax(1) == rows.targets).double() for c, rows in tests.items()}
        cases = {case: 100 * float(values.mean()) for case, values in right.items()}
        group = np.array([row.group for row in tests["a"]])
        return cases | {f"a/{g}": 100 * float(right["a"][group == g].mean()) for g in "xyz"}

    plain = percent()
    for method, gated in (("none", edit.with_gates(1.0)), ("edit", edit), ("zero-all", edit.with_gates(0.0))):
        with gated.applied(model):
            expected = percent()
        for case, value in expected.items():
            assert report.value(case, method) == pytest.approx(value)
        assert report.value("a", method, "worst_group") == pytest.approx(min(expected[f"a/{g}"] for g in "xyz"))
        assert report.value("average", method) == pytest.approx((expected["a"] + expected["b"]) / 2)
        if method != "none":
            assert report.value("b", method, "change") == pytest.approx(expected["b"] - plain["b"])
    draws = []
    for draw in range(4):
        seed = random_edits.draw_seed(3, draw)
        gates = random_edits.random_gates(edit, seed)
        with attached({site.name: site for site in find_sites(model)}, gates):
            drawn = percent()
            draws.append([drawn["a"], drawn["b"], min(drawn[f"a/{g}"] for g in "xyz")])
    draws = np.array(draws)
    found = {(m.case, m.metric): m for m in report.measures if m.method == "random"}
    for key, column in ((("a", "accuracy"), 0), (("b", "accuracy"), 1), (("a", "worst_group"), 2)):
        assert found[key].value == pytest.approx(draws[:, column].mean())
        assert found[key].spread == pytest.approx(draws[:, column].std(ddof=1))
        assert (found[key].n, found[key].low) == (4, None)
    assert found["average", "accuracy"].value == pytest.approx(draws[:, :2].mean())
    assert found["average", "accuracy"].spread == pytest.approx(draws[:, :2].mean(1).std(ddof=1))
    assert found["a", "change"].value == pytest.approx(draws[:, 0].mean() - plain["a"])


def test_the_model_is_back_and_the_report_is_repeatable():
    model, edit = tiny("llama"), edit_of(tiny("llama"))
    tokenizer = tokenizer_for("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = (evaluate(model, tokenizer, examples(8), edit=edit, draws=2, seed=5, **QUICK) for _ in range(2))
    other = evaluate(model, tokenizer, examples(8), edit=edit, draws=2, seed=6, **QUICK)
    assert one.rows() == two.rows()
    assert one.rows() != other.rows()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_interrupted_evaluation_leaves_the_model_clean():
    model = tiny("bert")
    edit = edit_of(model)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.classifier.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, TOKENIZER, examples(4), edit=edit, draws=3, **QUICK)
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_random_gates_keep_counts_and_values_on_other_neurons():
    edit = edit_of(MODEL)
    gates = random_edits.random_gates(edit, 1)
    for site, (indices, values) in edit.gates.items():
        moved = (gates[site] != 1).nonzero()[:, 0]
        assert not set(moved.tolist()) & set(indices.tolist())
        assert gates[site][moved].sort().values.tolist() == values.sort().values.tolist()
    again, other = (random_edits.random_gates(edit, seed) for seed in (1, 2))
    assert all(torch.equal(gates[site], again[site]) for site in gates)
    assert any(not torch.equal(gates[site], other[site]) for site in gates)


def test_random_gates_shuffle_where_all_neurons_are_edited():
    every = NeuronSet.all({"bert.encoder.layer.1.output.dense": 48})
    edit = NeuronEdit.build(MODEL, every, torch.arange(48.0))
    gates = random_edits.random_gates(edit, 0)
    (vector,) = gates.values()
    assert vector.sort().values.tolist() == list(range(48))
    assert vector.tolist() != list(range(48))


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_all_draws_at_once_are_the_draws_one_by_one(family, first):
    model = tiny(family)
    sites = {site.name: site for site in find_sites(model)[first:]}
    neurons = NeuronSet({name: range(6) for name in sites})
    edit = NeuronEdit.build(model, neurons, torch.linspace(-1, 2, len(neurons)))
    prepared = Prepared("set", Handle(model, tokenizer_for(family)), examples(7), batch_size=4, golden=Words())
    draws = [random_edits.random_gates(edit, seed) for seed in range(3)]
    cascade = evaluated._cascade(Handle(model), sites, None, attention=True)
    together = prepared.run_gated(cascade, *evaluated._joined(draws))
    for gates, outcome in zip(draws, together, strict=True):
        with attached(sites, gates):
            alone = prepared.run()
        torch.testing.assert_close(outcome.logits, alone.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outcome.proximity, alone.proximity, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("why", ["head", "nothing moves", "empty", "meta"])
def test_draws_run_one_by_one_where_they_must(why, monkeypatch):
    model, joined = tiny("bert"), []
    monkeypatch.setattr(evaluated, "_joined", lambda settings: joined.append(1))
    site = "classifier" if why == "head" else find_sites(model)[0].name
    edit = NeuronEdit.build(model, NeuronSet({site: [] if why == "empty" else [1, 2]}), float(why == "nothing moves"))
    if why == "meta":
        sites = {site.name: site for site in find_sites(copy.deepcopy(model).to("meta"))}
        assert evaluated._cascade(Handle(model), sites, None, attention=False) is None
        return
    report = evaluate(model, TOKENIZER, examples(4), edit=edit, draws=2, **QUICK)
    assert not joined
    assert any(m.method == "random" for m in report.measures)


def test_eta_against_the_reference():
    rows, golden = examples(12, 4), Words()
    edit = edit_of(MODEL)
    report = evaluate(MODEL, TOKENIZER, rows, edit=edit, draws=2, golden=golden, top_k=3, batch_size=5, **QUICK)

    def eta():
        total = 0.0
        for row in rows:
            inputs, vocabulary = encode(TOKENIZER, [row]), Vocabulary()
            units = split_units(TOKENIZER, inputs, [row.text], vocabulary, golden.phrases())
            with torch.no_grad():
                predicted = MODEL(**inputs).logits.argmax(1)
            scores = unit_scores(token_scores(MODEL, inputs), units)
            hard = reference.proximity(scores, units.ids, golden.bitmap(vocabulary), predicted, 3, 0.25)[0]
            total += float(hard[0, 1])
        return total / len(rows)

    assert report.value("test", "none", "eta") == pytest.approx(eta(), rel=1e-4)
    with edit.applied(MODEL):
        assert report.value("test", "edit", "eta") == pytest.approx(eta(), rel=1e-4)
    assert 0 < report.value("test", "none", "eta") < 2
    assert report.value("test", "random", "eta") > 0
    assert "eta" in str(report)


@dataclass
class Found:
    """What evaluation reads of a localisation."""

    spurious_set: NeuronSet
    info: dict[str, Any]


def test_eta_reads_correlation_tokens_as_neurons_were_located():
    rows, golden, edit = (
        Examples([Example(f"{row.text}, the the film!", row.label) for row in examples(8, 4)], LABELS),
        Words(),
        edit_of(MODEL),
    )

    def eta(**given):
        report = evaluate(
            MODEL,
            TOKENIZER,
            rows,
            golden=golden,
            **{"edit": edit, "controls": False, "bootstrap": 0} | given,
            progress=False,
        )
        return report.value("test", "none", "eta"), report.settings["correlation_tokens"]

    located = {"top_k": 2, "merge": "max", "keep_punctuation": True, "correlation_set": "words", "seed": 0}
    asked = {name: located[name] for name in ("top_k", "merge", "keep_punctuation", "correlation_set")}
    usual = {"top_k": 5, "merge": "sum", "keep_punctuation": False, "correlation_set": "occurrences"}
    value, said = eta(located=Found(edit.neurons, {"settings": located}))
    assert (said, eta()[1], eta(located=edit.neurons)[1]) == (asked, usual, usual)
    assert value != eta()[0]
    for name, setting in asked.items():  # each of them counts
        assert eta(located=Found(edit.neurons, {"settings": located | {name: usual[name]}}))[0] != value, (
            name,
            setting,
        )
    own = NeuronEdit.build(MODEL, edit.neurons, edit.vector(), {"method": "MacU", "settings": located})
    assert eta(edit=own) == (value, asked)
    assert eta(edit=own, top_k=3)[1] == asked | {"top_k": 3}
    assert eta(located=Found(edit.neurons, {}))[1] == usual  # a file without settings
    with pytest.raises(ValueError, match="token_score: neurons were located by tokens that 'ablation' ranks"):
        eta(located=Found(edit.neurons, {"settings": {"token_score": "ablation"}}))
    with pytest.raises(TypeError, match="located: expected a NeuronSet or Located, got dict"):
        eta(located={})


def test_eta_of_a_decoder_and_of_texts_without_words():
    model, tokenizer = tiny("gpt2"), tokenizer_for("gpt2")
    rows = Examples([Example("the movie", 0), Example("?!", 1), Example("so never", 1)], LABELS)
    report = evaluate(model, tokenizer, rows, golden=Words(), batch_size=2, **QUICK)
    assert 0 <= report.value("test", "none", "eta") <= 2
    alone = evaluate(model, tokenizer, rows[1:2], golden=Words(), **QUICK)
    assert alone.value("test", "none", "eta") == 0


def test_the_interval_is_that_of_the_binomial():
    rows = examples(200, 7)
    report = evaluate(MODEL, TOKENIZER, rows, progress=False, bootstrap=2000)
    measure = report.measures[0]
    assert measure.metric == "accuracy"
    share = measure.value / 100
    deviation = 100 * (share * (1 - share) / 200) ** 0.5
    assert measure.spread == pytest.approx(deviation, rel=0.06)  # 2,000 resamples: 3.8 deviations
    assert measure.low == pytest.approx(measure.value - 1.96 * deviation, abs=0.5 * deviation)
    assert measure.high == pytest.approx(measure.value + 1.96 * deviation, abs=0.5 * deviation)
    assert measure.n == 200


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 10**6), st.integers(1, 3))
def test_resampled_sums(n, bootstrap, seed, block):
    """Of a column of ones every resample sums to N; blocks of resamples all count; values stay in range."""
    rng = np.random.default_rng(seed)
    values = np.stack([np.ones(n), rng.random(n)], 1)
    statistics._BLOCK, old = block * n, statistics._BLOCK
    try:
        sums = statistics.resampled_sums(values, bootstrap, rng)
    finally:
        statistics._BLOCK = old
    assert sums.shape == (1 + bootstrap, 2)
    assert (sums[:, 0] == n).all()
    assert sums[0] == pytest.approx(values.sum(0))
    assert (sums[:, 1] <= n * values[:, 1].max() + 1e-9).all()
    assert (sums[:, 1] >= n * values[:, 1].min() - 1e-9).all()


def test_the_report_is_the_same_on_any_device(device):
    model, tests = tiny("bert"), examples(20)
    edit = edit_of(model)
    settings = {"edit": edit, "draws": 3, "golden": Words(), **QUICK}
    expected = evaluate(model, TOKENIZER, tests, **settings)
    found = evaluate(model.to(device), TOKENIZER, tests, **settings)
    assert [m.value for m in found.measures] == pytest.approx([m.value for m in expected.measures], abs=0.01)


def test_changes_are_paired():
    """An edit that does nothing changes nothing, in every resample."""
    nothing = NeuronEdit.build(MODEL, NeuronSet({find_sites(MODEL)[0].name: [1, 2]}), 1.0)
    report = evaluate(MODEL, TOKENIZER, examples(30), edit=nothing, controls=False, **QUICK)
    change = next(m for m in report.measures if m.metric == "change")
    assert (change.value, change.low, change.high, change.spread) == (0, 0, 0, 0)


# ---- odd sets and models


def test_odd_sets():
    one = Examples([Example("good", 1)], LABELS)
    tests = {"one": one, "missing": examples(6, used=1)}
    report = evaluate(MODEL, TOKENIZER, tests, draws=2, edit=edit_of(MODEL), **QUICK)
    assert report.value("one", "none") in (0, 100)
    small = Examples([*examples(30, 1), Example("bad", 0, group="rare"), Example("sad", 0, group="other")], LABELS)
    report = evaluate(MODEL, TOKENIZER, small, **QUICK)  # resamples without the rare group
    assert {m.case for m in report.measures} == {"test", "test/rare", "test/other"}
    assert next(m for m in report.measures if m.case == "test/rare").n == 1
    many = evaluate(tiny("bert", labels=3), TOKENIZER, examples(5), **QUICK)  # more outputs than labels
    assert 0 <= many.value("test", "none") <= 100
    plain = evaluate(MODEL, TOKENIZER, one, progress=False, bootstrap=0)
    assert plain.measures[0].low is None
    assert plain.measures[0].spread is None


def test_labels_the_model_does_not_have():
    rows = examples(9, labels=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"set 'stars': has label 2 \('c'\), the model only 2 outputs"):
        evaluate(MODEL, TOKENIZER, {"stars": rows}, **QUICK)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    model = tiny("bert")
    model.classifier.bias.data[0] = value
    with pytest.raises(ValueError, match=r"set 'b\.c': the model gives logits that are not finite for example \d+"):
        evaluate(model, TOKENIZER, {"b.c": examples(3)}, **QUICK)


def test_an_edit_of_another_model_is_refused_unless_forced():
    edit = edit_of(tiny("bert", seed=1))
    with pytest.raises(EditMismatch):
        evaluate(MODEL, TOKENIZER, examples(3), edit=edit, **QUICK)
    evaluate(MODEL, TOKENIZER, examples(3), edit=edit, force=True, controls=False, **QUICK)


def test_inside_an_applied_edit_that_edit_is_measured():
    model, rows = tiny("bert"), examples(12)
    a, b = edit_of(model, seed=1, labels="class"), edit_of(model, seed=2)
    settings = {"draws": 2, "golden": Words(), **QUICK}
    plain = evaluate(model, TOKENIZER, rows, edit=a, **settings)
    both = evaluate(model, TOKENIZER, rows, edit=a.combine(b), **settings)
    with a.applied(model):
        assert evaluate(model, TOKENIZER, rows, **settings).rows() == plain.rows()
        with b.applied(model):
            values = [m.value for m in evaluate(model, TOKENIZER, rows, **settings).measures]
            assert values == pytest.approx([m.value for m in both.measures])
        gated = predict(model, TOKENIZER, rows)
        with pytest.raises(ValueError, match="another is applied to the model now"):
            evaluate(model, TOKENIZER, rows, edit=b, **settings)
    with a.applied(model):
        assert torch.equal(predict(model, TOKENIZER, rows), gated)  # the gates act again after the evaluation
    assert not any(module._forward_pre_hooks for module in model.modules())


def weights_of(model, seed=0, **info):
    generator = torch.Generator().manual_seed(seed)
    return WeightEdit.build(model, {"classifier.weight": (range(20), torch.randn(20, generator=generator))}, info)


def test_an_edit_of_weights_is_measured_beside_the_model_alone():
    model, tests = tiny("bert"), {"a": examples(30, 1, groups=("x", "y")), "b": examples(17, 2)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edit = weights_of(model, labels="group", method="fcr")
    report = evaluate(model, TOKENIZER, tests, edit=edit, golden=Words(), **QUICK)
    plain = evaluate(model, TOKENIZER, tests, golden=Words(), **QUICK)
    assert {m.method for m in report.measures} == {"none", "edit", "threshold", "random"}
    assert {m.labels for m in report.measures if m.method == "edit"} == {"group"}
    assert (report.settings["draws"], report.settings["edit"]["method"]) == (20, "fcr")
    with edit.applied(model):
        for case, rows in tests.items():
            right = slowly(model, TOKENIZER, rows).argmax(1) == rows.targets
            assert report.value(case, "edit") == pytest.approx(100 * float(right.double().mean()))
    for case in tests:
        for metric in ("accuracy", "eta"):
            assert report.value(case, "none", metric) == plain.value(case, "none", metric)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="located: is a control of an edit of neurons"):
        evaluate(model, TOKENIZER, tests, edit=edit, located=NeuronSet(), **QUICK)
    other = tiny("bert", seed=1)
    with pytest.raises(EditMismatch):
        evaluate(other, TOKENIZER, tests, edit=edit, **QUICK)
    evaluate(other, TOKENIZER, tests, edit=edit, force=True, **QUICK)


def test_inside_applied_weights_these_are_measured():
    model, rows = tiny("bert"), examples(12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    a, b = weights_of(model, 1), weights_of(model, 2)
    plain = evaluate(model, TOKENIZER, rows, edit=a, **QUICK)
    both = evaluate(model, TOKENIZER, rows, edit=a.combine(b, "last"), **QUICK)
    with a.applied(model):
        assert evaluate(model, TOKENIZER, rows, **QUICK).rows() == plain.rows()
        inside = predict(model, TOKENIZER, rows)
        with b.applied(model):
            found = evaluate(model, TOKENIZER, rows, **QUICK)
            assert [m.value for m in found.measures] == [m.value for m in both.measures]
            assert found.settings["edit"]["rule"] == "last"
        for edit in (b, edit_of(model)):
            with pytest.raises(ValueError, match="another is applied to the model now"):
                evaluate(model, TOKENIZER, rows, edit=edit, **QUICK)
        with edit_of(model).applied(model), pytest.raises(ValueError, match="an edit of neurons and one of weights"):
            evaluate(model, TOKENIZER, rows, **QUICK)
        assert torch.equal(predict(model, TOKENIZER, rows), inside)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_interrupted_evaluation_leaves_the_weights():
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:  # with the edit
            raise KeyboardInterrupt

    handle = model.classifier.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, TOKENIZER, examples(4), edit=weights_of(model), **QUICK)
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tests": {}}, ValueError, "tests: need at least 1 set, got 0"),
        ({"tests": [1]}, TypeError, "tests: expected Examples or a dict of them, got list"),
        ({"tests": {"a": [1]}}, TypeError, "expected name to Examples, got 'a': list"),
        ({"tests": {1: examples(1)}}, TypeError, "expected name to Examples, got 1"),
        ({"tests": {"average": examples(1)}}, ValueError, "cannot be called 'average'"),
        ({"edit": {}}, TypeError, "edit: expected a NeuronEdit, WeightEdit or WeightDeltas, got dict"),
        ({"draws": 1}, ValueError, "draws: need at least 2, got 1"),
        ({"draws": 2.5}, TypeError, "draws: expected an integer"),
        ({"bootstrap": -1}, ValueError, "bootstrap: need at least 0"),
        ({"seed": -1}, ValueError, "seed: need at least 0"),
        ({"name": "random"}, ValueError, "name: expected a name other than"),
        ({"batch_size": 0}, ValueError, "batch_size: need at least 1"),
        ({"memory": "much"}, ValueError, "memory: expected bytes"),
        ({"max_length": 0}, ValueError, "max_length: need at least 3, got 0"),
        ({"golden": Words(), "top_k": 0}, ValueError, "top_k: need at least 1"),
        ({"golden": Words(("a", "b", "c"), ((), (), ()))}, ValueError, "golden: has labels .*, the model 2 outputs"),
        ({"golden": Words(LABELS[::-1])}, ValueError, "in another order than those of set 'test'"),
    ],
)
def test_mistakes(settings, error, message):
    with pytest.raises(error, match=message):
        evaluate(MODEL, TOKENIZER, **{"tests": examples(2), "progress": False, **settings})


def test_predict_mistakes():
    with pytest.raises(TypeError, match="examples: expected Examples"):
        predict(MODEL, TOKENIZER, [("good", 1)])
    with pytest.raises(ValueError, match="model: has no parameters"):
        predict(torch.nn.Identity(), TOKENIZER, examples(1))


# ---- the report


def report_of(**settings) -> Report:
    tests = {"kept": examples(20, 1, groups=("x", "y")), "broken": examples(12, 2)}
    edit = edit_of(MODEL, labels="class", method="macu")
    return evaluate(MODEL, TOKENIZER, tests, edit=edit, name="paper", draws=3, golden=Words(), **QUICK, **settings)


def test_report():
    report = report_of()
    rows = report.rows()
    keys = {"case", "method", "metric", "value", "spread", "n", "unit", "labels", "seed"}
    assert all(set(row) == keys for row in rows)
    assert len({(row["case"], row["method"], row["metric"]) for row in rows}) == len(rows)
    assert {row["method"] for row in rows} == {"none", "paper", "threshold", "zero-all", "random"}
    assert {row["labels"] for row in rows if row["method"] in ("none", "threshold")} == {"none"}
    assert {row["labels"] for row in rows if row["method"] not in ("none", "threshold")} == {"class"}
    metrics = {"accuracy", "accuracy_low", "accuracy_high", "change", "worst_group", "eta"}
    assert {row["metric"] for row in rows} >= metrics
    table = str(report)
    for line in ("accuracy, percent", "worst group", "random (3 draws)", "kept/x", "broken", "average", "±"):
        assert line in table
    assert max(map(len, table.splitlines())) <= 80
    frame = report.to_frame()
    assert len(frame) == len(report.measures)
    assert {"low", "high"} <= set(frame.columns)
    with pytest.raises(ValueError, match="the report has no 'kept', 'best', 'accuracy'"):
        report.value("kept", "best")
    assert report.settings["draws"] == 3
    assert report.settings["edit"]["method"] == "macu"
    assert report.settings["sets"]["kept"]["n"] == 20
