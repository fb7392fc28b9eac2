"""Topic-adjusted causal mediation: which units carry the effect of the prompt on the outcome, and how localised it is.

Heckerman, Fotouhi, Bahadori and others, "Removing Spurious Correlation from Neural Network Interpretations" (arXiv
2412.02893). What is the paper's, as far as its summary tells: the graph (treatment q, unit n, topic x of the
conversation by clustering, outcome y), natural indirect effects averaged for each unit (AIE), entropy balancing in the
place of propensity models, ordinary forward passes only. What is this package's reconstruction: the moments that are
balanced, the coding of q and n, the reduction of an MLP to numbers, intervals, and the two other estimators.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.base.budgets import budget, parse_bytes
from spurge.engine.base.checks import checked_values, choice, device_of, integer, number, share_of
from spurge.engine.base.files import PathLike, canonical_json, fingerprint, spurge_version
from spurge.engine.base.resume import Blocks
from spurge.engine.base.statistics import bootstrap_counts
from spurge.engine.base.tensor_files import Contents, flat
from spurge.engine.causal.confounders import Confounders
from spurge.methods.mediation.continuous_unit import ContinuousUnit
from spurge.methods.mediation.effects import EARLIER_NAMES, SIDES, Effects, Side
from spurge.methods.mediation.estimators import BalancedColumns, BalancedStrata, DichotomisedMediator, Estimator
from spurge.methods.mediation.mediators import Mediators, binary, units_of

Kind = Literal["balancing", "dichotomised_mediator", "continuous_unit"]
_PARTS = ("nie1", "nie0", "aie", "ess", "worst", "status")


@dataclass(frozen=True, kw_only=True)
class Mediation:
    """Settings of the mediation analysis, checked at birth; :meth:`effects` runs it.

    Attributes:
        estimator: ``"balancing"``: entropy balancing with nested weights. ``"dichotomised_mediator"`` (earlier:
            ``"binary_mediator"``): the effect through units cut at their median, not through the units; topics only.
            ``"continuous_unit"``: the unit as a continuous treatment, right for an outcome that is linear in unit,
            treatment and confounders, without an interaction of unit and treatment.
        interact: balance a unit's mean within each topic (with each column), not only overall.
        square: balance a unit's square.
        tolerance: greatest standardised difference that balancing may leave.
        resamples: bootstrap resamples of the prompts, the same for all units; 0: none, and no intervals.
        confidence: of the intervals.
        least_ess: effective sample size, as a share of its arm, below which a unit is flagged.
        least_arm: topics with fewer prompts in either arm are left out of all estimates. 1 keeps whatever has both.
        memory: budget of a block of units, ``"256MiB"`` or bytes; None: a share of what is free.
        device: where the estimates are made, e.g. ``"cuda"``; None: where the units are (`Recording.to`).
        seed: of the resamples.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: a setting out of range or of another type.
    """

    estimator: Kind = "balancing"
    interact: bool = True
    square: bool = True
    tolerance: float = 1e-6
    resamples: int = 200
    confidence: float = 0.95
    least_ess: float = 0.1
    least_arm: int = 10
    memory: str | int | None = None
    device: str | torch.device | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "estimator", EARLIER_NAMES.get(self.estimator, self.estimator))
        choice("estimator", self.estimator, get_args(Kind))
        for name in ("interact", "square", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if number("tolerance", self.tolerance) <= 0:
            raise ValueError(f"tolerance: expected a number above 0, got {self.tolerance}")
        if not 0 < number("confidence", self.confidence) < 1:
            raise ValueError(f"confidence: expected a number between 0 and 1, got {self.confidence}")
        share_of("least_ess", self.least_ess)
        for name, least in (("resamples", 0), ("least_arm", 1), ("seed", 0)):
            integer(name, getattr(self, name), least)
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.device is not None:
            object.__setattr__(self, "device", str(device_of("device", self.device)))

    def effects(
        self,
        units: Mediators | Tensor,
        treatment: Any,
        outcome: Any,
        confounders: Confounders | Any,
        *,
        threshold: float = 0.5,
        resume: PathLike | None = None,
    ) -> Effects:
        """Average indirect effects of all units, adjusted for the confounders and not.

        An average indirect effect is read as the mean of NIE(1) and NIE(0). Both sides use the same prompts and the
        same resamples. Needs recorded numbers only, no model.

        Args:
            units: values of U units for N prompts (`spurge.mlp_units`, `spurge.neuron_units`), or a tensor ``[U, N]``.
            treatment: of each prompt, True or False; of scores, such as toxicity in [0, 1], True from ``threshold`` on.
            outcome: finite numbers ``[N]``, such as the toxicity of the continuation.
            confounders: of the prompts: `Confounders`, or topics (`spurge.find_topics`, numbers or names).
            threshold: where scores of the treatment are cut.
            resume: a folder for finished blocks of units; a second call with the same arguments goes on where the
                first stopped.

        Raises:
            TypeError: an argument of another type.
            ValueError: lengths that do not fit, numbers that are not finite, an arm without prompts, a topic that
                predicts the treatment (in all topics one arm is missing), confounders that cannot be balanced at all
                (`spurge.engine.causal.balancing.Unbalanced`), or ``resume`` of another job.
        """
        if not isinstance(units, Mediators):
            units = units_of(units)
        if not isinstance(confounders, Confounders):
            confounders = Confounders.of(confounders)
        treated = binary(treatment, units.rows, threshold)
        outcomes = _outcome(outcome, units.rows)
        if len(confounders) != units.rows:
            raise ValueError(f"confounders: expected {units.rows} prompts like the units, got {len(confounders)}")
        kept, dropped = self._kept(treated, confounders)
        treated, outcomes, confounders = treated[kept], outcomes[kept], confounders.subset(kept)
        device = units.device if self.device is None else torch.device(self.device)
        estimators = {
            "adjusted": self._estimator(treated, outcomes, confounders, units.numbers, device),
            "unadjusted": self._estimator(treated, outcomes, None, units.numbers, device),
        }
        counts = torch.cat(
            [torch.ones(1, len(kept), dtype=torch.float64), bootstrap_counts(len(kept), self.resamples, self.seed)]
        ).to(device)
        totals = {side: _totals(own, counts) for side, own in estimators.items()}
        info = self._info(units, kept, treated, outcomes, confounders, dropped, threshold)
        if device.type != "cpu":
            info["device"] = device.type  # another kind rounds otherwise
        blocks = self._blocks(units, kept, estimators, counts, resume, _mark(info))
        adjusted, unadjusted = (
            Side(
                **{name: torch.cat([block[side][name] for block in blocks]) for name in (*_PARTS, "constant")},
                total=totals[side][0],
                draws=torch.cat([block[side]["draws"] for block in blocks], 1),
                total_draws=totals[side][1:, 0] - totals[side][1:, 1],
                confidence=self.confidence,
            )
            for side in SIDES
        )
        return Effects(adjusted, unadjusted, units.level, dict(units.widths), info | {"spurge": spurge_version()})

    # ---- inside ------------------------------------------------------------------------------------------------

    def _kept(self, treated: Tensor, confounders: Confounders) -> tuple[Tensor, list[dict[str, Any]]]:
        """Prompts of topics with enough of both arms, and what is left out."""
        for arm, name in ((treated, "treated"), (~treated, "untreated")):
            if int(arm.sum()) < self.least_arm:
                raise ValueError(f"treatment: {int(arm.sum())} {name} prompts, need at least {self.least_arm}")
        if confounders.topics is None:
            return torch.arange(len(treated)), []
        count = len(confounders.names)
        sizes = torch.bincount(confounders.topics, minlength=count)
        with_treatment = torch.bincount(confounders.topics[treated], minlength=count)
        thin = (sizes > 0) & (torch.minimum(with_treatment, sizes - with_treatment) < self.least_arm)
        if bool((thin == (sizes > 0)).all()):
            raise ValueError(
                f"treatment: every topic has fewer than {self.least_arm} prompts in one arm: the topic predicts the "
                "treatment, and there is nothing to compare"
            )
        dropped = [
            {"topic": confounders.names[topic], "prompts": int(sizes[topic]), "treated": int(with_treatment[topic])}
            for topic in thin.nonzero()[:, 0].tolist()
        ]
        return (~thin[confounders.topics]).nonzero()[:, 0], dropped

    def _estimator(
        self,
        treated: Tensor,
        outcomes: Tensor,
        confounders: Confounders | None,
        numbers: int,
        device: torch.device,
    ) -> BalancedStrata | BalancedColumns | DichotomisedMediator | ContinuousUnit:
        """The estimator that these confounders and units call for; None: unadjusted."""
        columns = torch.zeros(len(treated), 0, dtype=torch.float64) if confounders is None else confounders.design()
        topics = torch.zeros(len(treated), dtype=torch.int64) if confounders is None else confounders.topics
        treated, outcomes, columns = treated.to(device), outcomes.to(device), columns.to(device)
        single = confounders is None or confounders.columns is None
        how: dict[str, Any] = {"interact": self.interact, "square": self.square, "tolerance": self.tolerance}
        if self.estimator == "continuous_unit":
            if numbers > 1:
                raise ValueError(f"units: the continuous unit is one number, got {numbers}; reduce it otherwise")
            return ContinuousUnit(treated, outcomes, columns, tolerance=self.tolerance)
        if self.estimator == "dichotomised_mediator" and (numbers > 1 or not single):
            what = f"units of {numbers} numbers" if numbers > 1 else "columns"
            raise ValueError(f"estimator: the dichotomised mediator knows topics and single numbers only, got {what}")
        if numbers > 1 or not single:
            return BalancedColumns(treated, outcomes, columns, numbers=numbers, **how)
        assert topics is not None  # a single confounder is topics
        kinds, strata = topics.unique(return_inverse=True)
        strata, count = strata.to(device), len(kinds)
        if self.estimator == "dichotomised_mediator":
            return DichotomisedMediator(treated, outcomes, strata, count)
        return BalancedStrata(treated, outcomes, strata, count, **how)

    def _info(
        self,
        units: Mediators,
        kept: Tensor,
        treated: Tensor,
        outcomes: Tensor,
        confounders: Confounders,
        dropped: list[dict[str, Any]],
        threshold: float,
    ) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(self).items() if name not in ("memory", "device", "progress")}
        topics = []
        if confounders.topics is not None:
            for topic in confounders.topics.unique().tolist():
                own = confounders.topics == topic
                topics.append(
                    {
                        "topic": confounders.names[topic],
                        "prompts": int(own.sum()),
                        "treated": int(treated[own].sum()),
                    }
                )
        return {
            "method": "Mediation",
            "settings": settings,
            "threshold": float(threshold),
            "units": units.info
            | {
                "level": units.level,
                "numbers": units.numbers,
                "widths": [list(item) for item in units.widths.items()],
            },
            "prompts": len(treated),
            "treated": int(treated.sum()),
            "topics": topics,
            "dropped": dropped,
            "columns": list(confounders.column_names),
            "data": fingerprint(
                canonical_json([*(fingerprint(x) for x in (kept, treated, outcomes)), confounders.fingerprint()])
            ),
            "seed": self.seed,
        } | ({"slope": "within arms"} if self.estimator == "continuous_unit" else {})

    def _blocks(
        self,
        units: Mediators,
        kept: Tensor,
        estimators: dict[str, Any],
        counts: Tensor,
        resume: PathLike | None,
        mark: str,
    ) -> list[dict[str, dict[str, Tensor]]]:
        """Effects of all units, block by block, both sides of each."""
        finished = Blocks(resume, "mediation block", "a block of a mediation", mark)
        each = max(own.unit_bytes() for own in estimators.values()) + 8 * len(kept) + 8 * len(counts) * len(SIDES)
        size = max(1, min(len(units), budget(self.memory, counts.device) // (2 * each * units.numbers)))
        kept = kept.to(counts.device)
        found = []
        work = len(units) * len(counts) * len(SIDES)
        with tqdm(total=work, desc="mediate", unit="fit", unit_scale=True, disable=not self.progress) as bar:
            for span, values in units.blocks(size):
                name = f"units-{span.start:08d}-{span.stop:08d}"
                block = finished.find(name, _block_of)
                if block is None:
                    values = values.to(counts.device)[:, kept]
                    block = {side: _side(own, values, counts, bar) for side, own in estimators.items()}
                    finished.keep(name, flat(block))
                else:
                    bar.update((span.stop - span.start) * len(counts) * len(SIDES))
                found.append(block)
        return found


def _mark(info: dict[str, Any]) -> str:
    """What tells resume files apart, with the names that the first of them were written under."""
    settings = dict(info["settings"])
    first = {name: earlier for earlier, name in EARLIER_NAMES.items()}
    settings["estimator"] = first.get(settings["estimator"], settings["estimator"])
    return fingerprint(canonical_json(info | {"settings": settings}))


def _outcome(outcome: Any, rows: int) -> Tensor:
    found = outcome if isinstance(outcome, Tensor) else torch.as_tensor(np.asarray(outcome))
    if found.dim() != 1 or len(found) != rows:
        raise ValueError(f"outcome: expected one for each of {rows} prompts, got shape {tuple(found.shape)}")
    return checked_values("outcome", found.double()[:, None], 1)[:, 0].cpu()


def _totals(estimator: Estimator, counts: Tensor) -> Tensor:
    """mu11 and mu00 of the whole and of every resample, float64 ``[1 + R, 2]``; NaN for one that has none.

    Raises:
        Unbalanced: the whole has none.
    """
    found = [estimator.total(counts[0])]
    for count in counts[1:]:
        try:
            found.append(estimator.total(count))
        except ValueError:
            found.append((torch.nan, torch.nan))
    return torch.tensor(found, dtype=torch.float64)


def _side(estimator: Estimator, values: Tensor, counts: Tensor, bar: Any) -> dict[str, Tensor]:
    """The whole, then every resample from there."""
    prepared = estimator.prepare(values)
    whole = estimator.estimate(prepared, counts[0])
    bar.update(len(values))
    draws = values.new_empty(len(counts) - 1, len(values), dtype=torch.float32)
    for own, count in zip(draws, counts[1:], strict=True):
        own.copy_(estimator.estimate(prepared, count, whole.warm).aie)
        bar.update(len(values))
    constant = (values == values[:, :1]).flatten(1).all(1)
    found = {name: getattr(whole, name) for name in _PARTS} | {"draws": draws, "constant": constant}
    return {name: value.cpu() for name, value in found.items()}


def _block_of(file: Contents) -> dict[str, dict[str, Tensor]]:
    """Both sides of a finished block, from its file."""
    return {side: {name: file.tensors[f"{side}/{name}"] for name in (*_PARTS, "draws", "constant")} for side in SIDES}
