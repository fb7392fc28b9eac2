"""NeuronTune: suppress features that go with wrong predictions, and retrain the last layer without them.

Zheng, Ye and Zhang: "NeuronTune: Towards Self-Guided Spurious Bias Mitigation", ICML 2025. What its description leaves
open is a named option here, with the best-supported reading as the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spurge.engine.base.budgets import parse_bytes
from spurge.engine.base.checks import choice, device_of, integer, number, warn
from spurge.engine.evaluation.groups import accuracies
from spurge.engine.features.features import Features
from spurge.engine.last_layer.fitting import Sgd, Solver, fit_head
from spurge.engine.models.heads import Head
from spurge.methods.neurontune.dimensions import Classes, Scores, Signs, deltas, encode, score
from spurge.methods.neurontune.tuned import Tuned

Select = Literal["sfit", "worst_class", "class_difference"]
Start = Literal["fresh", "head"]
Numbers = float | Sequence[float]


@dataclass(frozen=True, eq=False)
class Retrained:
    """A layer that selection preferred: itself, on encoded features, its value, and the criteria of all candidates."""

    head: Head
    value: float
    candidates: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class NeuronTune:
    r"""Settings: :meth:`tune` identifies on one set and retrains on another, :meth:`halves` on halves of one.

    It trusts that errors come from the shortcut. Where a model errs as often for other reasons, the scores point at
    dimensions of the class itself, and the worst group can fall (seen on planted data): see
    `spurge.methods.neurontune.controls`.

    No group labels are used, for selection neither. Several values of ``threshold`` or ``l2``, and the epochs of
    ``"sgd"``, are candidates that ``select`` chooses from.

    Attributes:
        threshold: :math:`\lambda`: suppress dimensions with :math:`\delta_i^y > \lambda`.
        classes: for any class, for all, or each output by its own class's.
        signs: what is compared and read where features have signs, see `dimensions.score`; all but
            ``"raw"`` are the same behind a ReLU. Symmetric features need ``"split"``: by their magnitudes spurious
            dimensions do not stand out, and by raw values nearly all do.
        least_wrong: wrong predictions a class needs to be judged by.
        keep: factor that is left of a suppressed dimension; the paper's 0 is best.
        start: the layer begins anew, or from the model's own.
        solver: ``"lbfgs"``: the minimum, deterministic; ``"sgd"``: minibatches as published.
        sgd: settings of ``"sgd"``.
        l2: penalty of the layer (weight decay of ``"sgd"``).
        select: best candidate on the identification set: largest ``"sfit"``, largest ``"worst_class"`` accuracy, or
            smallest mean ``"class_difference"``. Of equal ones, the first.
        seed: of ``"sgd"``.
        memory: budget of fitting, e.g. ``"256MiB"``.
        device: where features are taken and all is computed, e.g. ``"cuda"``; None: where they are.
        progress: show progress bars.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type.
    """

    threshold: Numbers = 0.0
    classes: Classes = "union"
    signs: Signs = "magnitude"
    least_wrong: int = 10
    keep: float = 0.0
    start: Start = "fresh"
    solver: Solver = "lbfgs"
    sgd: Sgd = field(default_factory=Sgd)
    l2: Numbers = 1e-4
    select: Select = "sfit"
    seed: int = 0
    memory: str | int | None = None
    device: str | torch.device | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            choice(name, getattr(self, name), get_args(kind))
        for name, least in (("threshold", None), ("l2", 0.0)):
            given = getattr(self, name)
            several = isinstance(given, Sequence) and not isinstance(given, str)
            values = tuple(number(name, value, least) for value in (given if several else [given]))
            if not values:
                raise ValueError(f"{name}: need at least 1 value, got 0")
            object.__setattr__(self, name, values if several else values[0])
        integer("least_wrong", self.least_wrong, 1)
        integer("seed", self.seed, 0)
        if not 0 <= number("keep", self.keep) < 1:
            raise ValueError(f"keep: must be at least 0 and below 1, got {self.keep}")
        if not isinstance(self.sgd, Sgd):
            raise TypeError(f"sgd: expected Sgd, got {type(self.sgd).__name__}")
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.device is not None:
            object.__setattr__(self, "device", str(device_of("device", self.device)))

    def score(self, features: Features) -> Scores:
        """Scores of all dimensions by the model's own predictions of an identification set."""
        return score(self._placed(features), signs=self.signs, least_wrong=self.least_wrong)

    def mask(self, scores: Scores, threshold: float | None = None) -> Tensor:
        """Dimensions to suppress, bool ``[D]`` or ``[C, D]``; by the first threshold of the settings, or by another.

        Raises:
            ValueError: nothing would be left, of all dimensions or of one output's.
        """
        threshold = _several(self.threshold)[0] if threshold is None else threshold
        mask = scores.mask(threshold, self.classes)
        if bool(mask.all(-1).any()):
            raise ValueError(
                f"threshold: all {mask.shape[-1]} dimensions have a score above {threshold}"
                + (" in a class" if mask.dim() == 2 else "")
                + ", nothing is left to train on; raise threshold, use classes='intersection', or signs='split' where "
                "features have signs"
            )
        return mask

    def tune(self, identify: Features, train: Features) -> Tuned:
        """Identifies on one set, retrains class-balanced on the other, selects on the first.

        Args:
            identify: features the model was not trained on; on its training set errors are few and memorised.
            train: features to retrain on, of the same model.

        Warns:
            UserWarning: both are the same rows, a class is skipped, or nothing is suppressed.

        Raises:
            TypeError: no Features.
            ValueError: of different heads, no class with enough wrong predictions, or nothing left to train on.
        """
        _check_pair(identify, train)
        identify, train = self._placed(identify), self._placed(train)
        scores = self.score(identify)
        best: tuple[float, Retrained, Tensor] | None = None
        candidates = []
        for threshold in _several(self.threshold):
            mask = self.mask(scores, threshold)
            if not bool(mask.any()):
                warn(f"threshold: no dimension has a score above {threshold}: nothing is masked")
            found = self.retrain(identify, train, mask)
            candidates += [{"threshold": threshold, **candidate} for candidate in found.candidates]
            if best is None or found.value > best[1].value:
                best = (threshold, found, mask)
        assert best is not None  # settings have at least one threshold
        info = self.info("NeuronTune", identify, train) | {"threshold": best[0], "candidates": candidates}
        return Tuned(best[1].head, identify.head, best[2], scores, signed(identify, train), info)

    def halves(self, validation: Features, seed: int | None = None) -> Tuned:
        """The paper's second protocol (its dagger): halves of every class of a validation set.

        Identifies and selects on the first half, retrains on the second. Errors as :meth:`tune`.

        Args:
            validation: features the model was not trained on.
            seed: of the split; default the settings'.
        """
        return self.tune(*self.parts(validation, seed))

    def parts(self, validation: Features, seed: int | None = None) -> list[Features]:
        """The two halves of :meth:`halves`, the one that identifies first."""
        if not isinstance(validation, Features):
            raise TypeError(f"validation: expected Features, got {type(validation).__name__}")
        return validation.split((0.5, 0.5), seed=self.seed if seed is None else integer("seed", seed, 0))

    def retrain(self, identify: Features, train: Features, mask: Tensor) -> Retrained:
        """The best layer on ``train`` behind any mask, bool ``[D]`` or ``[C, D]``: the step that controls share."""
        identify, train = self._placed(identify), self._placed(train)
        base, outputs = train.head, train.head.outputs
        judged, values = encode(identify.values, self.signs), encode(train.values, self.signs)
        gates = torch.ones(mask.shape, dtype=torch.float64).masked_fill(mask, self.keep)
        start = None
        if self.start == "head":
            both = torch.cat([base.weight, -base.weight], 1) if self.signs == "split" else base.weight
            start = Head(both, base.bias)
        best: Retrained | None = None
        candidates: list[dict[str, Any]] = []

        def consider(l2: float, epoch: int | None, head: Head) -> None:
            nonlocal best
            found = self._criteria(identify, head.predictions(judged))
            candidates.append({"l2": l2, **({} if epoch is None else {"epoch": epoch}), **found})
            value = -found[self.select] if self.select == "class_difference" else found[self.select]
            if best is None or value > best.value:
                best = Retrained(head, value, candidates)

        for l2 in _several(self.l2):
            rest: dict[str, Any] = {"memory": self.memory, "progress": self.progress, "bias": base.bias is not None}
            if self.solver == "sgd":
                rest |= {
                    "sgd": self.sgd,
                    "seed": self.seed,
                    "watch": lambda epoch, head, l2=l2: consider(l2, epoch, head),
                }
            fitted = fit_head(
                values, train.labels, outputs, gates=gates, l2=l2, start=start, solver=self.solver, **rest
            )
            if self.solver == "lbfgs":
                consider(l2, None, fitted)
                start = fitted  # the minimum is the same from anywhere, and the next one is near
        assert best is not None  # there is at least one penalty and one epoch
        head = best.head
        if head.weight.shape == base.weight.shape:
            head = base.with_(weight=head.weight.to(base.weight.dtype), bias=head.bias)
        return Retrained(head, best.value, candidates)

    def _placed(self, features: Features) -> Features:
        return features if self.device is None else features.to(self.device)

    def _criteria(self, identify: Features, predictions: Tensor) -> dict[str, float]:
        """The three criteria of a candidate; SFit of the unmasked features, by classes with any wrong predictions."""
        found = accuracies(predictions, identify.labels, classes=len(identify.names))
        sfit = deltas(identify, predictions, self.signs, 1).sfit
        return {"sfit": sfit, "worst_class": found.worst_class, "class_difference": found.class_difference}

    def info(self, method: str, identify: Features, train: Features) -> dict[str, Any]:
        """Provenance of a result, JSON-able."""
        data = {"identify": identify.fingerprint(), "train": train.fingerprint()}
        return {"method": method, "settings": asdict(self), "labels": "class", "seed": self.seed, "data": data}


_CHOICES: dict[str, Any] = {
    "classes": Classes,
    "signs": Signs,
    "start": Start,
    "solver": Solver,
    "select": Select,
}


def _several(value: Numbers) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, (int, float)) else tuple(value)


def signed(*sets: Features) -> bool:
    """Whether any feature is negative."""
    return any(bool((features.values < 0).any()) for features in sets)


def _check_pair(identify: Features, train: Features) -> None:
    for name, features in (("identify", identify), ("train", train)):
        if not isinstance(features, Features):
            raise TypeError(f"{name}: expected Features, got {type(features).__name__}")
    if identify.head.fingerprint() != train.head.fingerprint():
        raise ValueError(
            "train: its head is not that of identify: features of two models, or of one trained in between"
        )
    if len(identify) == len(train) and identify.fingerprint() == train.fingerprint():
        warn(
            "identify: the same rows as train; a model makes few errors where it was trained, and they say little of "
            "its shortcuts"
        )
