"""What MacU's localisation found: two score maps, the sets chosen by them, and how far to trust them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spurge.engine.base.checks import instance
from spurge.engine.base.files import canonical_json
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.tables import Table, folded, page, wrapped
from spurge.engine.base.tensor_files import Contents, flat, of_group
from spurge.engine.cascade.audit import Agreement
from spurge.engine.cascade.scores import NeuronScores, NeuronSet
from spurge.engine.models.parameters import named_as

_SIDES = ("causal", "spurious")


@dataclass(frozen=True, eq=False, repr=False)
class Located(Saved, kind="located", what="a file of located neurons"):
    """Neurons that carry causal and spurious correlations (MacU section 3.1.3).

    Attributes:
        causal, spurious: Eq. 5 of every neuron, once with the causal and once with the spurious golden sets, summed
            over the training texts.
        causal_set, spurious_set: the neurons selected by them.
        certificate: exact single-unit ablations of a short list beside their scores; empty where none was asked for.
        info: settings, data and model fingerprints, completeness by site, seed; JSON-able.
    """

    causal: NeuronScores
    spurious: NeuronScores
    causal_set: NeuronSet
    spurious_set: NeuronSet
    certificate: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.causal.widths != self.spurious.widths:
            raise ValueError("causal, spurious: the two score maps must have the same sites and widths")
        for name in ("causal_set", "spurious_set"):
            getattr(self, name).check(self.causal.widths)
        for name in ("certificate", "info"):
            object.__setattr__(self, name, json.loads(canonical_json(getattr(self, name), nan_to_null=True)))

    @property
    def overlap(self) -> NeuronSet:
        """Neurons of both sets: what the paper gives to the swarm."""
        return self.causal_set & self.spurious_set

    @property
    def spurious_only(self) -> NeuronSet:
        """Neurons of the spurious set alone: what the paper erases."""
        return self.spurious_set - self.causal_set

    def called_as_in(self, names: Collection[str]) -> Located:
        """The same with the ``names`` that a model in other wrappers has for the sites; itself where they fit."""
        new = {site: named_as(site, names) for site in self.causal.widths}
        if all(site == name for site, name in new.items()):
            return self

        def renamed(found: Mapping[str, Any]) -> dict[str, Any]:
            return {new.get(site, site): value for site, value in found.items()}

        by_site: dict[str, Any] = {
            key: renamed(self.info[key]) for key in ("model", "completeness") if key in self.info
        }
        return Located(
            NeuronScores(renamed(self.causal.values), self.causal.info),
            NeuronScores(renamed(self.spurious.values), self.spurious.info),
            NeuronSet(renamed(self.causal_set.to_dict())),
            NeuronSet(renamed(self.spurious_set.to_dict())),
            self.certificate,
            {**self.info, **by_site},
        )

    def summary(self) -> list[dict[str, Any]]:
        """One flat row per site: neurons of each set, sums of the scores, and what completeness compares them with.

        ``*_effect`` is F(1) - F(0) summed over the texts, ``*_gap`` the share of it that the scores miss (absolute
        residuals summed over texts); None where the path has no F(0) of its own.
        """
        completeness = self.info.get("completeness", {})
        rows = []
        for site, width in self.causal.widths.items():
            row: dict[str, Any] = {"site": site, "neurons": width}
            for name, scores in (("causal", self.causal), ("spurious", self.spurious)):
                row[name] = int(getattr(self, f"{name}_set").indices(site).numel())
                row[f"{name}_sum"] = scores.per_site()[site]
                row |= {f"{name}_{key}": completeness.get(site, {}).get(f"{name}_{key}") for key in ("effect", "gap")}
            row["overlap"] = int(self.overlap.indices(site).numel())
            rows.append(row)
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """Flat result rows ``{"case", "method", "metric", "value", "n", "unit"}``, as reports write them."""
        method, n = str(self.info.get("method", "MacU")), self.info.get("texts")
        counts = {"causal": self.causal_set, "spurious": self.spurious_set, "overlap": self.overlap}
        out = [("all", f"{name} neurons", len(found), "neurons") for name, found in counts.items()]
        for row in self.summary():
            for name in counts:
                out.append((row["site"], f"{name} neurons", row[name], "neurons"))
            for name in ("causal_sum", "spurious_sum", "causal_effect", "spurious_effect"):
                if row[name] is not None:
                    out.append((row["site"], name.replace("_", " "), row[name], ""))
        for name, value in self.certificate.get("agreement", {}).items():
            if value is not None:
                out.append(("short list", f"rank correlation, {name}", value, ""))
        return [
            {"case": case, "method": method, "metric": metric, "value": value, "spread": None, "n": n, "unit": unit}
            for case, metric, value, unit in out
        ]

    def _to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = flat({"causal": self.causal.values, "spurious": self.spurious.values})
        rest = {
            "causal": self.causal.info,
            "spurious": self.spurious.info,
            "causal_set": self.causal_set.to_dict(),
            "spurious_set": self.spurious_set.to_dict(),
            "certificate": self.certificate,
            "info": self.info,
        }
        return tensors, rest

    @classmethod
    def _of_parts(cls, file: Contents) -> Located:
        causal, spurious = (NeuronScores(of_group(side, file.tensors), file.value(side, dict)) for side in _SIDES)
        causal_set, spurious_set = (NeuronSet(file.value(f"{side}_set", dict)) for side in _SIDES)
        found = cls(
            causal, spurious, causal_set, spurious_set, file.value("certificate", dict), file.value("info", dict)
        )
        instance("info: settings", found.info.get("settings", {}), dict)
        instance("info: model", found.info.get("model", {}), dict)
        str(found)  # what it prints of certificate and info is there, too
        return found

    def __repr__(self) -> str:
        return (
            f"Located({len(self.causal_set)} causal and {len(self.spurious_set)} spurious neurons of "
            f"{sum(self.causal.widths.values())}, {len(self.overlap)} in both)"
        )

    def __str__(self) -> str:
        """A table with one line per site, the phrases that go with a label, and how well scores and ablation agree."""
        table = "\n".join(folded(self._table(), gap=1, least=(40, 8, 7, 9, 5)))
        return wrapped("\n".join([repr(self), table, *self._notes()]))

    def _repr_html_(self) -> str:
        return page([Table(repr(self), self._table())], self._notes())

    def _table(self) -> list[list[str]]:
        table = [["site", "neurons", "causal", "spurious", "both"]]
        for row in self.summary():
            site = row["site"] if len(row["site"]) <= 40 else "..." + row["site"][-37:]
            table.append([site, *(str(row[name]) for name in ("neurons", "causal", "spurious", "overlap"))])
        return table

    def _notes(self) -> list[str]:
        lines = []
        for phrase in self.info.get("phrases", []):
            lines.append(
                f"goes with {phrase['label']}: {phrase['text']!r} ({phrase['count']} texts, z {phrase['strength']:.1f})"
            )
        agreement = ", ".join(f"{k} {v:.2f}" for k, v in self.certificate.get("agreement", {}).items() if v is not None)
        if agreement:
            lines.append(f"rank correlation of scores with exact ablation: {agreement}")
        for side, own in self.certificate.get("audit", {}).items():
            lines.append(f"all {side} scores, by {own['drawn']} values drawn: {Agreement.of(own)}")
        return lines
