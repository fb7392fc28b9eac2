"""What a run will take, before it is started: rows, bytes, operations, and the time these take on this machine.

Rows and blocks follow from how `Cascade` cuts its work, bytes from its `Footprint`. Operations are counted on one row
that runs through the model, forwards and back. Time is theirs at the rate of a short run through the model's last
layers, with as many rows as a layer will see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from spurge.engine.base.checks import integer
from spurge.engine.base.tables import wrapped
from spurge.engine.cascade.cascade import Cascade
from spurge.engine.cascade.memory_model import Footprint
from spurge.engine.models.call_arguments import main_input
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.planning.flops import cost_of
from spurge.engine.planning.timing import Sample


@dataclass(frozen=True)
class Plan:
    """What a run will take. Printed as a table; :meth:`rows` has the numbers for results files.

    Attributes:
        examples: how many texts (images).
        tokens: T, positions of each.
        layers: of the model.
        neurons: that are scored; of a swarm, that are gated.
        path: of the integral, or ``"swarm"``.
        rule: of its quadrature; empty where there is none.
        nodes: of the rule, on each path; 0 where there is none.
        total_rows: rows of all passes: unedited ones, erased ones, and those of nodes, units or particles.
        layer_rows: layers that these rows run through, added up.
        blocks: passes the work is cut into, the unedited and erased ones left out.
        flops: operations of matrix products and attention, forwards and back.
        bytes_peak: memory needed at once, beyond the model and the texts.
        budget: bytes the work is cut to fit into.
        seconds: what it will take.
        elsewhere: share of this time that is not in matrix products.
        least: the run takes this much or more: how often intervals are halved for a tolerance, nobody knows before.
    """

    examples: int
    tokens: int
    layers: int
    neurons: int
    path: str
    rule: str
    nodes: int
    total_rows: int
    layer_rows: int
    blocks: int
    flops: int
    bytes_peak: int
    budget: int
    seconds: float
    elsewhere: float
    least: bool = False

    def __str__(self) -> str:
        integral = f", {self.rule}, {self.nodes} nodes" if self.rule else ""
        at_least = "at least " if self.least else ""
        lines = {
            "examples": f"{self.examples:,} of {self.tokens:,} tokens",
            "model": f"{self.layers} layers, {self.neurons:,} neurons",
            "path": f"{self.path}{integral}",
            "rows": f"{at_least}{self.total_rows:,}, through {self.layer_rows:,} layers, in {self.blocks:,} blocks",
            "memory": f"{_size(self.bytes_peak)} at the peak, beyond the model; the budget is {_size(self.budget)}",
            "work": f"{at_least}{_operations(self.flops)}",
            "time": f"{at_least}{_duration(self.seconds)}, {100 * self.elsewhere:.0f} % of it outside matrix products",
        }
        return wrapped("\n".join(f"{name:<10}{line}" for name, line in lines.items()), " " * 10)

    def summary(self) -> str:
        """The same in one line."""
        about = "at least" if self.least else "about"
        return (
            f"{about} {_duration(self.seconds)} and {_size(self.bytes_peak)}: {self.examples:,} texts of "
            f"{self.tokens:,} tokens, {self.neurons:,} neurons, {_operations(self.flops)}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Flat result rows."""
        case = f"{self.examples} of {self.tokens} tokens"
        note = {"note": "at least"} if self.least else {}
        numbers: tuple[tuple[str, float, str], ...] = (
            ("rows", self.total_rows, ""),
            ("layer_rows", self.layer_rows, ""),
            ("blocks", self.blocks, ""),
            ("flops", self.flops, "FLOP"),
            ("peak_bytes", self.bytes_peak, "bytes"),
            ("budget_bytes", self.budget, "bytes"),
            ("seconds", self.seconds, "s"),
            ("elsewhere", 100 * self.elsewhere, "percent"),
        )
        return [
            {"case": case, "method": self.path, "metric": metric, "value": value, "unit": unit, **note}
            for metric, value, unit in numbers
        ]


def plan(cascade: Cascade, inputs: Mapping[str, Any], examples: int | None = None, *, targets: int = 1) -> Plan:
    """What `Cascade.attribute` will take.

    With a tolerance, what is sure: every path whole, and halved once.

    Args:
        cascade: as it will be used.
        inputs: a typical batch, tensors ``[B, ...]``; its size is that of the calls.
        examples: of all calls; B by default.
        targets: Q, numbers that a target gives for each row.

    Raises:
        ValueError: an empty batch, a count below 1, or a budget too small for one example.
    """
    integer("targets", targets, 1)
    work = _Work(cascade, inputs, targets)
    counts = _total(_calls(examples, inputs), work.attribution)
    integral = cascade.path in ("layer", "joint")
    return work.plan(
        counts,
        examples=_count(examples, inputs),
        neurons=sum(site.width for site in cascade.sites),
        path=cascade.path,
        rule=cascade.rule if integral else "",
        nodes=cascade.nodes if integral else 0,
        least=cascade.tolerance is not None,
    )


def plan_swarm(
    cascade: Cascade,
    inputs: Mapping[str, Any],
    neurons: NeuronSet,
    *,
    particles: int,
    iterations: int,
    group: int,
    examples: int | None = None,
) -> Plan:
    """What a particle swarm over the gates of ``neurons`` will take, `Cascade.gated` for each of its particles.

    Args:
        cascade, inputs, examples: as for :func:`plan`.
        particles, iterations: of the swarm.
        group: particles that are measured in one call.

    Raises:
        ValueError: as :func:`plan`, or a neuron the model does not have.
    """
    for name, value in (("particles", particles), ("iterations", iterations), ("group", group)):
        integer(name, value, 1)
    work = _Work(cascade, inputs)
    gated = min(cascade.units(neurons))[0]
    counts = _Counts()
    for size, times in Counter(min(group, particles - start) for start in range(0, particles, group)).items():
        counts += _total(_calls(examples, inputs), partial(work.gating, gated, size)) * times
    return work.plan(
        counts * iterations,
        examples=_count(examples, inputs),
        neurons=len(neurons),
        path="swarm",
        rule="",
        nodes=0,
        least=False,
    )


def peak_bytes(cascade: Cascade, inputs: Mapping[str, Any]) -> int:
    """Bytes that `Cascade.attribute` needs at once on a batch, beyond the model and the batch; nothing is timed.

    Raises:
        ValueError: an empty batch, or a budget too small for one example.
    """
    return _total(_calls(None, inputs), _Work(cascade, inputs).attribution).peak


# ---- counting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counts:
    """What work adds up to.

    Attributes:
        rows, layer_rows, blocks: as in `Plan`.
        graded, free: operations of passes with gradients and without.
        graded_passes, free_passes: how many these are.
        peak: bytes, the most of any part.
    """

    rows: int = 0
    layer_rows: int = 0
    blocks: int = 0
    graded: int = 0
    free: int = 0
    graded_passes: int = 0
    free_passes: int = 0
    peak: int = 0

    def __add__(self, other: _Counts) -> _Counts:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return replace(_Counts(**sums), peak=max(self.peak, other.peak))

    def __mul__(self, times: int) -> _Counts:
        products = {name: times * value for name, value in vars(self).items()}
        return replace(_Counts(**products), peak=self.peak)


def _count(examples: int | None, inputs: Mapping[str, Any]) -> int:
    return len(main_input(inputs)) if examples is None else integer("examples", examples, 1)


def _calls(examples: int | None, inputs: Mapping[str, Any]) -> Counter[int]:
    """How many calls there are with how many examples."""
    return _split(_count(examples, inputs), len(main_input(inputs)))


def _split(total: int, size: int) -> Counter[int]:
    """How many parts of each size there are when ``total`` is cut into runs of ``size``."""
    whole, rest = divmod(total, size)
    return +Counter({size: whole, rest: 1 if rest else 0})


def _total(parts: Mapping[int, int], count: Callable[[int], _Counts]) -> _Counts:
    total = _Counts()
    for size, times in parts.items():
        total += count(size) * times
    return total


class _Work:
    """What a cascade does with a batch, as `Cascade` itself cuts it."""

    def __init__(self, cascade: Cascade, inputs: Mapping[str, Any], targets: int = 1) -> None:
        self.cascade, self.inputs, self.targets = cascade, inputs, targets
        self.footprint: Footprint = cascade.footprint(inputs)
        with frozen(cascade.model):
            self.cost = cost_of(cascade.forward, inputs)
        self.sites = range(len(cascade.sites))

    def attribution(self, batch: int) -> _Counts:
        """`Cascade.attribute` on so many examples."""
        counts = _total(_split(batch, self._examples(batch)), partial(self._attribution, batch))
        results = 4 * self.targets * batch * sum(site.width for site in self.cascade.sites)
        return replace(counts, peak=counts.peak + 2 * results)  # of the parts, and joined

    def gating(self, site: int, particles: int, batch: int) -> _Counts:
        """`Cascade.gated` of so many particles on so many examples; ``site`` is the first with gates."""
        return _total(_split(batch, self._examples(batch)), partial(self._gating, site, particles))

    def _examples(self, batch: int) -> int:
        return min(batch, self.cascade.at_once(self.inputs))

    def _unedited(self, batch: int) -> _Counts:
        counts = _Counts(batch, batch * self.footprint.blocks)
        if self.cascade.path != "gradient" and self.cascade.rule != "radau":
            return replace(counts, free=self.cost.unedited.of(batch), free_passes=1)
        graded = self.cost.unedited.of(batch) + self.targets * self.cost.ends.of(batch)
        return replace(counts, graded=graded, graded_passes=1, peak=self._graph(batch))

    def _graph(self, batch: int) -> int:
        if self.cascade.path == "gradient":
            return self.footprint.read(batch)
        return self.footprint.kept(batch, differentiable=True)

    def _attribution(self, examples: int, batch: int) -> _Counts:
        """Of ``batch`` of a call's examples."""
        kinds: dict[str, Callable[[int], _Counts]] = {
            "gradient": partial(self._measured, examples),
            "layer": self._layers,
            "joint": self._joint,
            "neuron": self._neurons,
        }
        return self._unedited(batch) + kinds[self.cascade.path](batch)

    def _measured(self, examples: int, batch: int) -> _Counts:
        """Units that are switched off beside the gradient's estimates, as if spread over all sites and examples."""
        effort, sites = self.cascade.effort, len(self.cascade.sites)
        if not effort.measures:
            return _Counts()
        share, more = divmod(effort.exact - (-effort.audit // examples), sites)
        unedited = _Counts(batch, batch * self.footprint.blocks, free=self.cost.unedited.of(batch), free_passes=1)
        return unedited + self._forward({i: n for i in self.sites if (n := share + (i < more))}, batch)

    def _layers(self, batch: int) -> _Counts:
        nodes, budget = self.cascade.nodes, self.cascade.budget
        counts = self._forward(dict.fromkeys(self.sites, 1), batch) if self.cascade.completeness else _Counts()
        counts = replace(counts, blocks=0)
        rounds = [list(self.sites)]
        if self.cascade.tolerance is not None:
            rounds.append([i for i in self.sites for _ in range(2)])
        for pieces in rounds:
            cuts = self.footprint.cuts(budget, nodes, batch, pieces)
            sizes = [([pieces[p] for p in group], len(range(nodes)[part])) for group, part in cuts]
            counts += _Counts(peak=self.footprint.peak(sizes, batch))
            for group, count in sizes:
                counts += self._cascade(group, count, batch)
        return counts

    def _cascade(self, group: Sequence[int], nodes: int, batch: int) -> _Counts:
        rows, layers = batch * nodes * len(group), sum(self._behind(i) for i in group)
        forward, backward = self.cost.forward, self.cost.backward
        work = forward[group[0]].fixed + self.targets * backward[group[0]].fixed
        work += batch * nodes * sum(forward[i].row + self.targets * backward[i].row for i in group)
        pulled = self.targets * batch * sum(self.cost.pulled[i] for i in group)
        return _Counts(rows, batch * nodes * layers, 1, work + pulled, graded_passes=1)

    def _joint(self, batch: int) -> _Counts:
        counts = _Counts()
        if self.cascade.completeness:
            counts = _Counts(batch, batch * self.footprint.blocks, free=self.cost.scaled.of(batch), free_passes=1)
        slices = self.footprint.node_slices(self.cascade.budget, self.cascade.nodes, batch)
        pieces = 1 if self.cascade.tolerance is None else 3  # the whole path, and its halves
        for part in slices:
            count = len(range(self.cascade.nodes)[part])
            rows = count * batch
            back = self.cost.backward[0].of(rows) + rows * sum(self.cost.pulled)
            counts += (
                _Counts(
                    rows=rows,
                    layer_rows=rows * self.footprint.blocks,
                    blocks=1,
                    graded=self.cost.scaled.of(rows) + self.targets * back,
                    graded_passes=1,
                    peak=self.footprint.scaled(count, batch),
                )
                * pieces
            )
        return counts

    def _neurons(self, batch: int) -> _Counts:
        return self._forward({i: site.width for i, site in enumerate(self.cascade.sites)}, batch)

    def _forward(self, opened: Mapping[int, int], batch: int) -> _Counts:
        """Passes without gradients over so many rows from each site."""
        rows = sum(opened.values())
        at_once = min(rows, self.footprint.rows_forward(self.cascade.budget, batch))
        passes, forward = -(-rows // at_once), self.cost.forward
        fixed = passes * sum(count * forward[i].fixed for i, count in opened.items()) // rows
        return _Counts(
            rows=batch * rows,
            layer_rows=batch * sum(count * self._behind(i) for i, count in opened.items()),
            blocks=passes,
            free=fixed + batch * sum(count * forward[i].row for i, count in opened.items()),
            free_passes=passes,
            peak=self.footprint.forward(at_once, batch),
        )

    def _gating(self, site: int, particles: int, batch: int) -> _Counts:
        return self._unedited(batch) + self._forward({site: particles}, batch)

    def _behind(self, site: int) -> int:
        """Layers that a row runs through which opens at a site."""
        return self.footprint.blocks - 1 - self.footprint.block_of[site]

    def plan(self, counts: _Counts, **about: Any) -> Plan:
        """The plan of these counts: times are measured here."""
        layers = max(1, counts.layer_rows)
        typical = max(1, round(layers / max(1, counts.blocks) / self.footprint.blocks))
        with frozen(self.cascade.model):
            sample = Sample(self.cascade.forward, self.inputs, self.cost, typical)
            seconds = sample.graded().of(counts.graded_passes, counts.graded) if counts.graded else 0.0
            seconds += sample.free().of(counts.free_passes, counts.free) if counts.free else 0.0
            products = sample.products(counts.graded + counts.free) / seconds
        return Plan(
            tokens=self.footprint.tokens,
            layers=self.footprint.blocks,
            total_rows=counts.rows,
            layer_rows=counts.layer_rows,
            blocks=counts.blocks,
            flops=counts.graded + counts.free,
            bytes_peak=counts.peak,
            budget=self.cascade.budget,
            seconds=seconds,
            elsewhere=1 - min(products, 1.0) if products == products else 0.0,
            **about,
        )


# ---- for people ----------------------------------------------------------------------------------------------------


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _operations(count: int) -> str:
    return f"{count / 1e12:,.1f} TFLOP" if count >= 1e12 else f"{count / 1e9:,.1f} GFLOP"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
