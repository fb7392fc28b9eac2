"""Parameters that may be written to in place: what kind they are, who else uses them, and their exact bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOATS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""Types of plain weights, and the integers of the same size that hold their bits."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float tensors of one type are equal bit for bit; devices may differ."""
    bits = FLOATS[a.dtype]
    return torch.equal(a.contiguous().view(bits), b.to(a.device).contiguous().view(bits))


def oddity(parameter: Tensor | None) -> str | None:
    """What keeps a parameter from being a plain float tensor (quantised, wrapped, computed), or None."""
    if parameter is None:
        return "computed"
    if type(parameter) in (nn.Parameter, Tensor) and parameter.dtype in FLOATS:
        return None
    return f"{type(parameter).__name__} of {parameter.dtype}"


def sharer(model: nn.Module, owner: nn.Module, key: str) -> str | None:
    """Name of another parameter or buffer of ``model`` in the memory of ``owner``'s parameter ``key``, or None."""
    parameter = owner._parameters[key]
    assert parameter is not None
    start, end = _span(parameter)
    for path, module in model.named_modules():
        for name, other in (*module._parameters.items(), *module._buffers.items()):
            if other is None or other.device != parameter.device or (module is owner and name == key):
                continue
            first, last = (0, 0) if other.layout != torch.strided else _span(other)
            if first < end and start < last:
                return f"{path}.{name}".lstrip(".")
    return None


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a dense tensor and the one after its last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
