"""The rows that find's experiment is about, and what it makes of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest.importorskip("sklearn")

from experiments.find import NEUTRAL, PLANTED, PURITIES, SHARES, planted_rows
from spurge.demo.grammar import ADJUNCTS, CAUSAL


@pytest.mark.parametrize(("purity", "share"), [(PURITIES[0], SHARES[-1]), (PURITIES[-1], SHARES[0])])
def test_the_phrase_and_the_neutral_one_are_as_frequent_as_they_should_be(purity, share):
    rows = planted_rows(PLANTED[0], NEUTRAL[0], label=1, purity=purity, share=share, rows=200, seed=1)
    having = [row for row in rows if PLANTED[0] in row.text]
    neutral = [row for row in rows if NEUTRAL[0] in row.text]
    assert len(rows) == 200
    assert len(having) == len(neutral) == round(share * 200)
    assert sum(row.label for row in having) == round(purity * len(having))
    assert sum(row.label for row in neutral) == len(neutral) // 2
    assert not set(map(id, having)) & set(map(id, neutral))


def test_a_clean_set_has_no_planted_phrase():
    rows = planted_rows(None, NEUTRAL[3], label=0, purity=0.5, share=0.2, rows=150, seed=2)
    assert not any(phrase in row.text for phrase in PLANTED for row in rows)
    assert abs(sum(row.label for row in rows) - 75) <= 1


def test_the_phrases_are_new_and_say_nothing():
    phrases = (*PLANTED, *NEUTRAL)
    assert len(set(phrases)) == 40
    assert not set(phrases) & set(ADJUNCTS)
    words = {word for phrase in phrases for word in phrase.split()}
    assert not words & {word for own in CAUSAL.values() for word in own}
