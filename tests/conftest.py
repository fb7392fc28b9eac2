"""What all tests share: the device they run on, a seed, and a header that says what was tested."""

from __future__ import annotations

import os
import signal

import numpy
import pytest
import torch
import transformers

from spurge import _core

CUDA = torch.cuda.is_available() and _core.built_with_cuda
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

if WORKERS > 1:  # they share the cores, and so do the processes that tests start
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def pytest_report_header() -> list[str]:
    config = _core.build_config()
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return [
        f"spurge {config['version']} ({config['compiler']}, {config['isa_selected']}, CUDA {config['cuda']}), {cuda}",
        f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {numpy.__version__}",
    ]


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Ctrl-C raises also where the shell that started the tests ignores it, as it does for jobs in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)] if CUDA else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """CPU, and CUDA where there is a GPU and the build has kernels for it."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
