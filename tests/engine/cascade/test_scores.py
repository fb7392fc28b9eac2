"""Sets of neurons behave as sets, scores select by their rules, files come back whole or not at all."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.base.files import FileError, canonical_json
from spurge.engine.base.tensor_files import write_tensors
from spurge.engine.cascade.scores import NeuronRef, NeuronScores, NeuronSet, frequent

SITES = ["layer.2.down", "layer.10.down", "head"]
WIDTHS = {"head": 9, "layer.2.down": 7, "layer.10.down": 5}
mappings = st.dictionaries(st.sampled_from(SITES), st.lists(st.integers(0, 4), max_size=8))
sets = mappings.map(NeuronSet)


def scores(*rows, **info):
    return NeuronScores({site: torch.tensor(row) for site, row in zip(SITES, rows, strict=False)}, info)


# ---- sets


def test_a_set_is_sorted_unique_and_in_layer_order():
    neurons = NeuronSet({"layer.10.down": [3, 1, 3], "layer.2.down": torch.tensor([2]), "head": []})
    assert neurons.sites == ("layer.2.down", "layer.10.down")
    assert [str(ref) for ref in neurons] == ["layer.2.down[2]", "layer.10.down[1]", "layer.10.down[3]"]
    assert neurons.counts() == {"layer.2.down": 1, "layer.10.down": 2}
    assert neurons.indices("layer.10.down").tolist() == [1, 3]
    assert neurons.indices("head").dtype == torch.int64
    assert neurons.indices("head").tolist() == []
    assert NeuronRef("layer.2.down", 2) in neurons
    assert NeuronRef("layer.2.down", 3) not in neurons
    assert "layer.2.down" not in neurons
    assert repr(neurons) == "NeuronSet(3 neurons of 2 sites: layer.2.down 1, layer.10.down 2)"
    assert repr(NeuronSet()) == "NeuronSet(0 neurons)"


def test_a_set_cannot_be_changed_through_what_it_gives_out():
    source = np.array([1, 2])
    neurons = NeuronSet({"head": source})
    source[0] = 5
    neurons.indices("head")[0] = 7
    neurons.to_dict()["head"].append(8)
    assert neurons == NeuronSet({"head": [1, 2]})


@given(sets, sets)
def test_algebra_is_that_of_python_sets(a, b):
    python_a, python_b = set(a), set(b)
    assert set(a | b) == python_a | python_b
    assert set(a & b) == python_a & python_b
    assert set(a - b) == python_a - python_b
    assert (a <= b) == (python_a <= python_b)
    assert (a == b) == (python_a == python_b)
    assert len(a) == len(python_a) == sum(a.counts().values())
    assert all(ref in a for ref in python_a)


@given(sets, sets, sets)
def test_algebra_laws(a, b, c):
    assert a | b == b | a
    assert a & b == b & a
    assert (a | b) | c == a | (b | c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a - (b | c) == (a - b) & (a - c)
    assert (a - b) | (a & b) == a
    assert hash(a | b) == hash(b | a)


@given(sets, st.randoms(use_true_random=False))
def test_round_trips(a, shuffler: random.Random):
    refs = list(a)
    shuffler.shuffle(refs)
    assert NeuronSet.from_refs(refs) == a == NeuronSet(a.to_dict()) == copy.deepcopy(a)
    assert list(NeuronSet.from_refs(refs)) == list(a)


@given(sets, sets, st.integers(0, 2**32))
def test_random_like_keeps_counts_and_avoids_the_excluded(a, exclude, seed):
    free = {site: WIDTHS[site] - exclude.counts().get(site, 0) for site in WIDTHS}
    if any(count > free[site] for site, count in a.counts().items()):
        with pytest.raises(ValueError, match="to draw from"):
            a.random_like(WIDTHS, seed, exclude)
        return
    drawn = a.random_like(WIDTHS, seed, exclude)
    assert drawn.counts() == a.counts()
    assert not len(drawn & exclude)
    assert drawn <= NeuronSet.all(WIDTHS)
    assert drawn == a.random_like(WIDTHS, seed, exclude)


def test_random_like_draws_every_neuron_about_equally_often():
    one = NeuronSet({"head": [0, 1, 2]})
    times = np.zeros(9)
    for seed in range(600):
        times[one.random_like(WIDTHS, seed).indices("head")] += 1
    assert abs(times - 200).max() < 60  # 5 deviations of a binomial with n = 600, p = 1/3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NeuronSet([1]), TypeError, "site name to integers, got list"),
        (lambda: NeuronSet({3: [1]}), TypeError, "module paths, got int"),
        (lambda: NeuronSet({"a": 3}), TypeError, "'a' needs a sequence of integers, got int"),
        (lambda: NeuronSet({"a": "12"}), TypeError, "got str"),
        (lambda: NeuronSet({"a": [1.0]}), TypeError, "needs integers, got float64"),
        (lambda: NeuronSet({"a": [True]}), TypeError, "needs integers, got bool"),
        (lambda: NeuronSet({"a": [-1]}), ValueError, "negative numbers, got -1"),
        (lambda: NeuronSet.from_refs(["a"]), TypeError, "expected NeuronRef, got str"),
        (lambda: NeuronSet.all({"a": -1}), ValueError, "at least 0, got -1"),
        (lambda: NeuronSet({"a": [1]}) | {"a": [1]}, TypeError, "unsupported"),
        (lambda: NeuronSet({"a": [1]}).check(WIDTHS), ValueError, "'a' is unknown"),
        (lambda: NeuronSet({"head": [9]}).check(WIDTHS), ValueError, "has 9 neurons, got index 9"),
        (lambda: NeuronSet({"head": [0]}).random_like(WIDTHS, 1.5), TypeError, "seed: expected an integer"),
        (lambda: NeuronSet({"head": [0]}).random_like(WIDTHS, -1), ValueError, "seed: need at least 0"),
        (lambda: frequent([]), ValueError, "at least 1, got 0"),
        (lambda: frequent(NeuronSet()), TypeError, "sequence of NeuronSet"),
        (lambda: frequent([{"a": [1]}]), TypeError, "sequence of NeuronSet"),
        (lambda: frequent([NeuronSet()], 0), ValueError, "share: expected a number above 0"),
        (lambda: frequent([NeuronSet()], float("nan")), ValueError, "share"),
        (lambda: frequent([NeuronSet()], "half"), TypeError, "share: expected a number, got str"),
    ],
)
def test_set_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_frequent_counts_the_share_exactly():
    bags = [NeuronSet({"head": [0]})] * 3 + [NeuronSet({"head": [1], "layer.2.down": [2]})] * 27
    assert frequent(bags, 0.1) == NeuronSet({"head": [0, 1], "layer.2.down": [2]})  # 3 of 30 is 0.1
    assert frequent(bags, 0.9) == NeuronSet({"head": [1], "layer.2.down": [2]})
    assert frequent(bags, 1.0) == NeuronSet()


@given(st.lists(sets, min_size=1, max_size=5))
def test_frequent_lies_between_intersection_and_union(bags):
    union, intersection = bags[0], bags[0]
    for bag in bags[1:]:
        union, intersection = union | bag, intersection & bag
    assert frequent(bags, 1.0) == intersection
    assert frequent(bags, 1e-9) == union
    assert intersection <= frequent(bags, 0.5) <= union


# ---- scores

vectors = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=6)
score_maps = st.dictionaries(st.sampled_from(SITES), vectors, min_size=1).map(
    lambda rows: NeuronScores({site: torch.tensor(row) for site, row in rows.items()})
)


def test_scores_are_owned_float32_in_layer_order():
    source = torch.tensor([1.0, 2.0], dtype=torch.float64)
    made = NeuronScores({"layer.10.down": source, "layer.2.down": torch.ones(3, dtype=torch.bfloat16)})
    source[0] = 9
    assert list(made.values) == ["layer.2.down", "layer.10.down"]
    assert made.values["layer.10.down"].dtype == torch.float32
    assert made.values["layer.10.down"].tolist() == [1.0, 2.0]
    assert made.widths == {"layer.2.down": 3, "layer.10.down": 2}
    assert made.per_site() == {"layer.2.down": 3.0, "layer.10.down": 3.0}
    assert repr(made) == "NeuronScores(5 neurons of 2 sites, highest layer.10.down[1] = 2)"


@given(score_maps, st.integers(0, 20))
def test_ranking_is_a_stable_sort(made, n):
    flat = [(NeuronRef(site, i), v) for site, row in made.values.items() for i, v in enumerate(row.tolist())]
    expected = sorted(flat, key=lambda item: -item[1])[:n]  # Python's sort is stable
    assert made.ranking(n) == expected
    assert set(made.top(n)) == {ref for ref, _ in expected}
    assert len(made.ranking()) == sum(made.widths.values())


@given(
    score_maps,
    st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    st.none() | st.integers(1, 12),
    st.sampled_from(["positive", "absolute"]),
)
def test_select_is_the_stated_rule(made, fraction, cap, sign):
    flat = [(NeuronRef(site, i), v) for site, row in made.values.items() for i, v in enumerate(row.tolist())]
    if sign == "absolute":
        flat = [(ref, abs(v)) for ref, v in flat]
    greatest = max(v for _, v in flat)
    kept = sorted(((r, v) for r, v in flat if v > 0 and v >= fraction * greatest), key=lambda item: -item[1])
    assert set(made.select(fraction, cap, sign)) == {ref for ref, _ in kept[:cap]}


def test_select_takes_the_maximum_over_all_sites():
    made = scores([10.0, 1.9, 2.0], [1.0, -9.0, 3.0])
    assert made.select() == NeuronSet({"layer.2.down": [0, 2], "layer.10.down": [2]})
    assert made.select(sign="absolute") == NeuronSet({"layer.2.down": [0, 2], "layer.10.down": [1, 2]})
    assert made.select(cap=2) == NeuronSet({"layer.2.down": [0], "layer.10.down": [2]})
    assert scores([-1.0, 0.0]).select() == NeuronSet()


def test_scores_add_and_scale():
    a, b = scores([1.0, 2.0], method="ig", seed=1), scores([0.5, -1.0], method="ig", seed=2)
    total = 2 * a + b * 0.5
    assert total.values["layer.2.down"].tolist() == [2.25, 3.5]
    assert total.info == {"method": "ig"}
    assert "ig" in repr(total)
    with pytest.raises(ValueError, match="sites and widths differ"):
        a + scores([1.0, 2.0, 3.0])
    with pytest.raises(TypeError):
        a * "2"
    with pytest.raises(TypeError):
        a + 1


@settings(max_examples=20)
@given(score_maps)
def test_files_round_trip(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("scores") / "s.safetensors"
    NeuronScores(made.values, {"method": "ig", "settings": {"nodes": 2}}).save(path)
    again = NeuronScores.load(path)
    assert again.info == {"method": "ig", "settings": {"nodes": 2}}
    assert again.values.keys() == made.values.keys()
    assert all(torch.equal(again.values[site], made.values[site]) for site in made.values)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    scores([1.0, 2.0], [3.0]).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(FileError, match="truncated"):
        NeuronScores.load(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FileError, match="changed since"):
        NeuronScores.load(path)
    write_tensors(path, {"a": torch.ones(2)}, {"kind": "edit"})
    with pytest.raises(FileError, match="holds 'edit', expected 'scores'"):
        NeuronScores.load(path)
    write_tensors(path, {"a": torch.ones(2, dtype=torch.int64)}, {"kind": "scores", "info": canonical_json({})})
    with pytest.raises(FileError, match="needs a floating tensor"):
        NeuronScores.load(path)
    with pytest.raises(FileNotFoundError):
        NeuronScores.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NeuronScores({}), ValueError, "at least 1 site"),
        (lambda: NeuronScores([1]), TypeError, "got list"),
        (lambda: NeuronScores({1: torch.ones(2)}), TypeError, "module paths, got int"),
        (lambda: NeuronScores({"a": [1.0]}), TypeError, "'a' needs a floating tensor, got list"),
        (lambda: NeuronScores({"a": torch.ones(2).long()}), TypeError, "got torch.int64"),
        (lambda: NeuronScores({"a": torch.ones(2, 2)}), ValueError, r"got shape \(2, 2\)"),
        (lambda: NeuronScores({"a": torch.ones(0)}), ValueError, r"got shape \(0,\)"),
        (
            lambda: scores([1.0, float("nan"), float("inf")]),
            ValueError,
            "2 scores that are not finite.*neuron 1: nan",
        ),
        (lambda: NeuronScores({"a": torch.ones(2)}, {"x": {1, 2}}), TypeError, "cannot be written as JSON"),
        (lambda: scores([1.0]).select(0), ValueError, "fraction: expected a number above 0"),
        (lambda: scores([1.0]).select(1.1), ValueError, "at most 1, got 1.1"),
        (lambda: scores([1.0]).select("0.2"), TypeError, "fraction: expected a number, got str"),
        (lambda: scores([1.0]).select(cap=0), ValueError, "cap: need at least 1, got 0"),
        (lambda: scores([1.0]).select(cap=1.5), TypeError, "cap: expected an integer"),
        (
            lambda: scores([1.0]).select(sign="negative"),
            ValueError,
            "one of positive, absolute, got 'negative'",
        ),
        (lambda: scores([1.0]).top(-1), ValueError, "n: need at least 0"),
        (lambda: scores([1e38]) * 1e10, ValueError, "not finite"),
    ],
)
def test_score_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_frame():
    frame = scores([1.0, 2.0], [3.0]).to_frame()
    assert frame.columns.tolist() == ["site", "index", "score"]
    assert frame.values.tolist() == [
        ["layer.2.down", 0, 1.0],
        ["layer.2.down", 1, 2.0],
        ["layer.10.down", 0, 3.0],
    ]
