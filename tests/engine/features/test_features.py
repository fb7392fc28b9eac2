"""Features are checked at birth, split the same way everywhere, and come back from a file as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spurge
from spurge.engine.base.files import FileError
from spurge.engine.base.tensor_files import write_tensors
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head


def features(rows=24, width=5, outputs=3, dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(rows)
    head = Head(torch.randn(outputs, width, generator=generator), torch.randn(outputs, generator=generator))
    values = torch.randn(rows, width, generator=generator).to(dtype)
    numbers = torch.arange(rows)
    given = {"values": values, "labels": numbers % outputs, "head": head, "groups": numbers // outputs % 2}
    return Features(**(given | changes))


def test_predictions_are_those_of_the_head():
    x = features()
    expected = x.values @ x.head.weight.T + x.head.bias
    assert torch.allclose(x.logits(), expected, atol=1e-6)
    assert torch.equal(x.predictions(), x.logits().argmax(1))
    assert torch.equal(x.right(), x.predictions() == x.labels)
    assert x.counts().tolist() == [8, 8, 8]
    assert x.group_counts().tolist() == [12, 12]
    assert (len(x), x.names, x.group_names) == (24, ("0", "1", "2"), ("0", "1"))
    assert spurge.Features is Features


def test_repr():
    x = features(names=("a", "b", "c"), group_names=("land", "water"))
    accuracy = 100 * x.right().double().mean()
    assert repr(x) == f"Features(24 x 5, classes a 8, b 8, c 8, groups land 12, water 12, accuracy {accuracy:.1f} %)"
    assert "classes 20 of at least 1, acc" in repr(features(outputs=20, groups=None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_file_gives_all_back(tmp_path, dtype):
    x = features(dtype=dtype, names=("a", "b", "c"), group_names=("u", "v"), info={"seed": 3})
    x.save(tmp_path / "x.safetensors")
    y = Features.load(tmp_path / "x.safetensors")
    assert y.values.dtype == dtype
    assert y.fingerprint() == x.fingerprint()
    assert (y.names, y.group_names, y.info) == (x.names, x.group_names, x.info)
    assert y.head.fingerprint() == x.head.fingerprint()


def test_a_file_without_groups_and_bias(tmp_path):
    x = features(groups=None, head=Head.of(nn.Linear(5, 3, bias=False)))
    x.save(tmp_path / "x.safetensors")
    y = Features.load(tmp_path / "x.safetensors")
    assert y.groups is None
    assert y.head.bias is None
    assert y.head.prints == x.head.prints
    assert y.fingerprint() == x.fingerprint()


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.zeros(1)}, {"kind": "edit"})
    with pytest.raises(FileError, match="holds 'edit', expected 'features'"):
        Features.load(path)
    write_tensors(path, {"values": torch.zeros(1)}, {"kind": "features", "names": "{}", "head": "{}", "info": "{}"})
    with pytest.raises(FileError, match="not features"):
        Features.load(path)


def test_the_fingerprint_sees_every_part():
    x = features()
    values, labels = x.values.clone(), x.labels.clone()
    values[3, 1] += 1
    labels[0] = 2
    others = [
        features(values=values),
        features(labels=labels),
        features(groups=None),
        features(names=("a", "b", "c")),
        features(group_names=("a", "b")),
        x.with_head(x.head.with_(bias=torch.zeros(3))),
        x.to("cpu").subset(torch.arange(23)),
    ]
    prints = [other.fingerprint() for other in (x, *others)]
    assert len(set(prints)) == len(prints)
    assert features(info={"a": 1}).fingerprint() == x.fingerprint()


def test_subset():
    x = features()
    y = x.subset([5, 0, 5])
    assert torch.equal(y.values, x.values[[5, 0, 5]])
    assert y.labels.tolist() == [2, 0, 2]
    assert y.groups.tolist() == [1, 0, 1]
    assert y.group_names == x.group_names
    assert x.subset(x.labels == 1).labels.unique().tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 80),
    st.lists(st.floats(0.05, 1), min_size=1, max_size=4),
    st.integers(0, 5),
    st.sampled_from(["label", "group"]),
)
def test_split_keeps_the_shares_of_every_stratum(rows, weights, seed, by):
    numbers = torch.arange(rows)
    x = features(rows, values=numbers[:, None] * torch.ones(5), labels=numbers**2 % 7 % 3, groups=numbers % 3)
    total = sum(weights) * 1.001
    shares = [weight / total for weight in weights]
    strata = x.labels if by == "label" else x.groups
    try:
        parts = x.split(shares, seed=seed, by=by)
    except ValueError:  # a part without rows: only where some share of all strata is small
        assert min(share * int(count) for share in shares for count in strata.bincount()) < 1
        return
    numbers = [part.values[:, 0].long() for part in parts]
    together = torch.cat(numbers)
    assert len(together.unique()) == len(together) <= rows
    for part, share, rows_of in zip(parts, shares, numbers, strict=True):
        assert torch.equal(rows_of, rows_of.sort().values)
        assert torch.equal(part.labels, x.labels[rows_of])
        for stratum in strata.unique():
            expected = share * int((strata == stratum).sum())
            assert abs(int((strata[rows_of] == stratum).sum()) - expected) <= 1
    again = x.split(shares, seed=seed, by=by)
    assert [part.fingerprint() for part in again] == [part.fingerprint() for part in parts]


def test_halves_use_every_row_and_the_seed():
    x = features()
    parts = x.split()
    assert sum(map(len, parts)) == len(x)
    assert x.split(seed=1)[0].fingerprint() != parts[0].fingerprint()


def test_all_is_the_same_on_another_device(device):
    x = features()
    y = x.to(device)
    assert {y.values.device.type, y.labels.device.type, y.groups.device.type} == {device.type}
    assert torch.equal(y.right().cpu(), x.right())
    assert torch.allclose(y.logits().cpu(), x.logits(), atol=1e-5)
    assert y.fingerprint() == x.fingerprint()
    assert [part.fingerprint() for part in y.split()] == [part.fingerprint() for part in x.split()]
    assert y.subset([3, 1]).labels.tolist() == x.subset([3, 1]).labels.tolist()
    assert torch.equal(y.crossed().groups.cpu(), x.crossed().groups)


def test_other_groups():
    x = features(names=("a", "b", "c"), group_names=("u", "v"))
    y = x.crossed()
    assert y.group_names == ("a/u", "a/v", "b/u", "b/v", "c/u", "c/v")
    assert torch.equal(y.groups, 2 * x.labels + x.groups)
    assert x.with_groups(None).groups is None
    assert x.with_groups(x.labels, ("p", "q", "r")).group_counts().tolist() == [8, 8, 8]


NAN = torch.zeros(24, 5)
NAN[7, 2] = float("nan")
LARGE = torch.full((24, 5), 1e308, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": NAN}, ValueError, "values: expected finite numbers, got nan at row 7"),
        ({"values": -NAN.half() / 0}, ValueError, "values: expected finite numbers"),
        ({"values": torch.zeros(24, 6)}, ValueError, r"values: expected shape \[N, 5\], got \(24, 6\)"),
        ({"values": torch.zeros(0, 5)}, ValueError, r"got \(0, 5\)"),
        ({"values": torch.zeros(24, 5, dtype=torch.int64)}, TypeError, "values: expected a floating tensor"),
        ({"values": [[0.0]]}, TypeError, "values: expected a floating tensor, got list"),
        ({"labels": torch.full((24,), 3)}, ValueError, "labels: expected values below 3, got 3 at row 0"),
        ({"labels": torch.arange(24) - 1}, ValueError, "labels: expected values from 0, got -1 at row 0"),
        ({"labels": torch.zeros(23, dtype=torch.int64)}, ValueError, r"labels: expected shape \(24,\), got \(23,\)"),
        ({"labels": torch.zeros(24)}, TypeError, "labels: expected a tensor of whole numbers, got torch.float32"),
        ({"labels": torch.zeros(24, dtype=torch.bool)}, TypeError, "whole numbers, got torch.bool"),
        ({"groups": torch.full((24,), -1)}, ValueError, "groups: expected values from 0, got -1"),
        ({"group_names": ("a",)}, ValueError, "groups: expected values below 1, got 1 at row 3"),
        ({"groups": None, "group_names": ("a",)}, ValueError, "group_names: without groups"),
        ({"names": ("a", "b")}, ValueError, "names: expected 3, one for each output, got 2"),
        ({"names": ("a", "a", "b")}, ValueError, "names must differ"),
        ({"head": nn.Linear(5, 3)}, TypeError, "head: expected a Head"),
        ({"info": {"x": object()}}, TypeError, "cannot be written as JSON"),
    ],
)  # fmt: skip
def test_what_is_refused_at_birth(changes, error, message):
    with pytest.raises(error, match=message):
        features(**changes)


def test_large_finite_features_are_no_mistake():
    assert len(features(values=LARGE)) == 24
    assert len(features(values=torch.full((24, 5), 3e38))) == 24


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: x.subset([24]), ValueError, "index: expected values below 24, got 24 at row 0"),
        (lambda x: x.subset([-1]), ValueError, "index: expected values from 0, got -1"),
        (lambda x: x.subset([]), ValueError, "index: need at least 1 row, got 0"),
        (lambda x: x.subset(x.labels > 9), ValueError, "index: need at least 1 row, got 0"),
        (lambda x: x.subset([0.5]), TypeError, "index: expected a tensor of whole numbers"),
        (lambda x: x.split(()), ValueError, "shares: expected positive numbers"),
        (lambda x: x.split((0.5, 0.6)), ValueError, "shares: .* at most 1"),
        (lambda x: x.split((0.5, 0)), ValueError, "shares: expected positive numbers"),
        (lambda x: x.split((0.01, 0.9)), ValueError, r"shares: 24 rows give parts of \[0, "),
        (lambda x: x.split(by="row"), ValueError, "by: expected one of label, group, got 'row'"),
        (lambda x: x.with_groups(None).split(by="group"), ValueError, "groups: these features have none"),
        (lambda x: x.with_groups(None).group_counts(), ValueError, "groups: these features have none"),
        (lambda x: x.with_head(Head(torch.zeros(2, 5))), ValueError, "names: expected 2"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(features())
