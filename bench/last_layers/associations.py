"""The association part of ``run.py last-layer``: CA and SCA of a layer's edges, beside what people write in torch.

Every method starts from features as they come, labels in any order, and the layer's weight; logits, softmax and the
sorting by class are in its time. The limit is what the arithmetic alone takes: one matrix product for the logits, one
for the classes' gradients (for one row: none, but one reading of the features), each at the rate torch reaches for that
shape, and the logarithms.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.comparison import Case, Method
from common.harness import compare, peak_of_call, peak_of_child, reset_peak
from peers.sca import Layer, Scores, Tuned, autograd_loop, class_einsum, make_layer, streaming, vmap_grad

SHAPES = {"small": (10_000, 10, 512), "middle": (10_000, 100, 512), "large": (50_000, 1_000, 2_048)}
QUICK_SHAPES = {"small": (500, 5, 64), "middle": (500, 10, 64), "large": (2_000, 50, 128)}
TARGET = 3  # the class asked for, and the row
LIMIT = 4_000_000_000  # bytes of address space beyond the inputs that `show_limit` allows
LOOPED = 200  # samples that the slow methods do where all of them would take minutes
PEAKS = ("spurge", "tuned", "streaming", "class-einsum", "vmap-grad")
PEAKS_QUICK = ("spurge",)
SLOW = 1 << 33  # numbers in all per-sample gradients together, from which on those methods do few samples only

QUESTIONS: dict[str, dict[str, int]] = {"own rows": {}, "one target": {"target": TARGET}, "one row": {"row": TARGET}}
ASKED = {"small": list(QUESTIONS), "middle": list(QUESTIONS), "large": ["own rows", "one row"]}


def spurge_scores(layer: Layer, *, target: int | None = None, row: int | None = None) -> Scores:
    """The library's."""
    from spurge.engine.last_layer.association import association

    rows = None if row is None else [row]
    found = association(layer.features, layer.labels, (layer.weight, layer.bias), target=target, rows=rows)
    return Scores(found.ca, found.sca)


def methods(layer: Layer, question: dict[str, int], *, compiled: bool = False) -> dict[str, Method]:
    """Every method. Those that hold the whole G need it four times: G, its shares, logarithms and products."""
    samples, classes, width = len(layer.labels), *layer.weight.shape
    rows = 1 if "row" in question else classes
    whole = classes * rows * width * 4
    all_of_it = {"needs": 4 * whole, "note": f"G alone has {whole / 1e9:.2f} GB"} if whole > 1 << 30 else {}
    gradients = samples * rows * width  # of all samples, one by one
    part = min(samples, LOOPED) if gradients > SLOW else None
    of = "" if part is None else f"extrapolated from {part} of {samples} samples"
    looped = min(samples, LOOPED)
    tuned = Tuned(tile=1 << 26 if layer.weight.is_cuda else 1 << 19)  # there a cache of one core is no limit
    found = {
        "spurge": Method(partial(spurge_scores, layer, **question)),
        "tuned": Method(partial(tuned, layer, **question)),
        "streaming": Method(partial(streaming, layer, **question), once=gradients > SLOW),
        "class-einsum": Method(partial(class_einsum, layer, **question), **all_of_it),
        "vmap-grad": Method(
            partial(vmap_grad, layer, samples=part, **question),
            scale=1 if part is None else samples / part,
            rest=partial(vmap_grad, layer, samples=0, **question),
            once=gradients > SLOW >> 7,
            **{**all_of_it, **({"note": of} if of else {})},
        ),
        "autograd-loop": Method(
            partial(autograd_loop, layer, samples=looped, **question),
            scale=samples / looped,
            rest=partial(autograd_loop, layer, samples=0, **question),
            once=True,
            note=f"extrapolated from {looped} of {samples} samples",
        ),
    }
    if compiled:
        found["tuned-compiled"] = Method(
            partial(Tuned(compiled=True), layer, **question), note="additions and logarithm as one compiled loop"
        )
    return found


def agreement(reference: Scores, answer: Scores) -> dict[str, tuple[float, str]]:
    """Percent of rows whose best edge is the same, and the largest relative differences of CA and SCA."""

    def difference(value: Tensor, exact: Tensor) -> float:
        exact = exact.double()
        return float(((value.double() - exact).abs() / exact.abs().clamp_min(1e-300)).max())

    same = answer.sca.argmax(1) == reference.sca.argmax(1)
    return {
        "same_argmax": (100 * float(same.float().mean()), "percent"),
        "ca_difference": (difference(answer.ca, reference.ca), "relative"),
        "sca_difference": (difference(answer.sca, reference.sca), "relative"),
    }


def limits(layer: Layer, question: dict[str, int]) -> dict[str, tuple[float, str]]:
    """Seconds of the matrix products and the logarithms alone."""
    samples, classes, width = len(layer.labels), *layer.weight.shape
    device = layer.weight.device
    rows, each = min(samples, 2048), max(1, samples // classes)
    x, d = torch.rand(rows, width, device=device), torch.rand(rows, classes, device=device)
    out = torch.empty(rows, classes, device=device)
    calls: dict[str, Callable[[], Any]] = {"logits": lambda: torch.mm(x, layer.weight.T, out=out)}
    tiles = [] if "row" in question else sorted({min(width, tile) for tile in (128, 512, width)})
    for tile in tiles:
        mean = torch.empty(classes, tile, device=device)
        left, right = d[:each].T, x[:each, :tile]
        calls[f"classes {tile}"] = partial(torch.mm, left, right, out=mean)
    few = torch.rand(1 << 16, device=device) + 0.1
    gone = torch.empty_like(few)
    calls["log"] = lambda: torch.log(few, out=gone)
    if not tiles:
        calls["read"] = lambda: layer.features.sum()
    taken = {k: t.seconds for k, t in compare(calls, repeats=7, sample_seconds=0.02, device=device).items()}
    logits = taken["logits"] * samples / rows
    if not tiles:
        seconds = logits + taken["read"]
        return {"limit": (seconds, f"logits {logits:.3g} s, one reading of the features {seconds - logits:.3g} s")}
    products = min(taken[f"classes {tile}"] * width / tile for tile in tiles) * samples / each
    logarithms = taken["log"] / few.numel() * classes * classes * width
    note = f"logits {logits:.3g} s, class products {products:.3g} s, logarithms {logarithms:.3g} s"
    total = logits + products + logarithms
    return {"limit": (total, note), "limit x 1.3": (1.3 * total, "the aim")}


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """One after the other: the large features are in memory only while they are needed."""
    for size, shape in (QUICK_SHAPES if quick else SHAPES).items():
        for dtype in (torch.float32, torch.float16):
            layer = make_layer(*shape, dtype, device)
            name = f"N={shape[0]:,} C={shape[1]:,} M={shape[2]:,} {str(dtype).removeprefix('torch.')}"
            for asked in ASKED[size]:
                question = QUESTIONS[asked]
                if dtype == torch.float16 and asked != "own rows":
                    continue
                exact = Tuned(dtype=torch.float64)(layer, **question)
                compiled = not quick and size == "middle" and asked == "own rows" and dtype == torch.float32
                found = methods(layer, question, compiled=compiled)
                if dtype == torch.float16:
                    found = {key: found[key] for key in ("spurge", "tuned", "streaming")}
                    if size == "large":
                        del found["streaming"]
                child = ("association", *map(str, shape), str(dtype).removeprefix("torch."), asked)
                peaks = PEAKS_QUICK if quick else PEAKS
                if asked == "one row":
                    peaks = peaks[:2]
                if size == "small" or asked == "one target" or (dtype == torch.float16 and size != "large"):
                    peaks = ()
                yield Case(
                    f"association, {asked}, {name}",
                    found,
                    partial(agreement, exact),
                    limits(layer, question),
                    child,
                    tuple(key for key in peaks if key in found),
                )
            del layer


def peak(rest: list[str]) -> int:
    """Bytes beyond the inputs at the peak of one call. For ``run.py child``: N C M dtype question method."""
    samples, classes, width = map(int, rest[:3])
    dtype, question, name = getattr(torch, rest[3]), QUESTIONS[rest[4]], rest[5]
    methods(make_layer(60, 6, 64, dtype), question)[name].call()  # libraries in memory before the measured call
    layer = make_layer(samples, classes, width, dtype)
    return peak_of_call(methods(layer, question, compiled=name == "tuned-compiled")[name].call)


def under_limit(rest: list[str]) -> dict[str, Any]:
    """Run one method with an address space that ends ``limit`` bytes beyond what the inputs already take.

    For ``run.py child``: limit N C M method. ``ran`` says whether it came to its end, ``error`` what torch said if not.
    """
    limit, samples, classes, width = map(int, rest[:4])
    methods(make_layer(60, 6, 64), {})[rest[4]].call()
    layer = make_layer(samples, classes, width)
    reset_peak()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    held = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + limit, resource.RLIM_INFINITY))
    try:
        methods(layer, {})[rest[4]].call()
    except (MemoryError, RuntimeError) as error:
        return {"ran": False, "error": str(error).splitlines()[0][:200]}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"ran": True, "error": ""}


def show_limit(results: Any, *, quick: bool, threads: int) -> None:
    """The library, and the form with the whole G, each with ``LIMIT`` bytes of address space beyond its inputs."""
    shape = (QUICK_SHAPES if quick else SHAPES)["large"]
    case = f"association, own rows, N={shape[0]:,} C={shape[1]:,} M={shape[2]:,} float32"
    for name in ("spurge", "class-einsum"):
        found = peak_of_child(["last-layer", str(threads), "limited", str(LIMIT), *map(str, shape), name])
        note = f"with an address space of {LIMIT / 1e9:.0f} GB beyond the inputs: {found['error'] or 'ran'}"
        results.add(case, name, "ran_in_limit", int(found["ran"]), unit="", note=note)
        print(f"    {name:18s} {note}", flush=True)
