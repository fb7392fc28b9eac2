from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tolerance import assert_near
from spurge import _core, ops, reference
from spurge.ops._median import TRANSFORMS

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
KINDS = {
    "normal": lambda shape: torch.randn(shape),
    "relu": lambda shape: (torch.randn(shape) - torch.randn(shape[1])).relu(),  # mostly zeros in some columns
    "two values": lambda shape: (torch.rand(shape) > 0.5).double(),
    "three values": lambda shape: torch.randint(-1, 2, shape).double(),
    "constant": lambda shape: torch.randn(1, shape[1]).expand(shape),
    "orders of magnitude": lambda shape: (torch.randn(shape) * 8).exp() * torch.randn(shape).sign(),
    "infinite": lambda shape: torch.randn(shape) / torch.randint(0, 3, shape).sub(1).clamp_max(0),
    "rows ascend": lambda shape: torch.arange(shape[0])[:, None] + torch.rand(shape),
}


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(kind, rows, columns, dtype=torch.float32, device="cpu"):
    return KINDS[kind]((rows, columns)).nan_to_num(nan=0.5, posinf=torch.inf, neginf=-torch.inf).to(device, dtype)


def assert_medians(x, order, starts, transform="raw"):
    """Exact: a selection rounds nothing, and the mean of two is rounded once, for all but the smallest float64."""
    out = ops.segment_medians(x, order, starts, transform)
    want = reference.segment_medians(x, order, starts, transform)
    assert out.dtype == wide(x.dtype)
    torch.testing.assert_close(out, want.to(out.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 3), (7, 0), (64, 16), (65, 17), (257, 1031), (256, 16), (1000, 33)], ids=str
)
def test_matches_the_reference(shape, transform, dtype, device):
    x = draw("normal", *shape, dtype, device)
    n = shape[0]
    assert_medians(x, torch.randperm(n, device=device), torch.tensor([0, n], device=device), transform)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [300, 2001])
def test_any_distribution(kind, rows, dtype, device):
    x = draw(kind, rows, 40, dtype, device)
    borders = [0, rows // 2, rows // 2, rows - 20, rows]  # halves, an empty one, a small one
    assert_medians(x, torch.randperm(rows, device=device), torch.tensor(borders, device=device))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 400), st.integers(1, 40), st.lists(st.integers(0, 400), max_size=5), DTYPES,
    st.sampled_from(sorted(KINDS)), st.sampled_from(TRANSFORMS), st.integers(0, 2**31),
)  # fmt: skip
def test_any_segments(rows, columns, lengths, dtype, kind, transform, seed):
    torch.manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    assert_medians(draw(kind, rows, columns, dtype), torch.randint(0, rows, (sum(lengths),)), starts, transform)


@settings(max_examples=40, deadline=None)
@given(st.integers(257, 4000), st.integers(1, 20), DTYPES, st.sampled_from(sorted(KINDS)), st.integers(0, 2**31))
def test_any_long_segment(rows, columns, dtype, kind, seed):
    torch.manual_seed(seed)
    assert_medians(draw(kind, rows, columns, dtype), torch.arange(rows), torch.tensor([0, rows]))


def test_is_what_numpy_computes():
    x = torch.randn(999, 50)
    for rows in (x, x[:-1]):
        out = ops.segment_medians(rows, torch.arange(len(rows)), torch.tensor([0, len(rows)]))
        assert_near(out[0], torch.from_numpy(numpy.median(rows.numpy(), axis=0)))


def test_the_mean_of_the_middle_two():
    x = torch.tensor([[1.0, 10.0, -3.0], [4.0, 20.0, -4.0]])
    assert ops.segment_medians(x, torch.tensor([0, 1]), torch.tensor([0, 2])).tolist() == [[2.5, 15.0, -3.5]]


@pytest.mark.parametrize("rows", [2, 300])
def test_the_middle_two_may_be_as_large_as_can_be(rows, device):
    for dtype in (torch.float32, torch.float64):
        most = torch.finfo(dtype).max
        x = torch.full((rows, 1), most, dtype=dtype, device=device)
        x[0] = most * 0.5
        out = ops.segment_medians(x, torch.arange(rows, device=device), torch.tensor([0, rows], device=device))
        assert out.item() == pytest.approx(0.75 * most if rows == 2 else most)


@pytest.mark.parametrize("rows", [9, 300])
def test_nan_spoils_its_column_only(rows, dtype, device):
    x = draw("normal", rows, 37, dtype, device)
    order, starts = torch.arange(rows, device=device), torch.tensor([0, rows], device=device)
    clean = ops.segment_medians(x, order, starts)
    x[3, 5], x[rows - 1, 36] = torch.nan, -torch.nan
    out = ops.segment_medians(x, order, starts)
    assert out.isnan()[0].nonzero().flatten().tolist() == [5, 36]
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])
    for transform in TRANSFORMS[1:]:
        assert ops.segment_medians(x, order, starts, transform).isnan()[0].nonzero().flatten().tolist() == [5, 36]


def test_a_segment_without_rows_is_nan(dtype, device):
    x = draw("normal", 3, 20, dtype, device)
    out = ops.segment_medians(x, torch.arange(3, device=device), torch.tensor([0, 0, 3, 3], device=device))
    assert out.isnan().all(1).tolist() == [True, False, True]
    assert ops.segment_medians(x, torch.arange(0, device=device), torch.tensor([0], device=device)).shape == (0, 20)


def test_halves_of_a_value_add_up(dtype):
    """v = max(v, 0) - max(-v, 0): the transforms belong together, and zero has no sign."""
    x = draw("normal", 301, 18, dtype)
    order, starts = torch.arange(301), torch.tensor([0, 301])
    found = {t: ops.segment_medians(x, order, starts, t) for t in TRANSFORMS}
    assert torch.equal(found["raw"], found["positive"] - found["negative"])
    assert torch.equal(found["magnitude"], ops.segment_medians(x.abs(), order, starts))
    assert not torch.signbit(ops.segment_medians(-torch.zeros(5, 18), order[:5], torch.tensor([0, 5]))).any()


def test_the_order_of_rows_does_not_matter(dtype, device):
    x = draw("relu", 700, 40, dtype, device)
    starts = torch.tensor([0, 700], device=device)
    want = ops.segment_medians(x, torch.arange(700, device=device), starts)
    assert torch.equal(ops.segment_medians(x, torch.randperm(700, device=device), starts), want)


def test_reads_any_strides(dtype, device):
    x = draw("normal", 40, 90, dtype, device)
    order, starts = torch.arange(90, device=device).flip(0), torch.tensor([0, 10, 90], device=device)
    assert torch.equal(
        ops.segment_medians(x.t(), order, starts), ops.segment_medians(x.t().contiguous(), order, starts)
    )


def test_threads_do_not_change_bits(dtype):
    x, order, starts = draw("normal", 600, 531, dtype), torch.randperm(600), torch.tensor([0, 100, 600])
    one, many = (torch.empty(2, 531, dtype=wide(dtype)) for _ in range(2))
    _core.segment_medians(one, x, order, starts, "raw", threads=1)
    _core.segment_medians(many, x, order, starts, "raw", threads=7)
    assert torch.equal(one, many)


def test_rows_that_a_gpu_cannot_refuse_give_nan(device):
    if device.type != "cuda":
        pytest.skip("the CPU looks first")
    x = draw("normal", 5, 40, device=device)
    out = ops.segment_medians(x, torch.tensor([0, 1, 5, 2], device=device), torch.tensor([0, 2, 4, 9], device=device))
    assert out.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4, 3).int()}, "features: dtype must be .* got .*int32"),
        ({"features": torch.zeros(4)}, r"features: must be \[N, M\], got shape \(4,\)"),
        ({"order": torch.tensor([0, 4])}, r"order: must lie in \[0, 4\), got 4"),
        ({"order": torch.tensor([-1, 0])}, r"order: must lie in \[0, 4\), got -1"),
        ({"order": torch.tensor([0.0, 1.0])}, "order: dtype must be int64, got .*float32"),
        ({"order": torch.zeros(1, 2).long()}, r"order: must be \[n\], got shape \(1, 2\)"),
        ({"starts": torch.tensor([0, 2, 1])}, r"starts: must ascend within \[0, 2\], got 1 at 2"),
        ({"starts": torch.tensor([0, 3])}, r"starts: must ascend within \[0, 2\], got 3 at 1"),
        ({"starts": torch.tensor([-1, 2])}, r"starts: must ascend within \[0, 2\], got -1 at 0"),
        ({"starts": torch.tensor([]).long()}, "starts: must have at least 1 element, got 0"),
        ({"starts": torch.tensor([0, 2]).int()}, "starts: dtype must be int64, got .*int32"),
        ({"transform": "relu"}, "transform: must be one of raw, magnitude, positive, negative, got 'relu'"),
    ],
)
def test_says_what_is_wrong(change, message):
    good = {"features": torch.zeros(4, 3), "order": torch.tensor([3, 1]), "starts": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=message):
        ops.segment_medians(**(good | change))
