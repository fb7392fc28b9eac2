"""The bag of words beside scikit-learn's, and what it refuses."""

from __future__ import annotations

import pytest

from helpers import planted_texts
from spurge.engine.data.examples import Example, Examples
from spurge.engine.data.tfidf import BagOfWords


def test_probabilities_are_those_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    text = pytest.importorskip("sklearn.feature_extraction.text")
    rows = planted_texts.train()
    reading = text.TfidfVectorizer(ngram_range=(1, 2), min_df=2, token_pattern=r"\S+")
    matrix = reading.fit_transform(row.text for row in rows)
    # Of two outputs the penalty is shared by both, half of it each: C of a single one is twice as large.
    fitted = linear.LogisticRegression(C=2.0, tol=1e-10, max_iter=1000).fit(matrix, rows.targets.numpy())
    bag = BagOfWords(rows)
    for row in [*planted_texts.broken()[:20], Example("perhaps a chair", 0)]:
        expected = fitted.predict_proba(reading.transform([row.text]))[0]
        assert bag.probabilities(row) == pytest.approx(expected.tolist(), abs=2e-3)


def test_unknown_words_leave_the_prior() -> None:
    bag = BagOfWords(Examples([Example("good film", 1)] * 3 + [Example("bad film", 0)], ("no", "yes")))
    assert bag.probabilities(Example("zebra", 0))[1] > 0.5
    assert sum(bag.probabilities(Example("film", 0, "good"))) == pytest.approx(1)


def test_no_word_in_enough_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="no word is in 2 of 2 texts"):
        BagOfWords(Examples([Example("good", 1), Example("bad", 0)], ("no", "yes")))
