"""Scores: one number per neuron, and how neurons are chosen by them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.checks import choice, integer, share_of
from spurge.engine.base.files import canonical_json
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.tensor_files import Contents
from spurge.engine.models.neurons import NeuronSet, frequent, natural
from spurge.engine.models.sites import NeuronRef

__all__ = ["NeuronRef", "NeuronScores", "NeuronSet", "frequent"]


@dataclass(frozen=True, eq=False, repr=False)
class NeuronScores(Saved, kind="scores", what="a file of neuron scores"):
    """One number per neuron: site name to float32 vector ``[F]`` on the CPU, and how they were made.

    Attributes:
        values: site name to scores; copied, in natural order of the names.
        info: method, settings, data fingerprint, seed: anything that can be written as JSON.

    Raises:
        ValueError: no sites, an empty or not one-dimensional vector, or a score that is NaN or infinite.
        TypeError: a vector is no floating tensor, or ``info`` cannot be written as JSON.
    """

    values: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise TypeError(f"values: expected site name to tensor, got {type(self.values).__name__}")
        if not self.values:
            raise ValueError("values: need at least 1 site, got 0")
        checked = {site: _vector(site, given) for site, given in self.values.items()}
        object.__setattr__(self, "values", {site: checked[site] for site in sorted(checked, key=natural)})
        object.__setattr__(self, "info", json.loads(canonical_json(self.info)))

    @property
    def widths(self) -> dict[str, int]:
        """Site name to F."""
        return {site: vector.numel() for site, vector in self.values.items()}

    def per_site(self) -> dict[str, float]:
        """Sum of the scores of each site, added in float64: what completeness compares with F(1) - F(0)."""
        return {site: float(vector.double().sum()) for site, vector in self.values.items()}

    def ranking(self, n: int | None = None) -> list[tuple[NeuronRef, float]]:
        """The ``n`` highest scores, highest first, ties by site and index; None ranks all."""
        total = sum(self.widths.values())
        n = total if n is None else min(integer("n", n, 0), total)
        flat = torch.cat(list(self.values.values()))
        order = torch.sort(flat, descending=True, stable=True).indices[:n]
        sites, starts = list(self.values), np.cumsum([0, *self.widths.values()])
        where = np.searchsorted(starts, order.numpy(), side="right") - 1
        return [
            (NeuronRef(sites[at], int(position - starts[at])), value)
            for at, position, value in zip(where, order.tolist(), flat[order].tolist(), strict=True)
        ]

    def top(self, n: int) -> NeuronSet:
        """The ``n`` neurons with the highest scores (all, where there are fewer)."""
        return NeuronSet.from_refs(ref for ref, _ in self.ranking(n))

    def magnitudes(self) -> NeuronScores:
        """The same scores without their signs."""
        return NeuronScores({site: v.abs() for site, v in self.values.items()}, self.info)

    def select(
        self,
        fraction: float = 0.2,
        cap: int | None = None,
        sign: Literal["positive", "absolute"] = "positive",
    ) -> NeuronSet:
        r"""Neurons whose score reaches a share of the greatest one of all sites.

        .. math:: S = \{k : a_k > 0,\; a_k \ge t \max_j a_j\}

        with :math:`|a|` in place of :math:`a` for ``sign="absolute"``. The rule of knowledge neurons and DEPN
        (t = 0.2). No score above zero gives the empty set.

        Args:
            fraction: t, in (0, 1].
            cap: keep at most so many, the highest first, ties in order of site and index.
            sign: which scores count.

        Raises:
            ValueError: ``fraction`` outside (0, 1], ``cap`` below 1, an unknown ``sign``.
        """
        fraction = share_of("fraction", fraction)
        if cap is not None:
            cap = integer("cap", cap, 1)
        choice("sign", sign, ("positive", "absolute"))
        scores = self.magnitudes().values if sign == "absolute" else self.values
        # float64: a product rounded to float32 could drop a neuron that lies exactly on the threshold
        threshold = fraction * max(float(vector.max()) for vector in scores.values())
        chosen = {site: ((v > 0) & (v.double() >= threshold)).nonzero()[:, 0] for site, v in scores.items()}
        found = NeuronSet(chosen)
        if cap is None or len(found) <= cap:
            return found
        return NeuronScores(scores).top(cap)  # all chosen ones are above the rest

    def __add__(self, other: NeuronScores) -> NeuronScores:
        """Sum of two scores of the same sites; ``info`` keeps what both agree on.

        Raises:
            ValueError: sites or widths differ.
        """
        if not isinstance(other, NeuronScores):
            return NotImplemented
        if self.widths != other.widths:
            raise ValueError(f"scores: sites and widths differ, {self.widths} and {other.widths}")
        info = {key: value for key, value in self.info.items() if key in other.info and other.info[key] == value}
        return NeuronScores({site: v + other.values[site] for site, v in self.values.items()}, info)

    def __mul__(self, factor: float) -> NeuronScores:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        return NeuronScores({site: v * float(factor) for site, v in self.values.items()}, self.info)

    __rmul__ = __mul__

    def _to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.values, {"info": self.info}

    @classmethod
    def _of_parts(cls, file: Contents) -> NeuronScores:
        return cls(file.tensors, file.value("info", dict))

    def to_frame(self) -> Any:
        """A pandas DataFrame with columns ``site``, ``index``, ``score``; needs pandas."""
        import pandas as pd

        parts = [
            pd.DataFrame({"site": site, "index": np.arange(vector.numel()), "score": vector.numpy()})
            for site, vector in self.values.items()
        ]
        return pd.concat(parts, ignore_index=True)

    def __repr__(self) -> str:
        (ref, value), *_ = self.ranking(1)
        total = sum(self.widths.values())
        method = f", {self.info['method']}" if "method" in self.info else ""
        return f"NeuronScores({total} neurons of {len(self.values)} sites, highest {ref} = {value:.4g}{method})"


def _vector(site: Any, given: Any) -> Tensor:
    """A site's scores as an own float32 vector on the CPU."""
    if not isinstance(site, str):
        raise TypeError(f"values: sites are module paths, got {type(site).__name__}")
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"values: {site!r} needs a floating tensor, got {kind}")
    if given.dim() != 1 or given.numel() == 0:
        raise ValueError(f"values: {site!r} needs one score per neuron, [F], got shape {tuple(given.shape)}")
    vector = given.detach().to("cpu", torch.float32, copy=True).contiguous()
    bad = (~vector.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"values: {site!r} has {len(bad)} scores that are not finite, the first is neuron {first}: "
            f"{float(vector[first])}"
        )
    return vector
