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


def test_node_sum_into_memory_that_is_there(dtype, device):
    grads = normal(6, 3, 33, dtype=dtype, device=device)
    want, buffer = ops.node_sum(grads, [0.5, 2.0]), torch.zeros(5, 3, 33, dtype=wide(dtype), device=device)
    out = buffer[1:4]
    assert ops.node_sum_(out, grads, [0.5, 2.0]) is out
    assert torch.equal(buffer[1:4], want)
    assert not buffer[[0, 4]].any()
    strided = torch.zeros(3, 3, 33, dtype=wide(dtype), device=device).transpose(0, 1)
    assert torch.equal(ops.node_sum_(strided, grads, [0.5, 2.0]), want)


def test_node_sum_refuses_another_shape_or_dtype():
    with pytest.raises(ValueError, match=r"out: must be \(3, 5\) of torch.float32, got \(6, 5\)"):
        ops.node_sum_(torch.zeros(6, 5), torch.zeros(6, 5), [0.5, 0.5])
    with pytest.raises(ValueError, match=r"out: must be .*float32, got .*bfloat16"):
        ops.node_sum_(torch.zeros(3, 5).bfloat16(), torch.zeros(6, 5).bfloat16(), [0.5, 0.5])


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


# ---- both --------------------------------------------------------------------------------------------


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
