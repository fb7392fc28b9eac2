from __future__ import annotations

import pytest
import torch

from helpers import emulated
from spurge import _core

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu"]
if emulated.AVAILABLE:
    DEVICES.append("emulated")
if torch.cuda.is_available() and _core.built_with_cuda:
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(params=DTYPES, ids=lambda t: str(t).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """CPU; the CUDA kernels as the host runs them, where they were built so; and CUDA."""
    if request.param != "emulated":
        return torch.device(request.param)
    emulated.run_them(monkeypatch)
    return torch.device("cpu")
