"""How much each edge of a linear layer has to do with each class: FCR's accumulated signals, entropies and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from spurge.engine.base.checks import checked_labels, choice, integer
from spurge.engine.features.features import Features
from spurge.engine.last_layer.association_stream import (
    EdgeInputs,
    GradientSource,
    activation_entropy,
    gradient_entropy,
    stream,
)
from spurge.engine.last_layer.class_association import class_association
from spurge.engine.models.heads import Head

Reduction = Literal["mean", "sum"]
Activation = Literal["magnitude", "relu"]


@dataclass(frozen=True, eq=False, repr=False)
class Association:
    r"""Scores of the edges from M units to R outputs, over C classes (FCR Eq. 3 to 6). Made by :func:`association`.

    With :math:`A_c` and :math:`G_c` the activation of an edge's unit and the magnitude of the edge's gradient, over
    the samples of class c, and H the entropy of such a vector once it is scaled to sum 1:

    .. math:: \Gamma_{CA} = \frac{H(G_1 \dots G_C)}{H(A_1 \dots A_C)}, \qquad \Gamma_{SCA}^c = \Gamma_{CA}\; G_c\, A_c

    A unit that never fires, and an edge without gradient, score 0. Of a unit that fires for one class only both
    entropies vanish; where H(A) lies below :math:`\epsilon \ln K`, K counting the classes that have samples,
    :math:`\Gamma_{CA}` is the ratio of the smallest leaks into other classes: see
    :func:`spurge.engine.last_layer.class_association.class_association`.

    Attributes:
        activations: A, float64 ``[C, M]``.
        picked: G of class ``targets[r]``, ``[R, M]``.
        gradient_entropy: H(G), nats, ``[R, M]``.
        activation_entropy: H(A), nats, float64 ``[M]``.
        ca: Eq. 5, ``[R, M]``.
        rows: the output of each of the R rows, int64 ``[R]``.
        targets: the class whose G and A each row is scored for, int64 ``[R]``.
        counts: samples of each class, int64 ``[C]``.
        floor: :math:`\epsilon`.
        info: how it was made, JSON-able.
    """

    activations: Tensor
    picked: Tensor
    gradient_entropy: Tensor
    activation_entropy: Tensor
    ca: Tensor
    rows: Tensor
    targets: Tensor
    counts: Tensor
    floor: float
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def product(self) -> Tensor:
        """G times A of each row's class, without the entropies, ``[R, M]``."""
        own = self.activations.to(self.picked.dtype).index_select(0, self.targets)
        return own.mul_(self.picked)

    @property
    def sca(self) -> Tensor:
        """Eq. 6 for each row's class, ``[R, M]``."""
        return self.product.mul_(self.ca)

    def __repr__(self) -> str:
        rows, units = self.picked.shape
        return f"Association({units} units to {rows} outputs, {int(self.counts.sum())} samples of {len(self.counts)})"


def association(
    features: Tensor | Features,
    labels: Tensor | None = None,
    head: Head | tuple[Tensor, Tensor | None] | None = None,
    *,
    gradients: Tensor | None = None,
    logits: Tensor | None = None,
    classes: int | None = None,
    target: int | None = None,
    rows: Sequence[int] | None = None,
    activation: Activation = "magnitude",
    reduction: Reduction = "mean",
    floor: float = 1e-6,
    memory: str | int | None = None,
    progress: bool = False,
) -> Association:
    r"""Class-wise activations, gradient magnitudes and entropies of every edge of a linear layer (FCR Eq. 3 to 6).

    For cross-entropy the gradient of edge (m, o) is :math:`(p_o - 1[y = o])\, x_m`, and needs no autograd. Samples
    are taken class by class in blocks: beyond the inputs there are a few arrays ``[R, M]`` and one block, never
    ``[C, R, M]``. The same for any order of the samples but for rounding.

    Args:
        features: inputs of the layer, floating ``[N, M]``, or :class:`Features`, which bring labels and head along.
        labels: class of each sample, int64 ``[N]``.
        head: the layer, for the gradients of cross-entropy.
        gradients: instead of the head, gradients of any loss by the layer's outputs, ``[N, O]``
            (see :func:`spurge.engine.last_layer.capture.captured`); or ``[N, T, O]`` with features ``[N, T, M]``, where
            the layer runs at T positions: a sample's gradient and activation are then sums over its positions.
        logits: the head's outputs ``[N, O]``, where they are known already: spares their computation.
        classes: C; default the head's outputs, else the largest label and one.
        target: the class that all rows are scored for; default each output's own class.
        rows: only the edges of these outputs; default all.
        activation: of a negative input counts its size, or (``"relu"``) nothing.
        reduction: means over the samples of a class, which class sizes do not touch, or the paper's literal sums.
        floor: H(A), as a share of the greatest possible, below which a unit fires for one class only.
        memory: budget beyond the inputs, results included; default about 8 MiB beyond the accumulators.
        progress: show a bar.

    Raises:
        TypeError: a tensor of another type.
        ValueError: shapes that do not fit, a label, target or row out of range, fewer than two classes with samples,
            numbers that are not finite, or a budget that is too small.
    """
    if isinstance(features, Features):
        labels = features.labels if labels is None else labels
        head = features.head if head is None and gradients is None else head
        features = features.values
    choice("activation", activation, ("magnitude", "relu"))
    choice("reduction", reduction, ("mean", "sum"))
    if not isinstance(floor, float) or not 0 < floor < 1:
        raise ValueError(f"floor: expected a number above 0 and below 1, got {floor!r}")
    features = _floating("features", features)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    source = _gradient_source(features, head, gradients, logits, dtype)
    labels, counts = _counted(labels, features, classes, source)
    output_rows = _rows(rows, source.outputs)
    targets = _targets(target, output_rows, counts)
    sums = stream(
        EdgeInputs(
            features=features,
            labels=labels,
            counts=counts,
            source=source,
            rows=None if rows is None else output_rows.to(features.device),
            targets=targets if target is None else None,
            target=-1 if target is None else int(target),
            relu=activation == "relu",
            mean=reduction == "mean",
            dtype=dtype,
        ),
        memory,
        progress,
    )
    # NaN and infinity run through every sum; to look for them there costs nothing.
    if not bool(sums.sums.isfinite().all() & sums.activations.isfinite().all()):
        raise ValueError("features: expected finite numbers, gradients and logits too, got NaN, infinity or overflow")
    of_gradients, of_activations = gradient_entropy(sums, dtype), activation_entropy(sums.activations)
    return Association(
        activations=sums.activations,
        picked=sums.picked,
        gradient_entropy=of_gradients,
        activation_entropy=of_activations,
        ca=class_association(of_gradients, of_activations, sums, counts, floor),
        rows=output_rows.to(features.device),
        targets=targets.to(features.device),
        counts=counts,
        floor=floor,
        info={"activation": activation, "reduction": reduction, "floor": floor, "samples": len(features)},
    )


def _gradient_source(features: Tensor, head: Any, gradients: Any, logits: Any, dtype: torch.dtype) -> GradientSource:
    """Where the gradients by the layer's outputs come from, checked: as given, or cross-entropy's of a head."""
    if gradients is not None:
        if head is not None or logits is not None:
            raise ValueError("gradients: expected either these or a head (with logits where known), got both")
        gradients = _floating("gradients", gradients)
        if features.dim() not in (2, 3) or gradients.shape[:-1] != features.shape[:-1]:
            raise ValueError(
                f"gradients: expected [N, O] beside features [N, M], or [N, T, O] beside [N, T, M], got "
                f"{tuple(gradients.shape)} beside {tuple(features.shape)}"
            )
        source = GradientSource(None, gradients, None)
    else:
        layer = _layer(head, features, dtype)
        if logits is not None:
            logits = _floating("logits", logits)
            if logits.shape != (len(features), len(layer[0])):
                shape = (len(features), len(layer[0]))
                raise ValueError(f"logits: expected shape {shape}, got {tuple(logits.shape)}")
        source = GradientSource(layer, None, logits)
    if not features.numel() or not source.outputs:
        raise ValueError(
            f"features: expected samples, units and outputs, got {tuple(features.shape)} to {source.outputs}"
        )
    return source


def _counted(labels: Any, features: Tensor, classes: Any, source: GradientSource) -> tuple[Tensor, Tensor]:
    """Labels ``[N]`` beside the features, and the samples of each class ``[C]``."""
    outputs = None if source.layer is None else source.outputs
    labels = checked_labels("labels", labels, len(features), outputs).to(features.device)
    needed = int(labels.max()) + 1
    count = max(outputs or 0, needed) if classes is None else integer("classes", classes, 1)
    if count < needed:
        raise ValueError(f"classes: expected at least {needed}, the largest label and one, got {count}")
    counts = labels.bincount(minlength=count)
    if int((counts > 0).sum()) < 2:
        raise ValueError("labels: an entropy over classes needs samples of at least 2")
    return labels, counts


def _floating(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating tensor, got {found}")
    return value.detach()


def _layer(head: Any, features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias beside the features."""
    if head is None:
        raise ValueError("head: expected the linear layer, or gradients, got neither")
    if not isinstance(head, Head):
        try:
            head = Head(*head)
        except TypeError as error:
            raise TypeError(f"head: expected a Head or (weight, bias): {error}") from error
    if features.dim() != 2 or features.shape[1] != head.width:
        raise ValueError(f"features: expected shape [N, {head.width}] as the head reads, got {tuple(features.shape)}")
    if head.outputs < 2:
        raise ValueError("head: cross-entropy needs at least 2 outputs, got 1; give the gradients of its own loss")
    bias = None if head.bias is None else head.bias.to(features.device, dtype)
    return head.weight.to(features.device, dtype), bias


def _rows(rows: Any, outputs: int) -> Tensor:
    if rows is None:
        return torch.arange(outputs)
    found = [integer("rows", row, 0) for row in rows]
    if not found or max(found) >= outputs or len(set(found)) != len(found):
        raise ValueError(f"rows: expected different outputs below {outputs}, at least 1, got {found}")
    return torch.tensor(found)


def _targets(target: Any, rows: Tensor, counts: Tensor) -> Tensor:
    """The class of each row."""
    if target is None:
        if int(rows.max()) >= len(counts):
            raise ValueError(f"rows: output {int(rows.max())} is none of the {len(counts)} classes; give a target")
        return rows.clone()
    target = integer("target", target, 0)
    if target >= len(counts) or not counts[target]:
        raise ValueError(f"target: expected a class below {len(counts)} that has samples, got {target}")
    return torch.full_like(rows, target)
