"""The median part of ``run.py last-layer``: medians of columns for right and wrong samples of each class.

One segment for each class and correctness, one sample in five wrong, rows in any order; that rows are picked out is in
every method's time, who belongs to which segment is not. The limit is one reading of the features: a sum over the same
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from common.comparison import Case, Method
from common.harness import compare, peak_of_call
from peers import medians as peers

SHAPES = [(1_199, 2_048, 2), (20_000, 2_048, 2), (20_000, 512, 10)]  # N, M, classes
HEAVY = (20_000, 2_048)  # whose memory is measured
QUICK_SHAPES = [(300, 64, 2), (1_000, 64, 3)]
PEERS = {
    "numpy-median": peers.numpy_median,
    "torch-median": peers.torch_median,
    "torch-sort": peers.torch_sort,
    "torch-kthvalue": peers.torch_kthvalue,
    "torch-quantile": peers.torch_quantile,
}
NOTES = {"torch-median": "the lower of the middle two"}


def make_segments(
    samples: int, width: int, classes: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Features after a ReLU ``[N, M]``, the rows in the order of their segments ``[N]``, and borders ``[S + 1]``."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(samples, width, generator=generator).add_(0.3).relu_().to(dtype)
    wrong = torch.rand(samples, generator=generator) < 0.2
    segments = 2 * torch.randint(classes, (samples,), generator=generator) + wrong
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), segments.bincount(minlength=2 * classes).cumsum(0)])
    return features.to(device), segments.argsort(stable=True).to(device), starts.to(device)


def spurge_medians(features: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The library's."""
    from spurge import ops

    return ops.segment_medians(features, order, starts)


def methods(features: Tensor, order: Tensor, starts: Tensor) -> dict[str, Method]:
    """Every method; numpy works on the CPU only."""
    rows = order.split(starts.diff().tolist())
    slow = ("torch-sort", "torch-quantile") if features.numel() > 1 << 25 else ()
    found = {"spurge": Method(partial(spurge_medians, features, order, starts))}
    for name, function in PEERS.items():
        if name != "numpy-median" or features.device.type == "cpu":
            found[name] = Method(partial(function, features, rows), once=name in slow, note=NOTES.get(name, ""))
    return found


def agreement(exact: Tensor, answer: Tensor) -> Mapping[str, tuple[float, str]]:
    """The largest difference, beside the largest median."""
    return {"difference": (float((answer - exact).abs().max() / exact.abs().max()), "relative")}


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every shape in float32, and in float16."""
    for samples, width, classes in QUICK_SHAPES if quick else SHAPES:
        for dtype in (torch.float32, torch.float16):
            features, order, starts = make_segments(samples, width, classes, dtype, device)
            label = str(dtype).removeprefix("torch.")
            rows = order.split(starts.diff().tolist())
            exact = peers.numpy_median(features.float().cpu(), [of.cpu() for of in rows]).to(device)
            words = features.view(torch.float32)  # torch sums float16 slowly; the bytes are the same
            read = compare({"read": words.sum}, repeats=7, sample_seconds=0.02, device=device)["read"].seconds
            size = features.numel() * features.element_size()
            found = methods(features, order, starts)
            peaks = () if quick or dtype == torch.float16 or (samples, width) != HEAVY else tuple(found)
            yield Case(
                f"medians, N={samples:,} M={width:,} {classes} classes {label}",
                found,
                partial(agreement, exact),
                {"limit": (read, f"one reading at {size / read / 1e9:.1f} GB/s")},
                ("medians", str(samples), str(width), str(classes)),
                peaks,
            )


def peak(rest: list[str]) -> int:
    """Bytes beyond the inputs at the peak of one call. For ``run.py child``: N M classes method."""
    methods(*make_segments(40, 8, 2, torch.float32, "cpu"))[rest[3]].call()
    return peak_of_call(methods(*make_segments(*map(int, rest[:3]), torch.float32, "cpu"))[rest[3]].call)
