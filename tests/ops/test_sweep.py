from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge import _core, ops, reference

TYPES = [torch.float32, torch.float64]
INF = float("inf")


@pytest.fixture(params=TYPES, ids=["float32", "float64"])
def wide(request):
    return request.param


def case(samples, outputs, edited, *, levels=0, dtype=torch.float32, other=None, device="cpu"):
    """Random logits; with ``levels`` small whole numbers, so that ties abound and all crossings are exact."""

    def draw(*shape):
        return torch.randint(-levels, levels + 1, shape).double() if levels else torch.randn(shape).double() * 3

    labels = torch.randint(0, max(outputs, 1), (samples,))
    rows = torch.randperm(outputs)[:edited]
    logits, shifts = draw(samples, outputs).to(dtype), draw(samples, edited).to(other or dtype)
    return tuple(x.to(device) for x in (logits, shifts, rows, labels))


def right_at(rate, logits, shifts, rows, labels):
    """Whether the prediction at one rate is the label: what a sweep would evaluate again and again."""
    moved = logits.double().clone()
    moved[:, rows] += rate * shifts.double()
    return moved.argmax(1) == labels


def assert_exact(arguments, low, high, rates):
    intervals = ops.correct_interval(*arguments, low, high)
    for rate in rates:
        inside = (intervals[:, 0] <= rate) & (rate <= intervals[:, 1])
        assert torch.equal(inside, right_at(rate, *arguments)), f"at rate {rate}"


@pytest.mark.parametrize(
    "sizes",
    [(0, 3, 1), (5, 1, 0), (5, 1, 1), (1, 2, 1), (7, 2, 2), (40, 10, 3), (33, 1031, 1), (9, 257, 257), (11, 9000, 700)],
    ids=str,
)
@pytest.mark.parametrize("levels", [0, 3])
def test_matches_the_reference(sizes, levels, wide, device):
    arguments = case(*sizes, levels=levels, dtype=wide, device=device)
    out = ops.correct_interval(*arguments, -0.5, 2.0)
    assert out.shape == (sizes[0], 2)
    assert out.dtype == torch.float64
    assert torch.equal(out, reference.correct_interval(*arguments, -0.5, 2.0))


@pytest.mark.parametrize("other", TYPES, ids=["shift32", "shift64"])
def test_logits_and_shifts_have_types_of_their_own(wide, other, device):
    arguments = case(40, 20, 3, dtype=wide, other=other, device=device)
    wider = (arguments[0].double(), arguments[1].double(), *arguments[2:])
    assert torch.equal(ops.correct_interval(*arguments, 0.0, 1.0), ops.correct_interval(*wider, 0.0, 1.0))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 40), st.integers(0, 40), st.integers(1, 4), st.sampled_from(TYPES),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_ties_are_decided_as_argmax_decides_them(samples, outputs, edited, levels, dtype, seed):
    """Whole numbers: at rates that are sums of powers of two both sides of the equation are exact."""
    torch.manual_seed(seed)
    arguments = case(samples, outputs, min(edited, outputs), levels=levels, dtype=dtype)
    assert_exact(arguments, -1.0, 4.0, [-1.0, -0.5, 0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_any_rate_away_from_a_crossing(samples, outputs, edited, rate, seed):
    torch.manual_seed(seed)
    logits, shifts, rows, labels = case(samples, outputs, min(edited, outputs), dtype=torch.float64)
    moved = logits.clone()
    moved[:, rows] += rate * shifts
    best = moved.topk(min(2, outputs)).values
    clear = best[:, 0] - best[:, -1] > 1e-12 if outputs > 1 else torch.ones(samples, dtype=torch.bool)
    intervals = ops.correct_interval(logits, shifts, rows, labels, 0.0, 1.0)
    inside = (intervals[:, 0] <= rate) & (rate <= intervals[:, 1])
    assert torch.equal(inside[clear], right_at(rate, logits, shifts, rows, labels)[clear])


def test_beyond_its_ends_the_prediction_is_another(device):
    logits, shifts, rows, labels = case(400, 4, 2, dtype=torch.float64, device=device)
    intervals = ops.correct_interval(logits, shifts, rows, labels, -8.0, 8.0)
    for side, step in ((0, -1e-9), (1, 1e-9)):  # the moved logits are rounded: one float64 more changes nothing
        ends = intervals[:, side]
        inner = (ends.abs() < 8).nonzero().flatten()
        assert len(inner) > 20
        for n in inner.tolist():
            one = logits[n : n + 1], shifts[n : n + 1], rows, labels[n : n + 1]
            assert not right_at((ends[n] + step).item(), *one)
            if intervals[n, 1] - intervals[n, 0] > 1e-8:
                assert right_at((ends[n] - step).item(), *one)


def test_ties_go_to_the_smaller_index():
    logits, shifts, rows = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]]), torch.tensor([0])

    def interval(label):
        return ops.correct_interval(logits, shifts, rows, torch.tensor([label]), 0.0, 1.0)[0]

    assert interval(0).tolist() == [0.5, 1.0]
    assert interval(1).tolist() == [0.0, torch.tensor(0.5).double().nextafter(torch.tensor(0.0).double()).item()]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]], ids=str)
def test_a_quotient_below_float64_is_the_zero_that_has_no_sign(order, device):
    """Crossings at -0 (rounded), at the largest number below it, and at 0: which comes first must not be seen."""
    logits = torch.tensor([[0.0, 1e-310, -1e-310]], dtype=torch.float64)[:, order]
    shifts = torch.tensor([[0.0, 1e30, -1e30]], dtype=torch.float64)[:, order]
    for label in range(3):
        arguments = (x.to(device) for x in (logits, shifts, torch.arange(3), torch.tensor([label])))
        found = ops.correct_interval(*arguments, -1.0, 1.0)
        assert not (found.eq(0) & found.signbit()).any()


def test_a_single_rate_and_an_edit_that_moves_nothing():
    logits, labels = torch.tensor([[1.0, 2.0], [2.0, 2.0], [2.0, 2.0]]), torch.tensor([1, 0, 1])
    for shifts, rows in ((torch.zeros(3, 1), torch.tensor([1])), (torch.zeros(3, 0), torch.zeros(0).long())):
        out = ops.correct_interval(logits, shifts, rows, labels, 0.25, 0.25)
        assert out.tolist() == [[0.25, 0.25], [0.25, 0.25], [INF, -INF]]


def test_what_is_not_finite(wide, device):
    nan = float("nan")
    logits = torch.tensor(
        [
            [nan, 0, 0],
            [0, 0, nan],
            [INF, 1, 0],
            [0, INF, 0],
            [INF, INF, 0],
            [INF, INF, 0],
            [-INF, -INF, -INF],
            [1, 0, 0],
        ],
        dtype=wide,
        device=device,
    )
    labels = torch.tensor([1, 0, 0, 0, 0, 1, 0, 0], device=device)
    shifts = torch.full((8, 1), -1.0, dtype=wide, device=device)
    shifts[7] = INF
    out = ops.correct_interval(logits, shifts, torch.tensor([0], device=device), labels, 0.0, 1.0)
    full, empty = [0.0, 1.0], [INF, -INF]
    assert out.tolist() == [empty, empty, full, empty, full, empty, full, empty]


def test_a_nan_anywhere_empties_the_sample(device):
    for j in range(300):
        logits, shifts, rows, labels = case(1, 300, 2, device=device)
        logits[0, labels] = 100.0
        assert ops.correct_interval(logits, 0 * shifts, rows, labels, 0.0, 1.0).tolist() == [[0.0, 1.0]]
        logits[0, j] = torch.nan
        assert ops.correct_interval(logits, 0 * shifts, rows, labels, 0.0, 1.0).tolist() == [[INF, -INF]]


def test_reads_any_strides(wide, device):
    logits, shifts, rows, labels = case(40, 6, 2, dtype=wide, device=device)
    want = ops.correct_interval(logits, shifts, rows, labels, 0.0, 1.0)
    strided = logits.t().contiguous().t(), shifts.repeat(1, 2)[:, :2], rows.repeat_interleave(2)[::2], labels
    assert torch.equal(ops.correct_interval(*strided, 0.0, 1.0), want)


def test_threads_do_not_change_bits(wide):
    logits, shifts, rows, labels = case(40_000, 30, 2, dtype=wide)
    one, many = torch.empty(40_000, 2).double(), torch.empty(40_000, 2).double()
    _core.correct_interval(one, logits, shifts, rows, labels, 0.0, 1.0, threads=1)
    _core.correct_interval(many, logits, shifts, rows, labels, 0.0, 1.0, threads=7)
    assert torch.equal(one, many)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 3).half()}, "logits: dtype must be float32 or float64, got .*float16"),
        ({"logits": torch.zeros(4)}, r"logits: must be \[N, O\], got shape \(4,\)"),
        ({"shifts": torch.zeros(3, 2)}, "shifts: need 4 rows like logits, got 3"),
        ({"shifts": torch.zeros(4, 2).int()}, "shifts: dtype must be float32 or float64, got .*int32"),
        ({"rows": torch.tensor([0])}, r"rows: shape must be \(2,\), got \(1,\)"),
        ({"rows": torch.tensor([0, 3])}, r"rows: must lie in \[0, 3\), got 3"),
        ({"rows": torch.tensor([-1, 0])}, r"rows: must lie in \[0, 3\), got -1"),
        ({"rows": torch.tensor([1, 1])}, "rows: must be distinct, got 1 twice"),
        ({"rows": torch.tensor([0.0, 1.0])}, "rows: dtype must be int64, got .*float32"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, r"labels: must lie in \[0, 3\), got 3 at row 2"),
        ({"labels": torch.tensor([0, -1, 2, 0])}, r"labels: must lie in \[0, 3\), got -1 at row 1"),
        ({"labels": torch.zeros(3).long()}, r"labels: shape must be \(4,\), got \(3,\)"),
        ({"low": INF}, "low: must be finite, got inf"),
        ({"high": float("nan")}, "high: must be finite, got nan"),
        ({"low": 2.0}, "high: must be at least low, got 1.0 below 2.0"),
    ],
)
def test_says_what_is_wrong(change, message):
    good = {
        "logits": torch.zeros(4, 3),
        "shifts": torch.zeros(4, 2),
        "rows": torch.tensor([2, 0]),
        "labels": torch.tensor([0, 1, 2, 0]),
        "low": 0.0,
        "high": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        ops.correct_interval(**(good | change))
