"""What torch has to know of each op: one table, and the same tests for every row."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library

from spurge import _core, ops

Arguments = tuple[Any, ...]
F64 = torch.float64


def _proximity() -> Arguments:
    return (
        torch.rand(4, 6),
        torch.randint(-1, 40, (2, 6), dtype=torch.int32),
        torch.randint(-(2**31), 2**31 - 1, (2, 3, 2), dtype=torch.int32),
        torch.tensor([2, 0]),
        3,
        0.25,
    )


# Arguments of every op, all on the CPU. Ops that end in an underscore change their first ones.
CASES: dict[str, Callable[[], Arguments]] = {
    "associate_": lambda: (
        *(torch.zeros(3, 8, dtype=torch.float64) for _ in range(3)),
        torch.zeros(3, 8),
        torch.zeros(4, 8, dtype=torch.float64),
        torch.randn(6, 8),
        torch.randn(6, 3),
        torch.tensor([0, 2, 6]),
        torch.tensor([1, 3]),
        torch.tensor([0.5, 0.25], dtype=torch.float64),
        -1,
        False,
        True,
        True,
    ),
    "balance_sweep": lambda: (torch.randn(9, 4), torch.rand(9, dtype=F64), torch.randn(4, dtype=F64)),
    "balance_batch": lambda: (
        torch.randn(2, 30, 3), torch.rand(30, dtype=F64), torch.full((2, 3), 0.1, dtype=F64),
        torch.rand(30, 1, dtype=F64), torch.zeros(2, 3, dtype=F64), 1e-8, 50,
    ),
    "balance_strata": lambda: (
        torch.randn(2, 60), torch.tensor([0, 30, 60]), torch.ones(60, dtype=F64), torch.tensor([0.5, 0.5], dtype=F64),
        torch.full((2, 2), 0.1, dtype=F64), torch.ones(2, dtype=F64), torch.rand(60, 1, dtype=F64),
        torch.zeros(2, 3, dtype=F64), True, 1e-8, 50,
    ),
    "open_rows": lambda: (torch.randn(2, 3, 8), torch.randn(2, 3, 8), [0.25, 0.75]),
    "gate_columns_": lambda: (torch.randn(4, 3, 8), torch.tensor([5, 1]), torch.rand(2, 2)),
    "node_sum": lambda: (torch.randn(6, 3, 8), [0.5, 0.25, 0.25]),
    "multiply_sum": lambda: (torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)),
    "first_order": lambda: (
        torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool),
    ),
    "segment_medians": lambda: (
        torch.randn(9, 6), torch.tensor([8, 3, 3, 0, 5]), torch.tensor([0, 1, 4, 5]), "magnitude",
    ),
    "proximity": _proximity,
    "proximity_gradient": lambda: (torch.randn(4, 2), torch.randn(4, 2), *_proximity()),
    "correct_interval": lambda: (
        torch.randn(9, 4), torch.randn(9, 2), torch.tensor([3, 0]), torch.randint(0, 4, (9,)), 0.0, 1.0,
    ),
    "swarm_step_": lambda: (
        *(torch.empty(3, 9).uniform_(-1, 1) for _ in range(3)), torch.rand(9), 0.5, 1.5, 1.5, -1.0, 1.0, 0.5, 7, 2,
    ),
    "swarm_best_": lambda: (torch.rand(3, 9), torch.rand(3), torch.rand(3, 9), torch.rand(3)),
}  # fmt: skip


def moved(arguments: Arguments, device: torch.device) -> Arguments:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)


def named_parts(name: str, arguments: Arguments) -> tuple[list[Tensor], dict[str, Any]]:
    """What the public function takes: tensors by position, all else by its name in the schema."""
    schema = getattr(torch.ops.spurge, name).default._schema
    named = {a.name: x for a, x in zip(schema.arguments, arguments, strict=False) if not isinstance(x, Tensor)}
    return [x for x in arguments if isinstance(x, Tensor)], named


def call_public(name: str, arguments: Arguments) -> Any:
    tensors, named = named_parts(name, arguments)
    return getattr(ops, name)(*tensors, **named)


def floating(arguments: Arguments) -> list[Tensor]:
    return [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_op_has_a_case():
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("spurge::")}
    missing = registered - set(CASES)
    assert not missing, f"add {sorted(missing)} to CASES"


def test_opcheck(name, device):
    library.opcheck(getattr(torch.ops.spurge, name).default, moved(CASES[name](), device))


def test_compiles_into_one_graph(name, device):
    tensors, named = named_parts(name, moved(CASES[name](), device))
    public = getattr(ops, name)

    def call(*args):
        changed = [a.clone() for a in args]  # the ops that work in place get a tensor of the graph
        return public(*changed, **named), changed

    torch._dynamo.reset()  # `call` is compiled for every op
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))


@pytest.mark.parametrize("name", sorted(set(CASES) - {"proximity"}))
def test_nothing_requires_grad(name):
    arguments = CASES[name]()
    for a in floating(arguments):
        a.requires_grad_(not name.endswith("_"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = call_public(name, arguments)
    results = result if isinstance(result, tuple) else (result,)
    assert not any(r.requires_grad for r in results if isinstance(r, Tensor))


def test_opcheck_knows_the_gradient(device):
    arguments = moved(CASES["proximity"](), device)
    arguments[0].requires_grad_()
    library.opcheck(torch.ops.spurge.proximity.default, arguments)


def test_in_place_ops_bump_the_version(name):
    arguments = CASES[name]()
    before = [a._version for a in floating(arguments)]
    getattr(torch.ops.spurge, name).default(*arguments)
    after = [a._version for a in floating(arguments)]
    schema = getattr(torch.ops.spurge, name).default._schema
    written = [
        a.is_write
        for a, value in zip(schema.arguments, arguments, strict=False)
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    assert [y > x for x, y in zip(before, after, strict=True)] == written


def test_captured_in_a_cuda_graph(name, device):
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    eager, captured = (moved(CASES[name](), device) for _ in range(2))
    for a, b in zip(eager, captured, strict=True):
        if isinstance(a, Tensor):
            b.copy_(a)
    want = call_public(name, eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call_public(name, captured)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got, want)


def test_runs_on_the_callers_stream(device):
    if device.type != "cuda":
        pytest.skip("streams are CUDA's")
    x = torch.zeros(1 << 22, device=device)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # a kernel on the default stream would overtake this and read zeros
        x.fill_(1.0)
        total = ops.node_sum(x[None], [2.0])
    side.synchronize()
    assert torch.equal(total, torch.full_like(total, 2.0))


def test_runs_on_two_streams_at_once(name, device):
    if device.type != "cuda":
        pytest.skip("streams are CUDA's")
    given = [moved(CASES[name](), device) for _ in range(2)]

    def call(number):
        copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in given[number])
        return call_public(name, copies), [a for a in copies if isinstance(a, Tensor)]

    want = [call(number) for number in range(2)]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in range(2)], []
    for turn in range(8):
        with torch.cuda.stream(streams[turn % 2]):
            got.append(call(turn % 2))
    torch.cuda.synchronize()
    for turn, found in enumerate(got):
        torch.testing.assert_close(found, want[turn % 2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("open_rows", (torch.zeros(2, 3), torch.zeros(2, 4), [0.5])),
        ("gate_columns_", (torch.zeros(3, 2, 4), torch.tensor([0]), torch.zeros(2, 1))),
        ("node_sum", (torch.zeros(3, 2), [0.5, 0.5])),
        ("multiply_sum", (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).half(), None)),
        ("first_order", (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(3, 2), None)),
        ("segment_medians", (torch.zeros(3), torch.tensor([0]), torch.tensor([0, 1]))),
        (
            "correct_interval",
            (torch.zeros(3, 2), torch.zeros(3, 1), torch.tensor([0, 1]), torch.zeros(3).long(), 0.0, 1.0),
        ),
    ],
)
def test_shapes_are_refused_before_anything_runs(op, arguments):
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)
    with pytest.raises(ValueError, match="must") as fake:
        getattr(ops, op)(*meta)
    with pytest.raises(ValueError, match="must") as real:
        getattr(ops, op)(*arguments)
    assert str(fake.value).split(":")[0].split(" ")[0] == str(real.value).split(":")[0].split(" ")[0]


def test_a_device_without_kernels_runs_the_reference(name):
    op, here = getattr(torch.ops.spurge, name).default, CASES[name]()
    there = tuple(a.clone() if isinstance(a, Tensor) else a for a in here)
    want = op(*here)
    with pytest.warns(UserWarning, match=f"spurge::{name} has no kernel for cpu.*running the float64 reference"):
        got = op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *there)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(named_parts(name, there)[0], named_parts(name, here)[0])


LEVELS = _core.build_config()["isa_compiled"]
SCRIPT = """
import sys, torch
from spurge import _core, ops
assert _core.build_config()["isa_selected"] == sys.argv[1]
torch.manual_seed(0)
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x, u = (torch.randn(3, 5, 333) * 10.0 ** torch.randint(-42, 5, (333,))).to(dtype), torch.randn(3, 5, 333).to(dtype)
    x[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    results += [ops.open_rows(x, u, [0.2, 0.7]), ops.node_sum(torch.cat([x, u]), [0.3, 0.6])]
    results.append(ops.multiply_sum(x, u, torch.rand(3, 5) > 0.3))
    scale = torch.rand(3, 5, dtype=results[-1].dtype)
    results += [*ops.first_order(x, u, scale, torch.rand(3, 5) > 0.3), *ops.first_order(u, x, scale)]
    rows = torch.randint(0, 15, (700,))
    results.append(ops.segment_medians(x.view(15, 333), rows, torch.tensor([0, 9, 700]), "negative"))
    for n in (5, 300):
        results.append(ops.gate_columns_(x.clone(), torch.randperm(333)[:n], torch.rand(3, n)))
torch.save(results, sys.argv[2])
"""


def run_level(level, script, *arguments):
    environment = {**os.environ, "SPURGE_ISA": level}
    return subprocess.run(
        [sys.executable, "-c", script, level, *arguments], env=environment, capture_output=True, text=True
    )


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    found = {}
    for level in LEVELS:
        done = run_level(level, SCRIPT, str(tmp_path / level))
        if "does not support" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        found[level] = torch.load(tmp_path / level)
    for level, results in found.items():
        for got, want in zip(results, found["baseline"], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m, at=level: f"{at}: {m}")


def test_an_unknown_instruction_set_is_refused():
    done = run_level("mmx", "from spurge import _core; _core.build_config()")
    assert done.returncode != 0
    assert "ValueError: SPURGE_ISA: expected baseline, avx2 or avx512, got mmx" in done.stderr


OLD_TORCH = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__  # torch 2.10 brought it
from spurge import ops
x = torch.randn(2, 3, 4)
want = x + (0.5 - 1) * x
parameter = torch.nn.Parameter(x)
assert torch.equal(ops.open_rows(parameter, parameter, [0.5]), want)
halves, mask = x.bfloat16(), torch.ones(2, 3).bool()
assert torch.equal(ops.first_order(halves, halves, torch.ones(2, 3), mask)[0], ops.multiply_sum(halves, halves, mask))
version = x._version
ops.gate_columns_(x, torch.tensor([1]), torch.zeros(1, 1))
assert not x[..., 1].any() and x._version > version
"""


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this is an older torch")
def test_works_without_the_exchange_interface():
    done = subprocess.run([sys.executable, "-c", OLD_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
