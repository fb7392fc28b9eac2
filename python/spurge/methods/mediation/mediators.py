"""Units whose mediation is estimated: MLPs as one number or a few, single neurons, or any numbers a user brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.checks import choice, integer, number
from spurge.engine.base.files import canonical_json, fingerprint
from spurge.engine.recordings.recording import Recording

Level = Literal["mlp", "neuron", "unit"]
Reduction = Literal["difference", "norm", "components"]
_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False, repr=False)
class Mediators:
    """Values of U units for N prompts, read in blocks.

    Made by :func:`mlp_units`, :func:`neuron_units` and :func:`units_of`.

    Attributes:
        level: ``"mlp"``, ``"neuron"``, or ``"unit"`` for numbers of a user.
        widths: units of each part (a site's neurons; 1 for an MLP or a named unit), in order.
        rows: N.
        numbers: p, of a unit and prompt.
        info: how they came about, JSON-able.
        device: where the values lie.
    """

    level: Level
    widths: dict[str, int]
    rows: int
    numbers: int
    info: dict[str, Any]
    _read: Callable[[str, slice], Tensor]
    device: torch.device = _HOST

    def __len__(self) -> int:
        return sum(self.widths.values())

    def blocks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Units in order as (numbers among the U, values ``[n, N]`` or ``[n, N, p]``), at most ``size`` at a time."""
        first = 0
        names = list(self.widths)
        if self.level != "neuron":
            for start in range(0, len(names), size):
                some = names[start : start + size]
                yield slice(start, start + len(some)), torch.cat([self._read(name, slice(0, 1)) for name in some])
            return
        for name, width in self.widths.items():
            for start in range(0, width, size):
                stop = min(width, start + size)
                yield slice(first + start, first + stop), self._read(name, slice(start, stop))
            first += width

    def name(self, unit: int) -> str:
        """``"site"`` of an MLP, ``"site[index]"`` of a neuron."""
        for site, width in self.widths.items():
            if unit < width:
                return f"{site}[{unit}]" if self.level == "neuron" else site
            unit -= width
        raise ValueError(f"unit: there are {len(self)}, got one beyond")

    def __repr__(self) -> str:
        return f"Mediators({len(self)} of level {self.level}, {self.rows} prompts)"


def mlp_units(
    recording: Recording,
    treatment: Any,
    *,
    reduction: Reduction = "difference",
    components: int = 5,
    folds: int = 5,
    seed: int = 0,
) -> Mediators:
    """Each recorded MLP as one unit.

    Args:
        recording: with the MLPs' outputs ``[N, H]``.
        treatment: of each prompt, as `spurge.Mediation.effects` takes it; what ``difference`` looks at.
        reduction: ``"difference"``: the output along the difference of the arms' means. The direction for a prompt
            comes from the other folds: taken from the same prompts, H random numbers alone would part the arms by
            about ``sqrt(4 H / N)`` standard deviations. ``"norm"``: the output's length. ``"components"``: its first
            principal components, a unit of several numbers.
        components: how many of them, at most 10.
        folds: of the cross-fitting.
        seed: of the folds.

    Raises:
        ValueError: a choice that does not exist, a number out of range, or an arm with fewer prompts than folds.
    """
    choice("reduction", reduction, get_args(Reduction))
    if not 1 <= integer("components", components, 1) <= 10:
        raise ValueError(f"components: at most 10, got {components}")
    treated = binary(treatment, len(recording))
    folds, seed = integer("folds", folds, 2), integer("seed", seed, 0)
    fold = _folds(treated, folds, seed) if reduction == "difference" else None

    def read(site: str, _: slice) -> Tensor:
        outputs = recording.outputs(site)
        if fold is not None:
            return along_difference(outputs, treated.to(outputs.device), fold.to(outputs.device))[None]
        return outputs.norm(dim=1)[None] if reduction == "norm" else principal(outputs, components)[None]

    info: dict[str, Any] = {"reduction": reduction, "recording": recording.fingerprint()}
    info |= {"folds": folds, "seed": seed} if reduction == "difference" else {}
    numbers = components if reduction == "components" else 1
    widths = dict.fromkeys(recording.widths, 1)
    return Mediators("mlp", widths, len(recording), numbers, info, read, recording.device)


def neuron_units(recording: Recording, sites: Sequence[str] | None = None) -> Mediators:
    """Every neuron of the recorded sites, or of some of them, by its recorded activation.

    Raises:
        ValueError: a site that was not recorded.
    """
    names = list(recording.widths) if sites is None else list(sites)
    missing = [name for name in names if name not in recording.widths]
    if missing or not names:
        raise ValueError(f"sites: {missing[0] if missing else 'none'!r} is not among {list(recording.widths)}")
    widths = {name: recording.widths[name] for name in recording.widths if name in names}
    info = {"recording": recording.fingerprint()}

    def read(site: str, part: slice) -> Tensor:
        return recording.neurons(site, part).t().contiguous()

    return Mediators("neuron", widths, len(recording), 1, info, read, recording.device)


def units_of(values: Tensor, names: Sequence[str] | None = None) -> Mediators:
    """Units from numbers ``[U, N]`` (``[U, N, p]``) of any kind, on any device.

    Raises:
        TypeError: no floating tensor.
        ValueError: another shape, no units or prompts, numbers that are not finite, or names that do not fit.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"units: expected a floating tensor [U, N], got {found}")
    if values.dim() not in (2, 3) or not values.numel():
        raise ValueError(f"units: expected shape [U, N] or [U, N, p], got {tuple(values.shape)}")
    names = [str(unit) for unit in range(len(values))] if names is None else list(names)
    if len(names) != len(values) or len(set(names)) != len(names):
        raise ValueError(f"names: expected {len(values)} different ones, got {len(set(names))}")
    values = values.detach()
    unit_of = {name: unit for unit, name in enumerate(names)}
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        unit, row = bad[0, :2].tolist()
        raise ValueError(f"units: expected finite numbers, got another in {names[unit]!r} at prompt {row}")
    return Mediators(
        "unit",
        dict.fromkeys(names, 1),
        values.shape[1],
        values.shape[2] if values.dim() == 3 else 1,
        {"values": fingerprint(canonical_json([names, fingerprint(values)]))},
        lambda name, _: values[unit_of[name]][None],
        values.device,
    )


def along_difference(outputs: Tensor, treatment: Tensor, fold: Tensor) -> Tensor:
    """Outputs ``[N, H]`` along the unit vector between the arms' means in the other folds, ``[N]``."""
    found = outputs.new_zeros(len(outputs))
    for each in fold.unique().tolist():
        own, rest = fold == each, fold != each
        means = [outputs[rest & arm].mean(0) for arm in (treatment, ~treatment)]
        direction = means[0] - means[1]
        length = direction.norm()
        if length > 0:
            found[own] = (outputs[own] - (means[0] + means[1]) / 2) @ (direction / length)
    return found


def principal(outputs: Tensor, count: int) -> Tensor:
    """The first principal components ``[N, count]`` of outputs ``[N, H]``, each with its largest weight positive."""
    wide = outputs.double() - outputs.double().mean(0)
    _, vectors = torch.linalg.eigh(wide.t() @ wide)
    leading = vectors[:, -count:].flip(1)
    signs = leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()
    return (wide @ (leading * signs)).to(outputs.dtype)


def binary(treatment: Any, rows: int, threshold: float = 0.5) -> Tensor:
    """The treatment as bool ``[rows]``: as it is, 0 and 1, or scores from ``threshold`` on.

    Raises:
        ValueError: another length, or numbers that are not finite.
    """
    found = treatment if isinstance(treatment, Tensor) else torch.as_tensor(np.asarray(treatment))
    if found.dim() != 1 or len(found) != rows:
        raise ValueError(f"treatment: expected one for each of {rows} prompts, got shape {tuple(found.shape)}")
    if found.dtype == torch.bool:
        return found.cpu()
    numbers = found.double().cpu()
    if not bool(numbers.isfinite().all()):
        row = int((~numbers.isfinite()).nonzero()[0])
        raise ValueError(f"treatment: expected finite numbers, got {float(numbers[row])} at prompt {row}")
    return numbers >= number("threshold", threshold)


def _folds(treatment: Tensor, folds: int, seed: int) -> Tensor:
    """Number of the fold of each prompt ``[N]``, the arms spread evenly."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(len(treatment), dtype=torch.int64)
    for arm in (treatment, ~treatment):
        rows = arm.nonzero()[:, 0]
        if len(rows) < folds:
            raise ValueError(f"treatment: an arm has {len(rows)} prompts, too few for {folds} folds")
        found[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % folds
    return found
