"""What mediation found: effects of every unit with and without the confounders, and how localised they are."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from spurge.engine.base.checks import choice, instance, integer, number, shaped, share_of
from spurge.engine.base.files import canonical_json
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.statistics import benjamini_hochberg, interval, spread, two_sided
from spurge.engine.base.tables import Table, folded, page, wrapped
from spurge.engine.base.tensor_files import Contents, flat, of_group
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.causal.balancing import CONVERGED, INFEASIBLE
from spurge.engine.causal.concentration import MEASURES, localisation
from spurge.engine.models.neurons import NeuronSet
from spurge.methods.mediation.estimators import UnitEffects

SIDES = ("adjusted", "unadjusted")
_VECTORS = ("nie1", "nie0", "aie", "ess", "worst", "status", "constant")
EARLIER_NAMES = {"binary_mediator": "dichotomised_mediator"}
"""Names that an estimator had before: they are still taken, and stand in files."""
_ESTIMANDS = {
    "balancing": "AIE: the mean of NIE(1) and NIE(0)",
    "dichotomised_mediator": (
        "AIE: the mean of NIE(1) and NIE(0) through the unit cut at its median; what the unit carries within the "
        "halves counts as direct"
    ),
    "continuous_unit": (
        "AIE: slope of the outcome on the unit within arms, times the shift of the unit between arms; right for an "
        "outcome linear in unit, treatment and confounders, without an interaction of unit and treatment"
    ),
}
_BIASED = (
    "AIE: slope of the outcome on the unit across arms, as it once was taken: part of the direct effect is in it; "
    "estimate again"
)
FAILED = 0.1
"""Share of resamples without an estimate beyond which a unit is flagged."""


@dataclass(frozen=True, eq=False)
class Side(UnitEffects):
    """Effects of U units under one set of confounders.

    Attributes:
        constant: bool ``[U]``: the unit has one value only.
        total: mu11 and mu00, float64 ``[2]``.
        draws: average indirect effects of the bootstrap resamples, float32 ``[R, U]``.
        total_draws: total effects of the same, float64 ``[R]``.
        confidence: of the intervals.
    """

    constant: Tensor
    total: Tensor
    draws: Tensor
    total_draws: Tensor
    confidence: float = 0.95

    @property
    def total_effect(self) -> float:
        """TE = mu11 - mu00 = NIE(1) + NDE(0)."""
        return float(self.total[0] - self.total[1])

    @property
    def nde(self) -> Tensor:
        """NDE(0) = mu10 - mu00 = TE - NIE(1), ``[U]``."""
        return self.total_effect - self.nie1

    @cached_property
    def error(self) -> Tensor:
        """Standard error of ``aie``, by bootstrap, ``[U]``."""
        return spread(self.draws.double())

    @cached_property
    def interval(self) -> tuple[Tensor, Tensor]:
        """Ends of the percentile interval of ``aie``, ``[U]`` each."""
        return interval(self.draws.double(), self.confidence)

    @cached_property
    def p(self) -> Tensor:
        """Two-sided p of an effect of 0, normal with the bootstrap's error, ``[U]``."""
        return two_sided(self.aie, self.error)

    @cached_property
    def q(self) -> Tensor:
        """``p`` after Benjamini and Hochberg over all units, ``[U]``."""
        return benjamini_hochberg(self.p)

    def flags(self, least_ess: float) -> list[tuple[str, ...]]:
        """What to be wary of, for each unit: ``overlap``, ``unfinished``, ``low ess``, ``constant``, ``resamples``."""
        failed = self.draws.isnan().double().mean(0) if len(self.draws) else torch.zeros_like(self.aie)
        marks = {
            "overlap": self.status == INFEASIBLE,
            "unfinished": self.status > INFEASIBLE,
            "low ess": (self.ess < least_ess) & (self.status == CONVERGED),
            "constant": self.constant,
            "resamples": (failed > FAILED) & (self.status == CONVERGED),
        }
        columns = {name: mark.tolist() for name, mark in marks.items()}
        return [tuple(name for name in marks if columns[name][unit]) for unit in range(len(self.aie))]

    def measures(self, units: Tensor | None = None, *, corrected: bool = False) -> tuple[Tensor, Tensor]:
        """Localisation of ``aie`` and of its resamples: float64 ``[5]`` and ``[R, 5]``, see `localisation`.

        Noise alone spreads effects over units, and adjustment makes estimates noisier. ``corrected`` shrinks each
        effect to ``sqrt(max(a² - e², 0))`` with its standard error e; a resample, whose noise comes on top, by 2 e². A
        unit that a resample cannot estimate keeps its estimate there: left out, it would pass for one without effect.

        Args:
            units: bool ``[U]``, those that count; by default all with an estimate.
            corrected: take the noise off.
        """
        kept = ~self.aie.isnan() if units is None else units
        effects = self.aie[kept]
        draws = self.draws[:, kept].double()
        draws = torch.where(draws.isnan(), effects, draws)
        if corrected:
            noise = self.error[kept].square()
            effects = (effects.square() - noise).clamp_min(0).sqrt()
            draws = (draws.square() - 2 * noise).clamp_min(0).sqrt()
        if not len(effects):
            effects, draws = effects.new_full((1,), torch.nan), draws.new_full((len(draws), 1), torch.nan)
        return localisation(effects), localisation(draws)


@dataclass(frozen=True, eq=False, repr=False)
class Effects(Saved, kind="effects", what="a file of effects"):
    """Average indirect effects of U units, adjusted for confounders and not.

    Attributes:
        adjusted, unadjusted: from the same prompts and the same resamples.
        level: ``"mlp"``, ``"neuron"`` or ``"unit"``.
        widths: units of each site, in order (1 for an MLP).
        info: settings, prompts, treated prompts, topics with sizes, those left out, fingerprints.
    """

    adjusted: Side
    unadjusted: Side
    level: Literal["mlp", "neuron", "unit"]
    widths: dict[str, int]
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.adjusted.aie)

    @property
    def least_ess(self) -> float:
        """Share of an arm below which an effective sample size is flagged."""
        return float(self.info["settings"]["least_ess"])

    @property
    def estimand(self) -> str:
        """What ``aie`` is an estimate of, and where that is right: one sentence, by the estimator."""
        estimator = self.info["settings"].get("estimator", "balancing")
        if estimator == "continuous_unit" and "slope" not in self.info:
            return _BIASED
        return _ESTIMANDS[EARLIER_NAMES.get(estimator, estimator)]

    def names(self) -> list[str]:
        """Names of the units, in order."""
        if self.level != "neuron":
            return list(self.widths)
        return [f"{site}[{index}]" for site, width in self.widths.items() for index in range(width)]

    def ranking(
        self,
        *,
        side: Literal["adjusted", "unadjusted"] = "adjusted",
        sign: Literal["any", "positive"] = "any",
        alpha: float | None = None,
    ) -> list[int]:
        """Units by falling ``|aie|``, ties by number; those without an estimate left out.

        Args:
            side: which effects.
            sign: ``"positive"``: only units through which the treatment raises the outcome.
            alpha: only units whose q is at most this.
        """
        found = getattr(self, side)
        keep = found.aie > 0 if sign == "positive" else ~found.aie.isnan()
        if alpha is not None:
            keep &= found.q <= alpha
        order = found.aie.abs().nan_to_num(-1).argsort(descending=True, stable=True)
        return [unit for unit in order.tolist() if keep[unit]]

    def leading_sites(self, count: int, **choice: Any) -> list[str]:
        """The sites of the ``count`` leading MLPs, in the order of the layers; see :meth:`ranking`.

        Raises:
            ValueError: the units are no MLPs, or fewer than ``count`` have an estimate.
        """
        if self.level != "mlp":
            raise ValueError(f"effects: are those of level {self.level!r}, expected 'mlp'")
        leading = self._leading(count, choice)
        names = list(self.widths)
        return [names[unit] for unit in sorted(leading)]

    def neurons(self, count: int, **choice: Any) -> NeuronSet:
        """The ``count`` neurons of largest ``|aie|``; see :meth:`ranking`.

        Raises:
            ValueError: the units are no neurons, or fewer than ``count`` have an estimate.
        """
        if self.level != "neuron":
            raise ValueError(f"effects: are those of level {self.level!r}, expected 'neuron'")
        indices: dict[str, list[int]] = {}
        for unit in self._leading(count, choice):
            for site, width in self.widths.items():
                if unit < width:
                    indices.setdefault(site, []).append(unit)
                    break
                unit -= width
        return NeuronSet(indices)

    def _leading(self, count: int, choice: dict[str, Any]) -> list[int]:
        ranking = self.ranking(**choice)
        if len(ranking) < integer("count", count, 1):
            raise ValueError(f"count: only {len(ranking)} of {len(self)} units qualify, got {count}")
        return ranking[:count]

    def scores(self, side: Literal["adjusted", "unadjusted"] = "adjusted") -> NeuronScores:
        """``aie`` of neurons by site; 0 where there is no estimate.

        Raises:
            ValueError: the units are no neurons.
        """
        if self.level != "neuron":
            raise ValueError(f"effects: are those of level {self.level!r}, expected 'neuron'")
        parts = getattr(self, side).aie.nan_to_num(0.0).float().split(list(self.widths.values()))
        return NeuronScores(dict(zip(self.widths, parts, strict=True)), {"method": "Mediation", "side": side})

    def localisation(self, *, corrected: bool = False) -> list[dict[str, Any]]:
        """Measures of both sides and of their paired difference, with intervals, over the units that both estimate.

        Args:
            corrected: for the estimates' noise, see :meth:`Side.measures`.

        Returns:
            Rows ``{"measure", "adjusted", "unadjusted", "difference"}``, each a triple (value, low, high).
        """
        both = ~(self.adjusted.aie.isnan() | self.unadjusted.aie.isnan())
        found = {side: getattr(self, side).measures(both, corrected=corrected) for side in SIDES}
        found["difference"] = tuple(a - b for a, b in zip(found["adjusted"], found["unadjusted"], strict=True))
        rows = []
        for index, measure in enumerate(MEASURES):
            row: dict[str, Any] = {"measure": measure}
            for side, (value, draws) in found.items():
                low, high = interval(draws[:, index], self.adjusted.confidence)
                row[side] = (float(value[index]), float(low), float(high))
            rows.append(row)
        return rows

    def rows(self, *, most: int = 1000) -> list[dict[str, Any]]:
        """Flat result rows ``{"case", "method", "metric", "value", "spread", "n", "unit"}``.

        Args:
            most: units that get rows of their own, of largest adjusted effect.
        """
        n = int(self.info["prompts"])
        out: list[tuple[str, str, str, float, float | None]] = []
        for side in SIDES:
            own: Side = getattr(self, side)
            out.append(("total", side, "total effect", own.total_effect, float(spread(own.total_draws))))
            low, high = interval(own.total_draws, own.confidence)
            out += [
                ("total", side, "total effect_low", float(low), None),
                ("total", side, "total effect_high", float(high), None),
            ]
        for corrected in (False, True):
            for row in self.localisation(corrected=corrected):
                name = row["measure"] + (" corrected" if corrected else "")
                for side in (*SIDES, "difference"):
                    for ending, value in zip(("", "_low", "_high"), row[side], strict=True):
                        out.append(("localisation", side, name + ending, value, None))
        names = self.names()
        for unit in sorted(self.ranking()[: integer("most", most, 0)]):
            for side in SIDES:
                own = getattr(self, side)
                out.append((names[unit], side, "aie", float(own.aie[unit]), float(own.error[unit])))
                for metric, values in (
                    ("aie_low", own.interval[0]),
                    ("aie_high", own.interval[1]),
                    ("nie1", own.nie1),
                    ("nie0", own.nie0),
                    ("q", own.q),
                    ("ess", own.ess),
                ):
                    out.append((names[unit], side, metric, float(values[unit]), None))
        return [
            {"case": case, "method": method, "metric": metric, "value": value, "spread": error, "n": n, "unit": ""}
            for case, method, metric, value, error in out
        ]

    def _to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        names = (*_VECTORS, "total", "draws", "total_draws")
        sides = {side: {name: getattr(getattr(self, side), name) for name in names} for side in SIDES}
        rest = {
            "level": self.level,
            "widths": list(self.widths.items()),
            "info": json.loads(canonical_json(self.info, nan_to_null=True)),
            "confidence": self.adjusted.confidence,
        }
        return flat(sides), {"rest": rest}

    @classmethod
    def _of_parts(cls, file: Contents) -> Effects:
        rest = file.value("rest", dict)
        level = choice("level", rest["level"], ("mlp", "neuron", "unit"))
        widths = {instance("widths", site, str): integer("widths", width, 1) for site, width in rest["widths"]}
        units = sum(widths.values()) if level == "neuron" else len(widths)
        confidence = share_of("confidence", rest["confidence"])
        parts = {side: _checked_side(side, of_group(side, file.tensors), units) for side in SIDES}
        adjusted, unadjusted = (Side(**parts[side], confidence=confidence) for side in SIDES)
        found = cls(adjusted, unadjusted, level, widths, instance("info", rest["info"], dict))
        integer("info: prompts", found.info["prompts"], 1)
        number("info: least_ess", found.info["settings"]["least_ess"])
        instance("info: estimand", found.estimand, str)
        for topic in instance("info: topics", found.info.get("topics", []), list):
            instance("info: topics", topic, dict)
        return found

    def __repr__(self) -> str:
        known = int((~self.adjusted.aie.isnan()).sum())
        return (
            f"Effects({len(self)} units of level {self.level}, {known} with an adjusted estimate, "
            f"{self.info['prompts']} prompts)"
        )

    def __str__(self) -> str:
        """What is estimated, total effects, localisation, and the units of largest adjusted effect."""
        head, tail = self._sentences()
        tables = ["\n".join(["", *folded(table.lines, left=table.left)]) for table in self._tables()]
        return "\n".join([wrapped("\n".join(head)), *tables, *map(wrapped, tail)])

    def _repr_html_(self) -> str:
        head, tail = self._sentences()
        return page(self._tables(), [*head, *tail])

    def _sentences(self) -> tuple[list[str], list[str]]:
        """What stands above the tables, and what below them."""
        head = [repr(self), self.estimand]
        for side in SIDES:
            own: Side = getattr(self, side)
            low, high = interval(own.total_draws, own.confidence)
            head.append(f"total effect, {side}: {own.total_effect:.4f} [{float(low):.4f}, {float(high):.4f}]")
        counts = Counter(chain.from_iterable(self.adjusted.flags(self.least_ess)))
        flagged = ", ".join(f"{name} {count}" for name, count in counts.items())
        return head, [f"flagged units: {flagged}"] if counts else []

    def _tables(self) -> list[Table]:
        localisation = [["localisation", "adjusted", "unadjusted", "difference"], *self._localised()]
        units = [["unit", "AIE adjusted", "AIE unadjusted", "q", "ESS", "flags"], *self._leading_lines(20)]
        return [Table("", lines, left=len(lines[0])) for lines in (localisation, units)]

    def _localised(self) -> list[list[str]]:
        lines = []
        for corrected in (False, True):
            for row in self.localisation(corrected=corrected):
                texts = ["{:.3g} [{:.3g}, {:.3g}]".format(*row[side]) for side in (*SIDES, "difference")]
                lines.append([row["measure"] + (", noise taken off" if corrected else ""), *texts])
        return lines

    def _leading_lines(self, most: int) -> list[list[str]]:
        names, flags = self.names(), self.adjusted.flags(self.least_ess)
        lines = []
        for unit in self.ranking()[:most]:
            texts = []
            for side in SIDES:
                own: Side = getattr(self, side)
                low, high = (float(end[unit]) for end in own.interval)
                texts.append(f"{float(own.aie[unit]):+.4f} [{low:+.4f}, {high:+.4f}]")
            q, ess = float(self.adjusted.q[unit]), float(self.adjusted.ess[unit])
            lines.append([names[unit], *texts, f"{q:.2g}", f"{ess:.0%}", ", ".join(flags[unit])])
        return lines


def _checked_side(side: str, tensors: dict[str, Tensor], units: int) -> dict[str, Tensor]:
    """The tensors of a side in a file, once they are of so many units."""
    types = {"status": torch.int32, "constant": torch.bool}
    for name in _VECTORS:
        shaped(f"{side}/{name}", tensors.get(name), types.get(name, torch.float64), units)
    shaped(f"{side}/total", tensors.get("total"), torch.float64, 2)
    draws = shaped(f"{side}/draws", tensors.get("draws"), torch.float32, None, units)
    shaped(f"{side}/total_draws", tensors.get("total_draws"), torch.float64, len(draws))
    return tensors
