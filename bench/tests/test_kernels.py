"""Each kernel beside eager torch (and torch.compile) as pytest-benchmark cases: ``pytest bench``.

Small arrays by default; ``--bench-size memory`` and ``--bench-compile`` ask for more. Bytes moved are in each case's
``extra_info``, so that saved results (``--benchmark-json``) can be turned into GB/s. Nothing is asserted about time.
"""

from __future__ import annotations

import pytest
import torch

from kernel_rates.kernels import compiled, peers
from kernel_rates.swarms import Kernels
from spurge.bench.case import MIB, SIZES
from spurge.bench.kernels import DTYPES, KERNELS

pytest.importorskip("pytest_benchmark")
CASES = [(name, dtype) for name in KERNELS for dtype in DTYPES[name]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def _skip_without(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")


def test_numpy_finds_the_same_medians():
    case = KERNELS["segment_medians"](MIB // 8, torch.float32, "cpu")
    more = peers(case, device="cpu", with_compile=False)
    assert set(more) == {"clone", "numpy"}
    assert torch.equal(more["numpy"](), case.calls["torch"](*case.inputs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["spurge", "torch", "torch.compile"])
@pytest.mark.parametrize("name, dtype", CASES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in CASES])
def test_kernel(benchmark, request, bench_size, name, dtype, method, device):
    _skip_without(device)
    if method == "torch.compile" and not request.config.getoption("--bench-compile"):
        pytest.skip("asked for with --bench-compile")
    torch.manual_seed(0)
    case = KERNELS[name](SIZES[device][bench_size] * MIB, dtype, device)
    function = compiled(case) if method == "torch.compile" else case.calls[method]

    def call():
        function(*case.inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} {device}"
    benchmark.extra_info["traffic_bytes"] = case.traffic
    benchmark.pedantic(call, rounds=20, iterations=5 if bench_size == "cache" else 1, warmup_rounds=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ["40x256", "128x4096"])
def test_swarm(benchmark, shape, device):
    _skip_without(device)
    particles, dimensions = map(int, shape.split("x"))
    swarm, fitness = Kernels(particles, dimensions, device), torch.rand(particles, device=device)

    def call():
        swarm.step(fitness)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"swarm {shape} {device}"
    benchmark.extra_info["elements"] = particles * dimensions
    benchmark.pedantic(call, rounds=20, iterations=2, warmup_rounds=2)
