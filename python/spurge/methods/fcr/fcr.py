"""FCR: a class, or a feature seen as a fictitious class, removed from a classifier by single weights.

Hakemi, Hassan, Akhtar, Mian: "Post-hoc Spurious Correlation Neutralization with Single-Weight Fictitious Class
Unlearning". Equation and algorithm numbers are that paper's; what it leaves open is a named option here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spurge.engine.base.checks import choice, device_of, integer, warn
from spurge.engine.evaluation.groups import accuracies
from spurge.engine.features.features import Features
from spurge.engine.last_layer.association import Activation, Association, Reduction, association
from spurge.engine.last_layer.fitting import fit_head
from spurge.engine.models.heads import Head
from spurge.methods.fcr.edges import Choice, Edge, Sign, best_columns, tilt, usable
from spurge.methods.fcr.fictitious import Row, count_kinds, features_and_rows
from spurge.methods.fcr.orthogonal import checked_rate
from spurge.methods.fcr.rates import CRITERIA, LABELS, Chooser, Chosen, Criterion, describe_choice
from spurge.methods.fcr.removal import Removal

Score = Literal["sca", "product"]
Rates = Literal["shared", "each"]


@dataclass(frozen=True, kw_only=True)
class FCR:
    r"""Settings: :meth:`remove_class` is Algorithm 1, :meth:`remove_feature` Algorithm 2.

    Attributes:
        score: edges are ranked by Eq. 6, or (``"product"``) by :math:`G_c A_c` without the entropies.
        reduction: accumulate class means, or the sums of Eq. 3 and 4, which class sizes sway: :meth:`paper`.
        activation: of a negative feature counts its size, or nothing.
        sign: only positive weights, so that the edit lowers the output; ``"any"`` is literal Eq. 7, which raises it
            where the weight is negative.
        least_weight: skip weights below this share of the row's greatest: Eq. 7 divides by the weight.
        weights: :math:`\delta`, how many weights to edit for a class or feature, one after the other.
        rates: a criterion chooses one rate for all edges, as in the paper, or one for each.
        candidates: for each edge so many of the highest scores are tried by the criterion, and the best is taken; the
            paper takes the highest. More than 1 need ``rates="each"``. Independence takes the highest, too: without
            labels, an edit that drowns the classes in noise looks as good.
        most: greatest rate; the paper's range ends at 1.
        row: which output of the classifier a feature is taken from: the one whose predictions go with the feature
            most, the same by class labels, or the one that the chosen unit supports most.
        floor: entropy of activations, as a share of the greatest possible, below which a unit fires for one class only.
        l2: penalty of the head that is fitted for fictitious classes.
        memory: budget of the scores beyond their inputs, e.g. "256MiB".
        device: where features are taken and all is computed, e.g. "cuda"; None: where they are.
        progress: show bars.

    Raises:
        ValueError: a setting out of range.
    """

    score: Score = "sca"
    reduction: Reduction = "mean"
    activation: Activation = "magnitude"
    sign: Sign = "positive"
    least_weight: float = 1e-3
    weights: int = 1
    rates: Rates = "shared"
    candidates: int = 1
    most: float = 1.0
    row: Row = "predicted"
    floor: float = 1e-6
    l2: float = 1e-4
    memory: str | int | None = None
    device: str | torch.device | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("score", Score), ("reduction", Reduction), ("activation", Activation), ("sign", Sign)):
            choice(name, getattr(self, name), get_args(kind))
        choice("row", self.row, get_args(Row))
        choice("rates", self.rates, get_args(Rates))
        integer("weights", self.weights, 1)
        if integer("candidates", self.candidates, 1) > 1 and self.rates != "each":
            raise ValueError("candidates: are compared at rates of their own; give rates='each', too")
        if not 0 <= self.least_weight <= 1:
            raise ValueError(f"least_weight: expected 0 to 1, got {self.least_weight}")
        if checked_rate(self.most) == 0:
            raise ValueError("most: expected a rate above 0, got 0")
        if self.device is not None:
            object.__setattr__(self, "device", str(device_of("device", self.device)))

    @classmethod
    def paper(cls, **changes: Any) -> FCR:
        """One weight for each class, the one of highest SCA by the sums of Eq. 3 and 4, and one rate for all.

        Where classes are of equal size, sums and means choose the same.
        """
        return cls(**{"reduction": "sum", **changes})

    @classmethod
    def best(cls, **changes: Any) -> FCR:
        """What did best where it was measured: class means, five candidates for each edge, and a rate for each.

        On frozen features a shortcut is spread over many units and no shared rate may help; a criterion that is free to
        balance the rates does. It needs enough selection data: the choice is among more.
        """
        return cls(**{"reduction": "mean", "rates": "each", "candidates": 5, **changes})

    def remove_class(
        self, features: Features, label: int | str, *, rate: float | None = None, angle: float | None = None
    ) -> Removal:
        """Tilts the hyperplane of one class about its most specific edge (Algorithm 1); only that output changes.

        Args:
            features: labelled samples of all classes, and the head to edit.
            label: the class, its number or its name.
            rate: r of Eq. 8, default 1: orthogonal.
            angle: degrees of tilt, in place of a rate.

        Raises:
            ValueError: no such class or no samples of it, both a rate and an angle, a rate above ``most``, or no edge
                that can be edited.
        """
        if isinstance(label, str):
            label = features.names.index(choice("label", label, features.names))
        label = integer("label", label, 0)
        if label >= features.head.outputs:
            raise ValueError(f"label: expected a class below {features.head.outputs}, got {label}")
        if rate is None and angle is None:
            rate = 1.0
        _only_one(rate=rate, angle=angle)
        features = self._placed(features)
        found = self._associate(features.values, features.labels, features.head, [label], label)
        scores = self._scores(found)[0]
        allowed = usable(features.head.weight[label], self.least_weight, self.sign)
        picks = self._columns(scores, allowed, label, label, features.head, [])
        edges, head = tilt(features.head, picks, rate=_rate(rate), angle=angle, choice=None, most=self.most)
        text = f"class labels of {len(features)} samples for the scores; the tilt was given"
        info = self._info(features, "remove_class", label=label, says=text)
        return Removal(tuple(edges), features.head, head, labels="class", info=info)

    def remove_feature(
        self,
        features: Features,
        feature_labels: Tensor,
        *,
        feature: int | Sequence[int] | None = None,
        row: int | None = None,
        fictitious: Head | None = None,
        select: Features | None = None,
        criterion: Criterion | None = None,
        rate: float | None = None,
        angle: float | None = None,
    ) -> Removal:
        """Takes a feature's influence out of a class by the edge most specific for the feature (Algorithm 2).

        A head for the feature is fitted on the same features; its most specific edge gives the unit, and the weight
        from that unit in the classifier is edited. The feature may be labelled in another set than the classifier was
        made with.

        Args:
            features: samples for which the feature is known, and the head to edit.
            feature_labels: the fictitious class of each, int64 ``[N]``.
            feature: which fictitious classes to remove; default for each class the one that goes with it most: one
                weight for every class of the classifier.
            row: the output to edit; default by the setting ``row``.
            fictitious: a head for the feature, instead of fitting one.
            select: data to choose the rate on.
            criterion: least gap between average and worst group (the paper's), best worst group, best worst class,
                or (no labels) the least dependence of predictions on the predicted feature. The last assumes that the
                feature and the class are independent.
            rate, angle: a given tilt, in place of a criterion.

        Warns:
            UserWarning: edges and rates are chosen on the same rows, or the least gap lies where the worst group is
                worse than without an edit.

        Raises:
            ValueError: labels, features or rows out of range; not exactly one way to set the tilt; no groups or labels
                that the criterion needs; or no edge that can be edited.
        """
        _only_one(rate=rate, angle=angle, criterion=criterion)
        _check_criterion(criterion, features, select)
        features, select = self._placed(features), None if select is None else self._placed(select)
        kinds = count_kinds(features, feature_labels, fictitious)
        feature_labels = feature_labels.to(features.values.device)
        if fictitious is None:
            fictitious = fit_head(features.values, feature_labels, kinds, l2=self.l2, progress=self.progress)
        pairs = features_and_rows(features, feature_labels, kinds, feature, row, self.row)
        found = self._associate(features.values, feature_labels, fictitious, sorted({f for f, _ in pairs}), None)
        scores = dict(zip(found.rows.tolist(), self._scores(found), strict=True))
        picks: list[Edge] = []
        for kind, output in pairs:
            picks += self._feature_edges(scores[kind], fictitious, kind, output, features.head, picks)

        rounds: list[Chosen] = []
        choose = None
        if criterion is not None and select is not None:
            predicted = fictitious.predictions(select.values) if criterion == "independence" else None
            chooser = Chooser(select, criterion, predicted, high=self.most, each=self.rates == "each")
            choose = self._choose_by(chooser, fictitious, scores, picks, rounds)
        edges, head = tilt(features.head, picks, rate=_rate(rate), angle=angle, choice=choose, most=self.most)
        if criterion == "gap" and select is not None:
            _warn_of_ruin(select, head)

        labels, text = self._labels_used(features, select, criterion, self.row == "labelled" and row is None)
        info = self._info(features, "remove_feature", says=text, criterion=criterion)
        info["rounds"] = [{"rates": chosen.rates, "value": chosen.value} for chosen in rounds]
        curve = rounds[0].curve if rounds else None
        return Removal(tuple(edges), features.head, head, labels, fictitious, curve, info)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _placed(self, features: Features) -> Features:
        return features if self.device is None else features.to(self.device)

    def _associate(
        self, values: Tensor, labels: Tensor, head: Head, rows: list[int], target: int | None
    ) -> Association:
        return association(
            values,
            labels,
            head,
            rows=rows,
            target=target,
            activation=self.activation,
            reduction=self.reduction,
            floor=self.floor,
            memory=self.memory,
            progress=self.progress,
        )

    def _scores(self, found: Association) -> Tensor:
        return (found.sca if self.score == "sca" else found.product).cpu()

    def _columns(
        self, scores: Tensor, allowed: Tensor, target: int, row: int, head: Head, before: Sequence[Edge]
    ) -> list[Edge]:
        """The next ``weights`` edges of a row by score that no edge of ``before`` uses."""
        columns = best_columns(scores, allowed, _columns_of(row, before), self.weights)
        if len(columns) < self.weights:
            signs = "positive " if self.sign == "positive" else ""
            raise ValueError(
                f"edge: row {row} has {len(columns)} usable edges for class {target}, expected {self.weights}: none "
                f"left with a {signs}weight of at least {self.least_weight:g} of the greatest and a score above 0"
            )
        return [_edge(row, column, target, head, scores) for column in columns]

    def _choose_by(
        self,
        chooser: Chooser,
        fictitious: Head,
        scores: Mapping[int, Tensor],
        picks: Sequence[Edge],
        rounds: list[Chosen],
    ) -> Choice:
        """The choice of each round of `tilt`: edges, and rates by the criterion; kept in ``rounds``."""

        def choose(head: Head, edges: Sequence[Edge]) -> list[tuple[Edge, float]]:
            slots = [[edge] for edge in edges]
            if self.candidates > 1 and chooser.criterion != "independence":
                taken = [*(edge for chosen in rounds for edge in chosen.edges), *picks]
                slots = [self._candidates(edge, scores[edge.target], fictitious, head, taken) for edge in edges]
            rounds.append(chooser.choose(head, slots))
            return list(zip(rounds[-1].edges, rounds[-1].rates, strict=True))

        return choose

    def _candidates(
        self, edge: Edge, scores: Tensor, fictitious: Head, head: Head, others: Sequence[Edge]
    ) -> list[Edge]:
        """An edge and the next best of its row that no other edge uses: candidates for one edit."""
        allowed = self._supporting(fictitious, edge.target) & usable(
            head.weight[edge.row], self.least_weight, self.sign
        )
        columns = best_columns(scores, allowed, _columns_of(edge.row, others), self.candidates - 1)
        return [edge, *(_edge(edge.row, column, edge.target, head, scores) for column in columns)]

    def _supporting(self, fictitious: Head, kind: int) -> Tensor:
        """Which units ``[M]`` support a feature in its own head; all where signs do not matter."""
        return (fictitious.weight[kind] > 0) | (self.sign == "any")

    def _feature_edges(
        self, scores: Tensor, fictitious: Head, kind: int, row: int | None, head: Head, before: Sequence[Edge]
    ) -> list[Edge]:
        """Edges of the classifier for one feature; where the row is open, that of the greatest weight."""
        supporting = self._supporting(fictitious, kind)
        if row is None:
            grid = torch.stack([usable(weights, self.least_weight, self.sign) for weights in head.weight])
            columns = best_columns(scores, supporting & grid.any(0))
            row = int(head.weight[:, columns[0]].where(grid[:, columns[0]], -torch.inf).argmax()) if columns else 0
        allowed = supporting & usable(head.weight[row], self.least_weight, self.sign)
        return self._columns(scores, allowed, kind, row, head, before)

    def _labels_used(
        self, features: Features, select: Features | None, criterion: Criterion | None, by_class: bool
    ) -> tuple[str, str]:
        """Which labels beside the feature's were used (none, class or group), and the same for people.

        ``by_class``: rows were chosen by class labels.
        """
        labels = "class" if by_class else "none"
        text = f"feature labels of {len(features)} samples for the edges"
        if by_class:
            text += ", with their class labels"
        if criterion is None:
            return labels, f"{text}; the tilt was given"
        assert select is not None  # a criterion needs it
        text += f"; {describe_choice(criterion, len(select), self.rates == 'each', self.candidates)}"
        return max(labels, LABELS[criterion], key=("none", "class", "group").index), text

    def _info(self, features: Features, step: str, **more: Any) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(self).items() if name != "progress"}
        return {"method": "FCR", "step": step, "settings": settings, "data": features.fingerprint(), **more}


def _check_criterion(criterion: Criterion | None, features: Features, select: Features | None) -> None:
    """Refuses a criterion that is none, or has no data to be measured on."""
    if criterion is None:
        return
    choice("criterion", criterion, CRITERIA)
    if select is None:
        raise ValueError(f"select: criterion {criterion!r} needs data to choose on")
    if select.head.weight.shape != features.head.weight.shape:
        raise ValueError("select: its head has another shape than that of features")

    if len(select) == len(features) and select.fingerprint() == features.fingerprint():
        warn("select: the edges are found on the same rows, on which what is chosen looks better than it is")


def _warn_of_ruin(select: Features, head: Head) -> None:
    """Says it where the least gap lies below what there was: a classifier that is wrong everywhere has no gap."""
    before, after = (
        accuracies(own.logits(select.values), select.labels, select.groups).worst_group for own in (select.head, head)
    )
    if after < before:
        warn(
            f"criterion: the gap is least where the worst group of select has {after:.1f} % right, against "
            f"{before:.1f} % without an edit; 'worst_group' chooses by that itself"
        )


def _edge(row: int, column: int, target: int, head: Head, scores: Tensor) -> Edge:
    return Edge(row, column, target, float(head.weight[row, column]), float(scores[column]))


def _columns_of(row: int, edges: Sequence[Edge]) -> list[int]:
    return [edge.column for edge in edges if edge.row == row]


def _only_one(**ways: Any) -> None:
    """Exactly one of these is given."""
    there = [name for name, value in ways.items() if value is not None]
    if len(there) != 1:
        raise ValueError(f"{' or '.join(ways)}: expected exactly one of them, got {there or 'none'}")


def _rate(rate: Any) -> float | None:
    return None if rate is None else checked_rate(rate)
