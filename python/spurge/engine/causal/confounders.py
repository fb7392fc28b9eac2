"""What else moves both the treatment and the outcome: topics of the prompts, or any columns a user has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.checks import checked_labels, checked_values
from spurge.engine.base.files import canonical_json, fingerprint


@dataclass(frozen=True, eq=False, repr=False)
class Confounders:
    """Pre-treatment covariates x of N prompts: a topic of each, numbers of each, or both. Made by :meth:`of`.

    They have to be known before the treatment acts: the topic of a *prompt* is, that of its continuation is not (it
    depends on treatment and mediator, and adjusting for it opens a path between them).

    Attributes:
        topics: int64 ``[N]`` from 0, or None.
        columns: float64 ``[N, s]``, mean 0 and standard deviation 1, or None.
        names: of the topics.
        column_names: of the columns.
    """

    topics: Tensor | None
    columns: Tensor | None
    names: tuple[str, ...] = ()
    column_names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        topics: Any = None,
        columns: Any = None,
        *,
        names: Sequence[str] | None = None,
        column_names: Sequence[str] | None = None,
    ) -> Confounders:
        """Confounders from topics (numbers from 0, names, or clusters) and from columns ``[N, s]``.

        Args:
            topics: whole numbers ``[N]``, texts, or what :func:`spurge.find_topics` returns.
            columns: numbers ``[N, s]`` or ``[N]``; constant ones are refused.
            names: of the topics, by number.
            column_names: of the columns.

        Raises:
            TypeError: an argument of another type.
            ValueError: neither given, rows that do not fit together, numbers that are not finite, a constant column.
        """
        if topics is None and columns is None:
            raise ValueError("confounders: give topics, columns or both, got neither")
        found, labels = (None, ()) if topics is None else _topics(topics, names)
        numbers = None if columns is None else _columns(columns)
        if found is not None and numbers is not None and len(found) != len(numbers):
            raise ValueError(f"columns: need a row for each of {len(found)} topics, got {len(numbers)}")
        width = 0 if numbers is None else numbers.shape[1]
        if column_names is None:
            column_names = [f"column {number}" for number in range(width)]
        if len(column_names) != width:
            raise ValueError(f"column_names: expected {width}, got {len(column_names)}")
        if numbers is not None:
            deviation = numbers.std(0, unbiased=False)
            flat = (deviation <= 1e-12 * numbers.abs().amax(0)).nonzero()[:, 0].tolist()
            if flat:
                raise ValueError(f"columns: {column_names[flat[0]]!r} is constant, and there is nothing to balance")
            numbers = (numbers - numbers.mean(0)) / deviation
        return cls(found, numbers, labels, tuple(column_names))

    def __len__(self) -> int:
        rows = self.topics if self.topics is not None else self.columns
        assert rows is not None  # `of` saw to it
        return len(rows)

    def design(self) -> Tensor:
        """Indicators of all topics but the last that occurs, then the columns: float64 ``[N, s']``."""
        parts = [] if self.columns is None else [self.columns]
        if self.topics is not None:
            present = self.topics.unique()
            parts.insert(0, (self.topics[:, None] == present[:-1]).double())
        return torch.cat(parts, 1)

    def design_names(self) -> tuple[str, ...]:
        """Names of the columns of :meth:`design`."""
        present = [] if self.topics is None else self.topics.unique().tolist()[:-1]
        return (*(f"topic {self.names[topic]}" for topic in present), *self.column_names)

    def subset(self, rows: Tensor) -> Confounders:
        """The same confounders of some of the prompts; columns keep their scale."""
        return Confounders(
            None if self.topics is None else self.topics[rows],
            None if self.columns is None else self.columns[rows],
            self.names,
            self.column_names,
        )

    def fingerprint(self) -> str:
        """SHA-256 of all numbers."""
        parts = [None if x is None else fingerprint(x) for x in (self.topics, self.columns)]
        return fingerprint(canonical_json(parts))

    def __repr__(self) -> str:
        parts = [] if self.topics is None else [f"{len(self.topics.unique())} topics"]
        parts += [] if self.columns is None else [f"{self.columns.shape[1]} columns"]
        return f"Confounders({len(self)} prompts, {', '.join(parts)})"


def _topics(topics: Any, names: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    if hasattr(topics, "labels") and hasattr(topics, "names"):
        names = topics.names if names is None else names
        topics = topics.labels
    if isinstance(topics, (Sequence, np.ndarray)) and any(isinstance(topic, str) for topic in topics):
        for row, topic in enumerate(topics):
            if not isinstance(topic, str):
                raise TypeError(f"topics: expected names (str) all through, got {type(topic).__name__} at row {row}")
        if names is None:
            names = sorted(set(topics))
        known = {name: number for number, name in enumerate(names)}
        missing = [topic for topic in topics if topic not in known]
        if missing:
            raise ValueError(f"topics: {missing[0]!r} is none of {list(known)}")
        topics = [known[topic] for topic in topics]
    if not isinstance(topics, Tensor):
        topics = torch.as_tensor(np.asarray(topics))
    found = checked_labels("topics", topics, len(topics)).cpu()
    count = int(found.max()) + 1
    if names is None:
        names = [str(number) for number in range(count)]
    if len(names) < count:
        raise ValueError(f"names: expected at least {count}, one for each topic, got {len(names)}")
    return found, tuple(map(str, names))


def _columns(columns: Any) -> Tensor:
    numbers = columns if isinstance(columns, Tensor) else torch.as_tensor(np.asarray(columns))
    if numbers.dtype == torch.bool or not (numbers.is_floating_point() or numbers.is_complex()):
        numbers = numbers.double()
    numbers = numbers[:, None] if numbers.dim() == 1 else numbers
    return checked_values("columns", numbers).double().cpu()
