"""Targets: Eq. 6 and 7 against a plain reading, what gradients they have, and jobs of counterfactual rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import planted_texts
from helpers.tiny_models import tiny, tiny_tokenizer
from spurge import reference
from spurge.engine.cascade.cascade import Rows
from spurge.engine.data.examples import Example, Examples, encode
from spurge.engine.data.words import CorrelationTokens, Units, Vocabulary, split_units, unit_scores
from spurge.engine.models.handle import Handle
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.objectives import KindWeights, Likelihood, counterfactual_set
from spurge.methods.macu.proximity import Proximity, ProximityGap, proximity_jobs

TEXTS = ["the film is good and dull", "a lovely sad story", "happy"]


def proximity(**settings: Any) -> tuple[Proximity, torch.Tensor, list[list[str]]]:
    vocabulary, tokenizer = Vocabulary(), tiny_tokenizer()
    inputs = encode(tokenizer, TEXTS)
    units = split_units(tokenizer, inputs, TEXTS, vocabulary, planted_texts.GOLDEN.phrases())
    words = [[vocabulary.word(i) for i in row.tolist() if i >= 0] for row in units.ids]
    return Proximity(units, planted_texts.GOLDEN.bitmap(vocabulary), **settings), inputs["attention_mask"], words


def rows_of(attention: torch.Tensor, example: torch.Tensor, predicted: torch.Tensor) -> Rows:
    return Rows(torch.zeros(len(attention), 2), attention, example, predicted)


def plain(scores: list[float], words: list[str], golden: set[str], k: int) -> float:
    """Eq. 6 as it reads."""
    best = sorted(range(len(words)), key=lambda i: (-scores[i], i))[:k]
    shared = [i for i in best if words[i] in golden]
    return len(shared) / len(best) + (sum(scores[i] for i in shared) / len(shared) if shared else 0.0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_hard_proximity_is_equation_6(k: int) -> None:
    target, mask, words = proximity(form="hard", top_k=k)
    attention = torch.rand(6, mask.shape[1]) * mask.repeat(2, 1)
    predicted = torch.tensor([0, 1, 1]).repeat(2)
    got = target(rows_of(attention, torch.arange(3).repeat(2), predicted))
    for r in range(6):
        own = attention[r, 1 : 1 + len(words[r % 3])]  # all words are single tokens behind [CLS]
        scores = (own / own.sum()).tolist()
        for g, golden in enumerate((planted_texts.BAD, planted_texts.GOOD)):
            label = int(predicted[r])
            sets = (
                set((planted_texts.BAD, planted_texts.GOOD)[label]),
                set(planted_texts.GOLDEN.spurious(planted_texts.LABELS[label])),
            )
            assert math.isclose(float(got[r, g]), plain(scores, words[r % 3], sets[g], k), rel_tol=1e-5), golden


@pytest.mark.parametrize("form", ["soft", "hard"])
def test_blocks_and_any_order_of_rows_agree(form: str) -> None:
    target, mask, _ = proximity(form=form)
    attention, predicted = torch.rand(3, mask.shape[1]) * mask, torch.tensor([0, 1, 1])
    whole = target(rows_of(attention, torch.arange(3), predicted))
    part = target(rows_of(attention[1:], torch.arange(1, 3), predicted[1:]))
    torch.testing.assert_close(part, whole[1:])
    mixed = torch.tensor([2, 0, 0, 1])
    torch.testing.assert_close(target(rows_of(attention[mixed], mixed, predicted[mixed])), whole[mixed])


def test_gradients() -> None:
    attention, predicted = torch.rand(3, 8) + 0.1, torch.tensor([0, 1, 1])
    for form in ("soft", "hard"):
        target, mask, _ = proximity(form=form, top_k=2)
        leaf = (attention * mask).requires_grad_()
        value = target(rows_of(leaf, torch.arange(3), predicted))
        with torch.no_grad():
            torch.testing.assert_close(value, target(rows_of(leaf.detach(), torch.arange(3), predicted)))
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        assert grad.isfinite().all()
        assert grad.any()
    # hard: with C and G held, the value is linear in the normalised scores; move one and compare the second term
    step = torch.zeros_like(leaf)
    step[0, 4] = 1e-4
    moved = target(rows_of((leaf + step).detach(), torch.arange(3), predicted)).sum() - value.sum()
    assert math.isclose(float(moved.detach()), float((grad * step).sum()), rel_tol=0.05, abs_tol=1e-6)


def test_both_forms_are_the_op_s_and_carry_its_gradient() -> None:
    target, mask, _ = proximity(top_k=2)
    leaf = ((torch.rand(6, mask.shape[1]) + 0.1) * mask.repeat(2, 1)).requires_grad_()
    rows = rows_of(leaf, torch.arange(3).repeat(2), torch.tensor([0, 1, 1]).repeat(2))
    hard, soft = target.both(rows)
    assert torch.equal(target(rows), soft)
    scores = unit_scores(leaf, target.units)
    want = reference.proximity(scores, target.units.ids, target.bitmap, torch.tensor([0, 1, 1]), 2, 0.25)
    for got, expected in zip((hard, soft), want, strict=True):
        torch.testing.assert_close(got, expected.float())
        grads = [torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0] for value in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_gap_is_equation_7_and_needs_attention() -> None:
    target, mask, _ = proximity()
    rows = rows_of(torch.rand(3, mask.shape[1]), torch.arange(3), torch.tensor([0, 1, 1]))
    both = target(rows)
    torch.testing.assert_close(ProximityGap(target)(rows), both[:, 0] - both[:, 1])
    with pytest.raises(ValueError, match="attention: proximity reads"):
        target(Rows(rows.logits, None, rows.example, rows.predicted))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda q: sum(q) > 0.1), st.integers(0, 2**31))
def test_likelihood_is_minus_the_divergence(weights: list[float], seed: int) -> None:
    wanted = torch.tensor([weights]) / sum(weights)
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    got = Likelihood(wanted)(Rows(logits, None, torch.tensor([0, 0]), torch.tensor([0, 0])))
    expected = -torch.nn.functional.kl_div(logits.log_softmax(1), wanted.expand(2, -1), reduction="none").sum(1)
    torch.testing.assert_close(got.float(), expected, atol=1e-6, rtol=1e-5)
    assert bool((got <= 1e-6).all())


def test_proximity_jobs_share_one_vocabulary() -> None:
    examples = Examples([Example(text, 0) for text in TEXTS], planted_texts.LABELS)
    jobs = proximity_jobs(
        Handle(tiny("bert"), tiny_tokenizer()),
        examples,
        planted_texts.GOLDEN,
        correlation_tokens=CorrelationTokens(top_k=3),
        batch_size=2,
    )
    assert [len(job.labels) for job in jobs] == [2, 1]
    for job in jobs:
        rows = rows_of(torch.rand(job.inputs["input_ids"].shape), torch.arange(len(job.labels)), job.labels)
        assert job.target(rows).shape == (len(job.labels),)


def test_counterfactual_rows_have_the_answers_wanted_of_them() -> None:
    model, examples = planted_texts.model(), planted_texts.train().sample(60, 0)
    made = counterfactual_set(Handle(model, tiny_tokenizer()), planted_texts.train(), planted_texts.GOLDEN, examples)
    assert set(made.counts()) == {"kept", "swapped", "neutral"}
    assert all(made.counts().values())
    assert any("tuesday" in phrase.text for phrase in made.phrases)
    torch.testing.assert_close(made.wanted.sum(1), torch.ones(len(made.rows), dtype=torch.float64))
    for row, wanted in zip(made.rows, made.wanted, strict=True):
        if row.kind == "swapped":
            assert wanted[row.example.label] == 1
        if row.kind == "neutral":
            assert int(wanted.argmax()) == row.example.label
    jobs = made.jobs(Handle(model, tiny_tokenizer()), batch_size=16, weights=KindWeights(kept=3.0))
    assert sum(len(job.labels) for job in jobs) == len(made.rows)
    assert {float(w) for job in jobs for w in job.weights[job.labels >= 0]} == {3.0}
    kept = made.of(["kept"])
    assert kept.counts() == {"kept": 60, "swapped": 0, "neutral": 0}
    job = kept.jobs(Handle(model, tiny_tokenizer()), batch_size=99)[0]
    with torch.no_grad():  # the unedited model agrees with itself
        logits = model(**job.inputs).logits
    value = job.target(Rows(logits, None, torch.arange(60), logits.argmax(1)))
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)


def test_texts_without_golden_words_are_refused() -> None:
    examples = Examples([Example("well well", 0), Example("street", 1)], planted_texts.LABELS)
    golden = GoldenTokens(planted_texts.LABELS, {"negative": ["bad"], "positive": ["good"]})
    with pytest.raises(ValueError, match="golden: nothing to change in 2 texts"):
        counterfactual_set(Handle(tiny("bert"), tiny_tokenizer()), examples, golden, examples)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kept": -1.0}, "kept: a weight"),
        ({"swapped": float("nan")}, "swapped"),
        ({"swapped": 0, "neutral": 0}, "one of"),
    ],
)
def test_bad_weights(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KindWeights(**given)


def test_empty_units_are_fine() -> None:
    target = Proximity(
        Units(torch.zeros(1, 0, dtype=torch.int32), -torch.ones(1, 4, dtype=torch.int64)),
        torch.zeros(2, 2, 1, dtype=torch.int32),
    )
    assert (
        target(rows_of(torch.rand(2, 4), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))).tolist()
        == [[0, 0]] * 2
    )


def test_rows_of_any_order_after_rows_in_turn() -> None:
    target, mask, _ = proximity(form="soft")
    attention, predicted = torch.rand(3, mask.shape[1]) * mask, torch.tensor([0, 1, 1])
    whole = target(rows_of(attention, torch.arange(3), predicted))
    mixed = torch.tensor([2, 0, 2])
    rows = Rows(torch.zeros(3, 2), attention[mixed], mixed, predicted[mixed], in_turn=False)
    torch.testing.assert_close(target(rows), whole[mixed])
