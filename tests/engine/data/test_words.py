"""The same words under every kind of tokenizer; phrases; scores that are sums over tokens, and their gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from spurge.engine.data.words import (
    Units,
    Vocabulary,
    as_phrase,
    fold,
    split_units,
    split_words,
    unit_scores,
)

CORPUS = [
    "the movie was really wonderful and don't fail me",
    "a boring unfunny well-made film, not good at all!",
    "quantum naïve café 👍 好电影 it's",
] * 20
PIECES = ("not", "good", "Film,", "don't", "👍", "well-made", "naïve", "-", "!", "好", "quantum")
KINDS = ("wordpiece", "byte-level", "sentencepiece")


@cache
def tokenizer(kind: str, side: str = "right") -> PreTrainedTokenizerFast:
    """A small trained tokenizer of one kind; words fall into many pieces."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    if kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer = normalizers.BertNormalizer(lowercase=True)
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=special))
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    elif kind == "byte-level":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
        )
        raw.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]", fuse_unk=True))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        pieces = special + [f"<0x{i:02X}>" for i in range(256)]
        # Cut at blanks for training only, as SentencePiece does; the trained one sees the whole text as one "word".
        raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=pieces))
        raw.pre_tokenizer = None
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", pair="[CLS] $A [CLS] $B", special_tokens=[("[CLS]", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", padding_side=side)


def units_of(tok: Any, texts: list[Any], phrases: Any = (), **options: Any) -> tuple[list[list[str]], Units, Any]:
    pairs = not isinstance(texts[0], str)
    encoding = tok(
        [t[0] for t in texts] if pairs else texts,
        [t[1] for t in texts] if pairs else None,
        padding=True,
        return_tensors="pt",
    )
    vocabulary = Vocabulary()
    units = split_units(tok, encoding, texts, vocabulary, phrases, **options)
    words = [[vocabulary.word(i) for i in row if i >= 0] for row in units.ids.tolist()]
    return words, units, encoding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_words_are_those_of_the_text(kind: str, side: str) -> None:
    texts = ["Not good, don't FAIL!", "a really wonderful well-made film", "好电影 café 👍", "..."]
    words, units, encoding = units_of(tokenizer(kind, side), texts)
    assert words[0] == ["not", "good", "don't", "fail"]
    assert words[1] == ["a", "really", "wonderful", "well", "made", "film"]
    assert words[2] == ["好", "电", "影", "café"] or (kind == "sentencepiece" and words[2][-1] == "café")
    assert words[3] == []
    assert units.ids.dtype == torch.int32
    assert units.token_unit.dtype == torch.int64
    assert (units.token_unit[encoding["attention_mask"] == 0] == -1).all()
    special = torch.tensor([record.special_tokens_mask for record in encoding.encodings])
    assert (units.token_unit[special == 1] == -1).all()
    assert units.counts.tolist() == [len(row) for row in words]


@pytest.mark.parametrize("kind", KINDS)
def test_phrases_longest_first_and_never_across_punctuation(kind: str) -> None:
    phrases = {("not", "good"), ("not", "good", "at", "all"), ("well", "made"), ("fail",), ("do", "not")}
    texts = [
        "do not good at all",
        "not good film",
        "not. Good at all",
        "a WELL-made, well made film",
        "not good at",
    ]
    words, units, _ = units_of(tokenizer(kind), texts, phrases)
    assert words[0] == ["do not", "good", "at", "all"]  # the earlier phrase wins, then the longer
    assert words[1] == ["not good", "film"]
    assert words[2] == ["not", "good", "at", "all"]
    assert words[3] == ["a", "well made", "well made", "film"]
    assert words[4] == ["not good", "at"]
    assert units.ids[3, 1] == units.ids[3, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_have_the_units_of_both_and_no_phrase_across_the_border(kind: str) -> None:
    words, _, _ = units_of(tokenizer(kind, "left"), [("it is not", "good film"), ("a", "not good")], {("not", "good")})
    assert words == [["it", "is", "not", "good", "film"], ["a", "not good"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_occurrences_of_a_word_can_be_one_unit(kind: str, side: str) -> None:
    texts = [("a not good film", "Not good, a really GOOD film"), ("good", "film")]
    words, units, _ = units_of(tokenizer(kind, side), texts, {("not", "good")}, correlation_set="words")
    assert words == [["a", "not good", "film", "really", "good"], ["good", "film"]]
    each, apart, _ = units_of(tokenizer(kind, side), texts, {("not", "good")})
    assert len(each[0]) == 8
    row = torch.rand(units.token_unit.shape)
    merged, single = unit_scores(row, units), unit_scores(row, apart)
    for text in range(2):
        for column, word in enumerate(words[text]):
            places = [i for i, other in enumerate(each[text]) if other == word]
            torch.testing.assert_close(merged[text, column], single[text, places].sum())


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level"])
def test_punctuation_can_be_kept(kind: str) -> None:
    words, _, _ = units_of(tokenizer(kind), ["well-made, not good!"], {("well", "made")}, keep_punctuation=True)
    assert words[0] == ["well made", ",", "not", "good", "!"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_plain_dict_works_when_it_is_what_the_tokenizer_makes(kind: str, side: str) -> None:
    tok, texts = tokenizer(kind, side), ["not good, don't fail", "a film"]
    encoding = tok(texts, padding=True, truncation=True, max_length=6, return_tensors="pt")
    plain = dict(encoding.items())
    first, second = Vocabulary(), Vocabulary()
    a, b = split_units(tok, encoding, texts, first), split_units(tok, plain, texts, second)
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.token_unit, b.token_unit)
    assert list(first) == list(second)
    with pytest.raises(ValueError, match="not what the tokenizer makes of these texts"):
        split_units(tok, plain, ["not good, don't fail", "the film"], Vocabulary())


def test_truncation_drops_words_without_tokens() -> None:
    tok = tokenizer("wordpiece")
    encoding = tok(["not good film"], truncation=True, max_length=4, return_tensors="pt")
    vocabulary = Vocabulary()
    units = split_units(tok, encoding, ["not good film"], vocabulary)
    assert 1 <= len(vocabulary) <= 2
    assert next(iter(vocabulary)) == "not"
    assert units.ids.shape == (1, len(vocabulary))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    side=st.sampled_from(["left", "right"]),
    texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join), min_size=1, max_size=3),
)
def test_units_are_whole_and_in_order(kind: str, side: str, texts: list[str]) -> None:
    tok = tokenizer(kind, side)
    assume(any(tok(text).input_ids for text in texts))
    words, units, _ = units_of(tok, texts)
    for text, row, columns in zip(texts, words, units.token_unit.tolist(), strict=True):
        met = list(dict.fromkeys(c for c in columns if c >= 0))
        assert met == list(range(len(row)))
        expected = split_words(text)
        # A SentencePiece token may cover several words; its unit is the first of them.
        assert tuple(row) == expected or (kind == "sentencepiece" and set(row) <= set(expected))


@settings(max_examples=200)
@given(st.text())
def test_folding_and_splitting_are_stable(text: str) -> None:
    assert fold(fold(text)) == fold(text)
    for word in split_words(text):
        assert word
        assert fold(word) == word
    phrase = as_phrase(text)
    assert phrase is None or phrase == split_words(text)


def test_splitting_by_hand() -> None:
    assert split_words("It's the film’s rock-n-roll_band, 3.5 हिन्दी don’t n't") == (
        *("it", "s", "the", "film", "s", "rock", "n", "roll", "band", "3", "5", "हिन्दी", "don't", "n't"),
    )
    assert as_phrase("Devil's advocate") == ("devil", "s", "advocate")
    for bad in ("a+", ":-)", "", " - ", "not, fail"):
        assert as_phrase(bad) is None


@given(st.lists(st.text(max_size=5)))
def test_vocabulary_numbers_words_as_met(words: list[str]) -> None:
    vocabulary = Vocabulary(words)
    assert list(vocabulary) == list(dict.fromkeys(map(fold, words)))
    for word in words:
        number = vocabulary.id(word.upper() if word.isascii() else word)
        assert vocabulary.word(number) == fold(word)
        assert vocabulary.find(word) == number
        assert word in vocabulary
    assert len(vocabulary) == len(set(map(fold, words)))
    for bad in (-1, len(vocabulary)):
        with pytest.raises(ValueError, match="number"):
            vocabulary.word(bad)


def loop(row: torch.Tensor, units: Units, how: str) -> torch.Tensor:
    out = torch.zeros(len(row), units.ids.shape[1], dtype=row.dtype)
    for r in range(len(row)):
        column = units.token_unit[r % len(units.ids)]
        for u in range(units.ids.shape[1]):
            picked = row[r][column == u]
            if len(picked):
                out[r, u] = picked.sum() if how == "sum" else picked.max()
    total = out.abs().sum(1, keepdim=True)
    return torch.where(total > 0, out / total.clamp(min=1e-300), out)


@st.composite
def unit_batches(draw: st.DrawFn) -> Units:
    batch, tokens, width = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(0, 4))
    column = st.lists(st.integers(-1, width - 1), min_size=tokens, max_size=tokens)
    token_unit = torch.tensor(draw(st.lists(column, min_size=batch, max_size=batch)))
    return Units(torch.zeros(batch, width, dtype=torch.int32), token_unit)


@settings(max_examples=100, deadline=None)
@given(
    units=unit_batches(),
    copies=st.integers(0, 3),
    how=st.sampled_from(["sum", "max"]),
    seed=st.integers(0, 99),
)
def test_scores_are_those_of_a_plain_loop(units: Units, copies: int, how: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (copies * len(units.ids), units.token_unit.shape[1])
    row = torch.rand(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    score = unit_scores(row, units, how)
    # Sums of at most 7 doubles in two orders.
    torch.testing.assert_close(score, loop(row.detach(), units, how), rtol=1e-14, atol=0)
    weights = torch.rand(score.shape, generator=generator, dtype=torch.float64)
    (score * weights).sum().backward()
    assert row.grad is not None
    assert row.grad.isfinite().all()
    if score.numel() and how == "sum":
        assert torch.autograd.gradcheck(lambda x: unit_scores(x, units, how), row.detach().requires_grad_())


def test_scores_of_zero_stay_zero_signs_stay_and_nan_stays_nan() -> None:
    units = Units(torch.zeros(1, 2, dtype=torch.int32), torch.tensor([[-1, 0, 0, 1]]))
    assert unit_scores(torch.tensor([[9.0, 0, 0, 0]]), units).tolist() == [[0.0, 0.0]]
    assert unit_scores(torch.tensor([[9.0, 1, 0, -3]]), units).tolist() == [[0.25, -0.75]]
    assert unit_scores(torch.tensor([[9.0, torch.nan, 0, 1]]), units).isnan().all()
    assert not unit_scores(torch.tensor([[torch.nan, 1.0, 0, 1]]), units).isnan().any()  # a special token's
    expanded = torch.tensor([[0.0, 1, 1, 2]]).expand(4, 4)
    assert torch.equal(unit_scores(expanded, units), torch.full((4, 2), 0.5))


def test_unit_scores_refuses() -> None:
    units = Units(torch.zeros(2, 2, dtype=torch.int32), torch.tensor([[-1, 0], [0, 1]]))
    for bad in (torch.rand(3, 2), torch.rand(2, 3), torch.rand(2)):
        with pytest.raises(ValueError, match=r"row: expected \[m\*2, 2\]"):
            unit_scores(bad, units)
    for wrong in (torch.ones(2, 2, dtype=torch.int64), [[1.0, 2.0]]):
        with pytest.raises(TypeError, match="row: expected a floating-point tensor"):
            unit_scores(wrong, units)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="how: expected one of sum, max, got 'mean'"):
        unit_scores(torch.rand(2, 2), units, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ids and token_unit"):
        Units(torch.zeros(2, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="token_unit: columns must lie in -1 to 1"):
        Units(torch.zeros(1, 2), torch.tensor([[2]]))


def test_split_units_refuses() -> None:
    tok = tokenizer("wordpiece")
    encoding = tok(["good", "film"], padding=True, return_tensors="pt")

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"Slow does not tell .* use_fast=True"):
        split_units(Slow(), encoding, ["good", "film"], Vocabulary())
    with pytest.raises(ValueError, match="need one per row of the encoding, got 1 for 2"):
        split_units(tok, encoding, ["good"], Vocabulary())
    with pytest.raises(TypeError, match="got one str"):
        split_units(tok, encoding, "good", Vocabulary())
    with pytest.raises(TypeError, match="expected str or a pair of str, got int"):
        split_units(tok, encoding, ["good", 3], Vocabulary())  # type: ignore[list-item]
    with pytest.raises(ValueError, match="either all are pairs or none"):
        split_units(tok, encoding, ["good", ("a", "b")], Vocabulary())
    with pytest.raises(TypeError, match="expected the tokenizer's output"):
        split_units(tok, encoding["input_ids"], ["good", "film"], Vocabulary())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a tensor"):
        split_units(tok, tok(["good", "film"]), ["good", "film"], Vocabulary())
    encoding["input_ids"] = encoding["input_ids"][:, :2]
    with pytest.raises(ValueError, match="cut or padded"):
        split_units(tok, encoding, ["good", "film"], Vocabulary())
