from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tolerance import assert_near
from spurge import _core, ops, reference

SHAPES = [(0, 3, 4), (1, 1, 1), (1, 7, 1), (3, 0, 5), (2, 3, 64), (1, 257, 1031)]  # [B, T, H]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def normal(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape).to(device, dtype)


# ---- open_rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_open_rows_matches_the_reference(shape, nodes, dtype, device):
    x, u = normal(*shape, dtype=dtype, device=device), normal(*shape, dtype=dtype, device=device)
    alphas = [0.0, 0.3, 1.0][:nodes]
    out = ops.open_rows(x, u, alphas)
    assert out.dtype == dtype
    assert out.shape == (nodes * shape[0], *shape[1:])
    assert_near(out, reference.open_rows(x, u, alphas))


def test_a_node_of_one_changes_nothing(dtype):
    x = normal(2, 5, 33, dtype=dtype)
    assert torch.equal(ops.open_rows(x, normal(2, 5, 33, dtype=dtype), [1.0]), x)


def test_open_rows_takes_many_nodes(device):
    x, u = normal(1, 2, 9, device=device), normal(1, 2, 9, device=device)
    alphas = torch.linspace(0, 1, 131, dtype=torch.float64)  # more than travel in one kernel argument
    assert_near(ops.open_rows(x, u, alphas), reference.open_rows(x, u, alphas.tolist()))


def test_open_rows_reads_any_strides(dtype, device):
    x = normal(6, 8, 5, dtype=dtype, device=device).transpose(1, 2)[::2]
    u = normal(5, 8, dtype=dtype, device=device)[None].transpose(1, 2).expand(3, 8, 5).transpose(1, 2)
    assert not x.is_contiguous()
    assert_near(ops.open_rows(x, u, [0.2, 0.7]), reference.open_rows(x, u, [0.2, 0.7]))


def test_open_rows_from_an_unaligned_address(dtype, device):
    x = normal(1 + 3 * 40, dtype=dtype, device=device)[1:].view(3, 1, 40)
    assert_near(ops.open_rows(x, x, [0.25]), reference.open_rows(x, x, [0.25]))


def test_open_rows_keeps_nan_and_infinity(dtype, device):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0])
    x, u = (m.reshape(1, 1, -1).to(device, dtype).contiguous() for m in torch.meshgrid(special, special, indexing="ij"))
    assert_near(ops.open_rows(x, u, [0.0, 1.0]), reference.open_rows(x, u, [0.0, 1.0]))


def test_open_rows_resolves_negative_views():
    x = torch.complex(torch.randn(2, 3, 4), torch.randn(2, 3, 4)).conj().imag
    assert x.is_neg()
    assert_near(ops.open_rows(x, x, [0.5]), reference.open_rows(x, x, [0.5]))


@pytest.mark.parametrize("offset", [0, 1])
def test_open_rows_too_large_for_a_cache(offset, dtype):
    size = (9 << 20) // torch.empty(0, dtype=dtype).element_size()  # 4 nodes: 36 MB, written past the caches
    x, u = normal(2, size // 2, dtype=dtype), normal(2, size // 2, dtype=dtype)
    rows = torch.empty(4 * size + offset, dtype=dtype)[offset:].view(8, -1)
    _core.open_rows(rows, x, u, [0.0, 0.3, 0.6, 1.0], threads=3)
    for s, alpha in enumerate([0.0, 0.3, 0.6, 1.0]):
        assert torch.equal(rows[2 * s : 2 * s + 2], ops.open_rows(x, u, [alpha]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: (x, x[:1], [0.5]), r"x and u must have the same shape, got \(2, 3, 4\) and \(1, 3, 4\)"),
        (lambda x: (x, x.double(), [0.5]), "x and u must have the same dtype, got float32 and float64"),
        (lambda x: (x.int(), x.int(), [0.5]), "x: dtype must be float32, bfloat16, float16 or float64, got int32"),
        (lambda x: (x + 0j, x + 0j, [0.5]), "x: dtype must be .* got complex64"),
        (lambda x: (x[0, 0, 0], x[0, 0, 0], [0.5]), "x: must have at least 1 dimension"),
        (lambda x: (x, x, [0.5, float("nan")]), "alphas: must be finite, got nan"),
    ],
)
def test_open_rows_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        ops.open_rows(*call(torch.randn(2, 3, 4)))


# ---- gate_columns_ -----------------------------------------------------------------------------------


def gates_case(particles, examples, tokens, width, n, dtype, device="cpu"):
    z = normal(particles * examples, tokens, width, dtype=dtype, device=device)
    columns = torch.randperm(width)[:n].to(device)
    return z, columns, torch.empty(particles, n).uniform_(-1, 1).to(device)


@pytest.mark.parametrize(
    "sizes",  # P, B, T, F, n
    [(1, 1, 1, 1, 1), (1, 0, 3, 8, 2), (2, 3, 0, 8, 2), (2, 3, 5, 40, 0), (3, 2, 7, 257, 1), (3, 2, 7, 257, 257),
     (1, 1, 257, 1031, 13), (2, 1, 9, 1032, 700), (5, 1, 3, 64, 64)],
    ids=str,
)  # fmt: skip
def test_gate_columns_matches_the_reference(sizes, dtype, device):
    z, columns, gates = gates_case(*sizes, dtype, device)
    want = reference.gate_columns(z, columns, gates)
    version = z._version
    assert ops.gate_columns_(z, columns, gates) is z
    assert z._version > version
    assert_near(z, want)


def test_sorted_columns_of_a_whole_row(dtype, device):
    z, _, gates = gates_case(2, 2, 3, 64, 64, dtype, device)
    want = reference.gate_columns(z, torch.arange(64, device=device), gates)
    assert_near(ops.gate_columns_(z, torch.arange(64, device=device), gates), want)


@pytest.mark.parametrize("n", [2, 30])
def test_other_columns_keep_their_bits(n, dtype, device):
    z, columns, gates = gates_case(2, 2, 3, 40, n, dtype, device)
    z[0, 0] = torch.nan
    before = z.clone()
    ops.gate_columns_(z, columns, gates)
    others = torch.ones(40, dtype=torch.bool, device=device)
    others[columns] = False
    torch.testing.assert_close(z[..., others], before[..., others], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [3, 40])
def test_gate_columns_keeps_nan_and_infinity(n, dtype, device):
    z, columns, gates = gates_case(1, 1, 3, 40, n, dtype, device)
    z[0, 0], z[0, 1] = torch.inf, torch.nan
    gates[0, 0] = 0.0
    want = reference.gate_columns(z, columns, gates)
    assert_near(ops.gate_columns_(z, columns, gates), want)


def test_gate_columns_changes_a_strided_tensor(dtype, device):
    base = normal(4, 40, 6, dtype=dtype, device=device)
    z = base.transpose(1, 2)[::2]
    columns, gates = torch.tensor([39, 1], device=device), torch.tensor([[0.5, 0.0], [2.0, -1.0]], device=device)
    want, untouched = reference.gate_columns(z, columns, gates), base[1::2].clone()
    ops.gate_columns_(z, columns, gates)
    assert_near(base.transpose(1, 2)[::2], want)
    assert torch.equal(base[1::2], untouched)


@pytest.mark.slow
def test_gate_columns_beyond_two_to_the_31():
    width = 2**31 + 64
    untouched = np.zeros((1, 1, width), np.int16)  # its pages are made when somebody writes to them
    z = torch.from_numpy(untouched).view(torch.bfloat16)
    z[0, 0, -3:] = 3.0
    ops.gate_columns_(z, torch.tensor([width - 2]), torch.tensor([[0.5]]))
    assert z[0, 0, -3:].tolist() == [3.0, 1.5, 3.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, c, g: (z[0], c, g), r"z: must have 3 dimensions \[R, T, F\], got shape \(2, 5\)"),
        (lambda z, c, g: (z.long(), c, g), "z: dtype must be .* got int64"),
        (lambda z, c, g: (z, c.int(), g), "columns: dtype must be int64, got int32"),
        (lambda z, c, g: (z, c[None], g), r"columns: must have 1 dimension"),
        (lambda z, c, g: (z, c, g.double()), "gates: dtype must be float32, got float64"),
        (lambda z, c, g: (z, c, g[:, :1]), r"gates: shape must be \(2, 2\), got \(2, 1\)"),
        (lambda z, c, g: (z, c, g[0]), r"gates: must have 2 dimensions \[P, n\]"),
        (lambda z, c, g: (z[:3], c, g), "gates: the 3 rows of z must be a multiple of its P = 2 particles"),
        (lambda z, c, g: (z, c, g[:0]), "gates: the 4 rows of z must be a multiple of its P = 0 particles"),
        (lambda z, c, g: (z, c + 4, g), r"columns: must lie in \[0, 5\), got 5"),
        (lambda z, c, g: (z, c - 2, g), r"columns: must lie in \[0, 5\), got -2"),
        (lambda z, c, g: (z, c * 0, g), "columns: must be distinct, got 0 twice"),
    ],
)
def test_gate_columns_says_what_is_wrong(call, message):
    z = torch.randn(4, 2, 5)
    with pytest.raises(ValueError, match=message):
        ops.gate_columns_(*call(z, torch.tensor([0, 1]), torch.rand(2, 2)))


# ---- both --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3), st.integers(0, 5), st.integers(1, 70), st.lists(st.floats(-2, 2), max_size=4), DTYPES,
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_open_rows(examples, tokens, hidden, alphas, dtype, seed):
    torch.manual_seed(seed)
    x, u = normal(examples, tokens, hidden, dtype=dtype), normal(examples, tokens, hidden, dtype=dtype)
    want = reference.open_rows(x, u, alphas)
    size = (x.double().abs() + 3 * u.double().abs()).repeat(len(alphas), 1, 1)
    assert_near(ops.open_rows(x, u, alphas), want, size=size)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(1, 90),
    st.data(),
    DTYPES,
    st.integers(0, 2**31),
)
def test_any_gate_columns(particles, examples, tokens, width, data, dtype, seed):
    torch.manual_seed(seed)
    z, columns, gates = gates_case(particles, examples, tokens, width, data.draw(st.integers(0, width)), dtype)
    want = reference.gate_columns(z, columns, gates)
    assert_near(ops.gate_columns_(z, columns, gates), want)


def test_threads_do_not_change_bits(dtype):
    x, u = normal(3, 397, 1031, dtype=dtype), normal(3, 397, 1031, dtype=dtype)
    one, many = (torch.empty(6, 397, 1031, dtype=dtype) for _ in range(2))
    _core.open_rows(one, x, u, [0.3, 0.9], threads=1)
    _core.open_rows(many, x, u, [0.3, 0.9], threads=7)
    assert torch.equal(one, many)
    columns, gates = torch.randperm(1031)[:600], torch.rand(3, 600)
    one, many = x.clone(), x.clone()
    _core.gate_columns(one, columns, gates, threads=1)
    _core.gate_columns(many, columns, gates, threads=7)
    assert torch.equal(one, many)


def test_numpy_goes_through_plain_dlpack():
    x, out = np.arange(6, dtype=np.float32).reshape(1, 2, 3), np.empty((2, 2, 3), np.float32)
    _core.open_rows(out, x, x, [0.0, 0.5])
    np.testing.assert_array_equal(out, np.concatenate([0 * x, 0.5 * x]))


def test_the_bare_kernel_refuses_strided_memory():
    x = torch.randn(4, 4).t()
    with pytest.raises(ValueError, match=r"x: must be contiguous; call .contiguous\(\) first"):
        _core.open_rows(torch.empty(4, 4), x, x, [0.5])


def test_the_bare_kernel_refuses_other_objects():
    with pytest.raises(TypeError):
        _core.open_rows([1.0], [1.0], [1.0], [0.5])
