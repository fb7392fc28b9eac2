"""What belongs beside every number of a retrained last layer: the same without the mask, behind any mask, and DFR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.base.checks import integer, number
from spurge.engine.evaluation.groups import accuracies
from spurge.engine.features.features import Features
from spurge.engine.last_layer.fitting import fit_head
from spurge.engine.models.heads import Head
from spurge.methods.neurontune.dimensions import encode
from spurge.methods.neurontune.neurontune import NeuronTune
from spurge.methods.neurontune.tuned import Tuned

STRENGTHS = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)


def without_mask(tuned: Tuned, settings: NeuronTune, identify: Features, train: Features) -> Tuned:
    """The same class-balanced retraining and selection with nothing suppressed: what the mask is worth.

    On a validation set whose groups are balanced this alone does most of the work; where groups are as unbalanced as in
    training, it does next to nothing.

    Args:
        tuned: the result to hold it against.
        settings: that it was made with.
        identify, train: the sets it was made from.
    """
    return _behind(torch.zeros_like(tuned.mask), "no mask", tuned, settings, identify, train)


def random_masks(
    tuned: Tuned, settings: NeuronTune, identify: Features, train: Features, *, draws: int = 20, seed: int = 0
) -> list[Tuned]:
    """The same retraining behind masks of the same size on random dimensions: whether it matters which.

    Drawn, where there are enough, among dimensions that are not constant: a dead one costs nothing to lose.

    Args:
        tuned, settings, identify, train: as :func:`without_mask`.
        draws: masks.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(integer("seed", seed, 0))
    values = encode(train.values, tuned.signs)
    live = (values != values[0]).any(0).cpu()
    found = []
    for draw in tqdm(range(integer("draws", draws, 1)), desc="random masks", disable=not settings.progress):
        rows = [_random(row, live, generator) for row in tuned.mask.reshape(-1, tuned.mask.shape[-1])]
        mask = torch.stack(rows).view_as(tuned.mask)
        own = _behind(mask, "random mask", tuned, replace(settings, progress=False), identify, train)
        found.append(replace(own, info={**own.info, "draw": draw, "draw_seed": seed}))
    return found


def _random(row: Tensor, live: Tensor, generator: torch.Generator) -> Tensor:
    size = int(row.sum())
    among = live if int(live.sum()) > size else torch.ones_like(live)  # at least one live dimension stays
    places = among.nonzero()[:, 0]
    mask = torch.zeros_like(row)
    mask[places[torch.randperm(len(places), generator=generator)[:size]]] = True
    return mask


def _behind(
    mask: Tensor, method: str, tuned: Tuned, settings: NeuronTune, identify: Features, train: Features
) -> Tuned:
    found = settings.retrain(identify, train, mask)
    info = settings.info(method, identify, train) | {"candidates": found.candidates}
    return replace(tuned, head=found.head, mask=mask, info=info)


def dfr(
    validation: Features,
    *,
    train: Features | None = None,
    strengths: Sequence[float] = STRENGTHS,
    tunings: int = 1,
    retrains: int = 20,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> Head:
    r"""DFR: the last layer retrained on group-balanced validation data, the oracle with group labels.

    Kirichenko, Izmailov and Wilson, ICLR 2023, as in their code: L1-penalised logistic regression on standardised
    features. The strength is the one with the best worst group when rows of one half of the validation set, drawn so
    that its groups are equal, judge on the other; then ``retrains`` layers on equal groups of the whole are averaged.
    Other than their liblinear, the bias is not penalised, and more than two classes are one softmax.

    Args:
        validation: features with groups.
        train: the training set; standardises in the last fits. By default validation itself.
        strengths: C, the weight of the sum of losses beside the L1 norm; largest first.
        tunings: halves that the worst groups are added over.
        retrains: layers that are averaged.
        tolerance: of each fit, see `spurge.engine.last_layer.fitting.fit_head`.
        seed: of halves and draws.
        progress: show progress bars.

    Returns:
        The averaged layer, in the place of the features' own.

    Raises:
        TypeError: an argument of another type.
        ValueError: no groups, a group too small to halve, or a number out of range.
    """
    if not isinstance(validation, Features):
        raise TypeError(f"validation: expected Features, got {type(validation).__name__}")
    values = tuple(number("strengths", value) for value in strengths)
    if not values or min(values) <= 0:
        raise ValueError(f"strengths: expected numbers above 0, got {values}")
    tunings, retrains = integer("tunings", tunings, 1), integer("retrains", retrains, 1)
    sizes = validation.group_counts()
    if int(sizes.min()) < 4:
        name = validation.group_names[int(sizes.argmin())]
        raise ValueError(f"validation: group {name!r} has {int(sizes.min())} rows, too few to halve; need at least 4")
    generator = torch.Generator().manual_seed(integer("seed", seed, 0))
    tunings = tunings if len(values) > 1 else 0
    scale = validation.values if train is None else train.values
    with tqdm(total=tunings * len(values) + retrains, desc="DFR", disable=not progress) as bar:

        def fit(rows: Features, strength: float, start: Head | None, standardise: bool | Tensor) -> Head:
            bar.update()
            return _fit_l1(rows, strength, start, standardise, tolerance)

        strength = _best_strength(validation, values, tunings, generator, fit)
        layers: list[Head] = []
        for _ in range(retrains):
            begin = layers[-1] if layers else None  # the minimum is the same, and a third of the steps away
            layers.append(fit(_equal(validation, generator), strength, begin, scale))
    return _average(layers, validation.head)


def _fit_l1(rows: Features, strength: float, start: Head | None, standardise: bool | Tensor, tolerance: float) -> Head:
    """L1-penalised layer, classes weighted as they are: equal groups are the balance."""
    return fit_head(
        rows.values,
        rows.labels,
        rows.head.outputs,
        weights=None,
        start=start,
        standardise=standardise,
        l1=1 / (strength * len(rows)),
        l2=0.0,
        tolerance=tolerance,
    )


def _best_strength(
    validation: Features, strengths: Sequence[float], tunings: int, generator: torch.Generator, fit: Callable[..., Head]
) -> float:
    """The strength whose layers on equal groups of one half have the best worst group on the other, over all halves."""
    worst = torch.zeros(len(strengths), dtype=torch.float64)
    for _ in range(tunings):
        half, held = validation.split((0.5, 0.5), seed=_next_seed(generator), by="group")
        rows = _equal(half, generator)
        found: Head | None = None
        for index in sorted(range(len(strengths)), key=strengths.__getitem__):  # each begins at the sparser one
            found = fit(rows, strengths[index], found, True)
            worst[index] += accuracies(found.predictions(held.values), held.labels, held.groups).worst_group
    return strengths[int(worst.argmax())]


def _average(layers: Sequence[Head], base: Head) -> Head:
    """The mean of the layers in the place of ``base``; a place without a bias has no room for theirs, and is left."""
    weight = torch.stack([layer.weight.double() for layer in layers]).mean(0)
    biases = [layer.bias.double() for layer in layers if layer.bias is not None]
    bias = torch.stack(biases).mean(0)
    if base.bias is None:
        return Head(weight.to(base.weight.dtype), bias.to(base.weight.dtype))
    return base.with_(weight=weight.to(base.weight.dtype), bias=bias)


def _next_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


def _equal(features: Features, generator: torch.Generator) -> Features:
    """As many random rows of every group as the smallest has."""
    assert features.groups is not None  # the callers' sets have groups
    groups = features.groups.cpu()
    order = torch.randperm(len(groups), generator=generator)
    size = int(features.group_counts().min())
    parts = [order[groups[order] == group][:size] for group in range(len(features.group_names))]
    return features.subset(torch.cat(parts).sort().values)
