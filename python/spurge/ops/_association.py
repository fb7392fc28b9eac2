"""``associate_``: how strongly each weight of a linear layer belongs to each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spurge import _core, reference
from spurge.ops._registry import check, check_device, check_floating, register, run, sum_dtype, workspace


def _fake(
    sums: Tensor,
    logs: Tensor,
    carry: Tensor,
    picked: Tensor,
    activations: Tensor,
    features: Tensor,
    gradients: Tensor,
    starts: Tensor,
    classes: Tensor,
    scales: Tensor,
    target: int,
    relu: bool,
    resumed: bool,
    unfinished: bool,
) -> None:
    check_floating("features", features)
    twos = {
        "features": (features, "[N, M]"),
        "gradients": (gradients, "[N, O]"),
        "activations": (activations, "[C, M]"),
    }
    for name, (x, letters) in twos.items():
        check(x.dim() == 2, lambda: f"{name}: must have 2 dimensions {letters}, got shape {tuple(x.shape)}")  # noqa: B023
    check(classes.dim() == 1, lambda: f"classes: must have 1 dimensions [S], got shape {tuple(classes.shape)}")
    (samples, width), outputs, segments, labels = features.shape, gradients.shape[1], len(classes), len(activations)
    carries = resumed or unfinished
    edges, f64, i64 = (outputs, width), torch.float64, torch.int64
    wanted = [
        ("gradients", gradients, (samples, outputs), sum_dtype(features.dtype)),
        ("starts", starts, (segments + 1,), i64),
        ("classes", classes, (segments,), i64),
        ("scales", scales, (segments,), f64),
        ("activations", activations, (labels, width), f64),
        ("sums", sums, edges, f64),
        ("logs", logs, edges, f64),
        ("picked", picked, edges, torch.float32),
        ("carry", carry, edges if carries or carry.numel() else tuple(carry.shape), f64),
    ]
    for name, x, shape, dtype in wanted:
        check(tuple(x.shape) == shape, lambda: f"{name}: shape must be {shape}, got {tuple(x.shape)}")  # noqa: B023
        check(x.dtype == dtype, lambda: f"{name}: dtype must be {str(dtype)[6:]}, got {str(x.dtype)[6:]}")  # noqa: B023
        check_device("features", features, name, x)
    check(-1 <= target < labels, lambda: f"target: expected -1 or a class below {labels}, got {target}")
    check(
        not carries or segments > 0,
        lambda: "classes: need at least 1 where a segment is resumed or unfinished, got 0",
    )


_CHANGED, _READ = slice(0, 5), slice(5, 10)  # of the arguments


def _kernel(*arguments: Any) -> None:
    changed = arguments[_CHANGED]
    results = [x.contiguous() for x in changed]
    read = [x.contiguous() for x in arguments[_READ]]
    features, gradients = read[:2]
    room = workspace(features, _core.associate_workspace, *features.shape, *gradients.shape[-1:])
    run(_core.associate, *results, *read, *arguments[_READ.stop :], room)
    for x, result in zip(changed, results, strict=True):
        if result is x:
            torch.autograd.graph.increment_version(x)
        else:
            x.copy_(result)


def _twin(*arguments: Any) -> None:
    settings = dict(zip(("target", "relu", "resumed", "unfinished"), arguments[_READ.stop :], strict=True))
    results = reference.associate(*arguments[: _READ.stop], **settings)
    for x, result in zip(arguments[_CHANGED], results, strict=True):
        x.copy_(result)


_associate_ = register(
    "associate_(Tensor(a!) sums, Tensor(b!) logs, Tensor(c!) carry, Tensor(d!) picked, Tensor(e!) activations,"
    " Tensor features, Tensor gradients, Tensor starts, Tensor classes, Tensor scales, int target, bool relu,"
    " bool resumed, bool unfinished) -> ()",
    _fake,
    _kernel,
    _twin,
)


def associate_(
    sums: Tensor,
    logs: Tensor,
    carry: Tensor,
    picked: Tensor,
    activations: Tensor,
    features: Tensor,
    gradients: Tensor,
    starts: Tensor,
    classes: Tensor,
    scales: Tensor,
    *,
    target: int = -1,
    relu: bool = False,
    resumed: bool = False,
    unfinished: bool = False,
) -> None:
    r"""Add one block of samples, sorted by class, to the class-wise sums behind FCR's scores (FCR Eq. 3 to 5).

    .. math::
        G_s[o, m] = \mathrm{scale}_s \sum_{n \in s} |g_{no}|\,|x_{nm}|, \qquad
        \mathrm{sums} \mathrel{+}= G_s, \quad \mathrm{logs} \mathrel{+}= G_s \log G_s, \quad
        A_{c_s} \mathrel{+}= \mathrm{scale}_s \sum_{n \in s} |x_n|

    The gradient of the weight from neuron m to output o of a linear layer is :math:`g_o x_m`, so G_s is class s's sum
    of its magnitudes. After all blocks, its entropy over the classes is ``log(sums) - logs / sums``: the numbers for
    all classes never exist at once. Segments are runs of one class; one that spans blocks is handed on in ``carry``.

    Multiplies and adds short sums in float32 (float64 for float64), adds those up in float64. On the CPU bitwise the
    same for any number of threads, but not on every instruction set: here a fused multiply-add is worth its other last
    bits. On a GPU the same from run to run. Products below 1.2e-38 may count as 0. From float32 sums the entropy is
    good to about ``2e-7 * (1 + abs(log(sums)))``, however small it is. Not differentiable.

    Args:
        sums, logs: float64 ``[O, M]``, changed; begin with zeros. ``logs`` takes 0 log 0 for 0.
        carry: float64 ``[O, M]``, changed: the unscaled sum of an unfinished segment; ``[0]`` where there is none.
        picked: float32 ``[O, M]``, changed: G of the class ``target``; with target -1, in each row the G of the row's
            own class. Only segments that end in this block are written.
        activations: float64 ``[C, M]``, changed; each block adds its share, also to segments that go on.
        features: x, ``[N, M]``; float32, bfloat16, float16 or float64.
        gradients: g, the gradient by each output, ``[N, O]``; float32 (float64 with float64 features).
        starts: int64 ``[S + 1]``, the segments' borders, ascending from 0 to N.
        classes: int64 ``[S]``, the class of each segment; distinct, below C. Those that are no row are not picked.
        scales: float64 ``[S]``: one over the class's size for means, 1 for sums.
        target: the class to pick, or -1.
        relu: activations count the positive part of x instead of its magnitude.
        resumed: the first segment began in the block before.
        unfinished: the last segment goes on in the next block.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; on the CPU also for borders that do not ascend from 0
            to N and for classes out of range or named twice (a CUDA kernel cannot look before it runs: for borders and
            classes out of range it leaves NaN in all that is changed).

    >>> sums, logs, carry = (torch.zeros(2, 1, dtype=torch.float64) for _ in range(3))
    >>> picked, activations = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.float64)
    >>> associate_(sums, logs, carry, picked, activations, torch.tensor([[1.0], [3.0], [2.0]]),
    ...            torch.tensor([[-0.5, 0.5], [-0.5, 0.5], [0.25, -0.25]]), torch.tensor([0, 2, 3]),
    ...            torch.tensor([0, 1]), torch.tensor([0.5, 1.0], dtype=torch.float64))
    >>> sums.flatten().tolist(), picked.flatten().tolist(), activations.flatten().tolist()
    ([1.5, 1.5], [1.0, 0.5], [2.0, 2.0])
    """
    _associate_(
        sums, logs, carry, picked, activations, features, gradients, starts, classes, scales,
        target, relu, resumed, unfinished,
    )  # fmt: skip
