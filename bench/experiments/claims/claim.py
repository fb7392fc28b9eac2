"""A claim, and the numbers of results by which it holds or does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Number:
    """One number of a results file.

    Attributes:
        name: what the page calls it.
        case, method, metric: of its row; the mean is taken where rows differ by seed alone.
        digits: behind the point.
    """

    name: str
    case: str
    method: str
    metric: str
    digits: int = 1

    def of(self, rows: Rows) -> float:
        """Its value.

        Raises:
            ValueError: no such row.
        """
        wanted = (self.case, self.method, self.metric)
        values = [row["value"] for row in rows if (row["case"], row["method"], row["metric"]) == wanted]
        if not values:
            raise ValueError(f"no row of case {self.case!r}, method {self.method!r}, metric {self.metric!r}")
        return float(sum(values) / len(values))


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, or an aim of this project, with what decides.

    Attributes:
        method: whose.
        text: what is claimed.
        published: the paper's own numbers; empty for an aim of this project.
        file: of `bench/results`, without its ending.
        numbers: what was measured here.
        holds: whether it does, by the values of ``numbers`` in their order; None where they are too uncertain to say.
        reason: why it comes out so, as far as that was tested.
    """

    method: str
    text: str
    published: str
    file: str
    numbers: tuple[Number, ...]
    holds: Callable[..., bool | None]
    reason: str


def worst(name: str, method: str, case: str = "waterbirds") -> Number:
    """Accuracy of the worst group, of a method."""
    return Number(name, case, method, "worst_group_accuracy")


def interval(name: str, method: str, case: str, metric: str = "gain") -> tuple[Number, Number, Number]:
    """A metric of a method, and the ends of its interval."""
    ends = (Number(end, case, method, f"{metric}_{end}") for end in ("low", "high"))
    return (Number(name, case, method, metric), *ends)


def above(least: float, low: float, high: float) -> bool | None:
    """Whether a number with this interval is above another one; None where it may be either."""
    return True if low > least else False if high < least else None
