from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tolerance import assert_near
from spurge import _core, ops, reference

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def normal(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape).to(device, dtype)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- node_sum ----------------------------------------------------------------------------------------


def node_size(grads, weights):
    return reference.node_sum(grads.double().abs(), [abs(w) for w in weights])


@pytest.mark.parametrize("nodes", [1, 2, 5, 70])
@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (2, 7, 1), (3, 0, 5), (2, 3, 64), (1, 31, 1031)], ids=str)
def test_node_sum_matches_the_reference(shape, nodes, dtype, device):
    grads = normal(nodes * shape[0], *shape[1:], dtype=dtype, device=device)
    weights = torch.rand(nodes).tolist()
    out = ops.node_sum(grads, weights)
    assert out.dtype == wide(dtype)
    assert out.shape == shape
    assert_near(out, reference.node_sum(grads, weights), terms=nodes, size=node_size(grads, weights))


def test_node_sum_reads_any_strides(dtype, device):
    grads = normal(4, 40, 6, dtype=dtype, device=device).transpose(1, 2)
    assert_near(ops.node_sum(grads, [0.5, 2.0]), reference.node_sum(grads, [0.5, 2.0]))


def test_node_sum_keeps_nan_and_infinity(dtype, device):
    grads = torch.tensor([[1.0, torch.inf, torch.inf, torch.nan], [2.0, 1.0, -torch.inf, 1.0]]).to(device, dtype)
    assert_near(ops.node_sum(grads, [1.0, 1.0]), reference.node_sum(grads, [1.0, 1.0]))


def test_node_sum_takes_a_tensor_of_weights():
    grads, weights = torch.randn(6, 5), torch.rand(3, dtype=torch.float64)
    assert torch.equal(ops.node_sum(grads, weights), ops.node_sum(grads, weights.tolist()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: (g, []), "weights: need at least 1, got 0"),
        (
            lambda g: (g, [1.0] * 4),
            r"grads: its first dimension must be a multiple of the 4 weights, got shape \(6, 5\)",
        ),
        (lambda g: (g, [float("inf")] * 2), "weights: must be finite, got inf"),
        (lambda g: (g.long(), [1.0]), "grads: dtype must be .* got int64"),
        (lambda g: (g[0, 0], [1.0]), "grads: its first dimension"),
    ],
)
def test_node_sum_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        ops.node_sum(*call(torch.randn(6, 5)))


# ---- multiply_sum ------------------------------------------------------------------------------------


def product_size(p, z, mask):
    return reference.multiply_sum(p.double().abs(), z.double().abs(), mask)


@pytest.mark.parametrize("masked", [None, torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1), (2, 7, 1), (3, 9, 64), (2, 257, 1031), (1, 5, 4099)], ids=str
)
def test_multiply_sum_matches_the_reference(shape, masked, dtype, device):
    p, z = normal(*shape, dtype=dtype, device=device), normal(*shape, dtype=dtype, device=device)
    mask = None if masked is None else (torch.rand(shape[:2]) > 0.4).to(device, masked)
    out = ops.multiply_sum(p, z, mask)
    assert out.dtype == wide(dtype)
    assert out.shape == (shape[0], shape[2])
    want = reference.multiply_sum(p, z, mask)
    assert_near(out, want, terms=shape[1], size=product_size(p, z, mask))


def test_a_masked_token_does_not_count_whatever_it_holds(dtype, device):
    p, z = normal(2, 6, 33, dtype=dtype, device=device), normal(2, 6, 33, dtype=dtype, device=device)
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[0, 2] = mask[1, 5] = False
    want = ops.multiply_sum(p, z, mask)
    p[0, 2], z[1, 5] = torch.nan, torch.inf
    assert torch.equal(ops.multiply_sum(p, z, mask), want)
    assert ops.multiply_sum(p, z).isnan().any()


def test_any_nonzero_byte_keeps_a_token():
    p = torch.ones(1, 3, 2)
    assert torch.equal(ops.multiply_sum(p, p, torch.tensor([[0, 2, 255]], dtype=torch.uint8)), torch.full((1, 2), 2.0))


def test_multiply_sum_reads_any_strides(dtype, device):
    p = normal(2, 40, 6, dtype=dtype, device=device).transpose(1, 2)
    z = normal(2, 1, 40, dtype=dtype, device=device).expand(2, 6, 40)
    mask = (torch.rand(6, 2) > 0.4).to(device).t()
    assert_near(
        ops.multiply_sum(p, z, mask), reference.multiply_sum(p, z, mask), terms=6, size=product_size(p, z, mask)
    )


def test_completeness_of_a_linear_model():
    weight, z = torch.randn(40).double(), torch.randn(3, 5, 40).double()
    total = ops.multiply_sum(weight.expand_as(z), z).sum(1)  # a linear function's attribution is its value
    torch.testing.assert_close(total, (z @ weight).sum(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: (p[0], p[0]), r"p: must have 3 dimensions \[B, T, F\], got shape \(3, 4\)"),
        (lambda p: (p, p[:, :2]), r"p and z must have the same shape, got \(2, 3, 4\) and \(2, 2, 4\)"),
        (lambda p: (p, p.half()), "p and z must have the same dtype, got float32 and float16"),
        (lambda p: (p, p, torch.ones(2, 4).bool()), r"mask: shape must be \(2, 3\), got \(2, 4\)"),
        (lambda p: (p, p, torch.ones(2, 3)), "mask: dtype must be (bool or )?uint8, got float32"),
        (lambda p: (p.int(), p.int()), "p: dtype must be .* got int32"),
    ],
)
def test_multiply_sum_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        ops.multiply_sum(*call(torch.randn(2, 3, 4)))


# ---- first_order -------------------------------------------------------------------------------------


def first_order_case(*shape, dtype=torch.float32, device="cpu", masked=True):
    p, z = normal(*shape, dtype=dtype, device=device), normal(*shape, dtype=dtype, device=device)
    scale = torch.rand(shape[:2]).to(device, wide(dtype))
    return p, z, scale, (torch.rand(shape[:2]) > 0.4).to(device) if masked else None


def assert_first_order(got, p, z, scale, mask):
    """The total is multiply_sum's, the sums are near the reference, and reach, which adds nothing, to one rounding."""
    total, magnitude, reach = reference.first_order(p, z, scale, mask)
    torch.testing.assert_close(got[0], ops.multiply_sum(p, z, mask), rtol=0, atol=0, equal_nan=True)
    assert_near(got[0], total, terms=p.shape[1], size=magnitude)
    assert_near(got[1], magnitude, terms=p.shape[1], size=magnitude)
    assert_near(got[2], reach, size=reach)


@pytest.mark.parametrize("masked", [None, torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1), (2, 7, 1), (3, 9, 64), (2, 257, 1031), (1, 5, 4099)], ids=str
)
def test_first_order_matches_the_reference(shape, masked, dtype, device):
    p, z, scale, mask = first_order_case(*shape, dtype=dtype, device=device, masked=masked is not None)
    mask = mask if masked is None else mask.to(masked)
    got = ops.first_order(p, z, scale, mask)
    assert [x.dtype for x in got] == [wide(dtype)] * 3
    assert [x.shape for x in got] == [(shape[0], shape[2])] * 3
    assert_first_order(got, p, z, scale, mask)


def test_first_order_reads_any_strides(dtype, device):
    p = normal(2, 40, 6, dtype=dtype, device=device).transpose(1, 2)
    z = normal(2, 1, 40, dtype=dtype, device=device).expand(2, 6, 40)
    scale, mask = (torch.rand(6, 2).to(device, wide(dtype)).t(), (torch.rand(6, 2) > 0.4).to(device).t())
    assert_first_order(ops.first_order(p, z, scale, mask), p, z, scale, mask)


def test_first_order_without_a_token_that_counts_is_zero(dtype, device):
    p, z, scale, mask = first_order_case(2, 5, 67, dtype=dtype, device=device)
    mask[0], mask[1, 3] = False, True
    got = ops.first_order(p, z, scale, mask)
    assert not any(x[0].any() for x in got)
    assert all(x[1].any() for x in got)


@pytest.mark.parametrize("at", [0, 2, 8])
@pytest.mark.parametrize("width", [1, 67])
@pytest.mark.parametrize(
    ("activation", "scale"),
    [(torch.nan, 0.5), (torch.inf, 0.5), (-torch.inf, 0.0), (0.0, torch.inf), (1.0, torch.nan), (0.0, 0.5)],
)
def test_first_order_keeps_nan_and_infinity(activation, scale, width, at, dtype, device):
    p, z, scales, _ = first_order_case(1, 9, width, dtype=dtype, device=device, masked=False)
    z[0, at], scales[0, at] = activation, scale
    assert_first_order(ops.first_order(p, z, scales), p, z, scales, None)


def test_first_order_keeps_infinite_gradients(dtype, device):
    p, z, scale, _ = first_order_case(1, 3, 4, dtype=dtype, device=device, masked=False)
    p[0, 0], z[0] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf]), 1.0
    z[0, 0, 3] = 0.0
    total, magnitude, reach = ops.first_order(p, z, scale)
    assert_first_order((total, magnitude, reach), p, z, scale, None)
    assert magnitude[0, :2].tolist() == [torch.inf, torch.inf]
    assert reach.isfinite().all()


def test_first_order_does_not_count_a_masked_token_whatever_it_holds(dtype, device):
    p, z, scale, _ = first_order_case(2, 6, 33, dtype=dtype, device=device, masked=False)
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[0, 2] = mask[1, 5] = mask[1, 0] = False
    want = ops.first_order(p, z, scale, mask)
    p[0, 2], z[1, 5], scale[1, 0] = torch.nan, torch.inf, torch.nan
    assert all(torch.equal(a, b) for a, b in zip(ops.first_order(p, z, scale, mask), want, strict=True))
    assert all(x.isnan().any() for x in ops.first_order(p, z, scale))


def test_a_negative_scale_reaches_nowhere():
    reach = ops.first_order(torch.ones(1, 2, 9), torch.ones(1, 2, 9), torch.tensor([[-3.0, 0.0]]))[2]
    assert torch.equal(reach, torch.zeros(1, 9))


def test_magnitude_shows_tokens_that_cancel():
    p, z = torch.tensor([[[2.0], [2.0]]]), torch.tensor([[[3.0], [-3.0]]])
    assert [x.item() for x in ops.first_order(p, z, torch.tensor([[0.5, 0.25]]))] == [0.0, 12.0, 1.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, s: (p[0], p[0], s), r"p: must have 3 dimensions \[B, T, F\], got shape \(3, 4\)"),
        (lambda p, s: (p, p[:, :2], s), r"p and z must have the same shape, got \(2, 3, 4\) and \(2, 2, 4\)"),
        (lambda p, s: (p, p.half(), s), "p and z must have the same dtype, got float32 and float16"),
        (lambda p, s: (p, p, s[:, :2]), r"scale: shape must be \(2, 3\), got \(2, 2\)"),
        (lambda p, s: (p, p, s.double()), "scale: dtype must be float32, got float64"),
        (lambda p, s: (p.half(), p.half(), s.half()), "scale: dtype must be float32, got float16"),
        (lambda p, s: (p.double(), p.double(), s), "scale: dtype must be float64, got float32"),
        (lambda p, s: (p, p, s, torch.ones(2, 4).bool()), r"mask: shape must be \(2, 3\), got \(2, 4\)"),
        (lambda p, s: (p, p, s, s), "mask: dtype must be (bool or )?uint8, got float32"),
        (lambda p, s: (p.int(), p.int(), s), "p: dtype must be .* got int32"),
    ],
)
def test_first_order_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        ops.first_order(*call(torch.randn(2, 3, 4), torch.rand(2, 3)))


# ---- all ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 90), DTYPES,
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_node_sum(weights, rows, hidden, dtype, seed):
    torch.manual_seed(seed)
    grads = normal(len(weights) * rows, hidden, dtype=dtype)
    want = reference.node_sum(grads, weights)
    # a product of a gradient and a tiny weight may fall below the smallest number: allow for it
    size = node_size(grads, weights) + 1e-30
    assert_near(ops.node_sum(grads, weights), want, terms=2 * len(weights), size=size)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(0, 12), st.integers(1, 90), st.booleans(), DTYPES, st.integers(0, 2**31))
def test_any_multiply_sum(examples, tokens, width, masked, dtype, seed):
    torch.manual_seed(seed)
    p, z = normal(examples, tokens, width, dtype=dtype), normal(examples, tokens, width, dtype=dtype)
    mask = torch.rand(examples, tokens) > 0.5 if masked else None
    want = reference.multiply_sum(p, z, mask)
    assert_near(ops.multiply_sum(p, z, mask), want, terms=tokens, size=product_size(p, z, mask))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(0, 12), st.integers(1, 90), st.booleans(), DTYPES, st.integers(0, 2**31))
def test_any_first_order(examples, tokens, width, masked, dtype, seed):
    torch.manual_seed(seed)
    arguments = first_order_case(examples, tokens, width, dtype=dtype, masked=masked)
    assert_first_order(ops.first_order(*arguments), *arguments)


def test_threads_do_not_change_bits(dtype):
    grads = normal(4, 397, 1031, dtype=dtype)
    one, many = (torch.empty(2, 397, 1031, dtype=wide(dtype)) for _ in range(2))
    _core.node_sum(one, grads, [0.3, 0.9], threads=1)
    _core.node_sum(many, grads, [0.3, 0.9], threads=7)
    assert torch.equal(one, many)
    p, z, mask = (
        normal(5, 131, 4099, dtype=dtype),
        normal(5, 131, 4099, dtype=dtype),
        torch.ones(5, 131, dtype=torch.uint8),
    )
    one, many = (torch.empty(5, 4099, dtype=wide(dtype)) for _ in range(2))
    _core.multiply_sum(one, p, z, mask, threads=1)
    _core.multiply_sum(many, p, z, mask, threads=7)
    assert torch.equal(one, many)
    scale = torch.rand(5, 131, dtype=wide(dtype))
    ones, manys = ([torch.empty(5, 4099, dtype=wide(dtype)) for _ in range(3)] for _ in range(2))
    _core.first_order(*ones, p, z, scale, mask, threads=1)
    _core.first_order(*manys, p, z, scale, mask, threads=7)
    assert all(torch.equal(a, b) for a, b in zip(ones, manys, strict=True))
    assert torch.equal(ones[0], one)
