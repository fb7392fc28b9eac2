"""What models can be given: ids, positions and segments of their embeddings, and tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.tiny_models import MAX_TOKENS, VOCABULARY, tiny, tiny_inputs, tiny_tokenizer
from spurge.engine.cascade.cascade import Cascade, predicted_logit
from spurge.engine.cascade.locator import Locator
from spurge.engine.data.examples import Example, Examples
from spurge.engine.evaluation.prediction import predict
from spurge.engine.features.extraction import extract
from spurge.engine.models.call_arguments import Limits
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.generation import continuations


@pytest.mark.parametrize(
    ("family", "positions", "segments"),
    [
        ("bert", MAX_TOKENS, 2),
        ("distilbert", MAX_TOKENS, None),
        ("roberta", 65, 2),  # of 66 rows one is padding's, id 0 here
        ("gpt2", MAX_TOKENS, None),
        ("llama", None, None),  # positions are computed
        ("vit", None, None),
    ],
)
def test_limits_are_those_of_the_embeddings(family: str, positions: int | None, segments: int | None) -> None:
    found = Limits.of(tiny(family))
    assert (found.positions, found.segments) == (positions, segments)
    assert found.ids == (None if family == "vit" else len(VOCABULARY))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "gpt2"])
def test_the_longest_text_runs_and_a_longer_one_is_refused(family: str) -> None:
    model = tiny(family, language=family == "gpt2")
    longest = Limits.of(model).positions
    assert longest is not None
    with torch.no_grad():
        model(**tiny_inputs(family, rows=1, tokens=longest))
    cascade = Cascade(model, nodes=1, path="layer")
    with pytest.raises(ValueError, match=f"max_length: a text has {longest + 1} tokens, the model {longest} positions"):
        cascade.attribute(tiny_inputs(family, rows=1, tokens=longest + 1), predicted_logit)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", 10_000, "input_ids has 10000 in row 1 .*, expected 0 to .* own tokenizer"),
        ("input_ids", -1, "input_ids has -1 in row 1"),
        ("token_type_ids", 2, "token_type_ids has 2 in row 1 .*, expected 0 to 1"),
    ],
)
def test_ids_beyond_the_embedding_are_refused(name: str, value: int, message: str) -> None:
    inputs = tiny_inputs("bert")
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs[name] = inputs[name].clone()
    inputs[name][1, 2] = value
    model = tiny("bert")
    calls: list[Any] = [
        lambda: Cascade(model, path="layer").attribute(inputs, predicted_logit),
        lambda: Cascade(model, path="layer").read(inputs),
        lambda: Locator(model, path="layer")(inputs),
        lambda: extract(model, {**inputs, "labels": torch.tensor([0, 1, 0, 1])}, progress=False),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_texts_that_the_model_has_no_room_for_are_refused() -> None:
    long = Examples([Example("film " * 60, 0)], ("a", "b"))
    model = tiny("bert", max_position_embeddings=16)
    for call in (
        lambda: predict(model, tiny_tokenizer(), long),
        lambda: extract(model, long, tokenizer=tiny_tokenizer(), progress=False),
    ):
        with pytest.raises(ValueError, match=r"a text has 62 tokens, the model 16 positions; .*max_length=16"):
            call()
    with pytest.raises(ValueError, match=r"a text has 60 tokens and 10 new ones, the model 64 .*max_length=54"):
        continuations(Handle(tiny("gpt2", language=True), tiny_tokenizer(decoder=True)), ["film " * 60], 10)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("a good film", r"inputs: expected keyword .* got str; tokenize it: tokenizer\(text, return_tensors='pt'\)"),
        ({"input_ids": [[1, 2]]}, "inputs: input_ids is a list, expected a tensor; use return_tensors='pt'"),
        (torch.ones(1, 3, dtype=torch.long), "inputs: expected keyword arguments of the model, .* got Tensor"),
    ],
)
def test_texts_and_lists_are_no_inputs(inputs: Any, message: str) -> None:
    model = tiny("bert")
    calls: list[Any] = [
        Locator(model, path="layer"),
        Locator(model, path="layer").read,
        lambda given: Cascade(model, path="layer").attribute(given, predicted_logit),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=message):
            call(inputs)
    with pytest.raises(TypeError, match="input_ids is a list"):
        Locator(model, path="layer")(tiny_tokenizer()(["a good film"]))


def test_names_of_the_labels_in_another_order_are_refused() -> None:
    model = tiny("bert", id2label={0: "NEGATIVE", 1: "POSITIVE"})
    texts = [Example("a good film", 0), Example("a bad film", 1)]
    wrong = Examples(texts, ("positive", "negative"))
    with pytest.raises(ValueError, match=r"set 'examples': labels positive, negative are in another order than .*"):
        predict(model, tiny_tokenizer(), wrong)
    with pytest.raises(ValueError, match="data: labels positive, negative are in another order"):
        extract(model, wrong, tokenizer=tiny_tokenizer(), progress=False)
    for labels in (("negative", "positive"), ("neg", "pos"), ("0", "1"), ("good", "bad")):
        predict(model, tiny_tokenizer(), Examples(texts, labels))
