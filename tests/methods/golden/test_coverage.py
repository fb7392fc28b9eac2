"""What golden words leave out."""

from __future__ import annotations

import pytest

from helpers import planted_texts
from helpers.planted_texts import BAD, GOLDEN, GOOD, LABELS, PHRASE
from spurge.methods.golden.coverage import coverage
from spurge.methods.golden.golden import GoldenTokens


def test_a_shortcut_of_irrelevant_words_is_missing_until_it_is_listed():
    train = planted_texts.train()
    found = coverage(train, GOLDEN)
    assert [one.text for one in found.missing] == [PHRASE]
    (one,) = found.missing
    assert one.label == "positive"
    assert one.count == sum(PHRASE in row.text for row in train)
    assert PHRASE in found.summary()[0]
    assert coverage(train, GOLDEN.with_irrelevant([PHRASE])).missing == ()


def test_swappable_texts_are_counted_and_words_that_help_are_named():
    train = planted_texts.train()
    few = GoldenTokens(LABELS, {"negative": BAD[:1], "positive": GOOD[:1]})
    found = coverage(train, few)
    spoken = {0: BAD[0], 1: GOOD[0]}
    assert found.swappable == sum(spoken[row.label] in row.text.split() for row in train)
    helpful = [one.text for one in found.helpful(6)]
    assert set(helpful) & {*BAD, *GOOD}
    assert "would reach more" in found.summary()[1]


def test_other_labels_are_refused():
    with pytest.raises(ValueError, match="labels"):
        coverage(planted_texts.train(), GoldenTokens.from_words(a=["x"], b=["y"], c=["z"]))
