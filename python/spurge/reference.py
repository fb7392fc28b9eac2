"""What each op means, in plain torch and float64. Slow, obvious, and the oracle of every test.

The same names as in :mod:`spurge.ops`; in-place ops (trailing underscore there) return a new tensor here.
Letters: B examples, T tokens, H hidden, F neurons of a site, S nodes, R rows, P particles, n columns,
D dimensions, U units, G golden sets, Y labels. Of a last layer: N samples, M features, O outputs, C classes,
E edited outputs, S segments of samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
    product = p.double() * z.double()
    if mask is not None:
        product = product.masked_fill((mask == 0)[..., None], 0.0)
    return product.sum(1)


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


def proximity(
    scores: Tensor, ids: Tensor, bitmap: Tensor, labels: Tensor, k: int, sharpness: float
) -> tuple[Tensor, Tensor, Tensor]:
    """scores ``[R, U]``, ids ``[B, U]``, bitmap ``[G, Y, words]``, labels ``[B]`` -> hard, soft ``[R, G]``, grad.

    ``grad [R, G, U]``: derivative of soft by the scores, tau and T held constant.
    """
    hard = scores.new_zeros(scores.shape[0], bitmap.shape[0], dtype=torch.float64)
    soft = hard.clone()
    grad = scores.new_zeros(*hard.shape, scores.shape[1], dtype=torch.float64)
    for r in range(scores.shape[0]):
        b = r % ids.shape[0]
        units = (ids[b] >= 0).nonzero().flatten()
        a = scores[r, units].double()
        if len(units) == 0:
            continue
        if not a.isfinite().all():
            hard[r], soft[r], grad[r, :, units] = torch.nan, torch.nan, torch.nan
            continue
        g = golden_members(ids[b, units], bitmap, int(labels[b])).double()  # [G, n]

        ranked = a.sort(descending=True, stable=True)
        chosen = ranked.indices[:k]
        hits = g[:, chosen].sum(1)
        hard[r] = hits / len(chosen) + (g[:, chosen] * a[chosen]).sum(1) / hits.clamp_min(1)

        t = max(sharpness * a.std(correction=0).item(), 1e-3 * a.abs().mean().item()) or 1.0
        tau = ranked.values[k - 1 : k + 1].mean() if len(units) > k else a.min() - t
        m = ((a - tau) / t).sigmoid()
        inside, mass = (g * m).sum(1, keepdim=True), (g * m * a).sum(1, keepdim=True)
        soft[r] = (inside / m.sum() + mass / (inside + 1e-6)).flatten()

        dm = m * (1 - m) / t
        share = dm * (g * m.sum() - inside) / m.sum() ** 2
        mean = g * (m + dm * (a - mass / (inside + 1e-6))) / (inside + 1e-6)
        grad[r, :, units] = share + mean
    return hard, soft, grad


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
