"""Controls of an evaluation: a moved threshold, random weights, deleted words; overlapping groups, side effects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_models import WORDS, tiny, tiny_tokenizer
from spurge.engine.base.statistics import area_under_curve, holm, paired_p, resample_counts, resampled_sums
from spurge.engine.data.examples import Example, Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_deltas import Dense, WeightDeltas
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.evaluation import evaluated
from spurge.engine.evaluation.evaluation import evaluate, predict
from spurge.engine.evaluation.groups import compare
from spurge.engine.evaluation.numbers import Answers, Judged, summarize, threshold_of
from spurge.engine.evaluation.random_edits import draw_seed, random_heads, random_weights
from spurge.engine.evaluation.report import Report
from spurge.engine.evaluation.threshold import matched_shift, moved
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites

MODEL, TOKENIZER = tiny("bert"), tiny_tokenizer()
QUICK: dict[str, Any] = {"progress": False, "bootstrap": 50}
LABELS = ("negative", "positive")


def examples(n: int = 40, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(3, 10))) for _ in range(n)]
    names = (("x",), ("y",), ("x", "y"), ())
    return Examples([Example(text, i % 2, group=names[i // 2 % 4]) for i, text in enumerate(texts)], LABELS)


def bias_edit(amount: float) -> WeightEdit:
    bias = MODEL.classifier.bias.detach().clone()
    bias[1] += amount
    return WeightEdit.build(MODEL, {"classifier.bias": bias})


def measures(report: Report) -> dict[tuple[str, str, str], Any]:
    return {(m.case, m.method, m.metric): m for m in report.measures}


# ---- the moved threshold


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10**6), st.data())
def test_a_shift_of_two_labels_meets_the_counts(n: int, seed: int, data: Any) -> None:
    logits = np.random.default_rng(seed).normal(size=(n, 2))
    first = data.draw(st.integers(0, n))
    found = moved(logits, matched_shift(logits, np.array([first, n - first]))).argmax(1)
    assert (found == 0).sum() == first
    assert np.isfinite(matched_shift(logits, np.array([first, n - first]))).all()


def test_a_shift_of_more_labels_nearly_meets_them() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 5)) * 3
    for wanted in (np.array([400] * 5), np.array([1000, 700, 200, 90, 10]), np.array([0, 1200, 0, 500, 300])):
        found = np.bincount(moved(logits, matched_shift(logits, wanted)).argmax(1), minlength=5)
        assert np.abs(found - wanted).max() <= 12
        assert (found[wanted == 0] == 0).all()


def test_an_edit_of_the_bias_is_a_moved_threshold_and_the_report_says_so() -> None:
    rows = examples()
    margins = predict(MODEL, TOKENIZER, rows)
    amount = float((margins[:, 0] - margins[:, 1]).median())  # half of the rows change sides, or near
    report = evaluate(MODEL, TOKENIZER, {"a": rows, "b": examples(30, 1)}, edit=bias_edit(amount), name="bias", **QUICK)
    found = measures(report)
    for case in ("a", "b"):
        assert report.value(case, "threshold") == report.value(case, "bias")
        for group in ("", "/x", "/y"):
            key = f"{case}{group}"
            assert report.value(key, "bias", "auc") == pytest.approx(report.value(key, "none", "auc"))
    assert found["all", "bias", "by_threshold"].value == 100
    assert found["all", "bias", "by_threshold"].n == 70
    assert found["all", "bias", "by_constant"].value == pytest.approx(100)
    assert "bias mostly moves the threshold" not in report.notes[0]
    assert report.notes[0].startswith("this edit mostly moves the threshold: a constant")
    assert "this edit mostly moves the threshold" in str(report)
    assert report._repr_html_().count("<table>") == len(list(report.tables()))
    plain = evaluate(MODEL, TOKENIZER, rows, edit=bias_edit(amount), controls=False, **QUICK)
    assert {m.method for m in plain.measures} == {"none", "edit"}
    assert plain.notes == []


def test_an_edit_that_turns_answers_both_ways_is_none() -> None:
    targets = np.array([0, 1] * 20)
    plain = np.stack([np.zeros(40), np.where(np.arange(40) < 20, 1.0, -1.0)], 1)  # the first half answers 1
    edited = np.stack([np.zeros(40), np.where(targets == 1, 1.0, -1.0)], 1)  # as many answers, others
    found = {"test": {"none": [Answers.of(plain)], "edit": [Answers.of(edited)]}}
    threshold, _ = threshold_of(found, "edit")
    assert threshold is not None
    report = Report(
        tuple(summarize({"test": Judged(targets)}, found, {}, 0, 0, thresholds={"edit": threshold})), {"name": "edit"}
    )
    assert report.value("test", "edit", "by_threshold") == 0
    assert report.notes == []


def test_an_edit_of_some_texts_alone_is_told_from_a_moved_threshold() -> None:
    targets = np.array([1] * 30 + [0] * 30)
    plain = np.stack([np.zeros(60), np.where(targets == 1, -1.0, -9.0)], 1)
    edited = plain + np.stack([np.zeros(60), np.where(targets == 1, 2.0, 0.0)], 1)  # only half of the rows move
    found = {"test": {"none": [Answers.of(plain)], "edit": [Answers.of(edited)]}}
    threshold, _ = threshold_of(found, "edit")
    assert threshold is not None
    rows = summarize({"test": Judged(targets)}, found, {}, 20, 0, thresholds={"edit": threshold})
    report = Report(tuple(rows), {"name": "edit"})
    assert report.value("test", "edit", "by_threshold") == 100
    assert report.value("test", "edit", "by_constant") == pytest.approx(50)
    (note,) = report.notes
    assert note.startswith(
        "a constant added to the logits explains 100 % of the answers that this edit changes, but only 50 %"
    )


def test_compare_holds_layers_beside_a_moved_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    values = torch.randn(200, 3, generator=generator) + labels[:, None]
    head = Head(torch.tensor([[-1.0, 0, 0], [1, 0, 0]]), torch.zeros(2))
    test = Features(values, labels, head, groups=torch.arange(200) % 4 // 2, group_names=("g", "h"))
    shifted = head.with_(bias=torch.tensor([0.0, 1.5]))
    other = head.with_(weight=torch.tensor([[0.0, -1, 0], [0, 1, 0]]))
    report = compare({"a": test, "b": test}, {"ERM": head, "bias": shifted, "other": other}, bootstrap=60)
    assert report.value("all", "bias", "by_threshold") == 100
    assert report.value("all", "other", "by_threshold") < 50
    assert report.value("a", "bias: threshold") == report.value("a", "bias")
    assert [note.split(" mostly")[0] for note in report.notes] == ["bias"]
    assert report.value("a/g", "ERM", "auc") == pytest.approx(report.value("a/g", "bias", "auc"))
    p = {m.method: m.p for m in report.measures if (m.case, m.metric) == ("a", "change")}
    assert p["bias"] is not None
    assert 0 < p["bias"] <= 1
    alone = compare(test, {"ERM": head, "bias": shifted}, bootstrap=60, controls=False)
    assert {m.method for m in alone.measures} == {"ERM", "bias"}


# ---- areas, p, Holm


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=20))
def test_the_area_is_the_share_of_pairs(rows: list[tuple[int, bool, int]]) -> None:
    scores, positive, counts = (np.array(column) for column in zip(*rows, strict=True))
    pairs = [
        (a > b) + (a == b) / 2
        for a, up, times in rows
        for b, down, others in rows
        if up and not down
        for _ in range(times * others)
    ]
    found = area_under_curve(scores.astype(float), positive, counts[None].astype(float))[0]
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)


def test_p_of_paired_differences_and_holm() -> None:
    rng = np.random.default_rng(0)
    low = []
    for _ in range(300):  # no difference: p is at most 0.05 in about one of twenty
        own = rng.normal(size=(40, 1))
        p = paired_p(resampled_sums(own, 199, rng)[1:, 0])
        assert p is not None
        low.append(p <= 0.05)
    assert 0.02 < np.mean(low) < 0.10
    assert paired_p(np.zeros(9)) == 1
    assert paired_p(np.array([])) is None
    assert holm(np.array([0.04, 0.01, 0.5])).tolist() == pytest.approx([0.08, 0.03, 0.5])


def test_resamples_are_the_same_for_whoever_asks() -> None:
    values = np.random.default_rng(1).random((30, 2))
    counts = np.concatenate(list(resample_counts(30, 20, np.random.default_rng(5))))
    assert np.allclose(counts @ values, resampled_sums(values, 20, np.random.default_rng(5)))


def test_changes_of_sets_have_p_that_holm_adjusts() -> None:
    targets = np.zeros(60, int)
    right, wrong = np.tile([1.0, 0.0], (60, 1)), np.tile([0.0, 1.0], (60, 1))
    half = np.where(np.arange(60)[:, None] % 2 == 0, right, wrong)
    found = {c: {"none": [Answers.of(half)], "edit": [Answers.of(right if c == "a" else half)]} for c in "ab"}
    report = Report(tuple(summarize({c: Judged(targets) for c in "ab"}, found, {}, 99, 0)), {"seed": 0})
    p = {m.case: m.p for m in report.measures if m.metric == "change"}
    assert p["a"] == pytest.approx(2 * 2 / 100)  # the smallest that 99 resamples can give, of two tests
    assert p["b"] == 1
    assert "+50.0" in str(report)
    assert "* p < 0.05: paired bootstrap, Holm over sets" in str(report)
    assert {row["metric"] for row in report.rows()} >= {"change_p", "change_low"}


# ---- groups that overlap


def test_groups_may_overlap() -> None:
    rows = examples()
    assert rows.groups == ("x", "y")
    right = (predict(MODEL, TOKENIZER, rows).argmax(1) == rows.targets).double()
    report = evaluate(MODEL, TOKENIZER, rows, **QUICK)
    means = []
    for group in "xy":
        member = torch.tensor([group in row.groups for row in rows])
        means.append(100 * float(right[member].mean()))
        assert report.value(f"test/{group}", "none") == pytest.approx(means[-1])
        assert measures(report)[f"test/{group}", "none", "accuracy"].n == int(member.sum())
        assert len(rows.in_group(group)) == int(member.sum())
    assert report.value("test", "none", "mean_group") == pytest.approx(np.mean(means))
    assert report.value("test", "none", "worst_group") == pytest.approx(min(means))
    assert report.value("test", "none") == pytest.approx(100 * float(right.mean()))


# ---- the words deleted, and what should stay


def test_deleted_words_and_side_effects() -> None:
    rows, cue = examples(), [WORDS[0], WORDS[1]]
    untouched = Examples([Example("the plot", 0), Example("a movie so", 1)], LABELS)
    edit = WeightEdit.build(MODEL, {"classifier.weight": torch.randn(MODEL.classifier.weight.shape)})
    report = evaluate(MODEL, TOKENIZER, rows, edit=edit, cue=cue, untouched=untouched, draws=2, **QUICK)
    held = [any(word in cue for word in row.text.split()) for row in rows]
    assert 3 < sum(held) < 37
    shorter = [" ".join(w for w in row.text.split() if w not in cue) or row.text for row in rows]
    deleted = Examples([Example(text, row.label) for text, row in zip(shorter, rows, strict=True)], LABELS)
    right = predict(MODEL, TOKENIZER, deleted).argmax(1) == rows.targets
    assert report.value("test", "deleted") == pytest.approx(100 * float(right.double().mean()))
    found = measures(report)
    assert found["test (no cue)", "deleted", "agreement"].value == 100
    assert found["test (no cue)", "deleted", "divergence"].value == 0
    free = rows.subset([i for i, has in enumerate(held) if not has])
    for case, texts in (("test (no cue)", free), ("untouched", untouched)):
        before = predict(MODEL, TOKENIZER, texts).double()
        with edit.applied(MODEL):
            after = predict(MODEL, TOKENIZER, texts).double()
        same = 100 * float((before.argmax(1) == after.argmax(1)).double().mean())
        kl = torch.nn.functional.kl_div(after.log_softmax(1), before.softmax(1), reduction="batchmean")
        assert found[case, "edit", "agreement"].value == pytest.approx(same)
        assert found[case, "edit", "divergence"].value == pytest.approx(float(kl), abs=1e-6)
        assert (found[case, "edit", "agreement"].n, found[case, "edit", "divergence"].unit) == (len(texts), "nats")
    assert not any(m.case == "untouched" and m.metric == "accuracy" for m in report.measures)
    assert report.settings["cue"] == cue


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cue": "so"}, TypeError, "cue: expected a sequence of words, got str"),
        ({"cue": [1]}, TypeError, "cue: expected words, got int"),
        ({"cue": ["a+"]}, ValueError, r"cue: expected words or phrases, got 'a\+'"),
        ({"untouched": [1]}, TypeError, "untouched: expected Examples, got list"),
        ({"beside": {"other": 1}}, TypeError, "beside: expected name to an edit, got 'other': int"),
        ({"beside": {"threshold": bias_edit(1)}}, ValueError, "beside: expected a name other than none, threshold"),
        ({"name": "deleted"}, ValueError, "name: expected a name other than"),
        ({"tests": {"all": examples(2), "b": examples(2)}}, ValueError, "a set cannot be called 'all'"),
        ({"tests": {"untouched": examples(2)}, "untouched": examples(2)}, ValueError, "cannot be called 'untouched'"),
    ],
)
def test_mistakes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(MODEL, TOKENIZER, **{"tests": examples(2), "progress": False, **change})


# ---- random weights, other edits, what a repair states


def test_random_weights_keep_rows_and_sizes() -> None:
    weight = MODEL.classifier.weight.detach()
    width = weight.shape[1]
    edit = WeightEdit.build(MODEL, {"classifier.weight": ([3, 5, width + 3], weight.view(-1)[[3, 5, width + 3]] + 1)})
    places = edit.fit(MODEL)
    columns = set()
    for draw in range(30):
        indices, values = random_weights(edit, places, draw_seed(0, draw))["classifier.weight"]
        assert (indices // width).tolist() == [0, 0, 1]
        assert torch.allclose(values - weight.view(-1)[indices], torch.ones(3), atol=1e-6)
        assert not {3, 5} & set((indices[:2] % width).tolist())
        columns |= set((indices % width).tolist())
    assert len(columns) > 5
    changes = torch.randn(weight.shape)
    whole = WeightEdit.build(MODEL, {"classifier.weight": weight + changes})
    indices, values = random_weights(whole, whole.fit(MODEL), 0)["classifier.weight"]
    assert indices.tolist() == list(range(weight.numel()))
    drawn = (values.view_as(weight) - weight).sort(1).values
    torch.testing.assert_close(drawn, changes.sort(1).values, atol=1e-5, rtol=0)


def test_random_heads_keep_rows_and_sizes() -> None:
    before = Head(torch.zeros(2, 9), torch.zeros(2))
    weight = torch.zeros(2, 9)
    weight[0, 3], weight[1, :2] = 5.0, torch.tensor([-1.0, 2.0])
    for head in random_heads(before, before.with_(weight=weight), 20, 0):
        assert [sorted(row[row != 0].tolist()) for row in head.weight] == [[5.0], [-1.0, 2.0]]
        assert head.weight[0, 3] == 0
        assert (head.weight[1, :2] == 0).all()
    with pytest.raises(ValueError, match="at least 1 draw"):
        random_heads(before, before, 0, 0)


def test_random_last_layers_are_the_model_with_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"a": examples(), "b": examples(9, 3)}
    edit = WeightEdit.build(MODEL, {"classifier.weight": (range(6), torch.randn(6) * 3)})
    quick = evaluate(MODEL, TOKENIZER, rows, edit=edit, draws=3, **QUICK)
    monkeypatch.setattr(evaluated, "of_last_layer", lambda *_: False)
    slow = evaluate(MODEL, TOKENIZER, rows, edit=edit, draws=3, **QUICK)
    assert [m.value for m in quick.measures] == pytest.approx([m.value for m in slow.measures], abs=1e-3)
    assert quick.settings["draws"] == 3


def test_other_edits_stand_beside_and_a_repair_states_its_controls() -> None:
    site = find_sites(MODEL)[0].name
    gates = NeuronEdit.build(MODEL, NeuronSet({site: [0, 1, 2]}), 0.0)
    stated = {"controls": {"no-swaps": {"alpha": 1.0, "home": 90.0, "swapped": 41.5}}, "labels": "class"}
    repair = WeightDeltas.build(MODEL, {"classifier.bias": Dense(torch.tensor([0.0, 2.0]))}, stated)
    rows = examples()
    report = evaluate(MODEL, TOKENIZER, rows, edit=repair, beside={"gates": gates}, **QUICK)
    assert {m.method for m in report.measures} == {"none", "edit", "gates", "threshold", "gates: threshold"}
    with gates.applied(MODEL):
        right = predict(MODEL, TOKENIZER, rows).argmax(1) == rows.targets
    assert report.value("test", "gates") == pytest.approx(100 * float(right.double().mean()))
    assert any("the same steps without swaps: 90.0 % of its dev texts right, 41.5 %" in note for note in report.notes)


def test_an_edit_beside_has_the_controls_that_it_has_alone() -> None:
    layer = WeightEdit.build(MODEL, {"classifier.weight": (range(6), torch.randn(6) * 3)}, {"labels": "group"})
    rows = {"a": examples(), "b": examples(9, 3)}
    alone = measures(evaluate(MODEL, TOKENIZER, rows, edit=layer, draws=3, **QUICK))
    report = evaluate(MODEL, TOKENIZER, rows, edit=bias_edit(1), beside={"layer": layer}, draws=3, **QUICK)
    both = measures(report)
    names = {"edit": "layer", "threshold": "layer: threshold", "random": "layer: random"}
    for (case, method, metric), own in alone.items():
        if method in names:
            other = both[case, names[method], metric]
            assert (other.value, other.spread, other.labels) == (own.value, own.spread, own.labels)
    assert ("all", "layer", "by_threshold") in both
    assert both["all", "edit", "by_threshold"].value == pytest.approx(100)
    assert "layer: random (3 draws)" in str(report)
    repair = WeightDeltas.build(MODEL, {"classifier.weight": Dense(torch.ones(MODEL.classifier.weight.shape))})
    plain = evaluate(MODEL, TOKENIZER, rows, edit=layer, beside={"repair": repair}, controls=False, **QUICK)
    assert {m.method for m in plain.measures} == {"none", "edit", "repair"}


def test_groups_are_crossed_with_labels_for_the_worst_and_whole_for_the_area() -> None:
    rows = examples()
    right = (predict(MODEL, TOKENIZER, rows).argmax(1) == rows.targets).double()
    plain, report = (evaluate(MODEL, TOKENIZER, rows, cross_groups=cross, **QUICK) for cross in (False, True))
    cells = {}
    for group in "xy":
        for number, label in enumerate(LABELS):
            member = torch.tensor([group in row.groups and row.label == number for row in rows])
            cells[f"test/{label}/{group}"] = 100 * float(right[member].mean())
    found = measures(report)
    assert {case: found[case, "none", "accuracy"].value for case in cells} == pytest.approx(cells)
    assert report.value("test", "none", "worst_group") == pytest.approx(min(cells.values()))
    for case, metric in (("test/x", "auc"), ("test/y", "auc"), ("test", "mean_group_auc")):
        assert found[case, "none", metric] == measures(plain)[case, "none", metric]
    assert ("test/x", "none", "accuracy") not in found
