"""Prompts: every text in its template, tokenized as one, and words of the text alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import WORDS, tiny_tokenizer
from spurge.engine.data.examples import encode
from spurge.engine.data.words import Vocabulary, split_units
from spurge.engine.models.prompt_template import Prompted, split_template
from spurge.engine.recordings.padding import padded

TEMPLATE = "the story is; {text}. it was"
PAIRED = "film; {text}. actor; {pair}. it was"


def prompted(template: str = TEMPLATE, side: str = "right", decoder: bool = True) -> Prompted:
    return Prompted(tiny_tokenizer(decoder=decoder, padding_side=side), template)


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as GPT-2's: every byte a token, blanks belong to the word behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", *alphabet, "Ġg", "Ġgo", "Ġgoo", "Ġgood"])}
    merges = [("Ġ", "g"), ("Ġg", "o"), ("Ġgo", "o"), ("Ġgoo", "d")]
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")


def units_of(tokenizer: Any, texts: list[Any], **settings: Any) -> list[list[tuple[str, list[int]]]]:
    """Each text's words with the positions of their tokens."""
    inputs, vocabulary = encode(tokenizer, texts, **settings), Vocabulary()
    units = split_units(tokenizer, inputs, texts, vocabulary)
    return [
        [
            (vocabulary.word(int(number)), (columns == u).nonzero()[:, 0].tolist())
            for u, number in enumerate(ids)
            if number >= 0
        ]
        for ids, columns in zip(units.ids, units.token_unit, strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_are_those_of_the_whole_prompt(side: str) -> None:
    texts = ["the film was good", "walking", "great music and dull food"]
    tokenizer = prompted(side=side)
    inputs = encode(tokenizer, texts)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].dtype == torch.int64
    prompts = [TEMPLATE.format(text=text) for text in texts]
    want = tokenizer.tokenizer(prompts, padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], want["input_ids"])
    assert torch.equal(inputs["attention_mask"], want["attention_mask"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_text_has_words(side: str) -> None:
    """The template's own film and story are none, and a sub-word belongs to its word."""
    found = units_of(prompted(side=side), ["film story", "the walking actor, good"])
    start = [4 if side == "right" else 8, 4]
    assert found[0] == [("film", [start[0]]), ("story", [start[0] + 1])]
    assert found[1] == [
        ("the", [start[1]]),
        ("walking", [start[1] + 1, start[1] + 2]),
        ("actor", [start[1] + 3]),
        ("good", [start[1] + 5]),
    ]


def test_pairs_keep_their_two_texts_apart() -> None:
    tokenizer = prompted(PAIRED)
    inputs = encode(tokenizer, [("good film", "bad actor")])
    (record,) = inputs.encodings or []
    assert record.sequence_ids == [None, None, 0, 0, None, None, None, 1, 1, None, None, None]
    assert record.offsets[2:4] == [(0, 4), (5, 9)]
    assert record.offsets[7:9] == [(0, 3), (4, 9)]
    (found,) = units_of(tokenizer, [("good film", "bad actor")])
    assert [word for word, _ in found] == ["good", "film", "bad", "actor"]


def test_a_token_on_the_border_is_the_texts() -> None:
    """Byte-level tokenizers join the template's blank with the text's first letters."""
    tokenizer = Prompted(byte_level(), "so {text}?")
    inputs = encode(tokenizer, ["good"])
    (record,) = inputs.encodings or []
    assert record.ids == tokenizer.tokenizer("so good?")["input_ids"]
    assert record.sequence_ids == [None, None, 0, None]
    assert record.offsets[2] == (0, 4)
    assert units_of(tokenizer, ["good"]) == [[("good", [2])]]


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=12), around=st.sampled_from(["{text}", "a {text}", "{text}b", "é{text}\n"]))
def test_offsets_lie_in_the_text(text: str, around: str) -> None:
    tokenizer = Prompted(byte_level(), around)
    made = tokenizer([text])
    (record,) = made.encodings or []
    covered: set[int] = set()
    for sequence, (start, end) in zip(record.sequence_ids, record.offsets, strict=True):
        assert (start, end) == (0, 0) if sequence is None else 0 <= start < end <= len(text)
        covered |= set(range(start, end))
    assert covered == set(range(len(text)))


def test_a_text_may_hold_what_means_something_to_a_template_or_a_tokenizer() -> None:
    tokenizer = prompted("it was {text} or {pair}")
    inputs = encode(tokenizer, [("good {pair} film", "bad"), ("bad [PAD] film", "{text}")])
    plain = tokenizer.tokenizer(["it was good {pair} film or bad", "it was bad [PAD] film or {text}"], padding=True)
    assert inputs["input_ids"].tolist() == plain["input_ids"]
    assert inputs["attention_mask"].tolist() == plain["attention_mask"]
    assert inputs["input_ids"][1, 3] == tokenizer.pad_token_id
    assert inputs["attention_mask"][1, 3] == 1


def test_no_special_token_stands_behind_the_prompt() -> None:
    """The answer follows there: an end token would be read in its place."""
    inputs = encode(prompted(decoder=False), ["good film"])
    assert inputs["input_ids"][0, 0] == tiny_tokenizer().cls_token_id
    assert inputs["input_ids"][0, -1] == tiny_tokenizer().convert_tokens_to_ids("was")


# ---- truncation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [8, 9, 11])
def test_truncation_shortens_the_text_alone(limit: int) -> None:
    text = "good great superb lovely film"
    tokenizer = prompted()
    inputs = encode(tokenizer, [text, "bad"], max_length=limit)
    assert inputs["input_ids"].shape == (2, limit)
    words = text.split()[: limit - 7]
    want = tokenizer.tokenizer(TEMPLATE.format(text=" ".join(words)))["input_ids"]
    assert inputs["input_ids"][0].tolist() == want
    assert [word for word, _ in units_of(tokenizer, [text], max_length=limit)[0]] == words


def test_the_longer_text_of_a_pair_is_cut() -> None:
    tokenizer = prompted(PAIRED)
    found = units_of(tokenizer, [("good great superb lovely", "bad")], max_length=11)
    assert [word for word, _ in found[0]] == ["good", "great", "bad"]
    found = units_of(tokenizer, [("bad", "good great superb lovely")], max_length=11)
    assert [word for word, _ in found[0]] == ["bad", "good", "great"]
    found = units_of(tokenizer, [("bad film story", "good great superb")], max_length=11)
    assert [word for word, _ in found[0]] == ["bad", "film", "good"]


def test_a_template_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_length: the template .* 7 tokens.*expected more than 7, got 7"):
        encode(prompted(), ["good"], max_length=7)
    assert encode(prompted(), ["good"], max_length=8)["input_ids"].shape == (1, 8)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join), min_size=1, max_size=4),
    limit=st.integers(8, 20),
    side=st.sampled_from(["left", "right"]),
)
def test_truncated_and_padded_prompts_are_found_again(texts: list[str], limit: int, side: str) -> None:
    """Units of inputs whose records are lost are those of the records, however much was cut."""
    tokenizer = prompted(side=side)
    inputs = encode(tokenizer, texts, max_length=limit)
    assert inputs["input_ids"].shape[1] <= limit
    kept = split_units(tokenizer, inputs, texts, Vocabulary())
    again = split_units(tokenizer, dict(inputs), texts, Vocabulary())
    assert torch.equal(kept.ids, again.ids)
    assert torch.equal(kept.token_unit, again.token_unit)
    for text, row in zip(texts, kept.counts.tolist(), strict=True):
        assert row == min(len(text.split()), limit - 7)


# ---- standing in for a tokenizer ---------------------------------------------------------------------------------


def test_words_by_themselves_are_the_plain_tokenizers() -> None:
    words, alone = [" good", " not fail"], {"add_special_tokens": False}
    assert prompted()(words, **alone)["input_ids"] == tiny_tokenizer(decoder=True)(words, **alone)["input_ids"]


def test_what_is_not_told_is_the_tokenizers_own() -> None:
    tokenizer, plain = prompted(side="left"), tiny_tokenizer(decoder=True, padding_side="left")
    assert tokenizer.is_fast
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length) == ("[PAD]", "left", 64)
    assert tokenizer.decode([7]) == plain.decode([7])
    assert copy.deepcopy(tokenizer).pad_token == "[PAD]"
    with pytest.raises(AttributeError, match="nothing"):
        _ = tokenizer.nothing
    assert repr(tokenizer) == f"Prompted({type(plain).__name__}, {TEMPLATE!r})"


def test_the_side_of_the_padding_can_be_lent() -> None:
    tokenizer = Prompted(copy.deepcopy(tiny_tokenizer(decoder=True)), TEMPLATE)
    with padded(tokenizer, "left"):
        assert encode(tokenizer, ["good film", "bad"])["attention_mask"][1, 0] == 0
    assert encode(tokenizer, ["good film", "bad"])["attention_mask"][1, -1] == 0


def test_lists_and_padding_to_a_length() -> None:
    made = prompted()(["good", "good film"], padding="max_length", truncation=True, max_length=10)
    assert [len(row) for row in made["input_ids"]] == [10, 10]
    assert made["attention_mask"][0] == [1] * 8 + [0] * 2


@pytest.mark.parametrize(
    "template, message",
    [
        ("no place", r"template: expected one \{text\} and at most one \{pair\}, got 'no place'"),
        ("{text} {text}", "template: expected one"),
        ("{pair}", "template: expected one"),
        ("{text} {pair} {pair}", "template: expected one"),
    ],
)
def test_bad_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompted(template)


def test_other_braces_stand_for_themselves() -> None:
    assert split_template('{"review": "{text}"}') == ['{"review": "', "text", '"}']
    with pytest.raises(TypeError, match="template: expected str, got int"):
        split_template(3)  # type: ignore[arg-type]


def test_bad_calls_are_refused() -> None:
    with pytest.raises(TypeError, match="text: expected a list of texts, got one str"):
        prompted()("good")
    with pytest.raises(ValueError, match=r"template: has no \{pair\}, got pairs of texts"):
        encode(prompted(), [("good", "bad")])
    with pytest.raises(ValueError, match=r"template: has \{pair\}, got single texts"):
        encode(prompted(PAIRED), ["good"])
    with pytest.raises(ValueError, match="tokenizer: has a template already"):
        Prompted(prompted())
    with pytest.raises(ValueError, match="tokenizer: str does not tell which characters"):
        Prompted("a tokenizer")
    bare = copy.deepcopy(tiny_tokenizer(decoder=True))
    bare.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: has no padding token"):
        Prompted(bare, TEMPLATE)(["good", "good film"], padding=True)
