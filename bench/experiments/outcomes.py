"""Which test texts each method gets right, kept part by part, and the rows of results that follow from them.

A part is one method at one seed. What is finished is read from the folder, so that a run that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base import files
from spurge.engine.base.statistics import resampled_sums
from spurge.engine.base.tensor_files import flat, of_group, read_tensors, write_tensors
from spurge.engine.data.examples import Examples
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.methods.macu.objectives import length_of
from spurge.report.results import Results

RESAMPLES = 2000
CHARACTERS = 4096  # of a batch: its activations then fit the caches, and long texts run twice as fast
MEAN = "mean-ood"  # of the sets outside, each with the same weight
_LOGITS = "logits"


@dataclass(frozen=True, eq=False)
class Part:
    """What one method gives at one seed.

    Attributes:
        right: of each test set which texts are answered rightly, ``[N]``: 1 or 0, or the share of several draws.
        facts: numbers to report, and others to go on from; JSON-able.
        logits: of each test set ``[N, Y]``, where they are wanted again.
    """

    right: dict[str, Tensor]
    facts: dict[str, Any]
    logits: dict[str, Tensor] = field(default_factory=dict)


def logits(handle: Handle, rows: Examples, max_length: int | None = None) -> Tensor:
    """Of each text, ``[N, Y]`` float32, in batches of texts of like length."""
    found = torch.zeros(len(rows), len(rows.labels))
    order = sorted(range(len(rows)), key=lambda i: length_of(rows[i]))
    with frozen(handle.model, gradients=False):
        while order:
            at_once = max(1, min(32, CHARACTERS // max(1, length_of(rows[order[-1]]))))
            order, at = order[:-at_once], order[-at_once:]
            found[torch.tensor(at)] = handle.logits(handle.encode([rows[i] for i in at], max_length)).float().cpu()
    return found


def right(rows: Examples, logits: Tensor) -> Tensor:
    """Which texts get their label, uint8 ``[N]``."""
    return (logits.argmax(1) == rows.targets).to(torch.uint8)


def chosen(info: Mapping[str, Any]) -> dict[str, Any]:
    """Of what an edit of weights says of itself: its strength, and accuracies at home (dev) and on swaps."""
    return {name: info[name] for name in ("alpha", "home", "swapped") if name in info}


class Record:
    """Parts by what they are about (a prefix of the cases), method and seed.

    Args:
        cache: the folder.
        kind: of its files.
        outside: the test sets that a mean is taken of.
    """

    def __init__(self, cache: Path, kind: str, outside: Collection[str]) -> None:
        self.cache, self.kind, self.outside = cache, kind, tuple(outside)
        self.parts: dict[tuple[str, str], dict[int, Part]] = {}

    def measure(self, prefix: str, method: str, seed: int, key: str, make: Callable[[], Part]) -> Part:
        """Takes a part from the folder, or makes and keeps it; and says what it gives."""
        name = files.fingerprint(files.canonical_json([prefix, method, seed, key]))[:16]
        path = self.cache / f"{prefix.strip(':')}{method}-{seed}-{name}.safetensors"
        if path.exists():
            tensors, texts = read_tensors(path, self.kind)
            logits = of_group(_LOGITS, tensors)
            right = {name: part for name, part in tensors.items() if not name.startswith(f"{_LOGITS}/")}
            part = Part(right, files.parse_json(texts["facts"]), logits)
        else:
            part = make()
            kept = {**part.right, **flat({_LOGITS: part.logits})}
            write_tensors(path, kept, {"kind": self.kind, "facts": files.canonical_json(part.facts)})
        self.parts.setdefault((prefix, method), {})[seed] = part
        shown = " ".join(f"{case} {value:.1f}" for case, value in accuracies(part.right, self.outside).items())
        print(f"{prefix}{method} {seed}: {shown}", _short(part.facts), flush=True)
        return part

    def write(
        self,
        head: Results,
        base: str,
        labels: Callable[[str], str],
        *,
        base_once: bool = False,
        also: Collection[tuple[str, str]] = (),
    ) -> None:
        """All rows so far: accuracies and facts by seed, gains over the method `base` with paired intervals.

        Args:
            head: gets the rows in the place of those that it has.
            base: another method's gain at a seed is over this one at the same seed.
            labels: which labels a method used.
            base_once: `base` is the same for all seeds, and measured at one of them.
            also: a method, and another one whose gains over that are wanted, too.
        """
        head.rows.clear()
        for (prefix, method), seeds in self.parts.items():
            for seed, part in seeds.items():
                own: dict[str, Any] = {"seed": seed, "labels": labels(method)}
                for case, value in accuracies(part.right, self.outside).items():
                    head.add(f"{prefix}{case}", method, "accuracy", value, unit="percent", **own)
                for name, value in part.facts.items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool):
                        unit = "s" if name.endswith("seconds") else ""
                        head.add(f"{prefix}all", method, name, value, unit=unit, **own)
            if method != base:
                self._add_gains(head, (prefix, method, base), "gain", labels(method), base_once)
            for other in (other for own, other in also if own == method):
                self._add_gains(head, (prefix, method, other), f"gain_over_{other}", labels(method), False)

    def _add_gains(self, head: Results, which: tuple[str, str, str], metric: str, labels: str, once: bool) -> None:
        """Gains of a method over another, by prefix, method and the other, over the seeds that both have."""
        prefix, method, other = which
        own, before = self.parts[prefix, method], self.parts.get((prefix, other), {})
        pairs = {s: next(iter(before.values())) if once else before[s] for s in own if before and (once or s in before)}
        found = gains([(own[seed].right, plain.right) for seed, plain in pairs.items()], self.outside)
        note = f"over {other}; paired bootstrap over texts, seeds {', '.join(map(str, pairs))} averaged"
        for case, (gain, low, high, texts) in found.items():
            for name, value in ((metric, gain), (f"{metric}_low", low), (f"{metric}_high", high)):
                how: dict[str, Any] = {"n": texts, "unit": "points", "labels": labels, "note": note}
                head.add(f"{prefix}{case}", method, name, value, **how)


def accuracies(right: Mapping[str, Tensor], outside: Collection[str]) -> dict[str, float]:
    """In percent, of each set; and their mean over those outside, where all are there."""
    found = {case: 100 * float(part.double().mean()) for case, part in right.items()}
    return found | ({MEAN: fmean(found[case] for case in outside)} if {*outside} <= found.keys() else {})


def gains(
    pairs: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], outside: Collection[str]
) -> dict[str, tuple[float, float, float, int]]:
    """Mean over seeds of a method minus what it is compared with: gain, ends of the 95 % interval over texts, texts.

    Args:
        pairs: of each seed, by test set, which texts are right with the method and which without it.
        outside: the sets that a mean is taken of.
    """
    draws, generator = {}, np.random.default_rng(0)
    for case in sorted(pairs[0][1]) if pairs else ():  # the order of the draws must not depend on what was read back
        each = torch.stack([right[case].double() - plain[case].double() for right, plain in pairs]).mean(0)
        sums = resampled_sums(100 * each.numpy()[:, None], RESAMPLES, generator)[:, 0]
        draws[case] = (sums / len(each), len(each))
    if draws and {*outside} <= draws.keys():
        mean = np.mean([draws[case][0] for case in outside], axis=0)
        draws[MEAN] = (mean, sum(draws[case][1] for case in outside))
    return {
        case: (float(values[0]), *map(float, np.quantile(values[1:], (0.025, 0.975))), count)
        for case, (values, count) in draws.items()
    }


def _short(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if not isinstance(value, (dict, list))}
