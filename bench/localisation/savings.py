"""``run.py savings``: what each saving of the engine should give, by counting (``counts.py``), and what the clock says.

Each is measured by switching it off: a question asked with and without it, in turns, in one process. What cannot be
switched off inside the engine is written out here the way it would be done without.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.harness import Timing, compare, peak_of_call, peak_of_child, threads
from common.limits import best_matmul_rate, copy_bandwidth
from localisation.accuracy import converged, errors
from localisation.counts import Counts
from localisation.jobs import Job, make_job
from spurge import ops
from spurge.engine.cascade.cascade import Cascade
from spurge.engine.cascade.quadrature import MOST_NODES, gauss_legendre
from spurge.engine.models.call_arguments import at
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.probes import token_scores
from spurge.engine.models.sites import find_sites

NODES = 2
UNITS = 8  # neurons that are ablated or gated
PARTICLES = 20
TOLERANCE = 0.1
MAP_PASSES = 6  # over an attention map without a fused kernel: written, masked, softmax read and written, cast, read


@dataclass(frozen=True)
class Saving:
    """A question asked with a saving and without.

    Attributes:
        name: what is saved.
        predicted: how many times the work of ``on`` the work of ``off`` is.
        on, off: the question.
        note: what the prediction counts, or how ``off`` does without.
    """

    name: str
    predicted: float
    on: Callable[[], object]
    off: Callable[[], object]
    note: str


class EveryToken:
    """In the place of a cascade's readout: the language head runs on all tokens, and the probed one is picked."""

    head, tokens = None, 1

    @staticmethod
    def logits(run: Callable[[], Any], position: Tensor) -> Tensor:
        return at(run().logits, position)[:, 0]


def _cascade(job: Job, **settings: Any) -> Cascade:
    return Cascade(job.model, completeness=False, **({"path": "layer"} | settings))


def _asked(job: Job, cascade: Cascade) -> Callable[[], object]:
    return lambda: cascade.attribute(job.inputs, job.target)


def behind_the_projection(job: Job, counts: Counts) -> Iterator[Saving]:
    """One layer's path of two nodes, without the rest of the model: the gradients are made up."""
    site = find_sites(job.model)[job.layers // 2]
    weight = site.parameter.detach()
    like = {"dtype": weight.dtype, "device": weight.device}
    batch, (tokens, hidden, neurons) = len(job.ids), (counts.tokens, counts.hidden, counts.neurons)
    z, rest = torch.randn(batch, tokens, neurons, **like), torch.randn(batch, tokens, hidden, **like)
    gradient = torch.randn(NODES * batch, tokens, hidden, **like)
    u, (alphas, shares) = z @ weight.t(), gauss_legendre(NODES)

    def on() -> Tensor:
        ops.open_rows(rest, u, alphas)
        return ops.multiply_sum(ops.node_sum(gradient, shares).to(z) @ weight, z, None)

    def off() -> Tensor:
        scaled = (alphas.to(z).view(-1, 1, 1, 1) * z).flatten(0, 1)
        (scaled @ weight.t()).add_(rest.repeat(NODES, 1, 1))
        pulled = (gradient @ weight).view(NODES, *z.shape)
        return (torch.einsum("s,sbtf->btf", shares.to(z), pulled) * z).sum(1)

    whole = counts.attribution(NODES)
    more = (2 * NODES - 1) * counts.pull(pruned=False)
    note = f"one layer alone; of the whole question {(whole + more) / whole:.2f}"
    yield Saving("rows open behind the down projection", 2.0 * NODES, on, off, note)


def last_layer(job: Job, counts: Counts) -> Iterator[Saving]:
    """The last layer on the probed token, and on all."""
    on, off = _cascade(job), _cascade(job)
    _asked(job, off)()  # finds out what the head reads, once
    off.forward.pruned = off.forward.narrow = False
    times = counts.attribution(NODES, pruned=False) / counts.attribution(NODES)
    yield Saving("last layer on the probed token", times, _asked(job, on), _asked(job, off), "the whole question")


def head(job: Job, counts: Counts) -> Iterator[Saving]:
    """The language head on the probed token, and on all."""
    on, off = _cascade(job), _cascade(job)
    off.forward.readout = EveryToken()  # type: ignore[assignment]
    times = counts.attribution(NODES, head=counts.tokens) / counts.attribution(NODES)
    yield Saving("language head on the probed token", times, _asked(job, on), _asked(job, off), "the whole question")


def kept_prompt(job: Job, counts: Counts) -> Iterator[Saving]:
    """The unedited pass of a prompt that is asked about again."""
    cascade, units = _cascade(job), _units(job)
    prompt, base, place = cascade.read(job.inputs), counts.forward(), _place(job)
    if not prompt.traces:
        raise ValueError("memory: the unedited pass does not fit a quarter of what is free")
    whole = counts.attribution(NODES)
    yield Saving(
        "unedited pass kept, attribution",
        whole / (whole - base),
        lambda: cascade.attribute(prompt, job.target),
        _asked(job, cascade),
        f"{NODES} nodes",
    )
    rows = UNITS * counts.forward(place + 1)
    yield Saving(
        "unedited pass kept, ablation",
        (base + rows) / rows,
        lambda: cascade.ablate(prompt, job.target, units),
        lambda: cascade.ablate(job.inputs, job.target, units),
        f"{UNITS} units of layer {place}",
    )


def _place(job: Job) -> int:
    """A layer two thirds up, where edited neurons often are."""
    return 2 * job.layers // 3


def _units(job: Job) -> NeuronSet:
    return NeuronSet({job.sites[_place(job)]: range(UNITS)})


def gated_rows(job: Job, counts: Counts) -> Iterator[Saving]:
    """A swarm's particles, entering at the layer that they edit, and as passes of the whole model."""
    cascade, units, place = _cascade(job), _units(job), _place(job)
    prompt = cascade.read(job.inputs)
    gates = torch.rand(PARTICLES, UNITS, generator=torch.Generator().manual_seed(0)).to(job.ids.device)
    down, batch = job.model.get_submodule(job.sites[place]), len(job.ids)

    def gate(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., :UNITS] *= gates.repeat_interleave(batch, 0)[:, None].to(z)
        return (z,)

    def off() -> Tensor:
        handle = down.register_forward_pre_hook(gate)
        try:
            with torch.no_grad():
                logits = job.model(input_ids=job.ids.repeat(PARTICLES, 1), logits_to_keep=1).logits[:, -1]
        finally:
            handle.remove()
        return logits.float().gather(1, job.labels.repeat(PARTICLES)[:, None])

    opened = 2 * (counts.tokens if place < counts.layers - 1 else 1) * UNITS * counts.hidden
    yield Saving(
        "swarm enters at the edited layer",
        counts.forward(pruned=False) / (counts.forward(place + 1) + opened),
        lambda: cascade.gated(prompt, job.target, units, gates),
        off,
        f"{PARTICLES} particles, layer {place}, prompt kept",
    )


def adaptive(job: Job, counts: Counts, *, tolerance: float, cache: Any) -> Iterator[Saving]:
    """Nodes where the path turns, and as many everywhere as give the same error."""
    one = replace(job, ids=job.ids[:1], labels=job.labels[:1])
    reference = converged(one, tolerance=tolerance, cache=cache).scores

    def ask(**settings: Any) -> tuple[Callable[[], Any], float]:
        call = _asked(one, Cascade(one.model, **({"path": "layer"} | settings)))
        found = call()
        return call, errors({site: value[0] for site, value in found.values.items()}, reference).total

    first = Cascade(one.model, nodes=NODES, tolerance=TOLERANCE, path="layer")
    spent = first.attribute(one.inputs, one.target).nodes
    on, goal = ask(nodes=NODES, tolerance=TOLERANCE)
    mine = counts.adaptive(NODES, [count // NODES for count in spent.values()])
    uniform = NODES
    while True:
        off, error = ask(nodes=uniform, completeness=False)
        if error <= goal or uniform == MOST_NODES:
            break
        uniform *= 2
    reached = "" if error <= goal else ", which is not enough"
    note = f"error {goal:.2g}; {uniform} nodes everywhere give {error:.2g}{reached}"
    yield Saving("adaptive nodes", counts.attribution(uniform) / mine, on, off, note)


# ------------------------------------------------------------------------------------------------------ token scores


def _long(job: Job, tokens: int) -> dict[str, Any]:
    """A text of many tokens, the language head asked for the last one by both."""
    words = job.draw(2).flatten()
    ids = words.repeat(-(-tokens // len(words)))[None, :tokens]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}


def token_calls(job: Job, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """The attention of the last token in the last layer, head mean: with the engine, and from full maps."""
    inputs = _long(job, tokens)
    model = copy.deepcopy(job.model)
    model.set_attn_implementation("eager")

    def maps() -> Tensor:
        with torch.no_grad():
            return model(**inputs, output_attentions=True).attentions[-1][:, :, -1].float().mean(1)

    return {"on": lambda: token_scores(job.model, inputs, kind="attention"), "off": maps}


def token_row(job: Job, counts: Counts, rate: float, bandwidth: float) -> Saving:
    """One attention row in the place of all maps; ``counts`` of the long text."""
    calls = token_calls(job, counts.tokens)
    on = counts.forward(pruned=False) / rate / 1e9
    maps = MAP_PASSES * counts.maps(job.model.dtype.itemsize) / bandwidth / 1e9
    note = f"{MAP_PASSES} passes over the maps at {bandwidth:.0f} GB/s beside the products at {rate:.0f} GFLOP/s"
    return Saving("token scores without attention maps", (on + maps) / on, calls["on"], calls["off"], note)


def child(rest: list[str]) -> dict[str, int]:
    """``run.py child savings``: peak memory of token scores, ``on`` or ``off``, beyond the model."""
    options = argparse.ArgumentParser()
    options.add_argument("job")
    options.add_argument("which", choices=["on", "off"])
    options.add_argument("--tokens", type=int, required=True)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", default="cpu")
    args = options.parse_args(rest)
    with threads(args.threads):
        job = make_job(args.job, device=args.device)
        call = token_calls(job, args.tokens)[args.which]
        token_calls(job, 8)[args.which]()  # libraries are in memory before the measured call
        return {"peak_bytes": peak_of_call(call, args.device)}


# ---------------------------------------------------------------------------------------------------------- results

SAVINGS: dict[str, Callable[..., Iterator[Saving]]] = {
    "projection": behind_the_projection,
    "last-layer": last_layer,
    "head": head,
    "prompt": kept_prompt,
    "swarm": gated_rows,
    "adaptive": adaptive,
}


def _add(results: Any, case: str, saving: Saving, timings: dict[str, Timing]) -> None:
    on, off = timings["on"], timings["off"]
    for method, timing in (("with", on), ("without", off)):
        results.add(case, method, "seconds", timing.seconds, spread=timing.spread, n=timing.n, unit="s")
    _compare(results, case, saving.predicted, off.seconds / on.seconds, saving.note)


def _compare(results: Any, case: str, predicted: float, measured: float, note: str) -> None:
    results.add(case, "saving", "predicted", predicted, unit="ratio", note=note)
    results.add(case, "saving", "measured", measured, unit="ratio")
    results.add(case, "saving", "measured_over_predicted", measured / predicted, unit="ratio")
    print(f"{case:60s} predicted {predicted:7.2f}   measured {measured:7.2f}   {note}", flush=True)


def _memory(results: Any, name: str, counts: Counts, args: argparse.Namespace, size: int) -> None:
    """The bytes that the maps take: what both need beside them cancels."""
    case = f"{name}: memory of token scores, {counts.tokens} tokens"
    common = ["--tokens", str(counts.tokens), "--threads", str(args.threads), "--device", args.device]
    on, off = (peak_of_child(["savings", name, which, *common])["peak_bytes"] for which in ("on", "off"))
    results.add(case, "with", "peak_bytes", on, unit="bytes")
    results.add(case, "without", "peak_bytes", off, unit="bytes")
    predicted = counts.maps(size)
    results.add(case, "saving", "predicted_bytes", predicted, unit="bytes", note="maps of all layers")
    results.add(case, "saving", "measured_bytes", off - on, unit="bytes")
    results.add(case, "saving", "measured_over_predicted", (off - on) / predicted, unit="ratio")
    print(f"{case:60s} predicted {predicted / 1e6:7.0f} MB measured {(off - on) / 1e6:7.0f} MB", flush=True)


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """``run.py savings``."""
    warnings.filterwarnings("ignore", "tolerance .* not reached")
    repeats = 2 if args.quick else 5
    for name in args.shapes:
        job = make_job(name, device=args.device)
        if not job.generative:
            raise ValueError(f"shapes: savings are counted for gated language models, got {name!r}")
        counts = Counts.of(job.model.config, job.ids.shape[1])
        with threads(args.threads):
            for key, find in SAVINGS.items():
                if not any(fnmatch(key, pattern) for pattern in args.only):
                    continue
                if key == "adaptive":
                    find = partial(find, tolerance=args.exact_tolerance, cache=args.reference)
                for saving in find(job, counts):
                    short = 0.05 if key == "projection" else 0.0
                    timings = compare(
                        {"on": saving.on, "off": saving.off},
                        repeats=repeats,
                        budget=args.budget,
                        sample_seconds=short,
                        device=args.device,
                    )
                    _add(results, f"{name}: {saving.name}", saving, timings)
                    save()
            if any(fnmatch("tokens", pattern) for pattern in args.only):
                long = replace(counts, tokens=args.long)
                rate = best_matmul_rate(job.model.dtype, device=args.device, quick=args.quick)
                bandwidth = copy_bandwidth((1 << 25) if args.quick else (1 << 30), device=args.device)
                saving = token_row(job, long, rate, bandwidth)
                calls = {"on": saving.on, "off": saving.off}
                timings = compare(calls, repeats=repeats, budget=args.budget, device=args.device)
                _add(results, f"{name}: {saving.name}, {args.long} tokens", saving, timings)
                if args.peak:
                    _memory(results, name, long, args, job.model.dtype.itemsize)
                save()
