"""A computation on a GPU recorded once and replayed: the same kernels in the same memory, without Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_WARMING = 2  # runs before the capture: libraries make their handles and workspaces, allocators their blocks


class CudaGraph(Generic[Result]):
    """``run`` as a CUDA graph over inputs of one set of shapes.

    What ``run`` returned lies in the graph's own memory and is overwritten by the next replay. It may neither wait for
    the device nor decide anything by what is computed there.

    Args:
        run: inputs -> result; every tensor of the result is made from them.
        inputs: tensors on one CUDA device; copied.

    Raises:
        RuntimeError: ``run`` does what a graph cannot hold.
    """

    def __init__(self, run: Callable[[dict[str, Tensor]], Result], inputs: Mapping[str, Tensor]):
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        self._graph = torch.cuda.CUDAGraph()
        device = next(iter(self._inputs.values())).device
        with torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARMING):
                    run(self._inputs)
            current.wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._result = run(self._inputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Result:
        """The result for other numbers in the same shapes, queued on the current stream."""
        for name, value in self._inputs.items():
            value.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        return self._result
