from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.tolerance import assert_near, tolerance
from spurge import _core, ops, reference

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
NAMES = ("sums", "logs", "carry", "picked", "activations")


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Block(NamedTuple):
    features: Tensor
    gradients: Tensor
    starts: Tensor
    classes: Tensor
    scales: Tensor

    def to(self, device):
        return Block(*(x.to(device) for x in self))


def block(lengths, width, outputs, labels, dtype=torch.float32):
    """Random samples in segments of these lengths, of random classes."""
    samples = sum(lengths)
    return Block(
        torch.randn(samples, width).to(dtype),
        torch.randn(samples, outputs, dtype=wide(dtype)) / 4,
        torch.tensor([0, *lengths]).cumsum(0),
        torch.randperm(labels)[: len(lengths)],
        0.01 + torch.rand(len(lengths), dtype=torch.float64),
    )


def places(width, outputs, labels, device="cpu", begun=True):
    """Accumulators, with something in them already if begun."""
    shapes = [(outputs, width)] * 4 + [(labels, width)]
    made = [torch.rand(s, dtype=torch.float64) * begun for s in shapes]
    made[3] = made[3].float()
    return [x.to(device) for x in made]


def edges(b, begun=None):
    """G of every segment, ``[S, O, M]`` in float64; ``begun`` is what the first one has already."""
    cuts = b.starts.tolist()
    g, x = b.gradients.double().abs(), b.features.double().abs()
    sums = [g[i:j].t() @ x[i:j] for i, j in itertools.pairwise(cuts)]
    if begun is not None:
        sums[0] = sums[0] + begun
    return b.scales[:, None, None] * torch.stack(sums) if sums else g.new_zeros(0, g.shape[1], x.shape[1])


def assert_as_reference(got, b, before, dtype, **options):
    want = reference.associate(*before, *b, **options)
    G = edges(b.to("cpu"), before[2].cpu() if options.get("resumed") else None)
    # what a relative error of G changes G log G by, besides the logarithm's own
    size = {"sums": G.sum(0), "logs": (G * (1 + G.clamp_min(1e-300).log().abs())).sum(0)}
    for name, place, result, start in zip(NAMES, got, want, before, strict=True):
        total = start.cpu().abs() + (size[name] if name in size else result.cpu().abs())
        terms = 8 + len(b.features)
        assert place.dtype == (torch.float32 if name == "picked" else torch.float64)
        assert_near(place.to(wide(dtype) if name != "picked" else torch.float32), result, terms=terms, size=total)


OPTIONS = [
    {},
    {"target": 1, "relu": True},
    {"resumed": True},
    {"unfinished": True, "target": 0},
    {"resumed": True, "unfinished": True, "relu": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "width", "outputs", "labels"),
    [
        ([1], 1, 1, 2),
        ([3, 0, 2], 7, 3, 5),
        ([5, 9], 33, 2, 2),
        ([40, 1, 30], 257, 13, 4),
        ([700], 130, 25, 3),  # more samples of a class than float32 adds up
    ],
    ids=str,
)
def test_matches_the_reference(lengths, width, outputs, labels, options, dtype, device):
    b = block(lengths, width, outputs, labels, dtype).to(device)
    got = places(width, outputs, labels, device)
    before = [x.clone() for x in got]
    ops.associate_(*got, *b, **options)
    assert_as_reference(got, b, before, dtype, **options)


@pytest.mark.parametrize(
    ("lengths", "width", "outputs", "labels"),
    [
        ([5000, 1500], 40, 3, 2),  # classes that take several chunks
        ([1000, 900, 800, 700], 20, 14, 9),
        ([2] * 600, 5, 30, 600),  # more classes than one chunk takes
        ([30, 50], 6, 3100, 3200),  # more outputs than are packed at once
    ],
    ids=["long", "middle", "many classes", "many outputs"],
)
def test_matches_the_reference_beyond_one_chunk(lengths, width, outputs, labels, device):
    for dtype in (torch.float16, torch.float64):
        b = block(lengths, width, outputs, labels, dtype).to(device)
        got = places(width, outputs, labels, device)
        before = [x.clone() for x in got]
        ops.associate_(*got, *b)
        assert_as_reference(got, b, before, dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [[3, 1300, 0, 0, 700, 2, 500], [0, 2600], [600, 600, 0], [513] * 8], ids=str)
def test_matches_the_reference_where_a_gpu_cuts_the_samples(lengths, options, device):
    """Few outputs and many samples: classes that begin, end, or go on in a part, span several, or hold no sample."""
    for dtype in (torch.float32, torch.float64):
        b = block(lengths, 70, 3, 9, dtype).to(device)
        got = places(70, 3, 9, device)
        before = [x.clone() for x in got]
        ops.associate_(*got, *b, **options)
        assert_as_reference(got, b, before, dtype, **options)


@pytest.mark.parametrize(
    ("lengths", "width", "outputs"), [([], 5, 3), ([2, 3], 0, 3), ([2, 3], 5, 0), ([0, 0], 5, 3)], ids=str
)
def test_nothing_to_add(lengths, width, outputs, dtype, device):
    b = block(lengths, width, outputs, 4, dtype).to(device)
    got = places(width, outputs, 4, device)
    before = [x.clone() for x in got]
    ops.associate_(*got, *b)
    assert_as_reference(got, b, before, dtype)


def test_is_the_gradient_of_each_weight():
    features, labels = torch.rand(20, 6), torch.arange(20) // 5
    layer = torch.nn.Linear(6, 4)
    want = torch.zeros(4, 4, 6)
    for x, label in zip(features, labels, strict=True):
        layer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x), label).backward()
        want[label] += layer.weight.grad.abs()
    residuals = torch.softmax(layer(features), 1).detach() - torch.eye(4)[labels]
    got = places(6, 4, 4, begun=False)
    ops.associate_(*got, features, residuals, torch.arange(5) * 5, torch.arange(4), torch.ones(4).double())
    torch.testing.assert_close(got[0].float(), want.sum(0))
    torch.testing.assert_close(got[1].float(), torch.special.xlogy(want, want).sum(0))
    torch.testing.assert_close(got[3], torch.stack([want[c, c] for c in range(4)]))


def test_dead_units_and_silent_outputs_add_nothing(dtype, device):
    b = block([6, 6], 40, 15, 2, dtype)
    b.features[:, 3] = 0.0
    b.gradients[:, 7] = -0.0
    got = places(40, 15, 2, device, begun=False)
    ops.associate_(*got, *b.to(device), target=1)
    for name, x in zip(NAMES, got, strict=True):
        assert x.isfinite().all(), name
    for x in (got[0], got[1], got[3]):
        assert not x[:, 3].any()
        assert not x[7].any()
    assert not got[4][:, 3].any()


def test_keeps_nan_and_infinity(dtype, device):
    b = block([4, 3], 40, 15, 2, dtype)
    b.features[1, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    b.gradients[5, :2] = torch.tensor([torch.inf, torch.nan])
    b.gradients[1, 4] = 0.0  # 0 times infinity
    for relu in (False, True):
        got = places(40, 15, 2, device, begun=False)
        want = reference.associate(*(x.cpu() for x in got), *b, relu=relu)
        ops.associate_(*got, *b.to(device), relu=relu)
        for name, x, y in zip(NAMES, got, want, strict=True):
            rest = y.isfinite()
            torch.testing.assert_close(x.cpu()[~rest], y[~rest].to(x.dtype), equal_nan=True, msg=name)
            assert x.cpu()[rest].isfinite().all(), name


@pytest.mark.parametrize("power", [-30, -12, 0, 12, 30])
def test_the_entropy_does_not_depend_on_the_scale(power, device):
    b = block([9] * 7, 30, 5, 7)
    entropies = []
    for factor in (1.0, 10.0**power):
        got = places(30, 5, 7, device, begun=False)
        ops.associate_(*got, *b._replace(gradients=b.gradients * factor).to(device))
        sums, logs = got[0].cpu(), got[1].cpu()
        entropies.append(sums.log() - logs / sums)
    assert (entropies[0] >= 0).all()
    assert (entropies[0] <= math.log(7)).all()
    largest = 3 + abs(power) * math.log(10)  # logarithm, in float32
    torch.testing.assert_close(*entropies, rtol=0, atol=tolerance(torch.float32) * largest)


@pytest.mark.parametrize("power", [-12, -4, 0])
def test_the_entropy_of_a_single_class_is_nothing(power, dtype, device):
    b = block([60] * 5, 30, 5, 5, dtype)
    b.features[:60] = b.features[120:] = 0
    got = places(30, 5, 5, device, begun=False)
    ops.associate_(*got, *b._replace(gradients=b.gradients * 10.0**power).to(device))
    sums, logs = got[0].cpu(), got[1].cpu()
    noise = 2e-7 if dtype != torch.float64 else 1e-15  # what the op's documentation promises; worst seen 1.2e-7
    assert ((sums.log() - logs / sums).abs() <= noise * (1 + sums.log().abs())).all()


def test_logarithms_of_all_sizes(dtype):
    """One sample and one class: logs is G log G of single numbers, from the smallest normal to large ones."""
    exponents = torch.linspace(-37.9, 30, 4000, dtype=torch.float64)
    values = torch.cat([10.0**exponents, 1 + torch.linspace(-0.01, 0.01, 96, dtype=torch.float64)]).to(wide(dtype))
    got = places(1, len(values), 1, begun=False)
    one = torch.ones(1, dtype=torch.float64)
    ops.associate_(*got, torch.ones(1, 1, dtype=dtype), values[None], torch.tensor([0, 1]), torch.tensor([0]), one)
    G = values.double()
    assert torch.equal(got[0].flatten(), G)
    assert_near((got[1].flatten() / G).to(wide(dtype)), G.log(), terms=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_too_small_for_float32_do_no_harm(dtype):
    b = block([300, 20], 20, 3, 2, dtype)
    b.gradients[:, 1] *= 1e-41
    got = places(20, 3, 2, begun=False)
    want = reference.associate(*got, *b)
    ops.associate_(*got, *b)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-5, atol=1e-34)


def test_changes_strided_tensors_and_reads_any_strides(dtype, device):
    b = block([3, 8], 12, 5, 4, dtype).to(device)
    got = places(12, 5, 4, device)
    far = [torch.empty_like(x.t()).t().copy_(x) for x in got]
    turned = Block(b.features.t().contiguous().t(), b.gradients.repeat(1, 2)[:, :5], *b[2:])
    ops.associate_(*got, *b, resumed=True, unfinished=True)
    ops.associate_(*far, *turned, resumed=True, unfinished=True)
    for x, y in zip(got, far, strict=True):
        assert torch.equal(x, y)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 15), DTYPES,
    st.lists(st.integers(0, 60), max_size=5), st.booleans(), st.integers(-1, 5), st.integers(0, 2**31),
)  # fmt: skip
def test_any_cut_into_blocks(lengths, width, outputs, dtype, cuts, relu, target, seed):
    torch.manual_seed(seed)
    b = block(lengths, width, outputs, 6, dtype)
    samples = len(b.features)
    borders = sorted({0, samples, *(c for c in cuts if c < samples)})
    got = places(width, outputs, 6)
    before = [x.clone() for x in got]
    for begin, end in itertools.pairwise(borders):
        # every segment that has samples here; a segment without any goes with the block that it begins in
        inside = [
            s
            for s in range(len(lengths))
            if (b.starts[s] < end and b.starts[s + 1] > begin) or begin <= b.starts[s] == b.starts[s + 1] < end
        ]
        if not inside:
            continue
        first, last = inside[0], inside[-1]
        part = slice(first, last + 1)
        starts = b.starts[first : last + 2].clamp(begin, end) - begin
        ops.associate_(
            *got, b.features[begin:end], b.gradients[begin:end], starts, b.classes[part], b.scales[part],
            target=target, relu=relu, resumed=bool(b.starts[first] < begin), unfinished=bool(b.starts[last + 1] > end),
        )  # fmt: skip
    trailing = [s for s in range(len(lengths)) if b.starts[s] == samples == b.starts[s + 1]]
    if trailing:
        part = slice(trailing[0], None)
        empty = torch.zeros(len(trailing) + 1, dtype=torch.int64)
        ops.associate_(
            *got, b.features[:0], b.gradients[:0], empty, b.classes[part], b.scales[part], target=target, relu=relu
        )
    got[2] = before[2].clone()  # it holds what an unfinished segment left behind
    assert_as_reference(got, b, before, dtype, relu=relu, target=target)


def test_threads_do_not_change_bits(dtype):
    b = block([300, 40, 900, 1300], 1031, 29, 9, dtype)
    results = []
    for threads in (1, 7):
        torch.manual_seed(1)
        got = places(1031, 29, 9)
        _core.associate(*got, *b, resumed=True, unfinished=True, threads=threads)
        results.append(got)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


SCRIPT = """
import sys, torch
from spurge import _core
assert _core.build_config()["isa_selected"] == sys.argv[1]
for case in torch.load(sys.argv[2]):
    _core.associate(*case["got"], *case["block"], relu=True, resumed=True)
    torch.testing.assert_close(case["got"], case["want"], rtol=3e-6, atol=1e-5)
    case["odd"][0][0, :2] = torch.tensor([torch.nan, torch.inf])
    _core.associate(*case["empty"], *case["odd"])
    assert case["empty"][1][:, 0].isnan().all() and case["empty"][1][:, 1].isinf().all()
    assert case["empty"][1][:, 2:].isfinite().all()
"""


def test_every_instruction_set_agrees(tmp_path):
    """Not to the bit: some can fuse multiplication and addition. Sums of up to 330 numbers of about 1."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        b, got = block([300, 40, 0, 30], 83, 15, 9, dtype), places(83, 15, 9)
        want = reference.associate(*got, *b, relu=True, resumed=True)
        want = [y.to(x.dtype) for x, y in zip(got, want, strict=True)]
        odd, empty = [x.clone() for x in b], places(83, 15, 9, begun=False)
        cases.append({"got": got, "block": tuple(b), "want": want, "odd": odd, "empty": empty})
    torch.save(cases, tmp_path / "cases")
    for level in _core.build_config()["isa_compiled"]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, level, str(tmp_path / "cases")],
            env={**os.environ, "SPURGE_ISA": level}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 or "does not support" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(5)}, r"features: must have 2 dimensions \[N, M\], got shape \(5,\)"),
        ({"features": torch.zeros(5, 4).long()}, "features: dtype must be .* got (torch.)?int64"),
        ({"gradients": torch.zeros(4, 3)}, r"gradients: shape must be \(5, 3\), got \(4, 3\)"),
        ({"gradients": torch.zeros(5, 3).double()}, "gradients: dtype must be float32, got float64"),
        ({"starts": torch.tensor([0, 5])}, r"starts: shape must be \(3,\), got \(2,\)"),
        ({"starts": torch.tensor([0, 2, 5]).int()}, "starts: dtype must be int64, got int32"),
        ({"scales": torch.ones(2)}, "scales: dtype must be float64, got float32"),
        ({"sums": torch.zeros(4, 3).double()}, r"sums: shape must be \(3, 4\), got \(4, 3\)"),
        ({"logs": torch.zeros(3, 4)}, "logs: dtype must be float64, got float32"),
        ({"picked": torch.zeros(3, 4).double()}, "picked: dtype must be float32, got float64"),
        ({"activations": torch.zeros(4, 3).double()}, r"activations: shape must be \(4, 4\), got \(4, 3\)"),
        ({"carry": torch.zeros(0).double(), "resumed": True}, r"carry: shape must be \(3, 4\), got \(0,\)"),
        ({"target": 4}, "target: expected -1 or a class below 4, got 4"),
        ({"target": -2}, "target: expected -1 or a class below 4, got -2"),
    ],
)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_says_what_is_wrong(change, message, where):
    with pytest.raises(ValueError, match=message):
        call(change, where)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": torch.tensor([1, 2, 5])}, "starts: must begin with 0, got 1"),
        ({"starts": torch.tensor([0, 2, 4])}, "starts: must end with the 5 samples, got 4"),
        ({"starts": torch.tensor([0, 6, 5])}, "starts: must ascend, got 6 and then 5 at 2"),
        ({"classes": torch.tensor([0, 4])}, r"classes: expected values in \[0, 4\), got 4 at 1"),
        ({"classes": torch.tensor([-1, 2])}, r"classes: expected values in \[0, 4\), got -1 at 0"),
        ({"classes": torch.tensor([2, 2])}, "classes: must be distinct, got 2 again at 1"),
    ],
)
def test_says_what_is_wrong_with_the_segments(change, message):
    with pytest.raises(ValueError, match=message):
        call(change, "cpu")


def call(change, where):
    edges_ = (3, 4)
    arguments = {
        "sums": torch.zeros(edges_).double(),
        "logs": torch.zeros(edges_).double(),
        "carry": torch.zeros(0).double(),
        "picked": torch.zeros(edges_),
        "activations": torch.zeros(4, 4).double(),
        "features": torch.zeros(5, 4),
        "gradients": torch.zeros(5, 3),
        "starts": torch.tensor([0, 2, 5]),
        "classes": torch.tensor([3, 1]),
        "scales": torch.ones(2).double(),
    } | change
    ops.associate_(**{k: x.to(where) if isinstance(x, Tensor) else x for k, x in arguments.items()})
