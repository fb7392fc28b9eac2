r"""The kernels as torch sees them: for each op its schema, its contract, its kernel and its public face.

* The schema and the *fake* kernel (shapes, dtypes, error messages) are the contract, which
  ``torch.compile`` and ``opcheck`` use.
* The kernel allocates the outputs and calls the compiled module ``_core``, which sees no torch and makes
  the same checks again: an eager call costs microseconds, and Python checks would treble them. CUDA kernels
  run on torch's current stream, and can be captured in a CUDA graph.
* On a device without kernels (another accelerator, or CUDA where the build has none) the op runs its
  float64 twin in :mod:`spurge.reference`, and says so once.

None of the ops is differentiable: autograd looks through them, and results do not require grad.

Letters: B examples, T tokens, H hidden, F neurons of a site, S nodes, R rows, P particles, n columns,
D dimensions, U units, G golden sets, Y labels.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spurge import _core, reference

_LIB = torch.library.Library("spurge", "DEF")
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# torch >= 2.10 hands C++ its tensors and its current stream; older ones go through __dlpack__, which
# refuses tensors that require grad, and the stream has to be passed.
_EXCHANGE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def _check(condition: bool, message: Callable[[], str]) -> None:
    torch._check_value(condition, message)


def _check_floating(name: str, x: Tensor) -> None:
    _check(
        x.dtype in _FLOATING,
        lambda: f"{name}: dtype must be float32, bfloat16, float16 or float64, got {x.dtype}",
    )


def _check_same(name: str, x: Tensor, other: str, y: Tensor) -> None:
    _check(
        x.shape == y.shape,
        lambda: f"{name} and {other} must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}",
    )
    _check(x.dtype == y.dtype, lambda: f"{name} and {other} must have the same dtype, got {x.dtype} and {y.dtype}")
    _check_device(name, x, other, y)


def _check_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    _check(
        x.device == y.device,
        lambda: f"{name} and {other} must be on the same device, got {x.device} and {y.device}",
    )


def _run(kernel: Callable[..., Any], *args: Any) -> Any:
    """Call a ``_core`` function on detached tensors, with the thread count and, for old torch, the stream."""
    if _EXCHANGE:
        return kernel(*args, torch.get_num_threads())
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    stream = None
    for a in args:
        if isinstance(a, Tensor) and a.is_cuda:
            stream = torch.cuda.current_stream(a.device).cuda_stream
            break
    return kernel(*args, torch.get_num_threads(), stream)


def _written(x: Tensor, write: Callable[[Tensor], None]) -> None:
    """Let ``write`` change ``x`` in place, through a contiguous copy where it has to be, and tell autograd."""
    if x.is_contiguous():
        write(x)
        torch.autograd.graph.increment_version(x)
    else:
        copy = x.contiguous()
        write(copy)
        x.copy_(copy)


def _check_place(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of what is to be written, the bare kernels know only the number of elements."""
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name}: must be {shape} of {dtype}, got {tuple(x.shape)} of {x.dtype}")


def _copied(to: Tensor, result: Tensor) -> None:
    to.copy_(result)


# The oldest GPU generation that machine code was built for ("80-real 90-real 120" -> 80).
_OLDEST_ARCH = min((int(a) for a in re.findall(r"\d+", _core.build_config()["cuda_archs"] or "")), default=0)


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= _OLDEST_ARCH


def _slow(name: str, device: torch.device) -> None:
    built = "" if _core.built_with_cuda else " (this build has no CUDA kernels; see `spurge doctor`)"
    warnings.warn(f"spurge::{name} has no kernel for {device}{built}: running the float64 reference", stacklevel=3)


def _register(
    schema: str, fake: Callable[..., Any], kernel: Callable[..., Any], twin: Callable[..., Any]
) -> Callable[..., Any]:
    """Define one op: ``fake`` for shapes, ``kernel`` for CPU (and CUDA where built), ``twin`` elsewhere."""
    name = schema.split("(", 1)[0]

    def elsewhere(*args: Any) -> Any:
        _slow(name, next(a.device for a in args if isinstance(a, Tensor)))
        return twin(*args)

    def on_cuda(*args: Any) -> Any:
        return kernel(*args) if _runs_kernels(args[0].device) else elsewhere(*args)

    _LIB.define(schema)
    _LIB.impl(name, kernel, "CPU")
    if _core.built_with_cuda:
        _LIB.impl(name, on_cuda, "CUDA")
    _LIB.impl(name, elsewhere, "CompositeExplicitAutograd")
    _LIB.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"spurge::{name}", fake, lib=_LIB)
    return getattr(torch.ops.spurge, name).default


def _numbers(values: Sequence[float] | Tensor) -> Sequence[float]:
    return values.tolist() if isinstance(values, Tensor) else values


# ---- gate: open_rows, gate_columns_ --------------------------------------------------------------


def _open_rows_fake(x: Tensor, u: Tensor, alphas: Sequence[float]) -> Tensor:
    _check_floating("x", x)
    _check(x.dim() >= 1, lambda: "x: must have at least 1 dimension [B, ...], got a scalar")
    _check_same("x", x, "u", u)
    return x.new_empty((len(alphas) * x.shape[0], *x.shape[1:]))


def _open_rows_kernel(x: Tensor, u: Tensor, alphas: Sequence[float]) -> Tensor:
    shape = x.shape
    out = x.new_empty(len(alphas) * shape[0], *shape[1:]) if shape else x.new_empty(0)
    _run(_core.open_rows, out, x.contiguous(), u.contiguous(), alphas)
    return out


def _open_rows_into_fake(rows: Tensor, x: Tensor, u: Tensor, alphas: Sequence[float]) -> None:
    want = _open_rows_fake(x, u, alphas)
    _check_same("rows", rows, "the opened rows", want)


def _open_rows_into_kernel(rows: Tensor, x: Tensor, u: Tensor, alphas: Sequence[float]) -> None:
    _check_place("rows", rows, (len(alphas) * x.shape[0], *x.shape[1:]) if x.dim() else (), x.dtype)
    x, u = x.contiguous(), u.contiguous()
    _written(rows, lambda out: _run(_core.open_rows, out, x, u, alphas))


_open_rows = _register(
    "open_rows(Tensor x, Tensor u, float[] alphas) -> Tensor",
    _open_rows_fake,
    _open_rows_kernel,
    lambda x, u, alphas: reference.open_rows(x, u, alphas).to(x.dtype),
)

_open_rows_ = _register(
    "open_rows_(Tensor(a!) rows, Tensor x, Tensor u, float[] alphas) -> ()",
    _open_rows_into_fake,
    _open_rows_into_kernel,
    lambda rows, x, u, alphas: _copied(rows, reference.open_rows(x, u, alphas)),
)


def open_rows(x: Tensor, u: Tensor, alphas: Sequence[float] | Tensor) -> Tensor:
    r"""The rows of all quadrature nodes at once, opened behind a down projection.

    .. math:: \mathrm{out}_{sB+b} = x_b + (\alpha_s - 1)\, u_b

    ``x`` holds the unedited rows and ``u`` the projection's output in them; a projection is linear, so the
    result is what ``x`` would be with the neurons scaled by ``alphas[s]``. Bitwise the same for any number
    of threads, any instruction set, and on the GPU. Not differentiable.

    Args:
        x: unedited rows, ``[B, ...]``, float32, bfloat16, float16 or float64.
        u: what the scaled part adds to them, same shape and dtype.
        alphas: the nodes, ``[S]``. A list, or a tensor (which is read: on a GPU that waits for it).

    Returns:
        ``[S*B, ...]``, node-major, in the dtype of ``x``.

    Raises:
        ValueError: ``x`` and ``u`` differ in shape, dtype or device, or a node is not finite.

    >>> open_rows(torch.tensor([[3.0]]), torch.tensor([[2.0]]), [0.0, 0.5, 1.0]).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    return _open_rows(x, u, _numbers(alphas))


def open_rows_(rows: Tensor, x: Tensor, u: Tensor, alphas: Sequence[float] | Tensor) -> Tensor:
    """:func:`open_rows` into memory that is there already: ``rows``, ``[S*B, ...]``, is written and returned.

    Worth it for large rows in a loop: fresh memory of tens of megabytes costs the CPU several times what the
    kernel does. ``rows`` may be a slice of a larger buffer, and must not share memory with ``x`` or ``u``.

    >>> open_rows_(torch.empty(2, 1), torch.tensor([[3.0]]), torch.tensor([[2.0]]), [0.0, 1.0]).flatten().tolist()
    [1.0, 3.0]
    """
    _open_rows_(rows, x, u, _numbers(alphas))
    return rows


def _gate_columns_fake(z: Tensor, columns: Tensor, gates: Tensor) -> None:
    _check_floating("z", z)
    _check(z.dim() == 3, lambda: f"z: must have 3 dimensions [R, T, F], got shape {tuple(z.shape)}")
    _check(columns.dim() == 1, lambda: f"columns: must have 1 dimension [n], got shape {tuple(columns.shape)}")
    _check(columns.dtype == torch.int64, lambda: f"columns: dtype must be int64, got {columns.dtype}")
    _check(gates.dtype == torch.float32, lambda: f"gates: dtype must be float32, got {gates.dtype}")
    _check(
        gates.dim() == 2 and gates.shape[1] == columns.shape[0],
        lambda: f"gates: shape must be [P, {columns.shape[0]}], got {tuple(gates.shape)}",
    )
    _check(
        gates.shape[0] >= 1 and z.shape[0] % gates.shape[0] == 0,
        lambda: f"gates: the {z.shape[0]} rows of z must be a multiple of its P = {gates.shape[0]} particles",
    )
    _check_device("z", z, "columns", columns)
    _check_device("z", z, "gates", gates)


def _gate_columns_kernel(z: Tensor, columns: Tensor, gates: Tensor) -> None:
    columns, gates = columns.contiguous(), gates.contiguous()
    _written(z, lambda rows: _run(_core.gate_columns, rows, columns, gates))


_gate_columns_ = _register(
    "gate_columns_(Tensor(a!) z, Tensor columns, Tensor gates) -> ()",
    _gate_columns_fake,
    _gate_columns_kernel,
    lambda z, columns, gates: _copied(z, reference.gate_columns(z, columns, gates)),
)


def gate_columns_(z: Tensor, columns: Tensor, gates: Tensor) -> Tensor:
    r"""Multiply chosen neurons by gates, in place, each group of rows by its own.

    .. math:: z_{pB+b,\,t,\,c_j} \leftarrow g_{pj}\; z_{pB+b,\,t,\,c_j}

    A gate of 1 leaves a neuron as it is, 0 erases it (0 times infinity is NaN, as in torch). Rows are
    grouped particle-major. Bitwise the same for any number of threads, any instruction set, and on the GPU.
    Not differentiable.

    Args:
        z: activations, ``[R, T, F]`` with ``R = P*B``; float32, bfloat16, float16 or float64. A
            non-contiguous ``z`` is changed through a copy.
        columns: the neurons, int64 ``[n]``, distinct, in any order.
        gates: float32 ``[P, n]``.

    Returns:
        ``z`` itself.

    Raises:
        ValueError: a shape or dtype does not fit; on the CPU also for a column outside ``[0, F)`` or named
            twice. (A CUDA kernel cannot look before it runs: the former stops the device, the latter is a
            data race.)

    >>> gate_columns_(torch.ones(2, 1, 3), torch.tensor([1]), torch.tensor([[0.0], [2.0]])).flatten().tolist()
    [1.0, 0.0, 1.0, 1.0, 2.0, 1.0]
    """
    _gate_columns_(z, columns, gates)
    return z


# ---- ig: node_sum, multiply_sum ------------------------------------------------------------------


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _node_sum_fake(grads: Tensor, weights: Sequence[float]) -> Tensor:
    nodes = len(weights)
    _check_floating("grads", grads)
    _check(nodes >= 1, lambda: "weights: need at least 1, got 0")
    _check(
        grads.dim() >= 1 and grads.shape[0] % nodes == 0,
        lambda: f"grads: its first dimension must be a multiple of the {nodes} weights, got shape {tuple(grads.shape)}",
    )
    return grads.new_empty((grads.shape[0] // nodes, *grads.shape[1:]), dtype=_sum_dtype(grads.dtype))


def _node_sum_kernel(grads: Tensor, weights: Sequence[float]) -> Tensor:
    shape, dtype = grads.shape, _sum_dtype(grads.dtype)
    out = grads.new_empty(shape[0] // max(len(weights), 1), *shape[1:], dtype=dtype) if shape else grads.new_empty(0)
    _run(_core.node_sum, out, grads.contiguous(), weights)
    return out


def _node_sum_into_fake(out: Tensor, grads: Tensor, weights: Sequence[float]) -> None:
    _check_same("out", out, "the sum", _node_sum_fake(grads, weights))


def _node_sum_into_kernel(out: Tensor, grads: Tensor, weights: Sequence[float]) -> None:
    shape = (grads.shape[0] // max(len(weights), 1), *grads.shape[1:]) if grads.dim() else ()
    _check_place("out", out, shape, _sum_dtype(grads.dtype))
    grads = grads.contiguous()
    _written(out, lambda into: _run(_core.node_sum, into, grads, weights))


_node_sum = _register(
    "node_sum(Tensor grads, float[] weights) -> Tensor",
    _node_sum_fake,
    _node_sum_kernel,
    lambda grads, weights: reference.node_sum(grads, weights).to(_sum_dtype(grads.dtype)),
)

_node_sum_ = _register(
    "node_sum_(Tensor(a!) out, Tensor grads, float[] weights) -> ()",
    _node_sum_into_fake,
    _node_sum_into_kernel,
    lambda out, grads, weights: _copied(out, reference.node_sum(grads, weights)),
)


def node_sum(grads: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    r"""Gradients of all quadrature nodes, summed with the nodes' weights.

    .. math:: \mathrm{out}_b = \sum_s w_s\, g_{sB+b}

    Reads each gradient once and adds in the order of the nodes, in float32 (float64 for float64). Bitwise the
    same for any number of threads, any instruction set, and on the GPU. Not differentiable.

    Args:
        grads: ``[S*B, ...]``, node-major; float32, bfloat16, float16 or float64.
        weights: ``[S]``. A list, or a tensor (which is read: on a GPU that waits for it).

    Returns:
        ``[B, ...]``, float32 (float64 for float64).

    Raises:
        ValueError: no weights, a weight that is not finite, or rows that they do not divide.

    >>> node_sum(torch.tensor([[1.0], [2.0]]), [0.5, 0.25]).tolist()
    [[1.0]]
    """
    return _node_sum(grads, _numbers(weights))


def node_sum_(out: Tensor, grads: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """:func:`node_sum` into memory that is there already: ``out``, ``[B, ...]``, is written and returned.

    Worth it for large gradients in a loop, as :func:`open_rows_` is; ``out`` must not share memory with ``grads``.

    >>> node_sum_(torch.empty(1, 1), torch.tensor([[1.0], [2.0]]), [0.5, 0.25]).tolist()
    [[1.0]]
    """
    _node_sum_(out, grads, _numbers(weights))
    return out


def _multiply_sum_fake(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    _check_floating("p", p)
    _check(p.dim() == 3, lambda: f"p: must have 3 dimensions [B, T, F], got shape {tuple(p.shape)}")
    _check_same("p", p, "z", z)
    if mask is not None:
        _check(mask.dtype in (torch.bool, torch.uint8), lambda: f"mask: dtype must be bool or uint8, got {mask.dtype}")
        _check(
            mask.shape == p.shape[:2],
            lambda: f"mask: shape must be {tuple(p.shape[:2])}, got {tuple(mask.shape)}",
        )
        _check_device("p", p, "mask", mask)
    return p.new_empty((p.shape[0], p.shape[2]), dtype=_sum_dtype(p.dtype))


def _multiply_sum_kernel(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    shape, dtype = p.shape, _sum_dtype(p.dtype)
    out = p.new_empty(shape[0], shape[2], dtype=dtype) if len(shape) == 3 else p.new_empty(0)
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8) if mask.dtype == torch.bool else mask.contiguous()
    _run(_core.multiply_sum, out, p.contiguous(), z.contiguous(), mask)
    return out


_multiply_sum = _register(
    "multiply_sum(Tensor p, Tensor z, Tensor? mask) -> Tensor",
    _multiply_sum_fake,
    _multiply_sum_kernel,
    lambda p, z, mask: reference.multiply_sum(p, z, mask).to(_sum_dtype(p.dtype)),
)


def multiply_sum(p: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Attribution of each neuron: gradient times activation, summed over the tokens.

    .. math:: \mathrm{out}_{bk} = \sum_t m_{bt}\; p_{btk}\, z_{btk}, \qquad p = \bar g\, W_2

    Accumulates in float32 (float64 for float64). On the CPU over the tokens in order: bitwise the same for
    any number of threads and any instruction set. On a GPU in a fixed order of its own: the same from run to
    run. Not differentiable.

    Args:
        p: gradient at each neuron, ``[B, T, F]``; float32, bfloat16, float16 or float64.
        z: activation of each neuron, same shape and dtype.
        mask: bool or uint8 ``[B, T]``; a token where it is 0 does not count, whatever it holds. None counts all.

    Returns:
        ``[B, F]``, float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    >>> multiply_sum(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [4.0]]])).tolist()
    [[11.0]]
    """
    return _multiply_sum(p, z, mask)


# ---- proximity -----------------------------------------------------------------------------------


def _proximity_fake(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(
        scores.dtype in (torch.float32, torch.float64),
        lambda: f"scores: dtype must be float32 or float64, got {scores.dtype}",
    )
    for name, x, dtype, letters in (
        ("scores", scores, scores.dtype, "[R, U]"),
        ("ids", ids, torch.int32, "[B, U]"),
        ("bitmap", bitmap, torch.int32, "[G, Y, words]"),
        ("labels", labels, torch.int64, "[B]"),
    ):
        rank = letters.count(",") + 1
        _check(x.dim() == rank, lambda: f"{name}: must be {letters}, got shape {tuple(x.shape)}")  # noqa: B023
        _check(x.dtype == dtype, lambda: f"{name}: dtype must be {dtype}, got {x.dtype}")  # noqa: B023
        _check_device("scores", scores, name, x)
    rows, units = scores.shape
    examples = ids.shape[0]
    _check(ids.shape[1] == units, lambda: f"ids: need {units} columns like scores, got {ids.shape[1]}")
    _check(labels.shape[0] == examples, lambda: f"labels: need {examples}, one per row of ids, got {labels.shape[0]}")
    _check(
        rows % examples == 0 if examples else rows == 0,
        lambda: f"scores: its {rows} rows must be a multiple of the {examples} rows of ids",
    )
    _check(k >= 1, lambda: f"k: must be at least 1, got {k}")
    _check(
        math.isfinite(sharpness) and sharpness > 0, lambda: f"sharpness: must be positive and finite, got {sharpness}"
    )
    sets = bitmap.shape[0]
    return scores.new_empty((rows, sets)), scores.new_empty((rows, sets)), scores.new_empty((rows, sets, units))


def _proximity_kernel(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = _proximity_fake(scores, ids, bitmap, labels, k, sharpness)
    _run(_core.proximity, *out, *(x.contiguous() for x in (scores, ids, bitmap, labels)), k, sharpness)
    return out


def _proximity_twin(scores: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.to(scores.dtype) for x in reference.proximity(scores, *rest))


_proximity = _register(
    "proximity(Tensor scores, Tensor ids, Tensor bitmap, Tensor labels, int k, float sharpness)"
    " -> (Tensor, Tensor, Tensor)",
    _proximity_fake,
    _proximity_kernel,
    _proximity_twin,
)


def proximity(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float = 0.25
) -> tuple[Tensor, Tensor, Tensor]:
    r"""How near the best-scored units of each row are to golden sets (MacU Eq. 6), hard and soft.

    .. math::
        \mathrm{hard} = \frac{|C\cap G|}{|C|} + \frac{1}{|C\cap G|}\sum_{t\in C\cap G} a_t, \qquad
        \mathrm{soft} = \frac{\sum_t m_t g_t}{\sum_t m_t} + \frac{\sum_t m_t g_t a_t}{\sum_t m_t g_t + 10^{-6}}

    ``C`` holds the ``k`` best units (all where there are no more; equals by the smaller index), and the hard
    second term is 0 where the intersection is empty. ``g_t`` is 1 for units in the set, and

    .. math::
        m_t = \sigma\big((a_t - \tau)/T\big), \qquad T = \max\big(\mathrm{sharpness}\cdot\mathrm{std}(a),\;
        10^{-3}\,\mathrm{mean}|a|\big)

    with :math:`\tau` midway between the k-th and the (k+1)-th score, or :math:`\min a - T` in rows of at most
    ``k`` units. Standard deviation and means are over the row's units, not its padding. A unit counts as often
    as it occurs. Computed in float64; bitwise the same for any number of threads and any instruction set, and
    from run to run on a GPU. Not differentiable: :func:`soft_proximity` is.

    Args:
        scores: token scores of the units, ``[R, U]``, float32 or float64. Row ``r`` belongs to example ``r % B``.
        ids: the units' vocabulary numbers, int32 ``[B, U]``; -1 is padding, whatever its score.
        bitmap: the golden sets, int32 ``[G, Y, ceil(V/32)]``: unit ``v`` is in set ``g`` of label ``y`` if bit
            ``v % 32`` of ``bitmap[g, y, v // 32]`` is set. Units beyond the bitmap are in no set.
        labels: int64 ``[B]``, the label whose sets count for an example.
        k: units that count as best, at least 1.
        sharpness: how soft the soft one is; the smaller, the nearer to the hard one.

    Returns:
        ``hard [R, G]``, ``soft [R, G]``, both in [0, 2] for scores that sum to 1, and ``grad [R, G, U]``, the
        derivative of ``soft`` by the scores with tau and T held constant (0 at padding). A row without units
        gives 0; a row with a score that is NaN or infinite gives NaN.

    Raises:
        ValueError: a shape, dtype, ``k`` or ``sharpness`` does not fit; on the CPU also for a label outside
            ``[0, Y)`` (a CUDA kernel cannot look before it runs, and gives NaN).

    >>> scores, ids = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[4, 0, 1]], dtype=torch.int32)
    >>> bitmap = torch.tensor([[[0b10011]]], dtype=torch.int32)  # one set, one label: units 0, 1 and 4
    >>> hard, soft, grad = proximity(scores, ids, bitmap, torch.tensor([0]), k=2)
    >>> hard.tolist()  # both of the best two are in the set: 1 + mean(0.5, 0.3)
    [[1.399999976158142]]
    """
    return _proximity(scores, ids, bitmap, labels, k, sharpness)


class _SoftProximity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, *rest: Any) -> Tensor:
        _, soft, grad = _proximity(scores, *rest)
        ctx.save_for_backward(grad)
        return soft

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return torch.einsum("rg,rgu->ru", outer, grad), None, None, None, None, None


def soft_proximity(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float = 0.25
) -> Tensor:
    """The soft proximity of :func:`proximity`, ``[R, G]``, differentiable once by ``scores``.

    Arguments, errors and the formula as there; tau and T do not take part in the derivative.

    >>> scores = torch.tensor([[0.5, 0.3, 0.2]], requires_grad=True)
    >>> ids, bitmap = torch.tensor([[4, 0, 1]], dtype=torch.int32), torch.tensor([[[16]]], dtype=torch.int32)
    >>> soft_proximity(scores, ids, bitmap, torch.tensor([0]), k=1).sum().backward()
    >>> bool(scores.grad[0, 0] > 0 and scores.grad[0, 1] < 0)  # unit 4 is in the set, unit 0 pushes it out
    True
    """
    return _SoftProximity.apply(scores, ids, bitmap, labels, k, sharpness)


# ---- swarm: swarm_step_, swarm_best_ -------------------------------------------------------------


def _check_swarm(**tensors: Tensor) -> None:
    """All float32 on one device; the first is [P, D] and gives the shape of all but leader and fitness."""
    (first, lead), *others = tensors.items()
    _check(lead.dim() == 2, lambda: f"{first}: must have 2 dimensions [P, D], got shape {tuple(lead.shape)}")
    particles, dimensions = lead.shape
    _check(lead.dtype == torch.float32, lambda: f"{first}: dtype must be float32, got {lead.dtype}")
    for name, x in others:
        want = {"leader": (dimensions,), "fitness": (particles,), "best_fitness": (particles,)}.get(name, lead.shape)
        _check(x.shape == want, lambda: f"{name}: shape must be {tuple(want)}, got {tuple(x.shape)}")  # noqa: B023
        _check(x.dtype == torch.float32, lambda: f"{name}: dtype must be float32, got {x.dtype}")  # noqa: B023
        _check_device(first, lead, name, x)


def _swarm_step_fake(
    position: Tensor,
    velocity: Tensor,
    best: Tensor,
    leader: Tensor,
    inertia: float,
    cognitive: float,
    social: float,
    low: float,
    high: float,
    max_velocity: float,
    seed: int,
    iteration: int,
) -> None:
    _check_swarm(position=position, velocity=velocity, best=best, leader=leader)
    numbers = {"inertia": inertia, "cognitive": cognitive, "social": social, "low": low, "high": high}
    for name, value in numbers.items():
        _check(math.isfinite(value), lambda: f"{name}: must be finite, got {value}")  # noqa: B023
    _check(low < high, lambda: f"low: must be below high = {high}, got {low}")
    _check(max_velocity > 0, lambda: f"max_velocity: must be positive, got {max_velocity}")
    _check(0 <= seed < 2**63, lambda: f"seed: must lie in [0, 2^63), got {seed}")
    _check(0 <= iteration < 2**32, lambda: f"iteration: must lie in [0, 2^32), got {iteration}")


def _swarm_step_kernel(position: Tensor, velocity: Tensor, best: Tensor, leader: Tensor, *numbers: Any) -> None:
    best, leader = best.contiguous(), leader.contiguous()
    _written(position, lambda x: _written(velocity, lambda v: _run(_core.swarm_step, x, v, best, leader, *numbers)))


def _swarm_step_twin(position: Tensor, velocity: Tensor, *rest: Any) -> None:
    moved, speed = reference.swarm_step(position, velocity, *rest)
    position.copy_(moved)
    velocity.copy_(speed)


_swarm_step_ = _register(
    "swarm_step_(Tensor(a!) position, Tensor(b!) velocity, Tensor best, Tensor leader, float inertia,"
    " float cognitive, float social, float low, float high, float max_velocity, int seed, int iteration) -> ()",
    _swarm_step_fake,
    _swarm_step_kernel,
    _swarm_step_twin,
)


def swarm_step_(
    position: Tensor,
    velocity: Tensor,
    best: Tensor,
    leader: Tensor,
    *,
    inertia: float,
    cognitive: float,
    social: float,
    low: float,
    high: float,
    max_velocity: float,
    seed: int,
    iteration: int,
) -> None:
    r"""Move a particle swarm by one iteration, in place (MacU Eq. 8 and 9).

    .. math::
        v \leftarrow \mathrm{clip}\big(w v + c_1 r_1 (p - x) + c_2 r_2 (g - x),\; \pm v_{\max}\big), \qquad
        x \leftarrow \mathrm{clip}(x + v,\; [\mathrm{low}, \mathrm{high}])

    Where ``x`` met a wall, ``v`` changes its sign. ``r1`` and ``r2`` are new for each particle and dimension:
    24 bits of Philox-4x32-10 with ``seed`` as the key, and particle, dimension and ``iteration`` as the counter.
    So they depend on nothing else, and a swarm is bitwise the same for any number of threads, any instruction
    set, and on the GPU (unless the process flushes denormals to zero). Not differentiable.

    Args:
        position: x, float32 ``[P, D]``, changed; through a copy where it is not contiguous.
        velocity: v, float32 ``[P, D]``, changed; likewise.
        best: p, each particle's best position so far, float32 ``[P, D]``; no memory shared with ``position``.
        leader: g, the best position of all, float32 ``[D]``.
        inertia: w.
        cognitive: c1.
        social: c2.
        low, high: the box, the same in each dimension.
        max_velocity: largest change of a coordinate in one iteration, in its units; infinity is allowed.
        seed: in [0, 2^63).
        iteration: in [0, 2^32); the same number draws the same random numbers.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.

    >>> x, v = torch.zeros(2, 3), torch.zeros(2, 3)
    >>> swarm_step_(x, v, torch.ones(2, 3), torch.ones(3), inertia=0.5, cognitive=1.5, social=1.5,
    ...             low=-1.0, high=1.0, max_velocity=0.5, seed=0, iteration=1)
    >>> bool((x > 0).all() and (x <= 0.5).all() and torch.equal(x, v))
    True
    """
    _swarm_step_(position, velocity, best, leader, inertia, cognitive, social, low, high, max_velocity, seed, iteration)


def _swarm_best_fake(best: Tensor, best_fitness: Tensor, position: Tensor, fitness: Tensor) -> Tensor:
    _check_swarm(best=best, best_fitness=best_fitness, position=position, fitness=fitness)
    _check(best.shape[0] >= 1, lambda: "best: need at least 1 particle, got 0")
    return best.new_empty((), dtype=torch.int64)


def _swarm_best_kernel(best: Tensor, best_fitness: Tensor, position: Tensor, fitness: Tensor) -> Tensor:
    leader = best.new_empty((), dtype=torch.int64)
    position, fitness = position.contiguous(), fitness.contiguous()
    _written(
        best,
        lambda b: _written(best_fitness, lambda f: _run(_core.swarm_best, leader, b, f, position, fitness)),
    )
    return leader


def _swarm_best_twin(best: Tensor, best_fitness: Tensor, position: Tensor, fitness: Tensor) -> Tensor:
    places, values, leader = reference.swarm_best(best, best_fitness, position, fitness)
    best.copy_(places)
    best_fitness.copy_(values)
    return leader


_swarm_best_ = _register(
    "swarm_best_(Tensor(a!) best, Tensor(b!) best_fitness, Tensor position, Tensor fitness) -> Tensor",
    _swarm_best_fake,
    _swarm_best_kernel,
    _swarm_best_twin,
)


def swarm_best_(best: Tensor, best_fitness: Tensor, position: Tensor, fitness: Tensor) -> Tensor:
    r"""Remember each particle's best position, in place, and find the leader; fitness is maximised.

    .. math:: p_i \leftarrow x_i \text{ where } F(x_i) > F(p_i), \qquad g = p_j,\; j = \arg\max_i F(p_i)

    NaN never wins; among equals the smaller index leads. Bitwise the same everywhere. Not differentiable.

    Args:
        best: p, float32 ``[P, D]``, changed.
        best_fitness: F(p), float32 ``[P]``, changed; begin with minus infinity.
        position: x, float32 ``[P, D]``.
        fitness: F(x), float32 ``[P]``.

    Returns:
        j, int64, a tensor without dimensions: nothing waits for the GPU. 0 if no fitness has ever won.

    Raises:
        ValueError: a shape, dtype or device does not fit, or there is no particle.

    >>> best, fitness = torch.zeros(3, 1), torch.full((3,), -torch.inf)
    >>> swarm_best_(best, fitness, torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0.5, torch.nan, 0.7])).item()
    2
    >>> best.flatten().tolist()
    [1.0, 0.0, 3.0]
    """
    return _swarm_best_(best, best_fitness, position, fitness)
