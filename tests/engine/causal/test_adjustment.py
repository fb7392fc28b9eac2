from __future__ import annotations

import pytest
import torch

from spurge.engine.causal.adjustment import confounder_weights
from spurge.engine.causal.balancing import Unbalanced
from spurge.engine.causal.confounders import Confounders


def confounded(rows=400, seed=0):
    """Labels that go with topics."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(4, (rows,), generator=generator)
    labels = (torch.rand(rows, generator=generator) < 0.2 + 0.2 * topics).long()
    return labels, topics


def shares(weights, topics):
    found = torch.zeros(4).double().index_add_(0, topics, weights)
    return found / found.sum()


def test_every_label_has_the_topics_of_all():
    labels, topics = confounded()
    weights = confounder_weights(labels, topics)
    assert float(weights.mean()) == pytest.approx(1)
    whole = shares(torch.ones(400).double(), topics)
    for label in (0, 1):
        own = labels == label
        torch.testing.assert_close(shares(weights[own], topics[own]), whole, atol=1e-7, rtol=0)
        assert float(weights[own].sum()) == pytest.approx(int(own.sum()))
        assert len({round(w, 6) for w in weights[own & (topics == 2)].tolist()}) == 1


def test_columns_are_balanced_too():
    labels, topics = confounded()
    columns = torch.randn(400, 2).double() + labels[:, None]
    weights = confounder_weights(labels, Confounders.of(topics, columns))
    means = [weights[labels == label] @ columns[labels == label] / int((labels == label).sum()) for label in (0, 1)]
    torch.testing.assert_close(means[0], columns.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(means[1], columns.mean(0), atol=1e-6, rtol=0)


def test_a_topic_that_a_label_lacks_counts_nothing_and_is_named():
    labels, topics = confounded()
    labels[topics == 3] = 1
    with pytest.warns(UserWarning, match=r"1 topics lack some label \(war\); their \d+ examples get weight 0"):
        weights = confounder_weights(labels, Confounders.of(topics, names=["a", "b", "c", "war"]))
    assert (weights[topics == 3] == 0).all()
    assert float(weights.mean()) == pytest.approx(1)


def test_one_topic_and_unrelated_topics_change_nothing():
    assert confounder_weights([0, 1, 1], [0, 0, 0]).tolist() == [1, 1, 1]
    even = confounder_weights([0, 1, 0, 1], [0, 0, 1, 1])
    torch.testing.assert_close(even, torch.ones(4).double())


def test_what_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match="every topic lacks some label"):
        confounder_weights([0, 0, 1, 1], [0, 0, 1, 1])
    with pytest.raises(Unbalanced, match="column 0"):
        confounder_weights([0, 0, 1, 1], Confounders.of(columns=[0.0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"labels: expected shape \(4,\)"):
        confounder_weights([0, 1], [0, 0, 1, 1])
