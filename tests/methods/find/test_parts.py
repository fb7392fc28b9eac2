"""Candidates, which of them are distinct, changed texts, reliance, peers and roles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.data.bound import associate
from spurge.engine.data.examples import Example, Examples
from spurge.methods.find.candidates import Candidate, columns_of, presence, traits, word_pairs
from spurge.methods.find.changes import Changes, Neutral, inserted
from spurge.methods.find.distinct import adds_to_words, distinct
from spurge.methods.find.peers import Peers, Texts, Witnesses
from spurge.methods.find.reliance import Effect, observed, of_pairs
from spurge.methods.find.roles import Evidence, Lexicon, causal_score, propose, weigh, written_as_names
from spurge.methods.golden.golden import GoldenTokens

ROWS = [
    Example("The film was not good!", 0, "A film"),
    Example("A plot, a story", 1, "no plot at all here"),
    Example("the food was good", 1, "the food was good"),
    Example("dull", 0, "so dull!"),
]


def candidate(name: str, *rows: int, kind: str = "word", place: str = "") -> Candidate:
    return Candidate(kind, name, place, np.array(rows, dtype=np.int64))


def test_presence_agrees_with_the_search():
    examples = Examples(ROWS, ("no", "yes"))
    found = traits(examples, 1)
    assert {one.kind for one in found} == {"negation", "length", "punctuation", "overlap"}
    for one in found:
        having = presence(one.kind, one.name, one.place, examples)
        assert np.flatnonzero(having).tolist() == one.rows.tolist(), one.key


def test_columns_of_names_and_of_numbers():
    columns = {"source": ["a", "b", "a", None], "age": [1, 2.5, 4, float("nan")]}
    found = columns_of(columns, 1)
    assert {one.name: one.rows.tolist() for one in found} == {
        "source = a": [0, 2],
        "source = b": [1],
        "age at least 2.5": [1, 2],
    }
    examples = Examples([Example("x", 0)] * 4, ("no", "yes"))
    for one in found:
        assert np.flatnonzero(presence("column", one.name, "", examples, columns)).tolist() == one.rows.tolist()
    with pytest.raises(ValueError, match="not given"):
        presence("column", "other = a", "", examples, columns)
    with pytest.raises(ValueError, match="is a topic"):
        presence("topic", "0: film", "", examples)


def test_a_pair_is_kept_where_it_says_more_than_its_words():
    rng = np.random.default_rng(0)
    first, second = rng.random(400) < 0.5, rng.random(400) < 0.5
    labels = np.where(first & second, 1, (rng.random(400) < 0.1).astype(int))
    words = {
        "text": [candidate("man", *np.flatnonzero(first), place="text")],
        "second text": [candidate("sleeps", *np.flatnonzero(second), place="second text")],
    }
    (pair,) = word_pairs(words["text"], words["second text"], labels, 2, 8)
    assert word_pairs(words["text"], words["second text"], rng.permutation(labels), 2, 8) == []
    assert pair.name == "man → sleeps"
    assert adds_to_words([pair], words, labels, 2) == [pair]
    assert adds_to_words([pair], words, second.astype(int), 2) == []  # the second word alone says it


def test_a_phrase_is_listed_once():
    labels = np.array([1] * 40 + [0] * 60)
    whole = candidate("near the station", *range(30), kind="phrase")
    part = candidate("station", *range(31))
    longer = candidate("was near the station", *range(12), kind="phrase")
    other = candidate("superb", *range(25, 40))
    found = distinct([part, longer, other, whole], np.array([5.0, 3.0, 4.0, 5.0]), labels, 2, least=5, most=9)
    assert found == [3, 2]


def test_a_length_that_a_phrase_brings_is_left_out():
    labels = np.array([1] * 40 + [0] * 60)
    phrase = candidate("near the station", *range(30), kind="phrase")
    shadow = candidate("at least 9 words", *range(30), *range(70, 80), kind="length")
    other = candidate("at least 9 words", *range(20, 40), kind="length")
    assert distinct([phrase, shadow, other], np.array([5.0, 4.9, 3.0]), labels, 2, least=5, most=9) == [0, 2]


def test_a_longer_phrase_takes_the_place_of_the_part_that_it_fills():
    labels = np.array([1] * 40 + [0] * 60)
    part, whole = candidate("before", *range(34)), candidate("shortly before dinner", *range(30), kind="phrase")
    assert distinct([part, whole], np.array([5.1, 5.0]), labels, 2, least=5, most=9) == [1]
    assert distinct([part, whole], np.array([5.1, 5.0]), labels, 2, least=5, most=9, taken=[0]) == [0]


def test_a_longer_phrase_that_says_more_is_listed_too():
    labels = np.array([0] * 20 + [1] * 40 + [0] * 40)
    good, not_good = candidate("good", *range(60)), candidate("not good", *range(20), kind="phrase")
    assert distinct([good, not_good], np.array([5.0, 4.0]), labels, 2, least=5, most=9) == [0, 1]


WORDS = ["film", "plot", "on tuesday", "in spring", "by train"]


def changes(one: Candidate, rows: list[Example], texts: int = 50, seed: int = 0) -> list:
    pool = [candidate(name, *range(9), kind="phrase" if " " in name else "word") for name in WORDS]
    return Changes(rows, Neutral(pool, np.zeros(len(pool))), texts=texts, seed=seed).of(one, label=1)


def test_pairs_of_texts_differ_at_the_candidate_alone():
    rows = [Example("Near the station we ate", 1), Example("we ate", 0), Example("it was near the station.", 1)]
    pairs = changes(candidate("near the station", 0, 2, kind="phrase"), rows)
    deleted = {pair.source: pair.without.text for pair in pairs if pair.change == "delete"}
    assert deleted == {0: "we ate", 2: "it was."}
    for pair in pairs:
        if pair.change == "swap":
            assert pair.with_it is rows[pair.source]
            assert pair.without.text.lower().replace(".", "").endswith(("we ate", "tuesday", "spring", "train"))
        if pair.change == "insert":
            assert pair.source == 1
            assert "near the station" in pair.with_it.text
            rest = [pair.without.text.replace(unit, "") for unit in WORDS if unit in pair.without.text]
            assert pair.with_it.text.replace("near the station", "") in rest  # in the same place
    assert {pair.change for pair in pairs} == {"delete", "swap", "insert"}


def test_texts_that_speak_against_a_candidate_come_first():
    rows = [Example(f"it was the film {i}", int(i >= 3)) for i in range(40)]
    pairs = changes(candidate("film", *range(40)), rows, 6)
    deleted = [pair.source for pair in pairs if pair.change == "delete"]
    assert len(deleted) == 6
    assert set(deleted) >= {0, 1, 2}


def test_changes_depend_on_seed_and_candidate_alone():
    rows = [Example(f"word{i} and the film", i % 2) for i in range(30)]
    one = candidate("film", *range(20))
    assert changes(one, rows, 5, seed=3) == changes(one, rows, 5, seed=3)
    assert changes(one, rows, 5, seed=3) != changes(one, rows, 5, seed=4)


def test_negation_and_marks_are_taken_out():
    rows = [Example("it was not good!", 0), Example("I don't know", 1), Example("good", 1)]
    negated = {p.without.text for p in changes(candidate("a negation", 0, 1, kind="negation"), rows)}
    assert negated == {"it was good!", "I know"}
    marked = changes(candidate("!", 0, kind="punctuation"), rows)
    assert {(p.change, p.with_it.text, p.without.text) for p in marked} == {
        ("delete", "it was not good!", "it was not good"),
        ("insert", "I don't know!", "I don't know"),
        ("insert", "good!", "good"),
    }
    assert changes(candidate("at least 3 words", 0, kind="length"), rows) == []


def test_only_the_second_text_of_a_pair_is_changed():
    rows = [Example("a man sleeps", 0, "the man sleeps"), Example("a dog runs", 1, "it runs")]
    for one in (candidate("man → sleeps", 0, kind="pair"), candidate("sleeps", 0, place="second text")):
        made = [pair for pair in changes(one, rows) if pair.change == "delete"]
        assert [(pair.without.text, pair.without.pair) for pair in made] == [("a man sleeps", "the man")]


@given(st.lists(st.sampled_from(["a", "bc", "d."]), max_size=6), st.floats(0, 1, exclude_max=True))
def test_an_insertion_takes_nothing_away(words, at):
    made = inserted(" ".join(words), "new unit", at)
    assert "new unit" in made
    assert " ".join(made.replace("new unit", "").replace(".", " ").split()) == " ".join(words).replace(".", "")


def test_an_effect_is_a_mean_with_its_error():
    values = np.array([1.0, 2.0, 3.0])
    effect = Effect.of(values)
    assert effect.mean == pytest.approx(2)
    assert effect.error == pytest.approx(1 / 3**0.5)
    assert effect.interval[0] == pytest.approx(2 - 1.96 / 3**0.5)
    assert Effect.of(values[:1]).count == 0
    assert Effect.of(values[:1]).p == 1.0


def test_reliance_is_of_swaps_and_insertions():
    rows = [Example("near the station we ate", 1), Example("we ate", 0), Example("it was near the station", 1)]
    rows += [Example("they ate", 0)]
    pairs = changes(candidate("near the station", 0, 2, kind="phrase"), rows)
    with_it = np.array([[-1.0, 1.0]] * len(pairs))
    without = np.array([[0.5, -0.5] if pair.change == "swap" else [0.0, 0.0] for pair in pairs])
    found = of_pairs(pairs, with_it, without, label=1)
    assert found.effects["swap"].mean == pytest.approx(1.5)
    assert found.effects["insert"].mean == pytest.approx(1.0)
    assert found.lean.mean == pytest.approx(1.25)
    assert found.flips == 100.0


def test_observed_reliance_holds_the_label_fixed():
    labels = np.array([0] * 50 + [1] * 50)
    having = np.r_[0:10, 50:90]
    margins = np.stack([-(2.0 * labels), 2.0 * labels], 1)
    margins[:, 1] += np.where(np.isin(np.arange(100), having), 0.25, 0.0)
    found = observed(having, margins, labels, 1)
    assert found.lean.mean == pytest.approx(0.25)
    assert not found.measured


def test_peers_that_go_with_labels_speak_for_a_cause():
    vectors = np.array([[1.0, 0.0], [0.9, 0.1], [0.95, 0.0], [0.0, 1.0], [0.1, 0.9], [0.0, 0.95]])
    excess = np.array([9.0, 9.0, 9.0, 0.0, 0.0, 9.0])  # the last goes with a label alone among its peers
    peers = Peers(["superb", "awful", "dull", "library", "airport", "station"], vectors, excess)
    causes, shortcut = peers.of("superb"), peers.of("station")
    assert causes.ratio > 0 > shortcut.ratio
    assert {"awful", "dull"} <= set(causes.nearest)
    assert np.isnan(peers.of("unknown").ratio)


def test_a_word_of_the_same_texts_is_no_witness():
    vectors = np.array([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [0.8, 0.2]])
    rows = [np.arange(10), np.arange(10), np.arange(50, 90), np.arange(40, 80)]
    texts = Texts(rows, np.arange(100) % 2, 2)
    peers = Peers(["old", "station", "new", "young"], vectors, np.array([9.0, 9.0, 0.0, 0.0]), texts)
    found = peers.of("old", rows[0])
    assert "station" not in found.nearest
    assert found.ratio < 0


def test_what_is_said_beside_a_candidate_is_no_witness_for_it():
    labels = np.r_[np.zeros(100, int), np.ones(100, int)]
    candidate = np.r_[0:5, 100:160]
    beside = np.r_[50:74, 100:130, 160:170]  # goes with label 1 where the candidate stands, elsewhere with none
    rows = [candidate, beside]
    vectors = np.array([[1.0, 0.0], [1.0, 0.1]])
    excess = associate(rows, labels, 2).excess
    assert excess[1] > 0
    texts = Texts(rows, labels, 2)
    assert texts.excess([1], candidate)[0] == 0
    with_texts = Peers(["group", "people"], vectors, excess, texts).of("group", candidate)
    assert with_texts.ratio < Peers(["group", "people"], vectors, excess).of("group").ratio


def test_forms_of_a_word_are_no_witnesses():
    vectors = np.ones((4, 2))
    peers = Peers(["group", "groups", "team", "ground"], vectors, np.array([9.0, 9.0, 0.0, 0.0]))
    assert {*peers.of("group").nearest} <= {"team", "ground"}


def test_a_word_that_would_do_for_a_label_alone_is_no_cause():
    peers = Witnesses(0.8, ("awful", "dull"))
    usual = weigh("word", "group", 1, 3.0, peers, covers=0.2)
    dominant = weigh("word", "group", 1, 3.0, peers, covers=0.8)
    assert causal_score(usual) > 0.6
    assert causal_score(dominant) < 0.4
    lean = {"mean": 1.0, "least": 0.1}
    clause = "would do for most texts of its label, where causes are many words"
    assert propose(dominant, 0.001, 0.05, lean) == ("spurious", clause)


def test_roles_follow_the_evidence():
    lean = {"mean": 1.0, "least": 0.1}
    against = [Evidence(-2.0, "words like it go with no label")]
    assert propose(against, 0.001, 0.05, lean) == ("spurious", "words like it go with no label")
    assert propose(against, 0.2, 0.05, lean)[0] == "undecided"
    assert propose(against, 0.001, 0.05, lean, measured=False)[0] == "undecided"
    assert propose(against, 0.001, 0.05, {"mean": 0.05, "least": 0.1})[0] == "undecided"
    assert propose(against, 0.001, 0.05, {"mean": float("nan"), "least": 0.1})[0] == "undecided"
    assert propose([Evidence(2.0, "words like it do")], 1.0, 0.05, lean) == ("causal", "words like it do")
    assert propose([Evidence(0.0, "who knows")], 0.001, 0.05, lean)[0] == "undecided"


def test_what_is_known_of_a_word_moves_its_score():
    def score(name: str, **known: float) -> float:
        return causal_score(weigh("word", name, 1, 1.0, Witnesses(0.0, ("x",)), **known))  # type: ignore[arg-type]

    assert score("the") < score("superb")
    assert score("spielberg", named=0.9) < score("superb")
    assert causal_score(weigh("length", "at least 9 words", 1, 3.0, Witnesses(1.0))) < 0.1
    assert causal_score(weigh("negation", "a negation", 1, 3.0, Witnesses(1.0))) == 0.5


def test_a_lexicon_raises_and_lowers():
    rng = np.random.default_rng(0)
    good, plain = [f"good{i}" for i in range(30)], [f"plain{i}" for i in range(30)]
    listed = rng.standard_normal((30, 4)) * 0.1 + [1, 0, 0, 0]
    rest = rng.standard_normal((30, 4)) * 0.1 + [0, 1, 0, 0]
    golden = GoldenTokens(("no", "yes"), {"no": ["bad"], "yes": good[:-1]}, ["plain0"])
    single = Lexicon.single(golden)
    vectors = np.concatenate([listed, rest])
    lexicon = Lexicon(golden, [*good, *plain], vectors, rng.standard_normal((len(single), 4)) * 0.1 + [1, 0, 0, 0])

    def weight(name: str, label: int) -> float:
        return sum(one.weight for one in lexicon.evidence(name, label, golden.labels))

    assert weight("good0", 1) > weight("good29", 1) > weight("plain1", 1)  # listed, like those, and unlike them
    assert weight("good0", 0) < weight("good0", 1)
    assert weight("plain0", 1) < weight("plain1", 1)
    assert any("but goes with no" in one.clause for one in lexicon.evidence("good0", 0, golden.labels))


def test_names_are_known_by_their_capitals():
    counts = written_as_names(["I saw Denzel and the film", "So Denzel was good. The film", "DENZEL in THE film"])
    assert counts["denzel"] == (2, 2)
    assert counts["film"][0] == 0
    assert "the" in counts
    assert counts["the"][0] == 0
