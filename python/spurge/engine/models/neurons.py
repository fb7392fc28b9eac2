"""Sets of neurons.

Sites are kept in natural order of their names (``layer.2`` before ``layer.10``), which is the order of the
layers; within a site neurons go by index. That order breaks all ties: a selection never depends on how it was
built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.checks import integer, share_of
from spurge.engine.models.sites import NeuronRef


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key under which ``layer.2`` comes before ``layer.10``."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name) if part]


def _indices(site: Any, given: Any) -> np.ndarray:
    """``given`` as sorted, unique, read-only int64 indices."""
    if not isinstance(site, str):
        raise TypeError(f"indices: sites are module paths, got {type(site).__name__}")
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError(f"indices: {site!r} needs a sequence of integers, got {type(given).__name__}")
    array = (
        given.detach().cpu().numpy()
        if isinstance(given, Tensor)
        else np.asarray(given if isinstance(given, np.ndarray) else list(given))
    )
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"indices: {site!r} needs integers, got {array.dtype}")
    if array.size and array.min() < 0:
        raise ValueError(f"indices: {site!r} must not hold negative numbers, got {array.min()}")
    unique = np.unique(array.astype(np.int64))
    unique.flags.writeable = False
    return unique


class NeuronSet:
    """An immutable set of neurons: site name to sorted indices. Sites without neurons are left out.

    ``|``, ``&``, ``-``, ``<=``, ``==``, ``len`` and ``in`` are those of sets; iteration gives
    :class:`~spurge.engine.models.sites.NeuronRef` in the order of sites, then indices.

    Args:
        indices: site name to integers, in any order, repeated or not.

    Raises:
        TypeError: a site is no text, or an index no integer.
        ValueError: an index is negative.

    >>> NeuronSet({"mlp.2": [5, 1, 5], "mlp.10": [0]})
    NeuronSet(3 neurons of 2 sites: mlp.2 2, mlp.10 1)
    """

    __slots__ = ("_sites",)

    def __init__(self, indices: Mapping[str, Any] | None = None) -> None:
        if indices is not None and not isinstance(indices, Mapping):
            raise TypeError(f"indices: expected site name to integers, got {type(indices).__name__}")
        made = {site: _indices(site, given) for site, given in (indices or {}).items()}
        self._sites = {site: made[site] for site in sorted(made, key=natural) if made[site].size}

    @classmethod
    def from_refs(cls, refs: Iterable[NeuronRef]) -> NeuronSet:
        """The set of the given neurons."""
        indices: dict[str, list[int]] = {}
        for ref in refs:
            if not isinstance(ref, NeuronRef):
                raise TypeError(f"refs: expected NeuronRef, got {type(ref).__name__}")
            indices.setdefault(ref.site, []).append(ref.index)
        return cls(indices)

    @classmethod
    def all(cls, widths: Mapping[str, int]) -> NeuronSet:
        """Every neuron of sites with these widths."""
        return cls({site: np.arange(integer(f"widths: {site!r}", width, 0)) for site, width in widths.items()})

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that have neurons in the set."""
        return tuple(self._sites)

    def indices(self, site: str) -> Tensor:
        """The set's indices at ``site``, int64 ``[n]``, ascending; empty where the set has none."""
        return torch.from_numpy(self._sites.get(site, np.empty(0, np.int64)).copy())

    def counts(self) -> dict[str, int]:
        """Neurons per site."""
        return {site: int(array.size) for site, array in self._sites.items()}

    def to_dict(self) -> dict[str, list[int]]:
        """Site name to list of indices: JSON-able, and read back by ``NeuronSet(...)``."""
        return {site: array.tolist() for site, array in self._sites.items()}

    def check(self, widths: Mapping[str, int]) -> None:
        """Raises ValueError where a site is unknown to ``widths`` or an index is beyond its width."""
        for site, array in self._sites.items():
            if site not in widths:
                raise ValueError(f"neurons: site {site!r} is unknown, expected one of {list(widths)}")
            if array[-1] >= widths[site]:
                raise ValueError(f"neurons: {site!r} has {widths[site]} neurons, got index {array[-1]}")

    def random_like(self, widths: Mapping[str, int], seed: int, exclude: NeuronSet | None = None) -> NeuronSet:
        """Neurons drawn without replacement, as many of each site as this set has.

        Args:
            widths: site name to F.
            seed: the same seed gives the same neurons.
            exclude: neurons that must not be drawn.

        Raises:
            ValueError: a site of the set is not in ``widths``, or has fewer candidates than neurons to draw.
        """
        self.check(widths)
        generator = torch.Generator().manual_seed(integer("seed", seed, 0))
        drawn = {}
        for site, count in self.counts().items():
            free = np.arange(widths[site])
            if exclude is not None:
                free = np.setdiff1d(free, exclude._sites.get(site, free[:0]), assume_unique=True)
            if free.size < count:
                raise ValueError(f"neurons: {site!r} has {free.size} neurons to draw from, {count} are needed")
            drawn[site] = free[torch.randperm(free.size, generator=generator)[:count].numpy()]
        return NeuronSet(drawn)

    def _combine(self, other: Any, rule: Any) -> Any:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        none = np.empty(0, np.int64)
        names = {**self._sites, **other._sites}
        return NeuronSet({site: rule(self._sites.get(site, none), other._sites.get(site, none)) for site in names})

    def __or__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, np.union1d)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, np.intersect1d)

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, np.setdiff1d)

    def __le__(self, other: NeuronSet) -> bool:
        return len(self - other) == 0 if isinstance(other, NeuronSet) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple((site, array.tobytes()) for site, array in self._sites.items()))

    def __len__(self) -> int:
        return sum(array.size for array in self._sites.values())

    def __contains__(self, ref: object) -> bool:
        return isinstance(ref, NeuronRef) and ref.index in self._sites.get(ref.site, ())

    def __iter__(self) -> Iterator[NeuronRef]:
        for site, array in self._sites.items():
            for index in array.tolist():
                yield NeuronRef(site, index)

    def __repr__(self) -> str:
        shown = ", ".join(f"{site} {count}" for site, count in self.counts().items())
        many = f" of {len(self._sites)} sites: {shown}" if self._sites else ""
        return f"NeuronSet({len(self)} neurons{many})"


def frequent(sets: Sequence[NeuronSet], share: float = 0.5) -> NeuronSet:
    """Neurons that are in at least ``share`` of the sets (knowledge neurons: units selected in most bags).

    Raises:
        ValueError: no sets, or ``share`` outside (0, 1].
        TypeError: something else than a NeuronSet.
    """
    share = share_of("share", share)
    if isinstance(sets, NeuronSet) or not all(isinstance(item, NeuronSet) for item in sets):
        raise TypeError("sets: expected a sequence of NeuronSet")
    if not sets:
        raise ValueError("sets: need at least 1, got 0")
    found = {}
    for site in {site for item in sets for site in item.sites}:
        every = np.concatenate([item._sites[site] for item in sets if site in item._sites])
        index, times = np.unique(every, return_counts=True)
        found[site] = index[times / len(sets) >= share]
    return NeuronSet(found)
