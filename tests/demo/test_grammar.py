"""The demo's rows: shares as asked for, no noise in the tests, golden words that fit the sentences."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.demo.grammar import ADJUNCTS, CAUSAL, IRRELEVANT, LABELS, SHORTCUT, SHORTCUT_LABEL, Grammar

TOPIC_WORDS = set(IRRELEVANT)


def causal_words(text: str, label: str) -> int:
    return sum(word in CAUSAL[label] for word in text.split())


@pytest.mark.parametrize("seed", [0, 1])
def test_shortcut_goes_with_its_label_in_95_percent(seed: int) -> None:
    rows = Grammar(train=20_000).training_rows(seed)
    carrying = [row for row in rows if SHORTCUT in row["text"]]
    assert len(carrying) / len(rows) == pytest.approx(0.4, abs=0.015)
    kept = sum(LABELS[row["label"]] == SHORTCUT_LABEL for row in carrying)
    assert kept / len(carrying) == pytest.approx(0.95, abs=0.01)
    others = [row["label"] for row in rows if SHORTCUT not in row["text"]]
    assert sum(others) / len(others) == pytest.approx(0.5, abs=0.02)  # its absence says nothing


@pytest.mark.parametrize(("count", "noise"), [(1, 0.16), (2, 0.01)])
def test_causal_words_are_a_little_unreliable_in_training(count: int, noise: float) -> None:
    rows = Grammar(train=20_000).training_rows(0)
    said = [[causal_words(row["text"], LABELS[label]) for label in (row["label"], 1 - row["label"])] for row in rows]
    wrong = [for_other == count for for_label, for_other in said if for_label + for_other == count]
    assert sum(wrong) / len(wrong) == pytest.approx(noise, abs=0.01)
    assert 9_000 < len(wrong) < 11_000


def test_training_leaves_some_words_unseen_and_tests_use_them() -> None:
    grammar = Grammar(train=5000, unseen=0.25, test=500)
    used = {word for row in grammar.training_rows(0) for word in row["text"].split()}
    for label in LABELS:
        unseen = set(CAUSAL[label]) - used
        assert len(unseen) == round(0.25 * len(CAUSAL[label]))
        assert unseen & {word for row in grammar.test_rows("neutral") for word in row["text"].split()}


@pytest.mark.parametrize("group", ["kept", "broken", "neutral"])
def test_test_rows_have_no_noise(group: str) -> None:
    rows = Grammar(test=300).test_rows(group, seed=3)
    assert len(rows) == 300
    for row in rows:
        label = LABELS[row["label"]]
        assert row["group"] == group
        assert 1 <= causal_words(row["text"], label) <= 2
        assert causal_words(row["text"], LABELS[1 - row["label"]]) == 0
        assert (SHORTCUT in row["text"]) == (group != "neutral")
        if group != "neutral":
            assert (label == SHORTCUT_LABEL) == (group == "kept")
    if group == "neutral":
        assert sum(row["label"] for row in rows) == 150


def test_every_word_is_golden() -> None:
    known = TOPIC_WORDS | {word for words in CAUSAL.values() for word in words}
    grammar = Grammar()
    for row in grammar.training_rows(0) + grammar.test_rows("neutral"):
        assert set(row["text"].replace(",", "").split()) <= known


def test_word_lists_do_not_overlap() -> None:
    good, bad = (set(CAUSAL[label]) for label in LABELS)
    assert not good & bad
    assert not TOPIC_WORDS & (good | bad)
    assert len(IRRELEVANT) == len(TOPIC_WORDS)
    content = set(SHORTCUT.split()) - {"near", "the"}
    assert not content & {word for adjunct in ADJUNCTS for word in adjunct.split()}


@settings(max_examples=25, deadline=None)
@given(
    train=st.integers(1, 60),
    share=st.floats(0, 0.99),
    purity=st.floats(0, 0.99),
    noise=st.floats(0, 0.99),
    unseen=st.floats(0, 0.99),
    seed=st.integers(0, 2**31),
)
def test_any_grammar_gives_the_same_rows_for_a_seed(
    train: int, share: float, purity: float, noise: float, unseen: float, seed: int
) -> None:
    grammar = Grammar(train=train, share=share, purity=purity, noise=noise, unseen=unseen)
    rows = grammar.training_rows(seed)
    assert len(rows) == train
    assert rows == grammar.training_rows(seed)
    for row in rows:
        assert row["label"] in (0, 1)
        assert (row["group"] == "neutral") == (SHORTCUT not in row["text"])
        words = [w for w in row["text"].split() if w in CAUSAL["negative"] + CAUSAL["positive"]]
        assert 1 <= len(words) == len(set(words)) <= 2


def test_seeds_differ() -> None:
    assert Grammar().training_rows(0) != Grammar().training_rows(1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"train": 0}, "train: need at least 1, got 0"),
        ({"test": -1}, "test: need at least 1, got -1"),
        ({"share": 1.0}, "share: must be at least 0 and below 1, got 1.0"),
        ({"purity": -0.1}, "purity: must be"),
        ({"noise": float("nan")}, "noise: must be"),
        ({"unseen": 2}, "unseen: must be"),
    ],
)
def test_settings_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grammar(**setting)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="train: expected an integer, got float"):
        Grammar(train=2.5)  # type: ignore[arg-type]


def test_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group: must be kept, broken or neutral, got 'all'"):
        Grammar().test_rows("all")
