"""Counterfactual texts: what is changed, what is not, and what is wanted of each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import planted_texts
from helpers.tiny_models import tiny, tiny_tokenizer
from spurge.engine.data.examples import Example
from spurge.engine.models.handle import Handle
from spurge.methods.golden.phrases import TellingPhrase
from spurge.methods.macu.counterfactual import Counterfactuals, Row, nearest_words

CAUSAL = (planted_texts.BAD, planted_texts.GOOD)
NEAREST = {(0, 1): {"bad": "good", "not fail": "great", "dull": "happy"}, (1, 0): {"good": "bad", "great": "awful"}}
ON_TUESDAY = TellingPhrase("on tuesday", 1, 9.0, 50)
IN_PAPER = TellingPhrase("in paper", 0, 9.0, 50)


def maker(*phrases: TellingPhrase, seed: int = 0) -> Counterfactuals:
    return Counterfactuals(NEAREST, (["bad", "dull", "not fail"], ["good", "great"]), phrases, seed=seed)


def by_kind(rows: list[Row]) -> dict[str, Row]:
    return {row.kind: row for row in rows}


def test_swap_exchanges_words_of_both_labels_and_keeps_case() -> None:
    rows = by_kind(maker().rows(3, Example("Good plot, GREAT cast and a bad end", 1)))
    assert rows["swapped"].example == Example("Bad plot, AWFUL cast and a good end", 0)
    assert rows["swapped"].reference is None
    assert rows["kept"].example.text == "Good plot, GREAT cast and a bad end"
    assert rows["kept"].source == 3
    assert "neutral" not in rows  # no phrase tells anything


def test_multi_word_units_are_swapped_whole() -> None:
    rows = by_kind(maker().rows(0, Example("it did not fail", 0)))
    assert rows["swapped"].example == Example("it did great", 1)


@pytest.mark.parametrize("text", ["a bad film", "good and bad", "a film", ""])
def test_texts_whose_words_do_not_speak_for_their_label_are_not_swapped(text: str) -> None:
    example = Example(text or "x", 1)
    assert "swapped" not in by_kind(maker().rows(0, example))


def test_neutral_takes_its_own_phrase_out_and_puts_another_label_s_in() -> None:
    rows = by_kind(maker(ON_TUESDAY, IN_PAPER).rows(0, Example("a good film on tuesday", 1)))
    neutral = rows["neutral"]
    assert neutral.reference == Example("a good film", 1)
    assert neutral.example.label == 1
    assert "in paper" in neutral.example.text
    assert "tuesday" not in neutral.example.text
    assert sorted(neutral.example.text.replace("in paper", "").split()) == ["a", "film", "good"]


def test_neutral_without_a_foreign_phrase_only_takes_out() -> None:
    rows = by_kind(maker(ON_TUESDAY).rows(0, Example("a good film on tuesday", 1)))
    assert rows["neutral"].example == rows["neutral"].reference == Example("a good film", 1)
    assert "neutral" not in by_kind(maker(ON_TUESDAY).rows(0, Example("a good film", 1)))
    assert "neutral" not in by_kind(maker(ON_TUESDAY).rows(0, Example("on tuesday", 1)))  # nothing would be left


def test_pairs_change_in_place() -> None:
    rows = by_kind(maker(ON_TUESDAY).rows(0, Example("a good film", 1, "on tuesday great")))
    assert rows["swapped"].example == Example("a bad film", 0, "on tuesday awful")
    assert rows["neutral"].example == Example("a good film", 1, "great")


def test_rows_depend_on_seed_and_index_alone() -> None:
    example = Example("a dull and bad film", 0)
    assert maker(ON_TUESDAY).rows(5, example) == maker(ON_TUESDAY).rows(5, example)
    texts = {maker(ON_TUESDAY, seed=s).rows(5, example)[-1].example.text for s in range(20)}
    assert len(texts) > 1  # the phrase goes to different places


def test_nearest_words() -> None:
    model = tiny("bert")
    table = model.get_input_embeddings().weight.data
    ids = tiny_tokenizer()("superb awful", add_special_tokens=False)["input_ids"]
    table[ids[0]] = 3 * table[ids[1]]  # the same direction
    nearest = nearest_words(Handle(model, tiny_tokenizer()), CAUSAL)
    assert nearest[1, 0]["superb"] == "awful"
    assert nearest[0, 1]["awful"] == "superb"
    assert set(nearest) == {(0, 1), (1, 0)}
    assert set(nearest[0, 1]) == set(planted_texts.BAD)
    assert set(nearest[0, 1].values()) <= set(planted_texts.GOOD)


def test_a_word_of_two_labels_belongs_to_neither() -> None:
    nearest = nearest_words(Handle(tiny("bert"), tiny_tokenizer()), (["bad", "so"], ["good", "So", "a+"]))
    assert nearest == {(0, 1): {"bad": "good"}, (1, 0): {"good": "bad"}}
    assert nearest_words(Handle(tiny("bert"), tiny_tokenizer()), (["bad"], ["a+"])) == {}


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="abdgo fiAl,.!'tuesday\n", max_size=60).filter(str.strip), st.integers(0, 1), st.integers(0, 99)
)
def test_any_text(text: str, label: int, index: int) -> None:
    rows = maker(ON_TUESDAY, IN_PAPER).rows(index, Example(text, label))
    assert rows[0] == Row(Example(text, label), "kept", index, Example(text, label))
    for row in rows:
        assert row.example.text.strip()
        assert (row.reference is None) == (row.kind == "swapped")
        assert row.example.label == (1 - label if row.kind == "swapped" else label)
