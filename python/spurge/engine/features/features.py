"""Features of a labelled set: what the head of a classifier reads, with labels, groups and the head itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from spurge.engine.base.checks import checked_labels, checked_values, choice, instance
from spurge.engine.base.files import canonical_json, fingerprint
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.tensor_files import Contents
from spurge.engine.data.rows import check_names
from spurge.engine.models.heads import Head


@dataclass(frozen=True, eq=False, repr=False)
class Features(Saved, kind="features", what="features"):
    """N inputs as M numbers each, on any device, and the head that classifies them; never changes.

    Attributes:
        values: floating ``[N, M]``; kept as given, not copied.
        labels: int64 ``[N]``, below O, the outputs of the head.
        head: the layer that reads the features.
        groups: int64 ``[N]`` from 0, or None; a group is a part of the set judged on its own.
        names: names of the O classes; by default their numbers.
        group_names: names of the G groups; by default their numbers.
        info: provenance, JSON-able.

    Raises:
        TypeError: a tensor of another type, or ``info`` without a JSON form.
        ValueError: lengths that differ, no rows, a label or group out of range, or features that are not finite.
    """

    values: Tensor
    labels: Tensor
    head: Head
    _: KW_ONLY
    groups: Tensor | None = None
    names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.head, Head):
            raise TypeError(f"head: expected a Head (see Head.of), got {type(self.head).__name__}")
        values = checked_values("values", self.values, self.head.width)
        names = check_names(self.names or _numbers(self.head.outputs))
        if len(names) != self.head.outputs:
            raise ValueError(f"names: expected {self.head.outputs}, one for each output, got {len(names)}")
        object.__setattr__(self, "values", values)
        object.__setattr__(
            self, "labels", checked_labels("labels", self.labels, len(values), len(names)).to(values.device)
        )
        object.__setattr__(self, "names", names)
        if self.groups is not None:
            groups = checked_labels("groups", self.groups, len(values), len(self.group_names) or None).to(values.device)
            object.__setattr__(self, "groups", groups)
            group_names = check_names(self.group_names or _numbers(int(groups.max()) + 1))
            object.__setattr__(self, "group_names", group_names)
        elif self.group_names:
            raise ValueError(f"group_names: without groups there are none to name, got {len(self.group_names)}")
        object.__setattr__(self, "info", json.loads(canonical_json(self.info)))

    def logits(self) -> Tensor:
        """Logits of the head, float32 (float64 where features or head have it) ``[N, O]``; computed anew each time."""
        return self.head.logits(self.values)

    def predictions(self) -> Tensor:
        """The class with the largest logit (the first of equal ones), int64 ``[N]``."""
        return self.head.predictions(self.values)

    def right(self) -> Tensor:
        """Which rows the head classifies as labelled, bool ``[N]``."""
        return self.predictions() == self.labels

    def counts(self) -> Tensor:
        """Rows of each class, int64 ``[O]`` on the CPU."""
        return self.labels.bincount(minlength=len(self.names)).cpu()

    def group_counts(self) -> Tensor:
        """Rows of each group, int64 ``[G]`` on the CPU.

        Raises:
            ValueError: there are no groups.
        """
        return self._groups().bincount(minlength=len(self.group_names)).cpu()

    def subset(self, index: Tensor | Sequence[int]) -> Features:
        """The rows with these numbers, in this order, or those where a bool ``[N]`` is true; values are copied.

        Raises:
            TypeError: an index of another type.
            ValueError: none, or one out of range.
        """
        index = torch.as_tensor(index, device=self.values.device)
        if index.dtype == torch.bool and index.shape == (len(self),):
            index = index.nonzero()[:, 0]
        if not index.numel():
            raise ValueError("index: need at least 1 row, got 0")
        index = checked_labels("index", index, index.numel(), len(self))
        groups = None if self.groups is None else self.groups[index]
        return replace(self, values=self.values[index], labels=self.labels[index], groups=groups)

    def split(
        self, shares: Sequence[float] = (0.5, 0.5), *, seed: int = 0, by: Literal["label", "group"] = "label"
    ) -> list[Features]:
        """Random parts with these shares of every class or every group, each in the order of the rows.

        The same for a seed on every device. What the shares leave over is in no part. In a class of n rows the cuts
        fall at ``round(n * sum of the shares so far)``.

        Raises:
            ValueError: shares not positive or above 1 together, another ``by``, no groups, or a part without rows.
        """
        if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(f"shares: expected positive numbers that add up to at most 1, got {tuple(shares)}")
        choice("by", by, ("label", "group"))
        strata = (self.labels if by == "label" else self._groups()).cpu()
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        parts: list[list[Tensor]] = [[] for _ in shares]
        for stratum in strata.unique():
            rows = order[strata[order] == stratum]
            cuts = [round(len(rows) * sum(shares[:i])) for i in range(len(shares) + 1)]
            for part, low, high in zip(parts, cuts, cuts[1:], strict=False):
                part.append(rows[low:high])
        chosen = [torch.cat(part).sort().values for part in parts]
        if not all(len(rows) for rows in chosen):
            raise ValueError(f"shares: {len(self)} rows give parts of {[len(rows) for rows in chosen]}")
        return [self.subset(rows) for rows in chosen]

    def with_groups(self, groups: Tensor | None, names: Sequence[str] = ()) -> Features:
        """The same rows in other groups, or in none."""
        return replace(self, groups=groups, group_names=tuple(names))

    def crossed(self) -> Features:
        """A group for every class in every group, ``label * G + group``: those the worst group's accuracy is taken of.

        Groups that each hold one class alone stay as they are.

        Raises:
            ValueError: there are no groups.
        """
        groups = self.labels * len(self.group_names) + self._groups()
        if len(groups.unique()) == len(self._groups().unique()):
            return self
        return self.with_groups(groups, [f"{name}/{group}" for name in self.names for group in self.group_names])

    def with_head(self, head: Head) -> Features:
        """The same rows under another head with as many outputs."""
        return replace(self, head=head)

    def to(self, device: torch.device | str) -> Features:
        """The same rows on another device, where all that is done with them is done."""
        values = self.values.to(device)
        return self if values is self.values else replace(self, values=values)

    def fingerprint(self) -> str:
        """SHA-256 of features, labels, groups, names and head; not of ``info``."""
        groups = None if self.groups is None else fingerprint(self.groups)
        tensors = [fingerprint(self.values), fingerprint(self.labels), groups]
        return fingerprint(canonical_json([*tensors, self.names, self.group_names, self.head.fingerprint()]))

    def _to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, head = self.head.to_parts()
        tensors |= {"values": self.values, "labels": self.labels}
        tensors |= {} if self.groups is None else {"groups": self.groups}
        names = {"names": self.names, "group_names": self.group_names}
        return tensors, {"names": names, "head": head, "info": self.info}

    @classmethod
    def _of_parts(cls, file: Contents) -> Features:
        names = file.value("names", dict)
        return cls(
            values=file.tensors["values"],
            labels=file.tensors["labels"],
            head=Head.of_parts(file.tensors, file.value("head", dict)),
            groups=file.tensors.get("groups"),
            names=tuple(instance("names", names["names"], list)),
            group_names=tuple(instance("group_names", names["group_names"], list)),
            info=file.value("info", dict),
        )

    def _groups(self) -> Tensor:
        if self.groups is None:
            raise ValueError("groups: these features have none; give with_groups(...)")
        return self.groups

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        classes = _sizes(self.names, self.counts())
        groups = "" if self.groups is None else f", groups {_sizes(self.group_names, self.group_counts())}"
        accuracy = 100 * float(self.right().double().mean())
        return f"Features({len(self)} x {self.head.width}, classes {classes}{groups}, accuracy {accuracy:.1f} %)"


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _sizes(names: Sequence[str], counts: Tensor) -> str:
    """Names with their numbers of rows; of many, how many there are and how few rows the smallest has."""
    if len(names) > 8:
        return f"{len(names)} of at least {int(counts.min())}"
    return ", ".join(f"{name} {count}" for name, count in zip(names, counts.tolist(), strict=True))
