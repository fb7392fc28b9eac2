from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spurge.engine.causal.confounders import Confounders


def test_topics_by_number_by_name_and_as_found():
    by_number = Confounders.of([2, 0, 0])
    assert by_number.topics.tolist() == [2, 0, 0]
    assert by_number.names == ("0", "1", "2")
    by_name = Confounders.of(["war", "art", "war"])
    assert (by_name.topics.tolist(), by_name.names) == ([1, 0, 1], ("art", "war"))
    assert Confounders.of(["war"], names=["war", "art"]).topics.tolist() == [0]
    found = Confounders.of(SimpleNamespace(labels=torch.tensor([1, 0]), names=("a", "b")))
    assert (found.topics.tolist(), found.names) == ([1, 0], ("a", "b"))
    assert Confounders.of(np.array([0, 1])).topics.dtype == torch.int64


def test_columns_are_standardised():
    found = Confounders.of(columns=np.array([[1.0, 10], [2, 10], [3, 40]]), column_names=["age", "length"])
    torch.testing.assert_close(found.columns.mean(0), torch.zeros(2).double())
    torch.testing.assert_close(found.columns.std(0, unbiased=False), torch.ones(2).double())
    assert Confounders.of(columns=[True, False]).columns.tolist() == [[1.0], [-1.0]]


def test_design_leaves_out_one_topic_of_those_that_occur():
    found = Confounders.of([0, 3, 3, 1], [1.0, 2, 3, 4], names="abcd")
    assert found.design().shape == (4, 3)
    assert found.design()[:, :2].tolist() == [[1, 0], [0, 0], [0, 0], [0, 1]]
    assert found.design_names() == ("topic a", "topic b", "column 0")
    assert repr(found) == "Confounders(4 prompts, 3 topics, 1 columns)"
    assert Confounders.of([0, 0]).design().shape == (2, 0)


def test_subset_and_fingerprint():
    found = Confounders.of([0, 1, 1], [1.0, 2, 4])
    some = found.subset(torch.tensor([2, 0]))
    assert some.topics.tolist() == [1, 0]
    assert torch.equal(some.columns, found.columns[[2, 0]])
    assert len(some) == 2
    assert found.fingerprint() == Confounders.of([0, 1, 1], [1.0, 2, 4]).fingerprint()
    assert found.fingerprint() != Confounders.of([0, 1, 0], [1.0, 2, 4]).fingerprint()
    assert found.fingerprint() != Confounders.of([0, 1, 1], [1.0, 2, 5]).fingerprint()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "give topics, columns or both"),
        ({"topics": [0, -1]}, ValueError, "topics: expected values from 0, got -1"),
        ({"topics": [0.5, 1.0]}, TypeError, "topics: expected a tensor of whole numbers"),
        ({"topics": []}, (ValueError, TypeError), "topics"),
        ({"topics": ["x", None]}, TypeError, "topics: expected names .* got NoneType at row 1"),
        ({"topics": [None, "x"]}, TypeError, "topics: expected names .* got NoneType at row 0"),
        ({"topics": ["x"], "names": ["y"]}, ValueError, "topics: 'x' is none of"),
        ({"topics": [0, 2], "names": ["a"]}, ValueError, "names: expected at least 3"),
        ({"topics": [0, 1], "columns": [1.0]}, ValueError, "columns: need a row for each of 2 topics, got 1"),
        ({"columns": [1.0, float("nan")]}, ValueError, "columns: expected finite numbers, got nan at row 1"),
        ({"columns": [[1.0, 2], [1, 3]]}, ValueError, "columns: 'column 0' is constant"),
        ({"columns": [1.0, 2], "column_names": ["a", "b"]}, ValueError, "column_names: expected 1, got 2"),
    ],
)
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        Confounders.of(**arguments)
