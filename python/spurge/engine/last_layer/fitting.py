"""A new last layer on fixed features: exact by L-BFGS or proximal gradient, or by minibatches as the papers do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spurge.engine.base.budgets import parse_bytes
from spurge.engine.base.checks import checked_labels, checked_values, choice, integer, number, warn
from spurge.engine.base.gradients import without_gradients
from spurge.engine.last_layer.l1 import minimise_l1
from spurge.engine.last_layer.sgd import Sgd, descend
from spurge.engine.last_layer.softmax import ScaledFeatures, Softmax, deviations, minimise
from spurge.engine.models.heads import Head

__all__ = ["Sgd", "Solver", "balanced", "fit_head"]

Solver = Literal["lbfgs", "sgd"]


@without_gradients
def fit_head(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    weights: Tensor | Literal["class"] | None = "class",
    gates: Tensor | None = None,
    l2: float = 1e-4,
    l1: float = 0.0,
    bias: bool = True,
    start: Head | None = None,
    standardise: bool | Tensor = False,
    solver: Solver = "lbfgs",
    sgd: Sgd | None = None,
    tolerance: float = 1e-6,
    steps: int = 5000,
    seed: int = 0,
    memory: str | int | None = None,
    watch: Callable[[int, Head], None] | None = None,
    progress: bool = False,
) -> Head:
    r"""The linear layer that minimises weighted cross-entropy on fixed features.

    .. math::
        \min_{V, b}\; \sum_n s_n \,\mathrm{CE}\bigl(y_n, (g \circ V) x_n + b\bigr)
        + \tfrac{\lambda_2}{2} \|V\|_2^2 + \lambda_1 \|V\|_1, \qquad \sum_n s_n = 1

    The layer is :math:`g \circ V` and b; the bias is not penalised. ``"lbfgs"`` is deterministic and goes on to the
    minimum (by proximal gradient where ``l1`` is above 0). With two classes that is the logistic regression which
    other libraries call ``C = 2 / (l2 N)``, or ``C = 1 / (l1 N)`` with L1. ``"sgd"`` draws minibatches by ``s`` and
    applies ``l2`` as weight decay, to the bias too, as ``torch.optim.SGD``.

    Args:
        features: x, floating ``[N, M]``; the work is done on their device, the exact one in float64.
        labels: y, whole numbers ``[N]``.
        classes: O, rows of the layer.
        weights: s, at least 0, ``[N]``, scaled to sum to 1; ``"class"``: every class that occurs has the same sum;
            None: every row has the same. :func:`balanced` makes the weights of balanced groups.
        gates: g, ``[M]`` or ``[O, M]``: 0 keeps a weight at 0, 1 leaves it free; in between it is free and costs more.
        l2, l1: of the penalties.
        bias: whether there is one, without ``start``.
        start: V and b to begin with (a bias if it has one), and the place in a model that the result keeps. By default
            zeros; for ``"sgd"`` uniform numbers within :math:`1/\sqrt M` of 0.
        standardise: centre columns and divide by their standard deviation first, so that the penalty falls on all
            alike; the result reads plain features. Features ``[N', M]``: divide by the deviation in these rows.
        solver: ``"lbfgs"`` or ``"sgd"``.
        sgd: settings of ``"sgd"``.
        tolerance: of ``"lbfgs"``: greatest slope left, a column's over the root of its spread (no unit).
        steps: of ``"lbfgs"``, at most.
        seed: of ``"sgd"``.
        memory: budget of a float64 copy, ``"256MiB"`` or bytes; where it does not fit, blocks are widened one by one.
        watch: called after each epoch of ``"sgd"`` with its number, from 1, and the layer so far.
        progress: show a progress bar.

    Warns:
        UserWarning: the slope is still above ``tolerance`` after all steps.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that do not fit, fewer than two classes among the labels, a label or number out of range,
            features that are not finite, or settings that do not go together.
    """
    l2, l1 = number("l2", l2, 0), number("l1", l1, 0)
    tolerance, steps, seed = number("tolerance", tolerance, 0), integer("steps", steps, 1), integer("seed", seed, 0)
    if memory is not None:
        parse_bytes(memory)
    _check_solver(solver, l1, sgd, watch)
    values = checked_values("features", features)
    labels = checked_labels("labels", labels, len(values), integer("classes", classes, 2)).to(values.device)
    share = _shares(weights, labels)
    mapping = _Mapping.of(values, gates, classes, start, bias, standardise)
    values = values if bool(mapping.free.all()) else values[:, mapping.free]
    if solver == "sgd":
        if standardise is not False:
            values, mapping = _standardised(values, share, mapping)
        return _fit_sgd(values, labels, share, mapping, l2, sgd or Sgd(), seed, watch, progress)
    return _fit_exact(values, labels, share, mapping, l2, l1, tolerance, steps, memory, progress)


def _check_solver(solver: Any, l1: float, sgd: Any, watch: Any) -> None:
    """Refuses settings that the solver does not have."""
    choice("solver", solver, get_args(Solver))
    if solver == "sgd" and l1:
        raise ValueError("l1: only solver='lbfgs' has it")
    if solver == "lbfgs" and (sgd is not None or watch is not None):
        raise ValueError("sgd, watch: solver='lbfgs' has no epochs")


def _standardised(values: Tensor, share: Tensor, mapping: _Mapping) -> tuple[Tensor, _Mapping]:
    """Centred values over their scale, and the mapping that knows the centre."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    mapping = replace(mapping, centre=share @ values.double())
    return (values - mapping.centre.to(values)) / mapping.scale.to(values), mapping


def _fit_sgd(
    values: Tensor,
    labels: Tensor,
    share: Tensor,
    mapping: _Mapping,
    l2: float,
    settings: Sgd,
    seed: int,
    watch: Callable[[int, Head], None] | None,
    progress: bool,
) -> Head:
    """The layer after all epochs."""
    generator = torch.Generator().manual_seed(seed)
    v, b = mapping.initial() if mapping.start is not None else mapping.uniform(generator)
    found = descend(
        values,
        labels,
        share,
        mapping.gates,
        v,
        b if mapping.biased else None,
        decay=l2,
        settings=settings,
        generator=generator,
        watch=lambda epoch, v, b: None if watch is None else watch(epoch, mapping.head(v, b)),
        progress=progress,
    )
    return mapping.head(*found)


def _fit_exact(
    values: Tensor,
    labels: Tensor,
    share: Tensor,
    mapping: _Mapping,
    l2: float,
    l1: float,
    tolerance: float,
    steps: int,
    memory: str | int | None,
    progress: bool,
) -> Head:
    """The layer where the slope is within ``tolerance``, or, with a warning, that after all steps."""
    rows = ScaledFeatures(values, share, centred=mapping.biased, scale=mapping.scale, memory=memory)
    mapping = replace(mapping, centre=rows.centre)
    problem = Softmax(rows, labels, share, mapping.gates, l2, mapping.biased)
    how: dict[str, Any] = {"tolerance": tolerance, "steps": steps, "progress": progress}
    end = minimise_l1(problem, l1, *mapping.initial(), **how) if l1 else minimise(problem, *mapping.initial(), **how)
    if end.slope > tolerance:
        warn(
            f"fit_head: not at the minimum after {end.steps} steps: the slope is {end.slope:.2g}, tolerance "
            f"{tolerance:.2g}; raise l2, or steps"
        )
    return mapping.head(end.weight, end.bias)


def balanced(groups: Tensor) -> Tensor:
    """Weights that give every number that occurs in whole ``groups [N]`` the same sum; float64 ``[N]``, sum 1.

    Raises:
        TypeError: no tensor of whole numbers.
        ValueError: none, or one below 0.
    """
    groups = checked_labels("groups", groups, groups.numel() if isinstance(groups, Tensor) else 0)
    counts = groups.bincount()
    return 1.0 / (counts[groups].double() * int((counts > 0).sum()))


@dataclass(frozen=True, eq=False)
class _Mapping:
    """From V and b of the search, on centred and scaled columns, to the layer on plain features, and back."""

    free: Tensor  # bool [M], the columns that are searched, m of them
    gates: Tensor  # [1, m] or [O, m]
    scale: Tensor  # [m]
    centre: Tensor  # [m]
    weight: Tensor  # [O, M], V on plain features to begin with
    bias: Tensor  # [O]
    biased: bool
    start: Head | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        values: Tensor,
        gates: Tensor | None,
        classes: int,
        start: Head | None,
        bias: bool,
        standardise: bool | Tensor,
    ) -> _Mapping:
        """Of checked values, the rest as :func:`fit_head` takes it; nothing is centred yet."""
        width = values.shape[1]
        if start is not None and not isinstance(start, Head):
            raise TypeError(f"start: expected a Head, got {type(start).__name__}")
        if start is not None and (start.outputs, start.width) != (classes, width):
            raise ValueError(f"start: expected {width} features to {classes} outputs, got {start!r}")
        factor = _checked_gates(gates, classes, width).to(values.device)
        free = (factor != 0).any(0)
        biased = bias if start is None else start.bias is not None
        if not biased and standardise is not False:
            raise ValueError("standardise: centred columns need a bias, and there is none")
        scale = torch.ones_like(factor[0, free])
        if isinstance(standardise, Tensor):
            scale = deviations(checked_values("standardise", standardise, width)[:, free.to(standardise.device)]).to(
                scale
            )
        elif standardise:
            scale = deviations(values[:, free])
        weight, shift = factor.new_zeros(classes, width), factor.new_zeros(classes)
        if start is not None:
            weight += start.weight.to(weight)
            shift += 0 if start.bias is None else start.bias.to(shift)
        dtype = torch.promote_types(values.dtype, torch.float32) if start is None else start.weight.dtype
        return cls(free, factor[:, free], scale, torch.zeros_like(scale), weight, shift, biased, start, dtype)

    def uniform(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """V and b as ``nn.Linear`` begins: uniform within 1 / sqrt(M) of 0."""
        limit = self.weight.shape[1] ** -0.5
        draws = [torch.empty(p.shape).uniform_(-limit, limit, generator=generator) for p in (self.weight, self.bias)]
        v, b = (draw.to(self.weight) for draw in draws)
        return torch.where(self.gates != 0, v[:, self.free], 0.0), b

    def initial(self) -> tuple[Tensor, Tensor]:
        """V and b of the search to begin with; closed weights are 0."""
        v = torch.where(self.gates != 0, self.weight[:, self.free] * self.scale, 0.0)
        return v, self.bias + (self.gates * v / self.scale) @ self.centre

    def head(self, v: Tensor, b: Tensor | None) -> Head:
        """The layer on plain features."""
        inner = self.gates * v.double() / self.scale
        weight = torch.zeros_like(self.weight)
        weight[:, self.free] = inner
        shift = b.double() - inner @ self.centre if self.biased and b is not None else None
        bias = None if shift is None else shift.to(self.dtype)
        if self.start is None:
            return Head(weight.to(self.dtype), bias)
        return self.start.with_(weight=weight.to(self.dtype), bias=bias)


def _shares(weights: Any, labels: Tensor) -> Tensor:
    """Weights of the rows, float64 ``[N]`` with sum 1, on the labels' device."""
    if isinstance(weights, str) and weights == "class":
        share = balanced(labels)
    elif weights is None:
        share = torch.full((len(labels),), 1 / len(labels), dtype=torch.float64, device=labels.device)
    else:
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights: expected a tensor [N], 'class' or None, got {weights!r}")
        if weights.shape != labels.shape:
            raise ValueError(f"weights: expected shape {tuple(labels.shape)}, got {tuple(weights.shape)}")
        share = weights.detach().to(labels.device, torch.float64)
        wrong = ~(share.isfinite() & (share >= 0))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"weights: expected finite numbers of at least 0, got {float(share[row])} at row {row}")
        total = share.sum()
        share = share / total if total > 0 else share
    found = labels[share > 0].unique()
    if len(found) < 2:
        raise ValueError(f"labels: need rows of at least 2 classes with a weight above 0, got {found.tolist()}")
    return share


def _checked_gates(gates: Any, classes: int, width: int) -> Tensor:
    """Gates as ``[1, M]`` or ``[O, M]``."""
    if gates is None:
        return torch.ones(1, width, dtype=torch.float64)
    if not isinstance(gates, Tensor) or gates.is_complex():
        raise TypeError(f"gates: expected a tensor, got {type(gates).__name__}")
    if gates.shape not in ((width,), (classes, width)):
        raise ValueError(f"gates: expected shape ({width},) or ({classes}, {width}), got {tuple(gates.shape)}")
    gates = gates.detach().double()
    if not bool(gates.isfinite().all()):
        raise ValueError(f"gates: must be finite, got {float(gates[~gates.isfinite()][0])}")
    if not bool((gates != 0).any()):
        raise ValueError("gates: all weights are closed, there is nothing to fit")
    return gates.reshape(-1, width)
