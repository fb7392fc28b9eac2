"""The measured kernels: every op is one, all methods compute the same, and the table fits a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spurge import ops  # noqa: F401 - registers the ops
from spurge.bench import kernels
from spurge.bench.case import MIB, SIZES, Case
from spurge.bench.timing import Timing, compare
from spurge.cli import main
from spurge.report.results import Results

CASES = [(name, dtype) for name in kernels.KERNELS for dtype in kernels.DTYPES[name]]
SMALL = {"cpu": {"cache": 1, "middle": 2, "memory": 4}}


def test_every_op_is_measured():
    names = torch._C._dispatch_get_all_op_names()
    assert {name.split("::")[1] for name in names if name.startswith("spurge::")} <= set(kernels.KERNELS)


@pytest.mark.parametrize("name, dtype", CASES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in CASES])
def test_every_method_computes_the_same(name: str, dtype: torch.dtype):
    case = kernels.KERNELS[name](MIB // 8, dtype, "cpu")
    kernels.check(case)
    assert case.elements is None or case.elements in [x.numel() for x in case.inputs]


@pytest.mark.parametrize("name", ["open_rows", "multiply_sum", "swarm_step_", "correct_interval", "balance_sweep"])
def test_a_case_moves_about_what_it_was_asked_to(name: str):
    case = kernels.KERNELS[name](4 * MIB, torch.float32, "cpu")
    assert 0.8 < case.traffic / (4 * MIB) < 1.25


def test_a_kernel_that_computes_something_else_is_not_timed():
    case = kernels.KERNELS["node_sum"](MIB // 8, torch.float32, "cpu")
    calls = case.calls | {"spurge": lambda grads: case.calls["torch"](grads) * 1.001}
    with pytest.raises(ValueError, match=r"node_sum .* float32: output 0 of spurge is 1\.0e-03 from"):
        kernels.check(dataclasses.replace(case, calls=calls))


def test_rates_are_traffic_over_time():
    case = Case("swarm_step_", "2x4", torch.float32, 2 * 10**9, (), {}, print, elements=10**9)
    timings = {"copy": Timing(0.5, 0.0, 5, 0.5), "spurge": Timing(2.0, 0.1, 5, 2.0), "torch": Timing(3.0, 0.1, 5, 3.0)}
    results = Results("bench")
    results.extend(kernels.rows(case, "case", timings))
    found = {row["metric"]: row["value"] for row in results.select(method="spurge")}
    assert found == {"seconds": 2.0, "bandwidth": 1.0, "copy_share": 25.0, "ns_per_element": 2.0}
    assert kernels.cells(case, timings).split() == ["2.00", "25%", "1.50x"]
    assert kernels.cells(dataclasses.replace(case, elements=None), timings).split() == ["1.00", "25%", "1.50x"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small arrays, and one sample of each."""
    monkeypatch.setattr(kernels, "SIZES", SMALL)

    def once(calls: dict[str, Callable[[], Any]], **_: Any) -> dict[str, Timing]:
        return compare(calls, repeats=1)

    monkeypatch.setattr(kernels, "compare", once)


def test_the_command_prints_a_table_and_writes_rows(quick, tmp_path, capsys):
    file = tmp_path / "rates.json"
    assert main(["bench", "swarm_*", "node_sum", "--json", str(file), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines[:-1] if len(line) > 80] == []  # the last one names the file
    assert [line.split()[:3] for line in lines[2:6]] == [
        ["node_sum", "f32", "GB/s"],
        ["node_sum", "bf16", "GB/s"],
        ["swarm_step_", "f32", "ns"],
        ["swarm_best_", "f32", "GB/s"],
    ]
    results = Results.load(file)
    assert results.head["settings"].pop("command").startswith("spurge bench 'swarm_*' node_sum")
    assert results.head["settings"] == {
        "kernels": ["node_sum", "swarm_step_", "swarm_best_"],
        "device": "cpu",
        "threads": 1,
    }
    cases = {row["case"] for row in results.rows}
    assert len(cases) == 4 * 3
    assert {row["method"] for row in results.rows} == {"copy", "spurge", "torch", "torch-usual"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing_*"], "KERNEL: 'nothing_*' is none of open_rows, "),
        (["node_sum", "--device", "nowhere"], "--device: 'nowhere' cannot be used here: "),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"spurge: error: {said}")


def test_there_are_three_sizes():
    assert all(len(sizes) == 3 and list(sizes.values()) == sorted(sizes.values()) for sizes in SIZES.values())
    assert all(len(line) <= 80 for sizes in SIZES.values() for line in kernels.heads(sizes))
