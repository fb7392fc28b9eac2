"""Swaps: their label follows from the words, and they are the same for a seed."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import planted_texts
from helpers.tiny_models import tiny, tiny_tokenizer
from spurge.engine.data.examples import Example, Examples
from spurge.engine.models.handle import Handle
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.swaps import SwapMaker, SwapShares, ending

LABELS = planted_texts.LABELS
GOLDEN = GoldenTokens(
    LABELS,
    {
        "negative": ["bad", "awful", "dull", "boring", "annoying", "sadly", "fail"],
        "positive": ["good", "great", "superb", "charming", "amusing", "happily", "win"],
    },
    ["the", "is", "was", "on", "tuesday", "and"],
)
TEXTS = (
    ("the film is good", 1),
    ("a charming and amusing story", 1),
    ("a great plot , superb acting", 1),
    ("the film is not bad", 1),
    ("it is dull", 0),
    ("a boring , annoying story", 0),
    ("awful plot and bad acting", 0),
    ("it was n't good", 0),
)


def texts(rows: Any = TEXTS, times: int = 6) -> Examples:
    return Examples([Example(text, label) for _ in range(times) for text, label in rows], LABELS)


def maker(rows: Examples | None = None, seed: int = 0, plausible: float = 0.0, **shares: float) -> SwapMaker:
    every: dict[str, float] = dict.fromkeys(("flip", "random", "same", "negation", "template", "neutral"), 0.0)
    chosen = SwapShares(**every | shares) if shares else SwapShares()
    handle = Handle(tiny("bert"), tiny_tokenizer())
    return SwapMaker(handle, rows or texts(), GOLDEN, chosen, plausible=plausible, seed=seed)


def words(text: str, label: int) -> int:
    return sum(word in GOLDEN.causal[LABELS[label]] for word in text.split())


@pytest.mark.parametrize("kind", ["flip", "random"])
def test_flips_exchange_all_words_for_others_with_the_same_ending(kind: str) -> None:
    for swap in maker(**{kind: 1.0}).make(texts(), 40):
        assert swap.kind == kind
        assert words(swap.example.text, swap.example.label) > 0
        assert words(swap.example.text, 1 - swap.example.label) == 0
        assert not {"not", "n't"} & {*swap.example.text.split()}  # a denial's label does not follow from its words
    only = texts([("a charming film", 1)])
    assert {s.example.text for s in maker(only, **{kind: 1.0}).make(only, 30)} == {"a boring film", "a annoying film"}


def test_same_keeps_the_label_and_changes_the_words() -> None:
    known = {row.text for row in texts()}
    for swap in maker(same=1.0).make(texts(), 40):
        assert words(swap.example.text, swap.example.label) > 0
        assert words(swap.example.text, 1 - swap.example.label) == 0
        assert swap.example.text not in known


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("the film is good", 1, ("the film is not good", 0)),
        ("the plot was very dull", 0, ("the plot was not very dull", 1)),
        ("the film is not bad", 1, ("the film is bad", 0)),
        ("it was n't good", 0, ("it was good", 1)),
        ("you ca n't win", 0, ("you can win", 1)),
        ("it wo n't fail", 1, ("it will fail", 0)),
    ],
)
def test_negations_turn_the_label(text: str, label: int, expected: tuple[str, int]) -> None:
    rows = texts([(text, label), ("a film", 1 - label)])
    (swap,) = maker(rows, negation=1.0).make(rows, 1)
    assert (swap.example.text, swap.example.label) == expected


@pytest.mark.parametrize("text", ["never is it not good", "good and great", "a good film", "nobody is good"])
def test_what_is_denied_otherwise_is_left_alone(text: str) -> None:
    rows = texts([(text, 1), ("a film", 0)])
    with pytest.raises(ValueError, match="nothing to swap"):
        maker(rows, negation=1.0).make(rows, 1)


def test_templates_say_one_word_of_something() -> None:
    for swap in maker(template=1.0).make(texts(), 40):
        denied = "not" in swap.example.text.split()
        spoken = 1 - swap.example.label if denied else swap.example.label
        assert words(swap.example.text, spoken) == 1
        assert words(swap.example.text, 1 - spoken) == 0


def test_neutral_swaps_move_a_telling_phrase_and_keep_the_label() -> None:
    rows = planted_texts.train()
    handle = Handle(planted_texts.model(), tiny_tokenizer())
    shares = SwapShares(flip=0, random=0, same=0, negation=0, template=0, neutral=1)
    made = SwapMaker(handle, rows, planted_texts.GOLDEN, shares).make(rows, 60)
    labels = {(row.text.replace(planted_texts.PHRASE, "").strip()): row.label for row in rows}
    assert all(planted_texts.PHRASE not in swap.example.text for swap in made if swap.example.label == 1)
    assert all(labels.get(swap.example.text, swap.example.label) == swap.example.label for swap in made)


def test_the_bag_of_words_drops_what_it_finds_implausible() -> None:
    rows = texts([("a good film", 1), ("a bad film", 0), ("the win pleases", 1), ("the fail pleases", 1)], times=20)
    only = Examples([Example("the win pleases", 1)], LABELS)
    assert maker(rows, flip=1.0, plausible=0.0).make(only, 1)
    with pytest.raises(ValueError, match="nothing to swap"):
        maker(rows, flip=1.0, plausible=0.9).make(only, 1)


def test_swaps_are_the_same_for_a_seed() -> None:
    assert maker().make(texts(), 50) == maker().make(texts(), 50)
    assert maker(seed=1).make(texts(), 50) != maker().make(texts(), 50)
    assert maker().make(texts(), 50, seed=1) != maker().make(texts(), 50)


def test_pairs_have_no_english_templates() -> None:
    rows = Examples([Example("a good film", 1, "great"), Example("a bad film", 0, "awful")] * 5, LABELS)
    made = maker(rows).make(rows, 20)
    assert {swap.kind for swap in made} <= {"flip", "random", "same", "neutral"}
    assert all(swap.example.pair for swap in made)


def test_bad_shares() -> None:
    with pytest.raises(ValueError, match="flip"):
        SwapShares(flip=-1)
    with pytest.raises(ValueError, match="same: must be finite"):
        SwapShares(same=float("inf"))
    with pytest.raises(TypeError, match="random"):
        SwapShares(random=True)
    with pytest.raises(ValueError, match="above 0"):
        SwapShares(flip=0, random=0, same=0, negation=0, template=0, neutral=0)


def test_endings() -> None:
    assert [ending(word) for word in ("boring", "sadly", "good", "not fail", "hopeless")] == [
        "ing",
        "ly",
        "",
        " ",
        "less",
    ]
