"""Words and phrases that several texts share, beside a search by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.data.repeats import repeats


def by_hand(texts: list[list[list[str]]], words: tuple[str, ...]) -> list[int]:
    """Numbers of the texts, each of segments of words, that have the words in a row."""
    size = len(words)
    return [
        number
        for number, segments in enumerate(texts)
        if any(tuple(own[at : at + size]) == words for own in segments for at in range(len(own) - size + 1))
    ]


TEXTS = st.lists(st.lists(st.lists(st.sampled_from("abc"), max_size=7), min_size=1, max_size=2), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.integers(1, 3))
def test_every_repeat_has_its_texts_and_every_phrase_is_there_or_absorbed(texts, least):
    found = repeats([[" ".join(segment) for segment in own] for own in texts], least=least, nearly=1.0)
    rows = {one.words: one.rows.tolist() for one in found}
    assert len(rows) == len(found)
    phrases = {
        tuple(own[at:end])
        for segments in texts
        for own in segments
        for at in range(len(own))
        for end in range(at + 1, len(own) + 1)
    }
    frequent = {words: by_hand(texts, words) for words in phrases}
    frequent = {words: own for words, own in frequent.items() if len(own) >= least}
    assert all(frequent[words] == own for words, own in rows.items())
    assert {words for words in frequent if len(words) == 1} == {words for words in rows if len(words) == 1}
    for words, own in frequent.items():
        if words not in rows:  # then a longer phrase stands in the same texts
            assert any(len(other) > len(words) and frequent[other] == own for other in rows)


def test_a_phrase_grows_without_limit_and_swallows_its_parts():
    long = "one two three four five six seven eight nine ten eleven twelve"
    found = repeats([[f"{long} {end}"] for end in ("a", "b", "c")], least=3)
    assert [one.text for one in found if len(one.words) > 1] == [long]
    assert not any(one.whole for one in found if len(one.words) == 1)


def test_no_phrase_crosses_a_mark_or_a_segment():
    texts = [["good. film", "plot"], ["good. film", "plot"], ["good, film", "plot"]]
    assert [one.text for one in repeats(texts, least=2)] == ["good", "film", "plot"]


def test_nearly_the_same_texts_are_enough():
    texts = [["near the station"]] * 19 + [["near home"]]
    assert [one.text for one in repeats(texts, least=5) if one.whole] == ["near the station"]
    assert "near" in [one.text for one in repeats(texts, least=5, nearly=1.0) if one.whole]


def test_rows_rise_and_are_whole_numbers():
    (found,) = repeats([["a"], [","], ["a a"]], least=2)
    assert found.rows.dtype == np.int64
    assert found.rows.tolist() == [0, 2]


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="least: need at least 1"):
        repeats([["a"]], least=0)
    with pytest.raises(ValueError, match="nearly"):
        repeats([["a"]], least=1, nearly=0.0)
