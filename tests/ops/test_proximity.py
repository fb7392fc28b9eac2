from __future__ import annotations

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


def assert_matches(got, want, scores, ids):
    """Values lie in [0, 2]; the derivatives are sums of terms as large as a membership's slope, 1 / 4T."""
    real = (ids >= 0).repeat(max(1, scores.shape[0] // max(1, ids.shape[0])), 1)[: scores.shape[0]]
    a = scores.double().where(real, 0)
    n = real.sum(1).clamp_min(1)
    std = ((a - (a.sum(1) / n)[:, None]).square() * real).sum(1).div(n).sqrt()
    slope = 1 / torch.maximum(std, 1e-3 * a.abs().sum(1) / n).clamp_min(1e-300)
    assert_near(got[0], want[0], size=2.0)
    assert_near(got[1], want[1], size=2.0, terms=scores.shape[1])
    assert_near(got[2], want[2], size=1 + slope[:, None, None], terms=scores.shape[1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_the_reference(sizes, wide, device):
    arguments = case(*sizes, wide, device)
    got, want = ops.proximity(*arguments), reference.proximity(*arguments, 0.25)
    assert all(x.dtype == wide for x in got)
    assert [x.shape for x in got] == [x.shape for x in want]
    assert_matches(got, want, *arguments[:2])


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
    # T may be as small as a thousandth of the mean score: slopes are large, and so is their rounding
    torch.testing.assert_close(got[2].double(), want[2], rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6)


# ---- what Eq. 6 says ---------------------------------------------------------------------------------


def one_row(scores, members, k, **more):
    """hard, soft and grad of one row whose unit t has id t, for one set of the ids in ``members``."""
    bitmap = torch.tensor([[[sum(1 << v for v in members)]]], dtype=torch.int32)
    ids = torch.arange(len(scores), dtype=torch.int32)[None]
    row = torch.tensor([scores], dtype=torch.float64)
    return (x[0, 0] for x in ops.proximity(row, ids, bitmap, torch.tensor([0]), k, **more))


def test_hard_by_hand():
    hard, _, _ = one_row([0.4, 0.1, 0.3, 0.2], {0, 1}, 2)  # C = {0, 2}
    assert hard.item() == pytest.approx(1 / 2 + 0.4)
    assert next(one_row([0.4, 0.1, 0.3, 0.2], {0, 2}, 2)).item() == pytest.approx(1 + 0.35)
    assert next(one_row([0.4, 0.1, 0.3, 0.2], {1, 3}, 2)).item() == 0.0


def test_equals_go_by_the_smaller_index(device):
    for k in (1, 2, 3, 40):
        scores = torch.full((1, 64), 1 / 64, device=device)
        ids = torch.arange(64, dtype=torch.int32, device=device)[None]
        bitmap = torch.tensor([[[(1 << k) - 1 if k < 32 else -1, 0]]], dtype=torch.int32, device=device)
        hard, _, _ = ops.proximity(scores, ids, bitmap, torch.tensor([0], device=device), k)
        assert hard.item() == pytest.approx(min(k, 32) / k + 1 / 64)


def test_soft_comes_near_hard_as_it_sharpens():
    scores = [0.30, 0.02, 0.22, 0.04, 0.42]
    gaps = []
    for sharpness in (0.5, 0.1, 0.01):
        hard, soft, _ = one_row(scores, {0, 1}, 2, sharpness=sharpness)
        gaps.append(abs(hard - soft).item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6


def test_a_set_of_all_units_gives_one_plus_a_mean_score():
    hard, soft, _ = one_row([0.4, 0.1, 0.3, 0.2], {0, 1, 2, 3}, 2)
    assert hard.item() == pytest.approx(1.35)
    assert 1.0 < soft.item() < 1.4


def test_the_sets_of_the_examples_label_count():
    ids, scores = torch.zeros(2, 1, dtype=torch.int32), torch.ones(4, 1)
    bitmap = torch.tensor([[[1], [0]], [[0], [1]]], dtype=torch.int32)  # set 0: label 0 only, set 1: label 1 only
    hard, _, _ = ops.proximity(scores, ids, bitmap, torch.tensor([1, 0]), 1)
    assert hard.tolist() == [[0, 2], [2, 0], [0, 2], [2, 0]]  # row r belongs to example r % 2


def test_the_last_bit_of_a_word_counts(device):
    ids = torch.tensor([[31, 32, 63, 64]], dtype=torch.int32, device=device)
    bitmap = torch.tensor([[[-(2**31), -(2**31)]]], dtype=torch.int32, device=device)  # units 31 and 63
    hard, _, _ = ops.proximity(
        torch.tensor([[4.0, 3.0, 2.0, 1.0]], device=device), ids, bitmap, ids[0, :1].long() * 0, 4
    )
    assert hard.item() == pytest.approx(2 / 4 + 3.0)


# ---- padding, empty rows, NaN ------------------------------------------------------------------------


def test_padding_does_not_count(wide, device):
    scores, ids, bitmap, labels, k = case(2, 2, 9, 2, 2, 1, 3, wide, device, padding=0)
    want = ops.proximity(scores, ids, bitmap, labels, k)
    spoiled = torch.tensor([torch.nan, torch.inf, -torch.inf, 5.0], dtype=wide, device=device).expand(4, 4)
    wider = torch.cat([spoiled[:, :2], scores, spoiled[:, 2:]], 1)
    none = torch.full((2, 2), -1, dtype=torch.int32, device=device)
    got = ops.proximity(wider, torch.cat([none, ids, none], 1), bitmap, labels, k)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[2][..., 2:-2], want[2])
    assert not got[2][..., :2].any()
    assert not got[2][..., -2:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan(bad, wide, device):
    scores, ids, bitmap, labels, k = case(2, 2, 9, 2, 2, 1, 3, wide, device, padding=0)
    ids[0, 4] = -1
    want = ops.proximity(scores, ids, bitmap, labels, k)
    scores[2, 1] = bad  # a row of example 0
    hard, soft, grad = ops.proximity(scores, ids, bitmap, labels, k)
    assert hard[2].isnan().all()
    assert soft[2].isnan().all()
    assert torch.equal(grad[2].isnan(), (ids[0] >= 0).expand(2, 9))
    for got, expected in zip((hard, soft, grad), want, strict=True):
        assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])


def test_a_row_without_units_gives_zero(wide, device):
    scores, ids, bitmap, labels, k = case(1, 3, 5, 2, 2, 1, 2, wide, device)
    ids[1] = -1
    scores[1] = torch.nan
    for x in ops.proximity(scores, ids, bitmap, labels, k):
        assert not x[1].any()


@pytest.mark.parametrize("value", [0.0, 0.125])
def test_equal_scores_give_no_infinite_slope(value, wide, device):
    scores, ids, bitmap, labels, k = case(1, 2, 8, 2, 2, 1, 3, wide, device, padding=0)
    arguments = (torch.full_like(scores, value), ids, bitmap, labels, k)
    got = ops.proximity(*arguments)
    assert all(x.isfinite().all() for x in got)
    assert_matches(got, reference.proximity(*arguments, 0.25), *arguments[:2])


# ---- the derivative ----------------------------------------------------------------------------------


def soft_with(scores, members, tau, t):
    m = torch.sigmoid((scores - tau) / t)
    inside = (m * members).sum()
    return inside / m.sum() + (m * members * scores).sum() / (inside + 1e-6)


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_grad_is_the_derivative_with_tau_and_t_held(k):
    scores = torch.rand(8, dtype=torch.float64)
    members = (torch.arange(8) % 3 == 0).double()
    _, soft, grad = one_row(scores.tolist(), {0, 3, 6}, k)
    t = 0.25 * scores.std(correction=0)
    ranked = scores.sort(descending=True).values
    tau = (ranked[k - 1] + ranked[k]) / 2 if k < 8 else ranked[-1] - t
    assert soft.item() == pytest.approx(soft_with(scores, members, tau, t).item(), abs=1e-14)
    step = 1e-6
    for i in range(8):
        nudge = torch.zeros(8, dtype=torch.float64)
        nudge[i] = step
        ahead, behind = (soft_with(scores + d, members, tau, t) for d in (nudge, -nudge))
        assert grad[i].item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-6, abs=1e-8)


def test_soft_proximity_is_differentiable(wide, device):
    scores, ids, bitmap, labels, k = case(2, 2, 9, 2, 2, 1, 3, wide, device)
    _, soft, grad = ops.proximity(scores, ids, bitmap, labels, k, 0.5)
    outer = torch.rand_like(soft)
    scores.requires_grad_()
    got = ops.soft_proximity(scores, ids, bitmap, labels, k, 0.5)
    assert torch.equal(got, soft)
    got.backward(outer)
    torch.testing.assert_close(scores.grad, torch.einsum("rg,rgu->ru", outer, grad))
    assert not ops.soft_proximity(scores.detach(), ids, bitmap, labels, k).requires_grad


def test_soft_proximity_carries_a_gradient_through_a_softmax():
    _, ids, bitmap, labels, k = case(1, 2, 9, 2, 2, 1, 3, padding=0)
    logits = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    ops.soft_proximity(logits.softmax(1), ids, bitmap, labels, k)[:, 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    assert_near(logits.grad.sum(1), torch.zeros(2), size=logits.grad.abs().sum(1) + 1)  # a softmax ignores shifts


def test_soft_proximity_compiles_into_one_graph():
    arguments = case(2, 2, 9, 2, 2, 1, 3)

    def loss(scores):
        return ops.soft_proximity(scores.softmax(1), *arguments[1:]).square().sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        scores = arguments[0].clone().requires_grad_()
        f(scores).backward()
        results.append(scores.grad)
    torch.testing.assert_close(*results)


# ---- layout, threads, errors -------------------------------------------------------------------------


def test_reads_any_strides(wide, device):
    scores, ids, bitmap, labels, k = case(2, 3, 8, 2, 2, 2, 3, wide, device)
    want = ops.proximity(scores, ids, bitmap, labels, k)
    flipped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (scores, ids, bitmap)]
    assert not any(x.is_contiguous() for x in flipped)
    for got, expected in zip(ops.proximity(*flipped, labels, k), want, strict=True):
        assert torch.equal(got, expected)


def test_threads_do_not_change_bits():
    arguments = case(500, 3, 40, 2, 2, 2, 5, torch.float32)
    results = []
    for threads in (1, 7):
        out = [torch.empty(1500, 2), torch.empty(1500, 2), torch.empty(1500, 2, 40)]
        _core.proximity(*out, *arguments, 0.25, threads=threads)
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
@pytest.mark.parametrize("function", [ops.proximity, ops.soft_proximity])
def test_says_what_is_wrong(function, change, message):
    with pytest.raises(ValueError, match=message):
        function(*change(*case(2, 2, 6, 2, 2, 1, 2, torch.float32)[:4]))


def test_a_label_outside_gives_nan_on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("the CPU refuses it")
    scores, ids, bitmap, labels, k = case(1, 2, 6, 2, 2, 1, 2, device=device, padding=0)
    labels[0] = 2
    hard, _, _ = ops.proximity(scores, ids, bitmap, labels, k)
    assert hard[0].isnan().all()
    assert hard[1].isfinite().all()


def test_a_row_too_long_for_shared_memory(device):
    arguments = case(1, 1, 12000, 2, 2, 8, 40, device=device)
    assert_matches(ops.proximity(*arguments), reference.proximity(*arguments, 0.25), *arguments[:2])
