"""Scores of texts: probabilities of a classifier, numbers of a callable, and a row for everything that is wrong."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny_models import DECODERS, VOCABULARY, tiny, tiny_tokenizer, tokenizer_for
from spurge.engine.recordings.outcomes import score_texts

TEXTS = ["the film was good", "", "never dull and never boring , a great story", "walking", "sad music"]


def score(scorer, texts=TEXTS, **settings):
    return score_texts(scorer, texts, **({"progress": False} | settings))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("label", [0, 2])
def test_a_classifier_gives_the_probability_of_a_label(family, label):
    model, tokenizer = tiny(family, labels=3), tokenizer_for(family)
    found = score(model, label=label, tokenizer=tokenizer, batch_size=2)
    assert (found.shape, found.dtype) == ((5,), torch.float64)
    for value, text in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(value, logits.double().softmax(0)[label], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_with_a_head(family):
    model, tokenizer = tiny(family), tokenizer_for(family)
    texts = [text for text in TEXTS if text]
    together, alone = (score(model, texts, tokenizer=tokenizer, batch_size=size) for size in (4, 1))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="texts: row 1 has no token, got ''"):
        score(model, tokenizer=tokenizer)


def test_labels_that_may_hold_at_once_have_each_a_probability():
    model, tokenizer = tiny("bert", labels=3, problem_type="multi_label_classification"), tokenizer_for("bert")
    several = torch.stack([score(model, label=label, tokenizer=tokenizer) for label in range(3)], 1)
    model.config.problem_type = None
    single = torch.stack([score(model, label=label, tokenizer=tokenizer) for label in range(3)], 1)
    torch.testing.assert_close(single.sum(1), torch.ones(5).double())
    torch.testing.assert_close((several / (1 - several)).log().softmax(1), single, rtol=1e-6, atol=1e-9)


def test_one_output_is_a_probability_only_where_the_model_says_so():
    model, tokenizer = tiny("bert", labels=1), tokenizer_for("bert")
    with pytest.raises(ValueError, match="scorer: has one output"):
        score(model, label=0, tokenizer=tokenizer)
    model.config.problem_type = "multi_label_classification"
    assert 0 < float(score(model, label=0, tokenizer=tokenizer)[0]) < 1


def test_the_classifier_is_left_as_it_was():
    model, tokenizer = tiny("bert").train(), tokenizer_for("bert")
    one, two = score(model, tokenizer=tokenizer), score(model, tokenizer=tokenizer)
    assert torch.equal(one, two)  # no dropout
    with pytest.raises(ValueError, match="label: must lie in 0 to 1, got 2"):
        score(model, label=2, tokenizer=tokenizer)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_long_texts_are_cut():
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    assert score(model, ["good bad"], tokenizer=tokenizer, max_length=3) == score(model, ["good"], tokenizer=tokenizer)


@pytest.mark.parametrize(
    "make",
    [list, tuple, np.array, torch.tensor, lambda n: torch.tensor(n, dtype=torch.float16), lambda n: np.array(n, "f2")],
)
def test_a_callable_gives_its_numbers_in_the_order_of_the_texts(make):
    calls = []

    def length(texts):
        calls.append(list(texts))
        lengths = make([len(text) for text in texts])
        texts.clear()  # the batch is the callable's own
        return lengths

    found = score(length, batch_size=2)
    assert found.dtype == torch.float64
    assert found.tolist() == [len(text) for text in TEXTS]
    assert calls == [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]


def test_scores_carry_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    assert not score(lambda texts: weight.expand(len(texts)) * 2).requires_grad


def test_a_module_that_reads_texts_is_a_callable():
    class Length(nn.Module):
        def forward(self, texts):
            return [len(text) for text in texts]

    assert score(Length(), ["abc"]).tolist() == [3]


def test_a_module_of_ones_own_with_a_tokenizer_is_a_classifier():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(len(VOCABULARY), 2)

        def forward(self, input_ids, attention_mask, token_type_ids):
            return SimpleNamespace(logits=(self.table(input_ids) * attention_mask[..., None]).sum(1))

    found = score(Own(), tokenizer=tokenizer_for("bert"))
    assert bool(((found > 0) & (found < 1)).all())


@pytest.mark.parametrize(
    "answer, error, match",
    [
        (lambda n: [0.5] * (n - 1), ValueError, r"expected 2 numbers for rows 2 to 3, got shape \(1,\)"),
        (lambda n: [[0.5]] * n, ValueError, r"expected 2 numbers for rows 2 to 3, got shape \(2, 1\)"),
        (lambda n: 0.5, ValueError, r"expected 2 numbers for rows 2 to 3, got shape \(\)"),
        (lambda n: [], ValueError, r"got shape \(0,\)"),
        (lambda n: [0.5, float("nan")], ValueError, "expected finite numbers, got nan at row 3"),
        (lambda n: torch.tensor([-torch.inf, 0]), ValueError, "expected finite numbers, got -inf at row 2"),
        (lambda n: None, TypeError, "expected numbers for rows 2 to 3, got None"),
        (lambda n: [None] * n, TypeError, "expected numbers for rows 2 to 3, got None"),
        (lambda n: ["0.5"] * n, TypeError, "expected numbers for rows 2 to 3, got .*0.5"),
        (lambda n: [{"label": "toxic", "score": 0.5}] * n, TypeError, "rows 2 to 3, got {'label': 'toxic'"),
        (lambda n: [[0.5], [0.5, 0.5]], TypeError, r"expected numbers for rows 2 to 3, got \[\[0.5\]"),
        (lambda n: [1j] * n, TypeError, r"expected real numbers for rows 2 to 3, got torch\.complex128"),
        (lambda n: (0.5 for _ in range(n)), TypeError, "rows 2 to 3, got <generator"),
    ],
)
def test_what_a_callable_may_not_give(answer, error, match):
    calls = []

    def scorer(texts):
        calls.append(texts)
        return [0.0] * len(texts) if len(calls) == 1 else answer(len(texts))

    with pytest.raises(error, match=match):
        score(scorer, TEXTS[:4], batch_size=2)


def test_infinite_logits_are_refused_with_their_row():
    model, tokenizer = tiny("bert"), tokenizer_for("bert")

    def broken(module, args, output):
        output.logits[:, 0] = -torch.inf
        return output

    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[VOCABULARY.index("sad")] = torch.inf
    with pytest.raises(ValueError, match="not finite for the text at row 4"):
        score(model, tokenizer=tokenizer)
    with model.register_forward_hook(broken), pytest.raises(ValueError, match="not finite for the text at row 0"):
        score(model, ["good"], tokenizer=tokenizer)  # softmax alone would make 1 of it


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: score(tiny("bert")), TypeError, "tokenizer: BertForSequenceClassification needs its tokenizer"),
        (lambda: score(len, tokenizer=tiny_tokenizer()), TypeError, "tokenizer: is for a sequence classifier"),
        (lambda: score(3), TypeError, "scorer: expected a callable or a sequence classifier, got int"),
        (lambda: score(len, "one"), TypeError, "texts: expected a sequence of str, got str"),
        (lambda: score(len, []), ValueError, "texts: need at least 1, got 0"),
        (lambda: score(len, ["a", None]), TypeError, "texts: expected str, got NoneType at row 1"),
        (lambda: score(len, batch_size=0), ValueError, "batch_size: need at least 1, got 0"),
        (lambda: score(tiny("bert"), tokenizer=tiny_tokenizer(), label=-1), ValueError, "label: need at least 0"),
        (lambda: score(tiny("bert").bert, tokenizer=tiny_tokenizer()), ValueError, "model: expected logits"),
    ],
)
def test_what_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
