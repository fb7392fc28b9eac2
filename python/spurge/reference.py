"""What each op means, in plain torch and float64. Slow, obvious, and the oracle of every test.

The same names as in :mod:`spurge.ops`; in-place ops (trailing underscore there) return a new tensor here.
Letters: B examples, T tokens, H hidden, F neurons of a site, S nodes, R rows, P particles, n columns,
D dimensions, U units, G golden sets, Y labels. Of a last layer: N samples, M features, O outputs, C classes,
E edited outputs, S segments of samples. Of balancing: N rows, K covariates, P problems, S strata, U units, V outcomes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# ---- association ---------------------------------------------------------------------------------


def associate(
    sums: Tensor,
    logs: Tensor,
    carry: Tensor,
    picked: Tensor,
    activations: Tensor,
    features: Tensor,
    gradients: Tensor,
    starts: Tensor,
    classes: Tensor,
    scales: Tensor,
    *,
    target: int = -1,
    relu: bool = False,
    resumed: bool = False,
    unfinished: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """features ``[N, M]``, gradients ``[N, O]``, starts ``[S+1]``, classes and scales ``[S]``: the first five, changed.

    ``G_s[o, m] = scales[s] * sum of |gradients[n, o]| * |features[n, m]|`` over segment s; sums += G, logs += G log G.
    """
    sums, logs, carry, picked, activations = (x.double().clone() for x in (sums, logs, carry, picked, activations))
    for s, c in enumerate(classes.tolist()):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        x, g = features[rows].double(), gradients[rows].double()
        activations[c] += scales[s] * (x.relu() if relu else x.abs()).sum(0)
        total = g.abs().t() @ x.abs()
        if resumed and s == 0:
            total = carry + total
        if unfinished and s == len(classes) - 1:
            carry = total
            continue
        total = scales[s] * total
        sums += total
        logs += torch.special.xlogy(total, total)
        if c == target:
            picked = total
        elif target == -1 and c < len(picked):
            picked[c] = total[c]
    return sums, logs, carry, picked, activations


def class_association(gradients: Tensor, activations: Tensor, residuals: Tensor, floor: float = 1e-6) -> Tensor:
    """gradients G ``[C, R, M]``, activations A ``[C, M]``, residuals r ``[C, R]``: CA ``[R, M]``.

    H(G) / H(A) over classes, all with samples. Where H(A) < floor log C, a unit leaks evenly into the other classes
    until H(A) is that, its gradient by each class's mean residual r times as much; the larger H(G) of the two is taken.
    """
    classes = len(activations)
    out = gradients.new_zeros(gradients.shape[1:], dtype=torch.float64)
    for r, m in itertools.product(*map(range, out.shape)):
        g, a, own = gradients[:, r, m].double(), activations[:, m].double(), int(activations[:, m].argmax())
        if not a.sum() > 0 or not g.sum() > 0:
            continue
        least, others = floor * math.log(classes), torch.arange(classes) != own
        found, of_gradients = float(_entropy(a)), float(_entropy(g))
        if found < least:
            low, high = 0.0, classes - 1.0
            while (middle := (low + high) / 2) not in (low, high):
                even = torch.full_like(a, middle / (classes - 1)).where(others, 1.0)
                low, high = (middle, high) if _entropy(even) < least else (low, middle)
            leaked = residuals[:, r].double() * high / (classes - 1) * (a[own] / g[own])
            found, of_gradients = least, max(of_gradients, float(_entropy(leaked.where(others, 1.0))))
        out[r, m] = of_gradients / found
    return out


def _entropy(parts: Tensor) -> Tensor:
    return torch.special.entr(parts / parts.sum()).sum()


# ---- balance -------------------------------------------------------------------------------------


def balance_sweep(covariates: Tensor, base: Tensor, dual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """covariates ``[N, K]``, base ``[N]``, dual ``[K]`` -> scores ``[N]``, mean ``[K]``, value ``[2]``.

    ``z = covariates @ dual``, the mean under weights ``base * exp(z)``, and (log of their sum, max z where base > 0).
    Rows of weight 0 do not count, whatever they hold.
    """
    c = covariates.double()
    z = c @ dual
    if bool(z.isnan().any() | c.isnan().any() | base.isnan().any()):
        return z, torch.full_like(dual, torch.nan), z.new_full((2,), torch.nan)
    inside = (base > 0) & (z > -torch.inf)
    if not bool(inside.any()):
        return z, torch.full_like(dual, torch.nan), z.new_full((2,), -torch.inf)
    top = z[inside].max()
    w = base[inside] * (z[inside] - top).exp()
    return z, w @ c[inside] / w.sum(), torch.stack([top + w.sum().log(), top])


_CONVERGED, _INFEASIBLE, _UNFINISHED, _NOT_FINITE = range(4)
_REACH = 4.0  # of a step: the square root of its Newton decrement
_RIDGE = 1e-12  # of the direction only, beside the mean of the Hessian's diagonal
_CONSTANT = 1e-13  # a standard deviation below this share of the largest value is rounding
_EQUAL = 1e-10  # of two constants


def _newton(
    y: Tensor,
    base: Tensor,
    group: Tensor,
    masses: Tensor,
    start: Tensor,
    worst: Callable[[Tensor], float],
    tolerance: float,
    steps: int,
) -> tuple[Tensor, Tensor, float, int, int]:
    """Minimises ``sum of masses * logsumexp of y @ x + log base in each group`` over x.

    Centred covariates y ``[n, K]`` of rows with base > 0: where a minimum is, ``weights @ y`` is 0.
    Returns x, the weights, the value, the steps taken and the status.
    """

    def at(x: Tensor) -> tuple[float, float, Tensor]:
        z = y @ x
        top = z.new_full((len(masses),), -torch.inf).scatter_reduce(0, group, z, "amax")
        e = base * (z - top[group]).exp()
        sums = torch.zeros_like(masses).index_add(0, group, e)
        held = masses > 0
        value = masses[held] @ (top + sums.log())[held]
        return float(value), float(masses[held] @ top[held]), (masses / sums)[group] * e

    x, taken = start, 0
    value, top, w = at(x)
    while True:
        if top < -1e-12 * float(y.abs().amax(0) @ x.abs()):
            return x, w, value, taken, _INFEASIBLE
        if worst(w) <= tolerance:
            return x, w, value, taken, _CONVERGED
        if taken == steps:
            return x, w, value, taken, _UNFINISHED
        gradient = w @ y
        means = y.new_zeros(len(masses), y.shape[1]).index_add(0, group, (w / masses[group])[:, None] * y)
        apart = y - means[group]
        hessian = (w[:, None] * apart).t() @ apart
        ridge = _RIDGE * float(hessian.trace()) / len(x) + 1e-20
        direction = -torch.linalg.solve(hessian + ridge * torch.eye(len(x), dtype=y.dtype, device=y.device), gradient)
        slope = float(gradient @ direction)
        t = min(1.0, _REACH / max(-slope, 1e-300) ** 0.5)
        for _ in range(40):
            trial = at(x + t * direction)
            if trial[0] <= value + 1e-4 * t * slope + 1e-13 * (1 + abs(value)):
                break
            t *= min(0.5, max(0.1, -slope * t / (2 * (trial[0] - value - t * slope))))
        x = x + t * direction
        value, top, w = trial
        taken += 1


def _kish(w: Tensor) -> float:
    return float(w.sum() ** 2 / (w @ w))


def balance_batch(
    covariates: Tensor,
    base: Tensor,
    targets: Tensor,
    outcomes: Tensor,
    start: Tensor,
    tolerance: float = 1e-8,
    steps: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """covariates ``[P, N, K]``, base ``[N]`` or ``[P, N]``, targets and start ``[P, K]``, outcomes ``[N, V]``.

    -> dual ``[P, K]``, means ``[P, V]``, report ``[P, 4]`` and status ``[P]`` as in :func:`spurge.ops.balance_batch`.
    """
    problems = covariates.shape[0]
    dual = torch.full_like(targets, torch.nan)
    means = targets.new_full((problems, outcomes.shape[1]), torch.nan)
    report = targets.new_full((problems, 4), torch.nan)
    status = torch.full((problems,), _INFEASIBLE, dtype=torch.int32, device=targets.device)
    for p in range(problems):
        b = base if base.dim() == 1 else base[p]
        rows, report[p, 3] = b != 0, 0
        c, b, t = covariates[p, rows].double(), b[rows], targets[p]
        if not all(bool(x.isfinite().all()) for x in (c, b, t, start[p])):
            status[p] = _NOT_FINITE
            continue
        if len(b) == 0:
            continue
        y, share = c - t, b / b.sum()
        middle = share @ y
        deviation = (share @ (y - middle) ** 2).sqrt()
        varies = deviation > _CONSTANT * c.abs().amax(0)
        if bool((~varies & (middle.abs() > _EQUAL * torch.maximum(c.abs().amax(0), t.abs()))).any()):
            continue
        y = (y / deviation)[:, varies]

        def worst(w: Tensor, y: Tensor = y) -> float:
            return float(torch.cat([w @ y, w.new_zeros(1)]).abs().max())

        group = torch.zeros(len(b), dtype=torch.int64, device=b.device)
        begin = (start[p] * deviation)[varies]
        x, w, value, taken, state = _newton(y, b, group, b.new_ones(1), begin, worst, tolerance, steps)
        status[p], report[p, 3] = state, taken
        if state == _INFEASIBLE:
            continue
        dual[p] = 0
        dual[p, varies] = x / deviation[varies]
        means[p] = w @ outcomes[rows]
        report[p, :3] = report.new_tensor([worst(w), _kish(w), value])
    return dual, means, report, status


def balance_strata(
    values: Tensor,
    starts: Tensor,
    base: Tensor,
    masses: Tensor,
    means: Tensor,
    squares: Tensor | None,
    outcomes: Tensor,
    start: Tensor,
    interact: bool = True,
    tolerance: float = 1e-8,
    steps: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values ``[U, N]``, starts ``[S + 1]``, base ``[N]``, masses ``[S]``, means ``[U, S]``, squares ``[U]``.

    outcomes ``[N, V]``, start ``[U, S + 1]`` -> dual ``[U, S + 1]``, averages ``[U, V]``, report ``[U, 4]`` and status
    ``[U]`` as in :func:`spurge.ops.balance_strata`.
    """
    units, strata = means.shape
    dual = torch.full_like(start, torch.nan)
    averages = means.new_full((units, outcomes.shape[1]), torch.nan)
    report = means.new_full((units, 4), torch.nan)
    status = torch.full((units,), _INFEASIBLE, dtype=torch.int32, device=means.device)
    wanted = masses > 0
    stratum = torch.repeat_interleave(torch.arange(strata, device=masses.device), starts.diff())
    rows = (base != 0) & wanted[stratum]
    here = stratum[rows]
    present = torch.zeros_like(wanted).index_fill(0, here, True)
    report[:, 3] = 0
    for u in range(units):
        v, b, m = values[u, rows].double(), base[rows], means[u].where(wanted, 0.0)
        q = means.new_zeros(()) if squares is None else squares[u]
        if not all(bool(x.isfinite().all()) for x in (v, b, masses, m, q, start[u])):
            status[u] = _NOT_FINITE
            continue
        if not bool((present | ~wanted).all()) or len(b) == 0:
            continue
        if not interact:
            m = (masses @ m).expand(strata)
        share = b / b.sum()
        middle = share @ v
        deviation = (share @ (v - middle) ** 2).sqrt()
        largest = v.abs().max()
        flat = bool(deviation <= _CONSTANT * largest)
        deviation = v.new_ones(()) if flat else deviation
        x = (v - m[here]) / deviation
        constant, off = torch.zeros_like(wanted), torch.zeros_like(m)
        for j in wanted.nonzero().flatten().tolist():
            inside = here == j
            constant[j] = flat or (interact and bool(v[inside].max() - v[inside].min() <= _CONSTANT * largest))
            off[j] = (v[inside] - m[j]).abs().max()
        if bool((constant & (off > _EQUAL * torch.maximum(largest, m.abs()))).any()):
            continue
        kept = (wanted & ~constant).nonzero().flatten()
        y = (here[:, None] == kept) * x[:, None]
        if not interact:
            kept, y = kept[:1], y.sum(1, keepdim=True)[:, : len(kept)]
        spread, bent = v.new_zeros(()), False
        if squares is not None:
            spread = (share @ (v**2 - share @ v**2) ** 2).sqrt()
            bent = bool(spread > _CONSTANT * largest**2)
            if not bent and bool((v**2 - q).abs().max() > _EQUAL * torch.maximum(largest**2, q.abs())):
                continue
            if bent:
                y = torch.cat([y, (x**2 - (q - masses @ m**2) / deviation**2)[:, None]], 1)

        def worst(w: Tensor, x=x, v=v, q=q, kept=kept, spread=spread, bent=bent) -> float:  # type: ignore[no-untyped-def]
            sums = torch.zeros_like(masses).index_add(0, here, w * x)
            gaps = (sums / masses)[kept] if interact else sums.sum()[None][: len(kept)]
            square = (w @ (v**2 - q) / spread)[None][: int(bent)]
            return float(torch.cat([gaps, square, gaps.new_zeros(1)]).abs().max())

        curvature = start[u, -1] * deviation**2 * bent
        first = deviation * start[u, :-1][kept] + 2 * curvature * m[kept] / deviation
        first = torch.cat([first, curvature[None]]) if bent else first
        z, w, value, taken, state = _newton(y, b, here, masses, first, worst, tolerance, steps)
        status[u], report[u, 3] = state, taken
        if state == _INFEASIBLE:
            continue
        dual[u] = 0
        if bent:
            dual[u, -1] = z[-1] / deviation**2
        dual[u, kept] = z[: len(kept)] / deviation - 2 * dual[u, -1] * m[kept]
        if not interact and len(kept):
            dual[u, :-1] = dual[u, kept]
        averages[u] = w @ outcomes[rows]
        report[u, :3] = report.new_tensor([worst(w), _kish(w), value])
    return dual, averages, report, status


# ---- gate ----------------------------------------------------------------------------------------


def open_rows(x: Tensor, u: Tensor, alphas: Sequence[float]) -> Tensor:
    """x, u ``[B, ...]`` -> ``[S*B, ...]``, node-major: ``out[s*B+b] = x[b] + (alphas[s] - 1) * u[b]``."""
    rows = [x.double() + (alpha - 1) * u.double() for alpha in alphas]
    return torch.cat(rows) if rows else x.double()[:0]


def gate_columns(z: Tensor, columns: Tensor, gates: Tensor) -> Tensor:
    """z ``[P*B, T, F]``, columns ``[n]``, gates ``[P, n]`` -> z with ``z[p*B+b, t, columns[j]] *= gates[p, j]``."""
    full = torch.ones(gates.shape[0], z.shape[2], dtype=torch.float64, device=z.device)
    full[:, columns] = gates.double()
    return z.double() * full.repeat_interleave(z.shape[0] // gates.shape[0], 0)[:, None, :]


# ---- ig ------------------------------------------------------------------------------------------


def node_sum(grads: Tensor, weights: Sequence[float]) -> Tensor:
    """grads ``[S*B, ...]``, node-major -> ``[B, ...]``: ``out[b] = sum_s weights[s] * grads[s*B+b]``."""
    w = torch.tensor(list(weights), dtype=torch.float64, device=grads.device)
    return torch.einsum("s,sb...->b...", w, grads.double().unflatten(0, (len(weights), -1)))


def multiply_sum(p: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    """p, z ``[B, T, F]``, mask ``[B, T]`` -> ``[B, F]``: ``out[b, k] = sum_t mask[b, t] * p[b, t, k] * z[b, t, k]``.

    A token that the mask drops does not count, even where it holds NaN.
    """
    return _kept(p.double() * z.double(), mask).sum(1)


def first_order(p: Tensor, z: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """p, z ``[B, T, F]``, scale and mask ``[B, T]`` -> total, magnitude and reach ``[B, F]``.

    ``total`` is :func:`multiply_sum`; ``magnitude`` the same sum of ``|p z|``; ``reach[b, k]`` the largest of 0 and
    ``|z[b, t, k]| * scale[b, t]`` of the tokens that the mask keeps, NaN where one of them is NaN.
    """
    product = _kept(p.double() * z.double(), mask)
    sizes = _kept(z.double().abs() * scale.double()[..., None], mask)
    none = sizes.new_zeros(sizes.shape[0], 1, sizes.shape[2])
    return product.sum(1), product.abs().sum(1), torch.cat([none, sizes], 1).amax(1)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill((mask == 0)[..., None], 0.0)


# ---- median --------------------------------------------------------------------------------------


def segment_medians(features: Tensor, order: Tensor, starts: Tensor, transform: str = "raw") -> Tensor:
    """features ``[N, M]``, order ``[n]``, starts ``[S+1]`` -> ``[S, M]``: medians of ``order[starts[s]:starts[s+1]]``.

    The mean of the middle two for an even number of rows; NaN where there is no row, or a value is NaN.
    """
    x = features.double()
    parts = {"raw": x, "magnitude": x.abs(), "positive": x.clamp_min(0), "negative": (-x).clamp_min(0)}
    values = parts[transform]
    borders = starts.tolist()
    out = values.new_full((len(borders) - 1, values.shape[1]), torch.nan)
    for s, (begin, end) in enumerate(itertools.pairwise(borders)):
        ranked = values[order[begin:end]].sort(0).values
        if end > begin:
            low, high = ranked[(end - begin - 1) // 2], ranked[(end - begin) // 2]
            out[s] = torch.where(low == high, low, low / 2 + high / 2)
            out[s, ranked.isnan().any(0)] = torch.nan
    return out


# ---- proximity -----------------------------------------------------------------------------------


def golden_members(ids: Tensor, bitmap: Tensor, label: int) -> Tensor:
    """ids ``[n]`` >= 0, bitmap ``[G, Y, words]`` -> bool ``[G, n]``: bit ``id % 32`` of word ``id // 32``."""
    words = torch.nn.functional.pad(bitmap[:, label], (0, 1))  # an empty word for all units beyond the bitmap
    return (words[:, (ids // 32).clamp_max(bitmap.shape[2]).long()] >> (ids % 32)) % 2 == 1


def _sigmoid(a: Tensor, ranked: Tensor, k: int, sharpness: float) -> tuple[Tensor | float, Tensor | float]:
    """Threshold and temperature of a row of scores ``[n]``, as functions of them."""
    wanted, least = sharpness * a.std(correction=0), 1e-3 * a.abs().mean()
    t = wanted if wanted > least else least if least > 0 else 1.0
    tau = ranked[k - 1 : k + 1].mean() if len(a) > k else ranked[-1] - t
    return tau, t


def proximity(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float
) -> tuple[Tensor, Tensor]:
    """scores ``[R, U]``, ids ``[B, U]``, bitmap ``[G, Y, words]``, labels ``[B]`` -> hard, soft ``[R, G]``.

    Autograd differentiates it as :func:`spurge.ops.proximity` is differentiated.
    """
    sets = bitmap.shape[0]
    values = [(scores.new_empty(0, sets, dtype=torch.float64),) * 2]
    for r in range(scores.shape[0]):
        b = r % ids.shape[0]
        units = (ids[b] >= 0).nonzero().flatten()
        a = scores[r, units].double()
        if len(units) == 0 or not a.isfinite().all():
            nothing = a.new_full((1, sets), 0.0 if len(units) == 0 else torch.nan) + 0 * a.sum()
            values.append((nothing, nothing))
            continue
        g = golden_members(ids[b, units], bitmap, int(labels[b])).double()  # [G, n]

        ranked = a.sort(descending=True, stable=True)
        chosen = ranked.indices[:k]
        hits = g[:, chosen].sum(1)
        hard = hits / len(chosen) + (g[:, chosen] * a[chosen]).sum(1) / hits.clamp_min(1)

        tau, t = _sigmoid(a, ranked.values, k, sharpness)
        m = ((a - tau) / t).sigmoid()
        inside, mass = (g * m).sum(1), (g * m * a).sum(1)
        soft = inside / m.sum() + mass / (inside + 1e-6)
        values.append((hard[None], soft[None]))
    hard_rows, soft_rows = zip(*values, strict=True)
    return torch.cat(hard_rows), torch.cat(soft_rows)


def proximity_gradient(
    by_hard: Tensor,
    by_soft: Tensor,
    scores: Tensor,
    ids: Tensor,
    bitmap: Tensor,
    labels: Tensor,
    k: int,
    sharpness: float,
) -> Tensor:
    """by_hard, by_soft ``[R, G]`` and the arguments of :func:`proximity` -> derivative by the scores ``[R, U]``."""
    out = scores.new_zeros(scores.shape, dtype=torch.float64)
    for r in range(scores.shape[0]):
        b = r % ids.shape[0]
        units = (ids[b] >= 0).nonzero().flatten()
        a, n = scores[r, units].double(), len(units)
        if n == 0 or not a.isfinite().all():
            out[r, units] = torch.nan
            continue
        g = golden_members(ids[b, units], bitmap, int(labels[b])).double()
        hard, soft = by_hard[r].double(), by_soft[r].double()
        ranked = a.sort(descending=True, stable=True)
        best = torch.zeros_like(a).index_fill_(0, ranked.indices[:k], 1.0)
        tau, t = _sigmoid(a, ranked.values, k, sharpness)
        m = ((a - tau) / t).sigmoid()
        inside, mass = (g * m).sum(1), (g * m * a).sum(1)
        mean = mass / (inside + 1e-6)

        own = soft / (inside + 1e-6)
        by_m = (own[:, None] * g * (a - mean[:, None])).sum(0)
        by_m += (soft[:, None] * (g * m.sum() - inside[:, None])).sum(0) / m.sum() ** 2
        direct = (own[:, None] * g * m).sum(0) + (
            hard[:, None] * g * best / (g * best).sum(1, keepdim=True).clamp_min(1)
        ).sum(0)

        turn = by_m * m * (1 - m) / t
        by_tau, by_t = -turn.sum(), -(turn * (a - tau) / t).sum()
        edge = ranked.indices[k - 1 : k + 1] if n > k else ranked.indices[-1:]
        through = torch.zeros_like(a).index_fill_(0, edge, by_tau / len(edge))
        if n <= k:
            by_t = by_t - by_tau
        deviation = a.std(correction=0)
        if sharpness * deviation > 1e-3 * a.abs().mean():
            through += by_t * sharpness * (a - a.mean()) / (n * deviation)
        else:
            through += by_t * 1e-3 * a.sign() / n
        out[r, units] = direct + turn + through
    return out


# ---- swarm ---------------------------------------------------------------------------------------


def philox(counter: Sequence[int | Tensor], key: Sequence[int]) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four counter words, two key words -> four random words.

    Words are integers in ``[0, 2^32)``, or int64 tensors of them that broadcast.
    """

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # upper and lower word, without leaving int64
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & 0xFFFFFFFF

    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) for c in counter))
    k0, k1 = key
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def swarm_uniform(particles: int, dimensions: int, seed: int, iteration: int) -> tuple[Tensor, Tensor]:
    """r1 and r2 of one iteration, ``[P, D]`` in [0, 1), exact in float32.

    Of each 32 dimensions, block j of 16 serves j (words 0, 1) and j + 16 (words 2, 3).
    """
    d = torch.arange(dimensions)
    block = d // 32 * 16 + d % 16
    words = philox([block, torch.arange(particles)[:, None], iteration, 0], [seed & 0xFFFFFFFF, seed >> 32])
    first = d % 32 < 16
    r1, r2 = words[0].where(first, words[2]), words[1].where(first, words[3])
    return (r1 >> 8).double() / 2**24, (r2 >> 8).double() / 2**24


def swarm_step(
    position: Tensor,
    velocity: Tensor,
    best: Tensor,
    leader: Tensor,
    inertia: float,
    cognitive: float,
    social: float,
    low: float,
    high: float,
    max_velocity: float,
    seed: int,
    iteration: int,
) -> tuple[Tensor, Tensor]:
    """position, velocity, best ``[P, D]``, leader ``[D]`` -> the next position and velocity."""
    particles, dimensions = position.shape
    r1, r2 = (r.to(position.device) for r in swarm_uniform(particles, dimensions, seed, iteration))
    x = position.double()
    v = inertia * velocity.double() + cognitive * r1 * (best.double() - x) + social * r2 * (leader.double() - x)
    v = v.clamp(-max_velocity, max_velocity)
    inside = (x + v).clamp(low, high)
    return inside, torch.where((inside != x + v) & ~inside.isnan(), -v, v)


def swarm_best(best: Tensor, best_fitness: Tensor, position: Tensor, fitness: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """best, position ``[P, D]``, best_fitness, fitness ``[P]`` -> best, best_fitness, the leader's index."""
    better = fitness > best_fitness
    values = fitness.where(better, best_fitness)
    order = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).sort(descending=True, stable=True)
    return position.where(better[:, None], best), values, order.indices[0]


# ---- sweep ---------------------------------------------------------------------------------------


def correct_interval(logits: Tensor, shifts: Tensor, rows: Tensor, labels: Tensor, low: float, high: float) -> Tensor:
    """logits ``[N, O]``, shifts ``[N, E]``, rows ``[E]``, labels ``[N]`` -> ``[N, 2]``: rates that predict the label.

    A closed interval of ``[low, high]``, one float64 shorter where a tie at its end is lost; ``(inf, -inf)`` if empty.
    """
    z = logits.double()
    s = torch.zeros_like(z)
    s[:, rows] = shifts.double()
    mine, my_shift = z.gather(1, labels[:, None]), s.gather(1, labels[:, None])
    apart = z != mine  # where not, the difference of two infinities would be NaN
    gap = (z - mine).where(apart, 0.0)
    slope = (my_shift - s).where(apart | mine.isfinite(), 0.0)
    wins_tie = torch.arange(z.shape[1], device=z.device) >= labels[:, None]

    inf = torch.full_like(z, torch.inf)
    at = gap / slope
    first = torch.where(wins_tie, at, at.nextafter(inf)).where(slope > 0, -inf)
    last = torch.where(wins_tie, at, at.nextafter(-inf)).where(slope < 0, inf)
    never = (slope == 0) & ~((gap < 0) | ((gap == 0) & wins_tie))
    begin, end = first.amax(1).clamp_min(low), last.amin(1).clamp_max(high)
    empty = (begin > end) | never.any(1) | z.isnan().any(1) | ~s.isfinite().all(1)
    return torch.stack([begin.masked_fill(empty, torch.inf), end.masked_fill(empty, -torch.inf)], 1)
