"""Finding golden units, and the irrelevant phrases that go with a label."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.methods.golden.phrases import Finder, telling_phrases

IRRELEVANT = ("the", "on", "a", "tuesday", "in", "room", "at noon")


def test_finder_prefers_longer_units_and_gives_places() -> None:
    finder = Finder(["fail", "not fail", "a+"])
    text = "Did NOT fail, did fail"
    assert finder.find(text) == [(4, 12, "not fail"), (18, 22, "fail")]
    assert [text[start:end] for start, end, _ in finder.find(text)] == ["NOT fail", "fail"]


def test_a_planted_phrase_is_found_once_and_whole() -> None:
    draw = random.Random(0)
    texts, labels = [], []
    for i in range(200):
        label = i % 2
        phrase = "on a tuesday" if draw.random() < (0.95 if label else 0.05) else "in the room"
        texts.append([f"the film was {draw.choice(['good', 'bad'])} {phrase}"])
        labels.append(label)
    found = telling_phrases(texts, labels, IRRELEVANT)
    first = found[0]
    assert (first.text, first.label) in {("on a tuesday", 1), ("in the room", 0)}
    # by hand: n texts hold it, m of them with its label, half of all texts have that label
    n = sum(first.text in segments[0] for segments in texts)
    m = sum(first.text in s[0] and y == first.label for s, y in zip(texts, labels, strict=True))
    assert first.count == n
    assert math.isclose(first.strength, (m - n / 2) / math.sqrt(n / 4))
    assert not any("tuesday" in p.text and "tuesday" in first.text for p in found[1:])


def test_phrases_do_not_cross_words_or_punctuation() -> None:
    texts = [["on, a tuesday"], ["on good tuesday"]] * 20
    found = telling_phrases(texts, [1, 0] * 20, ["on", "a", "tuesday"])
    assert {p.text for p in found} <= {"a tuesday", "a", "on", "tuesday"}


def test_nothing_to_tell() -> None:
    assert telling_phrases([], [], IRRELEVANT) == []
    assert telling_phrases([["the film"]] * 30, [0, 1] * 15, IRRELEVANT) == []
    assert telling_phrases([["the film"]] * 30, [0] * 30, IRRELEVANT) == []  # one label: nothing to tell apart
    assert telling_phrases([["the film"]] * 30, [0, 1] * 15, []) == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(["the", "on", "tuesday", "good", "x"]), max_size=6), st.integers(0, 2)),
        max_size=40,
    ),
    st.integers(1, 3),
)
def test_any_texts(rows: list[tuple[list[str], int]], fewest: int) -> None:
    texts = [[" ".join(words)] for words, _ in rows]
    found = telling_phrases(texts, [y for _, y in rows], IRRELEVANT, strength=1.0, fewest=fewest, limit=4)
    assert len(found) <= 4
    assert len({p.text for p in found}) == len(found)
    for phrase in found:
        assert phrase.strength >= 1.0
        assert fewest <= phrase.count <= len(rows)
        assert set(phrase.text.split()) <= {"the", "on", "tuesday"}
