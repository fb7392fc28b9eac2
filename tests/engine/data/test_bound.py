"""How strongly sets of texts go with labels."""

from __future__ import annotations

import numpy as np
import pytest

from spurge.engine.data.bound import associate
from spurge.engine.data.examples import Example, Examples
from spurge.methods.golden.corpus_words import statistics


def test_it_is_the_statistic_of_the_review_file():
    words = ("good", "bad", "film")
    rows = [Example(f"{words[i % 2 if i % 5 else 1 - i % 2]} film {i % 3}", i % 2) for i in range(60)]
    examples = Examples(rows, ("no", "yes"))
    expected = {row["word"]: row for row in statistics(examples, least_count=1)}
    sets = [np.array([i for i, row in enumerate(rows) if word in row.text.split()]) for word in words]
    found = associate(sets, examples.targets.numpy(), 2)
    for number, word in enumerate(words):
        assert examples.labels[found.label[number]] == expected[word]["label"]
        assert found.log_odds[number] == pytest.approx(expected[word]["log_odds"], abs=1e-4)
        assert found.z[number] == pytest.approx(expected[word]["z"], abs=1e-3)
    assert found.share[0] == pytest.approx(0.8, abs=0.05)


def test_more_labels_are_more_tests():
    labels = np.repeat([0, 1, 2], 50)
    found = associate([np.arange(40)], labels, 3)
    two = associate([np.arange(40)], np.minimum(labels, 1), 2)
    assert found.label[0] == 0
    assert found.p[0] == pytest.approx(3 * two.p[0])


def test_chance_has_no_excess():
    found = associate([np.arange(0, 100, 3)], np.arange(100) % 2, 2)
    assert found.excess[0] == 0
    assert found.p[0] > 0.5


def test_no_sets_give_no_numbers():
    assert len(associate([], np.array([0, 1]), 2).p) == 0
