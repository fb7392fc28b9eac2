"""Which features go with wrong predictions: NeuronTune's scores, and the masks made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spurge import ops
from spurge.engine.base.checks import checked_labels, choice, integer, number, warn
from spurge.engine.features.features import Features

Signs = Literal["magnitude", "relu", "split", "raw"]
Classes = Literal["union", "intersection", "each"]

_TRANSFORMS = {"magnitude": ("magnitude",), "relu": ("positive",), "split": ("positive", "negative"), "raw": ("raw",)}


def encode(values: Tensor, signs: Signs) -> Tensor:
    r"""Features ``[N, M]`` as the new layer reads them, ``[N, D]``.

    As they are for ``"magnitude"`` and ``"raw"``; :math:`\max(v, 0)` for ``"relu"``; positive and negative parts side
    by side, D = 2 M, for ``"split"``.
    """
    if signs == "relu":
        return values.clamp_min(0)
    if signs == "split":
        return torch.cat([values.clamp_min(0), (-values).clamp_min(0)], 1)
    return values


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    r"""How much larger each dimension is where the model is wrong (NeuronTune, score).

    .. math:: \delta_i^y = \mathrm{Med}\{v_i : y, \text{wrong}\} - \mathrm{Med}\{v_i : y, \text{right}\}

    Attributes:
        deltas: float64 ``[C, D]`` on the CPU; NaN in the rows of skipped classes.
        wrong, right: rows of each class that the model predicts so, int64 ``[C]``.
        skipped: classes with too few wrong or no right predictions.
        signs: what v is, see :func:`encode`; for ``"magnitude"`` the medians are of :math:`|v|`.
        names: of the classes.
    """

    deltas: Tensor
    wrong: Tensor
    right: Tensor
    skipped: tuple[int, ...]
    signs: Signs
    names: tuple[str, ...]

    @property
    def sfit(self) -> float:
        r""":math:`\sum_i \sum_y |\delta_i^y|` (NeuronTune, model selection): larger is better.

        It grows with the scale of the features, so it compares layers of one backbone only. Skipped classes add
        nothing.
        """
        return float(self.deltas.abs().nansum())

    def by_class(self) -> dict[str, Tensor]:
        """Class name to its scores ``[D]``, without skipped classes: what a histogram is drawn of."""
        return {name: self.deltas[y] for y, name in enumerate(self.names) if y not in self.skipped}

    def mask(self, threshold: float = 0.0, classes: Classes = "union") -> Tensor:
        r"""Dimensions to suppress: :math:`\delta_i^y > \lambda`, strictly.

        Args:
            threshold: lambda.
            classes: ``"union"``: for any class; ``"intersection"``: for all that are not skipped; ``"each"``: for every
                output its own class's.

        Returns:
            bool ``[D]``, or ``[C, D]`` for ``"each"``, true where a dimension is to be suppressed.
        """
        choice("classes", classes, get_args(Classes))
        above = self.deltas > number("threshold", threshold)  # NaN is not above anything
        if classes == "each":
            return above
        if classes == "intersection":
            above[list(self.skipped)] = True
            return above.all(0)
        return above.any(0)

    def __repr__(self) -> str:
        share = 100 * float(self.mask().double().mean())
        skipped = f", skipped {', '.join(self.names[y] for y in self.skipped)}" if self.skipped else ""
        wrong = ", ".join(f"{name} {n}" for name, n in zip(self.names[:8], self.wrong.tolist(), strict=False))
        return (
            f"Scores({self.deltas.shape[1]} dimensions, {share:.1f} % above 0 in a class, wrong {wrong}"
            f"{', ...' if len(self.names) > 8 else ''}{skipped}, SFit {self.sfit:.4g})"
        )


def score(
    features: Features, predictions: Tensor | None = None, *, signs: Signs = "magnitude", least_wrong: int = 10
) -> Scores:
    """Scores of all dimensions by the predictions of the features' own head, or by others ``[N]``.

    Medians average the middle two of an even number.

    Args:
        features: the identification set.
        predictions: classes predicted for it.
        signs: what is compared: ``"magnitude"``: :math:`|v|`, the same as v behind a ReLU; ``"relu"``: its positive
            part; ``"split"``: its positive and negative parts as 2 M dimensions; ``"raw"``: v.
        least_wrong: a class with fewer wrong predictions is skipped, with a warning; its median would be noise.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.
        ValueError: no class has enough wrong predictions.
    """
    if not isinstance(features, Features):
        raise TypeError(f"features: expected Features, got {type(features).__name__}")
    least_wrong = integer("least_wrong", least_wrong, 1)
    found = deltas(features, features.predictions() if predictions is None else predictions, signs, least_wrong)
    names = [features.names[y] for y in found.skipped]
    if len(names) == len(features.names):
        raise ValueError(
            f"features: no class has {least_wrong} wrong predictions and one right (wrong: {found.wrong.tolist()}, "
            f"right: {found.right.tolist()}); give a larger identification set, or lower least_wrong"
        )
    if names:
        counts = ", ".join(f"{features.names[y]} {int(found.wrong[y])}" for y in found.skipped[:8])
        warn(
            f"features: {len(names)} of {len(features.names)} classes have fewer than {least_wrong} wrong predictions "
            f"or none that is right, and are skipped (wrong: {counts})"
        )
    return found


def deltas(features: Features, predictions: Tensor, signs: Signs, least_wrong: int) -> Scores:
    """As :func:`score`, without a warning about skipped classes."""
    choice("signs", signs, _TRANSFORMS)
    labels, count = features.labels, len(features.names)
    predictions = checked_labels("predictions", predictions, len(features)).to(labels.device)
    segment = 2 * labels + (predictions == labels)  # wrong and right of each class, in turn
    sizes = segment.bincount(minlength=2 * count)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    order = segment.sort(stable=True).indices
    medians = [ops.segment_medians(features.values, order, starts, form) for form in _TRANSFORMS[signs]]
    both = torch.cat(medians, 1).double().cpu().unflatten(0, (count, 2))
    difference = both[:, 0] - both[:, 1]
    wrong, right = sizes.cpu().unflatten(0, (count, 2)).unbind(1)
    skipped = ((wrong < least_wrong) | (right < 1)).nonzero()[:, 0]
    difference[skipped] = torch.nan
    return Scores(difference, wrong.clone(), right.clone(), tuple(skipped.tolist()), signs, features.names)
