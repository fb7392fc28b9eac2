"""Label words: files, tokens, logits by hand, and a classifier whose parts are the language model's own."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import spurge
from helpers.tiny_models import LANGUAGE, tiny, tiny_language, tiny_tokenizer
from spurge.engine.base.files import FileError
from spurge.engine.data.examples import encode
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.probes import probed_token, token_scores
from spurge.engine.models.sites import find_sites
from spurge.engine.models.verbalizers import Verbalized, Verbalizer

WORDS = {"negative": ["bad", "awful"], "positive": ["good", "great", "superb"]}
TEMPLATE = "the film; {text}. it was"
TEXTS = ["the walking actor", "superb and lovely story on tuesday", "bad"]


def wrapped(
    name: str = "llama", pool: Any = "sum", side: str = "right", **settings: Any
) -> tuple[Verbalized, Any, dict[str, Tensor]]:
    """A classifier, its tokenizer, and inputs."""
    tokenizer = tiny_tokenizer(decoder=True, padding_side=side)
    model, prompted = Verbalizer(WORDS, TEMPLATE, pool).wrap(tiny_language(name, **settings), tokenizer)
    return model, prompted, encode(prompted, TEXTS)


# ---- logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["sum", "mean"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_logits_are_made_of_the_next_tokens(name: str, pool: str, side: str) -> None:
    """Against each prompt alone, without padding, from the language model's own output."""
    model, _, inputs = wrapped(name, pool, side)
    logits = model(**inputs).logits.detach()
    assert logits.shape == (3, 2)
    plain = tiny_tokenizer(decoder=True)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([plain(TEMPLATE.format(text=text))["input_ids"]])
        spoken = model.language_model(input_ids=ids).logits[0, -1].detach()
        for y, words in enumerate(WORDS.values()):
            said = [float(spoken[plain.convert_tokens_to_ids(word)]) for word in words]
            want = math.log(sum(map(math.exp, said))) if pool == "sum" else sum(said) / len(said)
            assert float(logits[row, y]) == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_softmax_is_the_probability_mass_of_the_words() -> None:
    model, prompted, inputs = wrapped()
    spoken = model.language_model(**inputs).logits[torch.arange(3), probed_token(model, inputs)].softmax(1)
    mass = torch.stack([spoken[:, prompted.convert_tokens_to_ids(words)].sum(1) for words in WORDS.values()], 1)
    torch.testing.assert_close(model(**inputs).logits.softmax(1), mass / mass.sum(1, keepdim=True))


def test_positions_that_are_given_are_kept() -> None:
    model, prompted, inputs = wrapped("gpt2")
    moved = inputs["attention_mask"].cumsum(1)
    spoken = model.language_model(**inputs, position_ids=moved).logits[torch.arange(3), probed_token(model, inputs)]
    want = spoken[:, prompted.convert_tokens_to_ids(WORDS["negative"])].logsumexp(1)
    torch.testing.assert_close(model(**inputs, position_ids=moved).logits[:, 0], want)
    assert not torch.allclose(model(**inputs).logits[:, 0], want, atol=1e-3)


def test_a_text_without_a_mask_or_as_embeddings() -> None:
    model, prompted, _ = wrapped()
    inputs = encode(prompted, TEXTS[:1])
    want = model(**inputs).logits
    torch.testing.assert_close(model(inputs["input_ids"]).logits, want)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits, want)


def test_half_precision_is_pooled_in_float32() -> None:
    model, _, inputs = wrapped(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(**inputs).logits.dtype == torch.float32
    model, _, inputs = wrapped(dtype=torch.float64)
    assert model(**inputs).logits.dtype == torch.float64


# ---- one model under two names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "gemma2"])
def test_parts_have_the_language_models_own_names(name: str) -> None:
    model, _, _ = wrapped(name)
    language = model.language_model
    assert dict(model.named_parameters()).keys() == dict(language.named_parameters()).keys()
    assert model.state_dict().keys() == language.state_dict().keys()
    assert [site.name for site in find_sites(model)] == [site.name for site in find_sites(language)]
    assert all(a.down is b.down for a, b in zip(find_sites(model), find_sites(language), strict=True))
    assert (model.device, model.dtype, model.training) == (language.device, language.dtype, language.training)
    assert model.get_input_embeddings() is language.get_input_embeddings()
    assert model.get_output_embeddings() is language.get_output_embeddings()


def test_the_configuration_names_the_labels_in_a_copy() -> None:
    language = tiny_language("llama")
    before = language.config.to_dict()
    model, _ = Verbalizer(WORDS).wrap(language, tiny_tokenizer(decoder=True))
    assert model.config.num_labels == 2
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert language.config.to_dict() == before


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_edits_fit_both_and_folds_are_in_both(name: str) -> None:
    model, _, inputs = wrapped(name)
    language = model.language_model
    sites = find_sites(model)
    neurons = NeuronSet({sites[0].name: [0, 3], sites[2].name: [5]})
    edit = NeuronEdit.build(model, neurons, [0.0, 0.5, -1.0])
    assert edit.model == NeuronEdit.build(language, neurons, 0.0).model
    before = model(**inputs).logits
    with edit.applied(model):
        want, spoken = model(**inputs).logits, language(**inputs).logits
    with edit.applied(language):
        torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=0)
    assert not torch.allclose(before, want)
    folded = edit.fold(model)
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(language(**inputs).logits, spoken, rtol=1e-4, atol=1e-5)
    folded.undo()
    assert torch.equal(model(**inputs).logits, before)


def test_a_copy_is_a_pair_of_its_own() -> None:
    model, _, inputs = wrapped()
    other = copy.deepcopy(model)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    with torch.no_grad():
        find_sites(other)[0].down.weight.zero_()
    assert not find_sites(other.language_model)[0].down.weight.any()
    assert find_sites(model)[0].down.weight.any()
    assert other.double().language_model.dtype == torch.float64


def test_token_scores_of_a_language_model_as_it_is() -> None:
    """Without label words a score is about the next token: what its logit loses without an embedding."""
    language = tiny_language("llama")
    inputs = encode(tiny_tokenizer(decoder=True), TEXTS[:1])
    found = token_scores(language, inputs, kind="ablation")
    with torch.no_grad():
        embedded = language.get_input_embeddings()(inputs["input_ids"])
        said = language(inputs_embeds=embedded).logits[0, -1]
        embedded[0, 2] = 0
        want = said.max() - language(inputs_embeds=embedded).logits[0, -1, said.argmax()]
    torch.testing.assert_close(found[0, 2], want, rtol=1e-4, atol=1e-5)


# ---- words -------------------------------------------------------------------------------------------------------


def test_a_word_stands_for_its_first_token() -> None:
    tokenizer = tiny_tokenizer(decoder=True)
    found = Verbalizer({"a": ["walking", "walks", "bad"], "b": ["good"]}).tokens(tokenizer)
    ids = tokenizer.convert_tokens_to_ids
    assert found == {"a": [ids("walk"), ids("bad")], "b": [ids("good")]}


@pytest.mark.parametrize(
    "words, message",
    [
        ({"a": ["bad"], "b": ["œœ"]}, "words: 'œœ' of label 'b' begins with a token the tokenizer lacks"),
        ({"a": ["bad"], "b": ["\u200d\u0301"]}, "words: .* of label 'b'"),
        (
            {"a": ["walking"], "b": ["good", "walks"]},
            "words: expected first tokens that tell labels apart, got 'walk' for both 'walking' of 'a' and 'walks'",
        ),
    ],
)
def test_words_that_cannot_be_told_are_refused(words: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Verbalizer(words).wrap(tiny_language("llama"), tiny_tokenizer(decoder=True))


def test_a_word_without_a_token_is_refused() -> None:
    class Silent:
        is_fast, unk_token_id = True, None

        def __call__(self, texts: list[str], **settings: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] for _ in texts]}

    with pytest.raises(ValueError, match="words: the tokenizer makes no token of 'bad' of label 'negative'"):
        Verbalizer(WORDS).tokens(Silent())


@pytest.mark.parametrize(
    "words, error, message",
    [
        ([], TypeError, "words: expected labels to words, got list"),
        ({"a": ["good"]}, ValueError, r"words: expected at least 2 labels, got \['a'\]"),
        ({"a": ["good"], "b": []}, ValueError, "words: expected at least 1 word for 'b', got none"),
        ({"a": ["good"], "b": [" "]}, ValueError, "words: expected a word for 'b', got ' '"),
        ({"a": ["good"], "b": "bad"}, TypeError, "words: expected a list of words for 'b', got 'bad'"),
        ({"a": ["good"], "b": [3]}, TypeError, "words: expected str for 'b', got int"),
        ({"a": ["good"], 1: ["bad"]}, TypeError, "words: expected a label's name, got 1"),
    ],
)
def test_bad_words_are_refused(words: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Verbalizer(words)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="template: expected one"):
        Verbalizer(WORDS, "no place")
    with pytest.raises(ValueError, match="pool: expected one of sum, mean, got 'most'"):
        Verbalizer(WORDS, pool="most")  # type: ignore[arg-type]


def test_models_that_do_not_go_on_with_a_text_are_refused() -> None:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
    masked = BertForMaskedLM(BertConfig(vocab_size=32, num_hidden_layers=1, num_attention_heads=2, hidden_size=32))
    for model in (tiny("bert"), tiny("llama"), masked, T5ForConditionalGeneration(T5Config(**sizes))):
        with pytest.raises(ValueError, match=f"model: expected a causal .* got {type(model).__name__}"):
            Verbalizer(WORDS).wrap(model, tiny_tokenizer(decoder=True))


def test_what_is_wrapped_already_is_refused() -> None:
    model, prompted, _ = wrapped()
    with pytest.raises(ValueError, match="tokenizer: has a template already"):
        Verbalizer(WORDS).wrap(model.language_model, prompted)
    with pytest.raises(ValueError, match=r"model: expected a causal language model .*, got Verbalized"):
        Verbalizer(WORDS).wrap(model, tiny_tokenizer(decoder=True))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="words: expected tokens of the model's 20 outputs, got"):
        Verbalizer(WORDS).wrap(tiny_language("llama", vocab_size=20), tiny_tokenizer(decoder=True))


def test_a_row_of_padding_is_refused() -> None:
    model, _, inputs = wrapped()
    with pytest.raises(ValueError, match="inputs: example 1 has no real token"):
        model(inputs["input_ids"], torch.tensor([[1], [0], [1]]).expand_as(inputs["input_ids"]))


# ---- files -------------------------------------------------------------------------------------------------------


def test_files_come_back(tmp_path: Path) -> None:
    made = Verbalizer({"b": [" bad", "ñ"], "a": ("good",)}, "{text} — {pair}\n", "mean")
    made.save(tmp_path / "words.json")
    assert Verbalizer.load(tmp_path / "words.json") == made
    assert Verbalizer.load(tmp_path / "words.json").labels == ("b", "a")
    assert spurge.Verbalizer is Verbalizer
    (tmp_path / "hand.json").write_text(json.dumps({"words": WORDS}))
    assert Verbalizer.load(tmp_path / "hand.json") == Verbalizer(WORDS)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a JSON file"),
        ("[]", "not a verbalizer: expected an object, got list"),
        ('{"template": "{text}"}', "not a verbalizer: 'words' is missing"),
        ('{"words": []}', "words: expected labels to words, got list"),
        ('{"words": {"a": ["x"], "b": ["y"]}, "wrods": 1}', "'wrods' is not known, expected"),
        ('{"kind": "edit", "words": {"a": ["x"], "b": ["y"]}}', "holds 'edit', expected 'verbalizer'"),
        ('{"schema": 9, "words": {"a": ["x"], "b": ["y"]}}', "schema 9 is newer than this Spurge .* can read"),
        ('{"words": {"a": ["x"]}}', "words: expected at least 2 labels"),
        ('{"words": {"a": ["x"], "b": ["y"]}, "template": 3}', "template: expected str, got int"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(FileError, match=message) as caught:
        Verbalizer.load(path)
    assert str(path) in str(caught.value)
