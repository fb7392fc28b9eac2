"""What golden words leave out: words that go with a label and are not among them, and texts that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spurge.engine.base.statistics import benjamini_hochberg
from spurge.engine.data.bound import associate
from spurge.engine.data.examples import Examples
from spurge.engine.data.repeats import Repeat, repeats
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.golden.phrases import Finder

_LEVEL = 0.01  # false discovery rate of what is called bound to a label
_LEAST_LOG_ODDS = 0.7  # twice the odds
_COVERED = 0.9  # share of the rarer one's texts from which two units that share a word count as one


@dataclass(frozen=True)
class Missing:
    """A word or phrase that goes with a label and is no golden word.

    Attributes:
        text: the words.
        label: name of the label.
        z: log-odds of the label over their standard error.
        count: texts that have it.
        bare: texts of the label that have it, and none of the label's causal words.
    """

    text: str
    label: str
    z: float
    count: int
    bare: int


@dataclass(frozen=True)
class Coverage:
    """How far golden words reach in a training set.

    Attributes:
        texts: N.
        swappable: texts with a causal word of their label: these can be swapped.
        missing: what goes with a label and is not listed, strongest first.
    """

    texts: int
    swappable: int
    missing: tuple[Missing, ...]

    def helpful(self, n: int = 5) -> list[Missing]:
        """The missing ones that would reach most texts that no causal word of their label reaches."""
        found = sorted((one for one in self.missing if one.bare), key=lambda one: (-one.bare, -one.z, one.text))
        return found[:n]

    def summary(self, n: int = 5) -> list[str]:
        """Lines for people; empty where nothing is missing and most texts can be swapped."""
        lines = []
        if self.missing:
            shown = "; ".join(f"{one.text!r} ({one.label}, {one.count} texts)" for one in self.missing[:n])
            more = f", and {len(self.missing) - n} more" if len(self.missing) > n else ""
            lines.append(f"bound to a label, but not golden: {shown}{more}")
        if self.swappable * 2 < self.texts:
            share = 100 * self.swappable / self.texts
            words = ", ".join(one.text for one in self.helpful(n))
            help_line = f"; would reach more, where they are causes: {words}" if words else ""
            lines.append(f"only {share:.0f} % of the texts have a causal word of their label{help_line}")
        return lines


def coverage(examples: Examples, golden: GoldenTokens, *, least_count: int | None = None) -> Coverage:
    """Holds golden words against a training set.

    A word or phrase is missing where it goes with a label (q below 0.01, twice the odds), is not listed itself as
    causal or irrelevant, and has no causal word in it. A phrase of irrelevant words counts: each alone may say nothing,
    and all together a lot.

    Args:
        examples: labelled texts, their labels in the order of the golden words.
        golden: the words.
        least_count: texts that have a missing word, at least; by default 8, and one of 200.

    Raises:
        ValueError: other labels than those of the golden words, or a number out of range.
    """
    golden = golden.for_labels(examples.labels)
    parts = [row.segments for row in examples]
    least = least_count if least_count is not None else max(8, round(len(examples) / 200))
    units = [one for one in repeats(parts, least=least) if one.whole]
    targets = examples.targets.numpy()
    finders = [Finder(golden.causal[name]) for name in golden.labels]
    own = [any(finders[row.label].find(text) for text in texts) for row, texts in zip(examples, parts, strict=True)]
    reached = np.array(own, dtype=bool)
    missing = _missing(units, targets, golden, reached)
    return Coverage(len(examples), int(reached.sum()), tuple(missing))


def _missing(units: Sequence[Repeat], targets: np.ndarray, golden: GoldenTokens, reached: np.ndarray) -> list[Missing]:
    listed = {word for words in (*golden.causal.values(), golden.irrelevant) for word in words}
    causal = {part for words in golden.causal.values() for word in words for part in word.split()}
    if not units:
        return []
    bound = associate([one.rows for one in units], targets, len(golden.labels))
    q = benjamini_hochberg(torch.from_numpy(bound.p)).numpy()
    order = np.argsort(-np.abs(bound.z), kind="stable")
    taken: list[Repeat] = []
    found = []
    for number in order:
        one = units[number]
        if not (q[number] < _LEVEL and bound.log_odds[number] >= _LEAST_LOG_ODDS):
            continue
        if one.text in listed or causal & set(one.words):
            continue
        if any(_same(one, other) for other in taken):
            continue
        taken.append(one)
        label = int(bound.label[number])
        bare = int((~reached[one.rows] & (targets[one.rows] == label)).sum())
        found.append(Missing(one.text, golden.labels[label], float(bound.z[number]), len(one.rows), bare))
    return found


def _same(one: Repeat, other: Repeat) -> bool:
    """Whether two units share a word and stand mostly in the same texts."""
    if not set(one.words) & set(other.words):
        return False
    common = len(np.intersect1d(one.rows, other.rows, assume_unique=True))
    return common >= _COVERED * min(len(one.rows), len(other.rows))
