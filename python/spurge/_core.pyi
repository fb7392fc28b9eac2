"""Compiled kernels. Private: use :mod:`spurge.ops`. Arrays are anything with DLPack, contiguous, on one device."""

from typing import Any

built_with_cuda: bool

def build_config() -> dict[str, Any]: ...

# association
def associate(
    sums: Any,
    logs: Any,
    carry: Any,
    picked: Any,
    activations: Any,
    features: Any,
    gradients: Any,
    starts: Any,
    classes: Any,
    scales: Any,
    target: int = -1,
    relu: bool = False,
    resumed: bool = False,
    unfinished: bool = False,
    workspace: Any = None,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...
def associate_workspace(samples: int, width: int, outputs: int) -> int: ...

# balance
def balance_sweep(
    scores: Any,
    mean: Any,
    value: Any,
    workspace: Any,
    covariates: Any,
    base: Any,
    dual: Any,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...
def balance_batch(
    dual: Any,
    means: Any,
    report: Any,
    status: Any,
    workspace: Any,
    covariates: Any,
    base: Any,
    targets: Any,
    outcomes: Any,
    start: Any,
    tolerance: float,
    steps: int,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...
def balance_strata(
    dual: Any,
    averages: Any,
    report: Any,
    status: Any,
    workspace: Any,
    values: Any,
    starts: Any,
    base: Any,
    masses: Any,
    means: Any,
    squares: Any | None,
    outcomes: Any,
    start: Any,
    interact: bool,
    tolerance: float,
    steps: int,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...
def balance_sweep_workspace(rows: int, columns: int) -> int: ...
def balance_batch_workspace(problems: int, rows: int, columns: int) -> int: ...
def balance_strata_workspace(units: int, rows: int, strata: int) -> int: ...

# gate
def open_rows(out: Any, x: Any, u: Any, alphas: list[float], threads: int = 1, stream: int | None = None) -> None: ...
def gate_columns(z: Any, columns: Any, gates: Any, threads: int = 1, stream: int | None = None) -> None: ...

# ig
def node_sum(out: Any, grads: Any, weights: list[float], threads: int = 1, stream: int | None = None) -> None: ...
def multiply_sum(out: Any, p: Any, z: Any, mask: Any | None, threads: int = 1, stream: int | None = None) -> None: ...
def first_order(
    total: Any,
    magnitude: Any,
    reach: Any,
    p: Any,
    z: Any,
    scale: Any,
    mask: Any | None,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...

# median
def segment_medians(
    out: Any,
    features: Any,
    order: Any,
    starts: Any,
    transform: str,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...

# proximity
def proximity(
    hard: Any,
    soft: Any,
    scores: Any,
    ids: Any,
    bitmap: Any,
    labels: Any,
    k: int,
    sharpness: float,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...
def proximity_gradient(
    grad: Any,
    by_hard: Any,
    by_soft: Any,
    scores: Any,
    ids: Any,
    bitmap: Any,
    labels: Any,
    k: int,
    sharpness: float,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...

# swarm
def swarm_step(
    position: Any,
    velocity: Any,
    best: Any,
    leader: Any,
    inertia: float,
    cognitive: float,
    social: float,
    low: float,
    high: float,
    max_velocity: float,
    seed: int,
    iteration: int,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...
def swarm_best(
    leader: Any,
    best: Any,
    best_fitness: Any,
    position: Any,
    fitness: Any,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...

# sweep
def correct_interval(
    out: Any,
    logits: Any,
    shifts: Any,
    rows: Any,
    labels: Any,
    low: float,
    high: float,
    threads: int = 1,
    stream: int | None = None,
) -> None: ...
