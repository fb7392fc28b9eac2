from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tolerance import EPS, assert_near
from spurge import _core, ops, reference

DTYPES = st.sampled_from([torch.float32, torch.float64])

# R / B, B, U, G, Y, words, k
SIZES = [
    (1, 1, 1, 1, 1, 1, 1), (2, 3, 7, 2, 3, 2, 3), (1, 2, 33, 3, 2, 1, 5), (3, 2, 5, 2, 2, 4, 5), (1, 2, 6, 1, 2, 2, 9),
    (2, 1, 70, 2, 2, 2, 31), (2, 1, 70, 2, 2, 2, 32), (1, 2, 300, 2, 2, 1, 299), (0, 2, 4, 2, 2, 1, 2),
    (0, 0, 4, 2, 2, 1, 2), (1, 2, 0, 2, 2, 1, 2), (1, 2, 4, 0, 2, 1, 2), (1, 2, 4, 2, 2, 0, 2),
]  # fmt: skip


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def wide(request):
    return request.param


def case(repeats, examples, units, sets, labels, words, k, dtype=torch.float64, device="cpu", padding=0.2):
    """Scores that sum to 1, some of them equal; a fifth of the units is padding."""
    scores = torch.rand(repeats * examples, units, dtype=dtype).mul(20).ceil()
    scores /= scores.sum(1, keepdim=True)
    ids = torch.randint(0, 32 * words + 9, (examples, units), dtype=torch.int32)  # some are beyond the bitmap
    ids[torch.rand(ids.shape) < padding] = -1
    bitmap = torch.randint(-(2**31), 2**31 - 1, (sets, labels, words), dtype=torch.int32)
    return *(x.to(device) for x in (scores, ids, bitmap, torch.randint(0, labels, (examples,)))), k


def derivatives(scores, sets):
    return (torch.randn(len(scores), sets, dtype=scores.dtype, device=scores.device) for _ in range(2))


def assert_matches(got, want):
    """Values lie in [0, 2]."""
    for mine, other in zip(got, want, strict=True):
        assert_near(mine, other, size=2.0, terms=8)


def assert_gradient_matches(got, want, scores, ids, sharpness=0.25):
    """Derivatives are sums of terms as large as a membership's slope, 1 / 4T, whose exponents are as large as 1 / T."""
    real = (ids >= 0).repeat(max(1, scores.shape[0] // max(1, ids.shape[0])), 1)[: scores.shape[0]]
    a = scores.double().where(real, 0)
    n = real.sum(1).clamp_min(1)
    std = ((a - (a.sum(1) / n)[:, None]).square() * real).sum(1).div(n).sqrt()
    slope = 1 / torch.maximum(std, 1e-3 * a.abs().sum(1) / n).clamp_min(1e-300)
    assert_near(got, want, size=4 * (1 + slope[:, None]) * max(1, 0.25 / sharpness) ** 2, terms=scores.shape[1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_the_reference(sizes, wide, device):
    arguments = case(*sizes, wide, device)
    got, want = ops.proximity(*arguments), reference.proximity(*arguments, 0.25)
    assert all(x.dtype == wide for x in got)
    assert [x.shape for x in got] == [x.shape for x in want]
    assert_matches(got, want)
    outer = (*derivatives(arguments[0], sizes[3]),)
    grad, expected = ops.proximity_gradient(*outer, *arguments), reference.proximity_gradient(*outer, *arguments, 0.25)
    assert (grad.dtype, grad.shape) == (wide, arguments[0].shape)
    assert_gradient_matches(grad, expected, *arguments[:2])


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 3), st.integers(0, 4), st.integers(0, 50), st.integers(0, 3), st.integers(1, 3), st.integers(0, 3),
    st.integers(1, 60), st.floats(0.01, 10), DTYPES, st.floats(0, 1), st.integers(0, 2**31),
)  # fmt: skip
def test_any_case(repeats, examples, units, sets, labels, words, k, sharpness, dtype, padding, seed):
    torch.manual_seed(seed)
    arguments = case(repeats, examples, units, sets, labels, words, k, dtype, padding=padding)
    got, want = ops.proximity(*arguments, sharpness), reference.proximity(*arguments, sharpness)
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=8 * EPS[dtype])
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=8 * EPS[dtype] * max(1, units**0.5))
    outer = (*derivatives(arguments[0], sets),)
    grad = ops.proximity_gradient(*outer, *arguments, sharpness)
    # T may be as small as a thousandth of the mean score: slopes are large, and so is their rounding
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-8}
    torch.testing.assert_close(grad.double(), reference.proximity_gradient(*outer, *arguments, sharpness), **close)


# ---- what Eq. 6 says ---------------------------------------------------------------------------------


def one_row(scores, members, k, **more):
    """hard and soft of one row whose unit t has id t, for one set of the ids in ``members``."""
    bitmap = torch.tensor([[[sum(1 << v for v in members)]]], dtype=torch.int32)
    ids = torch.arange(len(scores), dtype=torch.int32)[None]
    row = torch.tensor([scores], dtype=torch.float64)
    return (x[0, 0] for x in ops.proximity(row, ids, bitmap, torch.tensor([0]), k, **more))


def test_hard_by_hand():
    hard, _ = one_row([0.4, 0.1, 0.3, 0.2], {0, 1}, 2)  # C = {0, 2}
    assert hard.item() == pytest.approx(1 / 2 + 0.4)
    assert next(one_row([0.4, 0.1, 0.3, 0.2], {0, 2}, 2)).item() == pytest.approx(1 + 0.35)
    assert next(one_row([0.4, 0.1, 0.3, 0.2], {1, 3}, 2)).item() == 0.0


def test_equals_go_by_the_smaller_index(device):
    for k in (1, 2, 3, 40):
        scores = torch.full((1, 64), 1 / 64, device=device)
        ids = torch.arange(64, dtype=torch.int32, device=device)[None]
        bitmap = torch.tensor([[[(1 << k) - 1 if k < 32 else -1, 0]]], dtype=torch.int32, device=device)
        hard, _ = ops.proximity(scores, ids, bitmap, torch.tensor([0], device=device), k)
        assert hard.item() == pytest.approx(min(k, 32) / k + 1 / 64)


def test_soft_comes_near_hard_as_it_sharpens():
    scores = [0.30, 0.02, 0.22, 0.04, 0.42]
    gaps = []
    for sharpness in (0.5, 0.1, 0.01):
        hard, soft = one_row(scores, {0, 1}, 2, sharpness=sharpness)
        gaps.append(abs(hard - soft).item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6


def test_a_set_of_all_units_gives_one_plus_a_mean_score():
    hard, soft = one_row([0.4, 0.1, 0.3, 0.2], {0, 1, 2, 3}, 2)
    assert hard.item() == pytest.approx(1.35)
    assert 1.0 < soft.item() < 1.4


def test_the_sets_of_the_examples_label_count():
    ids, scores = torch.zeros(2, 1, dtype=torch.int32), torch.ones(4, 1)
    bitmap = torch.tensor([[[1], [0]], [[0], [1]]], dtype=torch.int32)  # set 0: label 0 only, set 1: label 1 only
    hard, _ = ops.proximity(scores, ids, bitmap, torch.tensor([1, 0]), 1)
    assert hard.tolist() == [[0, 2], [2, 0], [0, 2], [2, 0]]  # row r belongs to example r % 2


def test_the_last_bit_of_a_word_counts(device):
    ids = torch.tensor([[31, 32, 63, 64]], dtype=torch.int32, device=device)
    bitmap = torch.tensor([[[-(2**31), -(2**31)]]], dtype=torch.int32, device=device)  # units 31 and 63
    hard, _ = ops.proximity(torch.tensor([[4.0, 3.0, 2.0, 1.0]], device=device), ids, bitmap, ids[0, :1].long() * 0, 4)
    assert hard.item() == pytest.approx(2 / 4 + 3.0)


# ---- padding, empty rows, NaN ------------------------------------------------------------------------


def test_padding_does_not_count(wide, device):
    scores, ids, bitmap, labels, k = case(2, 2, 9, 2, 2, 1, 3, wide, device, padding=0)
    outer = (*derivatives(scores, 2),)

    def results(scores, ids):
        arguments = scores, ids, bitmap, labels, k
        return *ops.proximity(*arguments), ops.proximity_gradient(*outer, *arguments)

    want = results(scores, ids)
    spoiled = torch.tensor([torch.nan, torch.inf, -torch.inf, 5.0], dtype=wide, device=device).expand(4, 4)
    wider = torch.cat([spoiled[:, :2], scores, spoiled[:, 2:]], 1)
    none = torch.full((2, 2), -1, dtype=torch.int32, device=device)
    got = results(wider, torch.cat([none, ids, none], 1))
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[2][..., 2:-2], want[2])
    assert not got[2][..., :2].any()
    assert not got[2][..., -2:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan(bad, wide, device):
    scores, ids, bitmap, labels, k = case(2, 2, 9, 2, 2, 1, 3, wide, device, padding=0)
    ids[0, 4] = -1
    outer = (*derivatives(scores, 2),)

    def results():
        arguments = scores, ids, bitmap, labels, k
        return *ops.proximity(*arguments), ops.proximity_gradient(*outer, *arguments)

    want = results()
    scores[2, 1] = bad  # a row of example 0
    hard, soft, grad = results()
    assert hard[2].isnan().all()
    assert soft[2].isnan().all()
    assert torch.equal(grad[2].isnan(), ids[0] >= 0)
    for got, expected in zip((hard, soft, grad), want, strict=True):
        assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])


def test_a_row_without_units_gives_zero(wide, device):
    scores, ids, bitmap, labels, k = case(1, 3, 5, 2, 2, 1, 2, wide, device)
    ids[1] = -1
    scores[1] = torch.nan
    for x in ops.proximity(scores, ids, bitmap, labels, k):
        assert not x[1].any()
    assert not ops.proximity_gradient(*derivatives(scores, 2), scores, ids, bitmap, labels, k)[1].any()


@pytest.mark.parametrize("value", [0.0, 0.125])
def test_equal_scores_give_no_infinite_slope(value, wide, device):
    scores, ids, bitmap, labels, k = case(1, 2, 8, 2, 2, 1, 3, wide, device, padding=0)
    arguments = (torch.full_like(scores, value), ids, bitmap, labels, k)
    got, outer = ops.proximity(*arguments), (*derivatives(scores, 2),)
    assert_matches(got, reference.proximity(*arguments, 0.25))
    grad = ops.proximity_gradient(*outer, *arguments)
    assert grad.isfinite().all()
    assert_gradient_matches(grad, reference.proximity_gradient(*outer, *arguments, 0.25), *arguments[:2])


# ---- the derivative ----------------------------------------------------------------------------------


def whole_derivative(outer, arguments, sharpness):
    """Automatic differentiation of the reference."""
    leaf = arguments[0].double().clone().requires_grad_()
    values = reference.proximity(leaf, *arguments[1:], sharpness)
    return torch.autograd.grad(values, leaf, [x.double() for x in outer])[0]


@pytest.mark.parametrize("k", [1, 3, 8, 20, 40])
@pytest.mark.parametrize("sharpness", [0.02, 0.25, 3.0])
def test_gradient_is_that_of_automatic_differentiation(k, sharpness, wide, device):
    scores, ids, bitmap, labels, _ = case(3, 2, 37, 2, 2, 1, k, wide, device)
    scores = torch.rand_like(scores)  # no equals: there sort and select may share the k-th place differently
    arguments, outer = (scores, ids, bitmap, labels, k), (*derivatives(scores, 2),)
    got = ops.proximity_gradient(*outer, *arguments, sharpness)
    assert_gradient_matches(got, whole_derivative(outer, arguments, sharpness), scores, ids, sharpness)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 15), st.floats(0.05, 2), st.booleans(), st.integers(0, 2**31))
def test_reference_is_that_of_automatic_differentiation(units, k, sharpness, signed, seed):
    torch.manual_seed(seed)
    scores, ids, bitmap, labels, _ = case(1, 3, units, 2, 2, 1, k)
    scores = torch.rand_like(scores) - 0.5 * signed
    arguments, outer = (scores, ids, bitmap, labels, k), (*derivatives(scores, 2),)
    got = reference.proximity_gradient(*outer, *arguments, sharpness)
    torch.testing.assert_close(got, whole_derivative(outer, arguments, sharpness), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_gradient_is_what_small_steps_show(k):
    """Threshold and temperature move with the scores; of hard, C stays."""
    scores, ids, bitmap, labels, _ = case(1, 2, 8, 2, 2, 1, k, padding=0)
    scores = torch.rand_like(scores).requires_grad_()

    def both(scores):
        return torch.cat(ops.proximity(scores, ids, bitmap, labels, k, 0.5), 1)

    assert torch.autograd.gradcheck(both, scores, eps=1e-7, atol=1e-6)


def test_the_integral_of_the_gradient_is_the_difference():
    scores, ids, bitmap, labels, k = case(1, 2, 9, 1, 2, 1, 3, padding=0)
    start, end = torch.rand_like(scores), torch.rand_like(scores)
    nodes, total = 20_000, torch.zeros(2, dtype=torch.float64)
    points = (start + (end - start) * ((torch.arange(nodes) + 0.5) / nodes)[:, None, None]).flatten(0, 1)
    one = torch.ones(len(points), 1, dtype=torch.float64)
    grad = ops.proximity_gradient(0 * one, one, points, ids, bitmap, labels, k).view(nodes, 2, 9)
    total = (grad * (end - start)).sum((0, 2)) / nodes
    apart = ops.proximity(end, ids, bitmap, labels, k)[1] - ops.proximity(start, ids, bitmap, labels, k)[1]
    torch.testing.assert_close(total[:, None], apart, rtol=0, atol=1e-4)


def test_the_hard_gradient_is_a_mean_over_hits():
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    ids, bitmap = torch.arange(4, dtype=torch.int32)[None], torch.tensor([[[0b0111]]], dtype=torch.int32)
    hard, _ = ops.proximity(scores, ids, bitmap, torch.tensor([0]), 2)  # C = {0, 2}
    (3 * hard.sum()).backward()
    assert scores.grad.tolist() == [[1.5, 0, 1.5, 0]]


def test_is_differentiable(wide, device):
    arguments = case(2, 2, 9, 2, 2, 1, 3, wide, device)
    hard, soft = ops.proximity(*arguments, 0.5)
    assert not hard.requires_grad
    assert not soft.requires_grad
    outer = (*derivatives(arguments[0], 2),)
    scores = arguments[0].clone().requires_grad_()
    got = ops.proximity(scores, *arguments[1:], 0.5)
    assert torch.equal(got[0], hard)
    assert torch.equal(got[1], soft)
    torch.autograd.backward(got, outer)
    assert torch.equal(scores.grad, ops.proximity_gradient(*outer, *arguments, 0.5))
    scores.grad = None
    ops.proximity(scores, *arguments[1:], 0.5)[1].backward(outer[1])  # of soft alone
    assert torch.equal(scores.grad, ops.proximity_gradient(0 * outer[0], outer[1], *arguments, 0.5))


def test_carries_a_gradient_through_a_softmax():
    _, ids, bitmap, labels, k = case(1, 2, 9, 2, 2, 1, 3, padding=0)
    logits = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    ops.proximity(logits.softmax(1), ids, bitmap, labels, k)[1][:, 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    assert_near(logits.grad.sum(1), torch.zeros(2), size=logits.grad.abs().sum(1) + 1)  # a softmax ignores shifts


def test_compiles_into_one_graph_with_its_gradient():
    arguments = case(2, 2, 9, 2, 2, 1, 3)

    def loss(scores):
        hard, soft = ops.proximity(scores.softmax(1), *arguments[1:])
        return soft.square().sum() + hard.sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        scores = arguments[0].clone().requires_grad_()
        f(scores).backward()
        results.append(scores.grad)
    torch.testing.assert_close(*results)


# ---- layout, threads, errors -------------------------------------------------------------------------


def test_reads_any_strides(wide, device):
    scores, ids, bitmap, labels, k = case(2, 3, 8, 2, 2, 2, 3, wide, device)
    outer = (*derivatives(scores, 2),)

    def results(scores, ids, bitmap, by_hard, by_soft):
        arguments = scores, ids, bitmap, labels, k
        return *ops.proximity(*arguments), ops.proximity_gradient(by_hard, by_soft, *arguments)

    want = results(scores, ids, bitmap, *outer)
    flipped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (scores, ids, bitmap, *outer)]
    assert not any(x.is_contiguous() for x in flipped)
    for got, expected in zip(results(*flipped), want, strict=True):
        assert torch.equal(got, expected)


def test_threads_do_not_change_bits():
    arguments = case(500, 3, 40, 2, 2, 2, 5, torch.float32)
    results = []
    for threads in (1, 7):
        out = [torch.empty(1500, 2), torch.empty(1500, 2), torch.empty(1500, 40)]
        _core.proximity(*out[:2], *arguments, 0.25, threads=threads)
        _core.proximity_gradient(out[2], *out[:2], *arguments, 0.25, threads=threads)
        results.append(out)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_rows_do_not_change_each_other():
    scores, ids, bitmap, labels, k = case(1, 5, 60, 2, 2, 2, 5)
    together = ops.proximity(scores, ids, bitmap, labels, k)
    for b in range(5):
        alone = ops.proximity(scores[b : b + 1], ids[b : b + 1], bitmap, labels[b : b + 1], k)
        for got, want in zip(alone, together, strict=True):
            assert torch.equal(got[0], want[b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, i, b, y: (s.half(), i, b, y, 2), "scores: dtype must be float32 or float64, got torch.float16"),
        (lambda s, i, b, y: (s[0], i, b, y, 2), r"scores: must be \[R, U\], got shape \(6,\)"),
        (lambda s, i, b, y: (s, i.long(), b, y, 2), "ids: dtype must be torch.int32, got torch.int64"),
        (lambda s, i, b, y: (s, i[:, 1:], b, y, 2), "ids: need 6 columns like scores, got 5"),
        (lambda s, i, b, y: (s[:3], i, b, y, 2), "scores: its 3 rows must be a multiple of the 2 rows of ids"),
        (lambda s, i, b, y: (s, i[:0], b, y[:0], 2), "scores: its 4 rows must be a multiple of the 0 rows of ids"),
        (lambda s, i, b, y: (s, i, b[0], y, 2), r"bitmap: must be \[G, Y, words\], got shape \(2, 1\)"),
        (lambda s, i, b, y: (s, i, b.long(), y, 2), "bitmap: dtype must be torch.int32, got torch.int64"),
        (lambda s, i, b, y: (s, i, b, y[:1], 2), "labels: need 2, one per row of ids, got 1"),
        (lambda s, i, b, y: (s, i, b, y.int(), 2), "labels: dtype must be torch.int64, got torch.int32"),
        (lambda s, i, b, y: (s, i, b, y + 2, 2), r"labels: must lie in \[0, 2\), got [23]"),
        (lambda s, i, b, y: (s, i, b, y - 2, 2), r"labels: must lie in \[0, 2\), got -[12]"),
        (lambda s, i, b, y: (s, i, b, y, 0), "k: must be at least 1, got 0"),
        (lambda s, i, b, y: (s, i, b, y, 2, 0.0), "sharpness: must be positive and finite, got 0.0"),
        (lambda s, i, b, y: (s, i, b, y, 2, float("nan")), "sharpness: must be positive and finite, got nan"),
    ],
)
def test_says_what_is_wrong(change, message):
    arguments = change(*case(2, 2, 6, 2, 2, 1, 2, torch.float32)[:4])
    with pytest.raises(ValueError, match=message):
        ops.proximity(*arguments)
    with pytest.raises(ValueError, match=message):
        ops.proximity_gradient(*(torch.zeros(len(arguments[0]), 2).to(arguments[0].dtype),) * 2, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[1:], r"by_soft: must be \[4, 2\], got shape \(3, 2\)"),
        (lambda x: x.double(), "by_soft: dtype must be torch.float32, got torch.float64"),
    ],
)
def test_says_what_is_wrong_with_derivatives(change, message):
    arguments = case(2, 2, 6, 2, 2, 1, 2, torch.float32)
    outer = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=message):
        ops.proximity_gradient(outer, change(outer), *arguments)


def test_a_label_outside_gives_nan_on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("the CPU refuses it")
    scores, ids, bitmap, labels, k = case(1, 2, 6, 2, 2, 1, 2, device=device, padding=0)
    labels[0] = 2
    hard, _ = ops.proximity(scores, ids, bitmap, labels, k)
    assert hard[0].isnan().all()
    assert hard[1].isfinite().all()
    grad = ops.proximity_gradient(*derivatives(scores, 2), scores, ids, bitmap, labels, k)
    assert grad[0].isnan().all()
    assert grad[1].isfinite().all()


def test_a_row_too_long_for_shared_memory(device):
    arguments = case(1, 1, 12000, 2, 2, 8, 40, device=device)
    assert_matches(ops.proximity(*arguments), reference.proximity(*arguments, 0.25))
    outer = (*derivatives(arguments[0], 2),)
    grad, want = ops.proximity_gradient(*outer, *arguments), reference.proximity_gradient(*outer, *arguments, 0.25)
    assert_gradient_matches(grad, want, *arguments[:2])


LEVELS = """
import sys, torch
from spurge import _core, ops
assert _core.build_config()["isa_selected"] == sys.argv[1]
torch.manual_seed(0)
results = []
for dtype in (torch.float32, torch.float64):
    for units in (1, 7, 8, 40, 333):
        scores, ids = torch.randn(6, units, dtype=dtype).exp(), torch.randint(-1, 90, (3, units), dtype=torch.int32)
        arguments = scores, ids, torch.randint(-(2**31), 2**31 - 1, (2, 2, 2)).int(), torch.tensor([0, 1, 0]), 6
        outer = torch.randn(6, 2, dtype=dtype), torch.randn(6, 2, dtype=dtype)
        results += [*ops.proximity(*arguments), ops.proximity_gradient(*outer, *arguments, 0.1)]
torch.save(results, sys.argv[2])
"""


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    found = {}
    for level in _core.build_config()["isa_compiled"]:
        environment = {**os.environ, "SPURGE_ISA": level}
        command = [sys.executable, "-c", LEVELS, level, str(tmp_path / level)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "does not support" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        found[level] = torch.load(tmp_path / level)
    for level, results in found.items():
        for got, want in zip(results, found["baseline"], strict=True):
            assert torch.equal(got, want), level
