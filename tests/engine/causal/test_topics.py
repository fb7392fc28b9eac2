"""Topics: planted clusters found and named, the same for a seed; embeddings of any encoder, which stays as it was."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from helpers.tiny_models import HIDDEN, VOCABULARY, tiny, tiny_tokenizer, tokenizer_for
from spurge.engine.causal import topics as module
from spurge.engine.causal.confounders import Confounders
from spurge.engine.causal.topics import Topics, find_topics
from spurge.engine.recordings.embedding import embed

SUBJECTS = ("police court", "music film", "team game", "bread cheese")
TEXTS = [f"the {SUBJECTS[i % 4]} of {i}" for i in range(80)]
PLANTED = torch.arange(80) % 4


def points(planted: torch.Tensor = PLANTED, spread: float = 0.05, seed: int = 0) -> torch.Tensor:
    """Points around the corners of a simplex, `planted` says which."""
    noise = torch.randn(len(planted), 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.one_hot(planted, 6) + spread * noise


def same_parts(one: torch.Tensor, other: torch.Tensor) -> bool:
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(one.unique()) == len(other.unique())


def test_planted_topics_are_found_and_named():
    found = find_topics(TEXTS, points(), clusters=(2, 4, 8))
    assert same_parts(found.labels, PLANTED)
    assert found.labels.dtype == torch.int64
    assert max(found.silhouettes, key=found.silhouettes.get) == 4
    assert set(found.silhouettes) == {2, 4, 8}
    assert found.silhouettes[4] > 0.8
    assert found.sizes == (20,) * 4
    for topic in range(4):
        subject = SUBJECTS[int(PLANTED[found.labels == topic][0])]
        assert found.names[topic] == f"{topic}: {', '.join(sorted(subject.split()))}"  # neither "the" nor numbers
    assert found.info["chosen"] == 4
    assert repr(found) == "Topics(80 prompts, 4 topics of 20 to 20)"
    assert Confounders.of(found).names == found.names


def test_the_same_seed_gives_the_same_topics_on_any_number_of_threads():
    values = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    texts = [f"word{i % 7}" for i in range(1500)]
    before, found = torch.get_num_threads(), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        try:
            with threadpool_limits(threads):
                found.append(find_topics(texts, values, clusters=(3, 9), seed=5))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    one, two = found
    other = find_topics(texts, values, clusters=(3, 9), seed=6)
    assert torch.equal(one.labels, two.labels)
    assert (one.names, one.silhouettes, one.info) == (two.names, two.silhouettes, two.info)
    assert not torch.equal(one.labels, other.labels)


def test_small_clusters_join_the_nearest():
    planted = torch.tensor([0] * 50 + [1] * 47 + [2] * 3)
    values = points(planted)
    values[97:, 1] += 0.5  # cluster 2 lies closer to 1 than to 0
    texts = ["a b"] * 100
    assert find_topics(texts, values, clusters=(3,), least_share=0.03).sizes == (50, 47, 3)
    found = find_topics(texts, values, clusters=(3,), least_share=0.031)
    assert found.sizes == (50, 50)
    assert same_parts(found.labels, planted.clamp_max(1))
    assert found.info["joined"] == 1
    with pytest.raises(ValueError, match=r"least_share: the largest of 3 clusters has 0\.5, got 0\.6"):
        find_topics(texts, values, clusters=(3,), least_share=0.6)


def test_the_smaller_of_equal_candidates_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_silhouette", lambda *_: 0.5)
    assert find_topics(TEXTS, points(), clusters=(4, 2, 2)).info["chosen"] == 2


def test_silhouettes_of_many_prompts_are_taken_on_a_sample(monkeypatch: pytest.MonkeyPatch):
    whole = find_topics(TEXTS, points(), clusters=(4,))
    monkeypatch.setattr(module, "_SILHOUETTE_ROWS", 40)
    part = find_topics(TEXTS, points(), clusters=(4,))
    assert part.silhouettes[4] != whole.silhouettes[4]
    assert part.silhouettes[4] == pytest.approx(whole.silhouettes[4], abs=0.05)
    monkeypatch.setattr(module, "_SILHOUETTE_ROWS", 3)  # a sample that cannot show clusters
    assert find_topics(TEXTS, points(spread=0.0) + 0.01 * torch.rand(80, 6), clusters=(79,)).silhouettes == {79: 0.0}


def test_the_ratio_is_that_of_dunning():
    """Against the sum written out, for a table without zeros and one with."""
    for both, inside, have, texts in ((8, 10, 20, 100), (10, 10, 10, 100)):
        table = np.array([[both, inside - both], [have - both, texts - inside - have + both]])
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / texts
        by_hand = 2 * sum(o * np.log(o / e) for o, e in zip(table.flat, expected.flat, strict=True) if o)
        assert module._ratio(both, inside, have, texts) == pytest.approx(by_hand)
    assert module._ratio(1, 10, 20, 100) == 0  # rarer inside than outside
    assert module._ratio(10, 10, 100, 100) == 0  # in every text


def test_texts_without_words_have_a_topic_and_a_number_for_a_name():
    assert find_topics(["!", "", "7", "?"], points(torch.tensor([0, 0, 1, 1])), clusters=(2,)).names == ("0", "1")


@pytest.mark.parametrize("kind", ["array", "list", "half", "double", "gradient", "strided", "callable"])
def test_embeddings_of_any_kind(kind):
    values = points()
    handed = []

    def called(texts):
        handed.append(texts)
        return values

    given = {
        "array": values.numpy(),
        "list": values.tolist(),
        "half": values.half(),
        "double": values.double(),
        "gradient": values.clone().requires_grad_(),
        "strided": values.T.contiguous().T,
        "callable": called,
    }[kind]
    assert same_parts(find_topics(TEXTS, given, clusters=(4,)).labels, PLANTED)
    assert handed == ([TEXTS] if kind == "callable" else [])


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"texts": "one"}, TypeError, "texts: expected a sequence of str, got str"),
        ({"texts": []}, ValueError, "texts: need at least 1"),
        ({"texts": [*TEXTS[:-1], 3]}, TypeError, "texts: expected str, got int at row 79"),
        ({"embeddings": points()[:-1]}, ValueError, "embeddings: expected a row for each of 80 texts, got 79"),
        ({"embeddings": points().index_fill(0, torch.tensor(7), torch.nan)}, ValueError, "got nan at row 7"),
        ({"embeddings": points().long()}, TypeError, r"embeddings: expected a floating tensor, got torch\.int64"),
        ({"embeddings": points()[:, 0]}, ValueError, r"embeddings: expected shape \[N, M\]"),
        ({"embeddings": torch.ones(80, 3)}, ValueError, "clusters: 4 need as many different embeddings, got 1"),
        ({"clusters": 4}, TypeError, "clusters: expected a sequence of whole numbers, got int"),
        ({"clusters": ()}, ValueError, "clusters: need at least 1 number"),
        ({"clusters": (1, 4)}, ValueError, "clusters: need at least 2, got 1"),
        ({"clusters": (4, 80)}, ValueError, "clusters: expected numbers below 80, the number of texts, got 80"),
        ({"clusters": (4.0,)}, TypeError, "clusters: expected an integer, got float"),
        ({"least_share": -0.1}, ValueError, "least_share: must be at least 0"),
        ({"least_share": float("nan")}, ValueError, "least_share: must be finite"),
        ({"seed": -1}, ValueError, "seed: need at least 0"),
    ],
)
def test_what_is_refused(change, error, match):
    settings = {"texts": TEXTS, "embeddings": points(), "clusters": (4,)} | change
    with pytest.raises(error, match=match):
        find_topics(settings.pop("texts"), settings.pop("embeddings"), **settings)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'spurge\[mediation\]'"):
        find_topics(TEXTS, points(), clusters=(4,))


def test_topics_are_checked_at_birth():
    with pytest.raises(ValueError, match="labels: expected values below 1"):
        Topics(torch.tensor([0, 1]), ("0",), {}, {})
    assert Topics(torch.tensor([0, 2]), ("a", "b", "c"), {}, {}).sizes == (1, 0, 1)


SENTENCES = ["the film was good", "", "never dull and never boring , a great story", "walking", "sad music"]


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "deberta_v2"])
def test_embeddings_are_the_mean_of_a_texts_own_tokens(family):
    model, tokenizer = tiny(family), tokenizer_for(family)
    found = embed(model, tokenizer, SENTENCES, batch_size=3, progress=False)
    assert (found.shape, found.dtype) == ((5, HIDDEN), torch.float32)
    for row, text in zip(found, SENTENCES, strict=True):
        with torch.no_grad():
            hidden = model.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row, nn.functional.normalize(hidden.mean(0), dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embed(model.base_model, tokenizer, SENTENCES, batch_size=3, progress=False), found)


def test_padding_on_either_side_of_a_decoder():
    model, texts = tiny("llama"), [text for text in SENTENCES if text]
    right, left = (
        embed(model, tiny_tokenizer(decoder=True, padding_side=side), texts, progress=False)
        for side in ("right", "left")
    )
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was():
    model = tiny("bert").train()
    model.bert.embeddings.requires_grad_(False)
    before = [(p.clone(), p.requires_grad) for p in model.parameters()]
    found = embed(model, tokenizer_for("bert"), SENTENCES, progress=False)
    assert not found.requires_grad
    assert torch.equal(found, embed(model, tokenizer_for("bert"), SENTENCES, progress=False))  # no dropout
    with pytest.raises(ValueError, match="max_length"):
        embed(model, tokenizer_for("bert"), SENTENCES, max_length=0, progress=False)
    assert all(module.training for module in model.modules())
    for parameter, (value, wanted) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == wanted


def test_embeddings_make_topics():
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    texts = [*["the film story"] * 2, *["food room service"] * 2, "sad"]
    found = find_topics(texts, lambda rows: embed(model, tokenizer, rows, progress=False), clusters=(3,))
    assert found.sizes == (2, 2, 1)


def test_long_texts_are_cut():
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    whole, cut = (embed(model, tokenizer, ["good bad sad"], max_length=n, progress=False) for n in (None, 3))
    assert torch.equal(cut, embed(model, tokenizer, ["good"], progress=False))
    assert not torch.equal(whole, cut)


def test_batches_are_halved_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    expected = embed(model, tokenizer, SENTENCES, progress=False)
    forward, rows = model.bert.forward, []

    def small(**inputs):
        rows.append(len(inputs["input_ids"]))
        if rows[-1] > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return forward(**inputs)

    monkeypatch.setattr(model.bert, "forward", small)
    torch.testing.assert_close(embed(model, tokenizer, SENTENCES, progress=False), expected, rtol=1e-4, atol=1e-5)
    assert rows == [5, 3, 2, 2, 1]


def test_what_embed_refuses():
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    with pytest.raises(TypeError, match="texts: expected a sequence of str, got str"):
        embed(model, tokenizer, "one", progress=False)
    with pytest.raises(ValueError, match="texts: need at least 1"):
        embed(model, tokenizer, [], progress=False)
    with pytest.raises(ValueError, match="batch_size: need at least 1"):
        embed(model, tokenizer, SENTENCES, batch_size=0, progress=False)
    with pytest.raises(ValueError, match="texts: row 1 has no token, got ''"):
        embed(tiny("gpt2"), tiny_tokenizer(decoder=True), SENTENCES, progress=False)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[VOCABULARY.index("sad")] = torch.nan
    with pytest.raises(ValueError, match="not finite for the text at row 4"):
        embed(model, tokenizer, SENTENCES, progress=False)


class Odd(nn.Module):
    """A model whose output is `answer` of the ids."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **rest):
        return SimpleNamespace(last_hidden_state=self.answer(input_ids))


def test_models_without_usable_states_are_refused():
    tokenizer = tokenizer_for("bert")
    with pytest.raises(
        ValueError, match=r"model: expected last hidden states \(1, 3, 'D'\) in its output, got \(1, 7\)"
    ):
        embed(Odd(lambda ids: torch.zeros(1, 7)), tokenizer, ["good"], progress=False)
    with pytest.raises(ValueError, match="mean of the hidden states is zero at row 0"):
        embed(Odd(lambda ids: torch.zeros(*ids.shape, 7)), tokenizer, ["good"], progress=False)


def test_states_at_padding_do_not_count_even_if_not_finite():
    states = Odd(lambda ids: torch.where(ids[..., None] == 0, torch.inf, ids[..., None] * torch.ones(4)))
    found = embed(states, tokenizer_for("bert"), SENTENCES, progress=False)
    torch.testing.assert_close(found, torch.full((5, 4), 0.5))
