#include "ops/balance/balance_device.cuh"

namespace spurge::balance {
namespace {

using namespace device;

constexpr int kWideRows = 256;  // of a stratum, on average: from here on the whole block shares it

// Who takes a stratum: the whole block, or a warp.
template <bool wide>
struct Team {
  static constexpr int size = wide ? kThreads : 32, count = wide ? 1 : kWarps;
  int lane = threadIdx.x % size, index = threadIdx.x / size;

  __device__ double sum(double x) const { return wide ? block_sum(x) : warp_sum(x); }
  __device__ double max(double x) const { return wide ? block_max(x) : warp_max(x); }
  // Of what the leaders have.
  __device__ double all(double x) const { return block_sum(lane == 0 ? x : 0.0); }
};

// A block is a unit. A row's score is slopes[j] x + curvature u, with x = (v - means[j]) / deviation, u = x^2 - wanted.
template <bool wide, class T>
__global__ void __launch_bounds__(kThreads)
    strata_kernel(double* __restrict__ dual, double* __restrict__ averages, double* __restrict__ report,
                  std::int32_t* __restrict__ status, double* __restrict__ x, const T* __restrict__ values,
                  const std::int64_t* __restrict__ starts, const double* __restrict__ base,
                  const double* __restrict__ masses, const double* __restrict__ means,
                  const double* __restrict__ squares, const double* __restrict__ outcomes,
                  const double* __restrict__ start, StrataShape shape, Newton settings) {
  __shared__ int flag;
  const Team<wide> team;
  const std::int64_t unit = blockIdx.x, rows = shape.rows, strata = shape.strata;
  const int thread = threadIdx.x;
  const bool interact = shape.interact;
  dual += unit * (strata + 1);
  averages += unit * shape.outcomes;
  report += unit * kReport;
  status += unit;
  values += unit * rows;
  means += unit * strata;
  start += unit * (strata + 1);
  x += unit * (rows + 6 * (strata + 1));
  double* const slopes = x + rows;
  double* const logs = slopes + strata + 1;       // log of a stratum's sum of base exp(score)
  double* const gradient = logs + strata + 1;
  double* const bends = gradient + strata + 1;    // the Hessian's diagonal, then the direction
  double* const mixed = bends + strata + 1;       // the mean of u, then the Hessian's last row
  double* const largest = mixed + strata + 1;     // of |x|; -1 where the slope is left out
  const auto stop = [&](int taken, Status why) {
    give_up(dual, strata + 1, averages, shape.outcomes, report, status, taken, why);
  };
  // f(j, first, end) for each stratum with mass; a warp's strata are its own.
  const auto each = [&](const auto& f) {
    for (std::int64_t j = team.index; j < strata; j += team.count)
      if (masses[j] > 0.0) f(j, starts[j] + team.lane, starts[j + 1]);
  };

  const double square = squares ? squares[unit] : 0.0;
  double lost = finite(square) ? 0.0 : 1.0, missing = 0.0, total = 0.0, middle = 0.0, size = 0.0, pooled = 0.0;
  for (std::int64_t j = thread; j <= strata; j += kThreads) {
    if (!finite(start[j]) || (j < strata && (!finite(masses[j]) || (masses[j] > 0.0 && !finite(means[j]))))) lost = 1.0;
    if (j < strata && masses[j] > 0.0) pooled = fma(masses[j], means[j], pooled);
  }
  each([&](std::int64_t j, std::int64_t first, std::int64_t end) {
    double inside = 0.0;
    for (std::int64_t i = first; i < end; i += team.size) {
      if (base[i] == 0.0) continue;
      const double v = widen(values[i]);
      if (!finite(base[i]) || !finite(v)) lost = 1.0;
      inside = 1.0;
      total += base[i];
      middle = fma(base[i], v, middle);
      size = fmax(size, fabs(v));
    }
    if (team.max(inside) == 0.0) missing = 1.0;
  });
  if (block_max(lost) > 0.0) return stop(0, not_finite);
  missing = block_max(missing);
  total = block_sum(total);
  if (missing > 0.0 || total == 0.0) return stop(0, infeasible);
  middle = block_sum(middle) / total;
  size = block_max(size);
  pooled = block_sum(pooled);
  const auto mean_of = [&](std::int64_t j) { return interact ? means[j] : pooled; };

  double spread = 0.0, center = 0.0, above = 0.0;  // above: sum of the masses times the squared means
  each([&](std::int64_t j, std::int64_t first, std::int64_t end) {
    for (std::int64_t i = first; i < end; i += team.size) {
      if (base[i] == 0.0) continue;
      const double v = widen(values[i]);
      spread = fma(base[i] / total, (v - middle) * (v - middle), spread);
      center = fma(base[i] / total, v * v, center);
    }
    if (team.lane == 0) above = fma(masses[j], mean_of(j) * mean_of(j), above);
  });
  double deviation = sqrt(block_sum(spread));
  const bool flat = deviation <= kConstant * size;
  if (flat) deviation = 1.0;
  center = block_sum(center);
  above = block_sum(above);

  double wrong = 0.0, kept = 0.0, apart = 0.0;
  spread = 0.0;
  each([&](std::int64_t j, std::int64_t first, std::int64_t end) {
    const double m = mean_of(j);
    double low = HUGE_VAL, high = -HUGE_VAL, most = 0.0;
    for (std::int64_t i = first; i < end; i += team.size) {
      x[i] = 0.0;
      if (base[i] == 0.0) continue;
      const double v = widen(values[i]), bent = v * v - center;
      x[i] = (v - m) / deviation;
      low = fmin(low, v);
      high = fmax(high, v);
      most = fmax(most, fabs(x[i]));
      spread = fma(base[i] / total, bent * bent, spread);
      apart = fmax(apart, fabs(v * v - square));
    }
    low = -team.max(-low);
    high = team.max(high);
    most = team.max(most);
    const bool constant = flat || (interact && high - low <= kConstant * size);
    if (constant && fmax(fabs(low - m), fabs(high - m)) > kEqual * fmax(size, fabs(m))) wrong = 1.0;
    if (!constant) kept += 1.0;
    if (team.lane == 0) largest[j] = constant ? -1.0 : most;
  });
  spread = sqrt(block_sum(spread));
  apart = block_max(apart);
  wrong = block_max(wrong);
  kept = team.all(kept);
  const bool bent = squares && spread > kConstant * size * size;
  if (wrong > 0.0 || (squares && !bent && apart > kEqual * fmax(size * size, fabs(square))))
    return stop(0, infeasible);
  const double wanted = (square - above) / (deviation * deviation);
  const bool sloped = kept > 0.0;
  const int unknowns = (interact ? static_cast<int>(kept) : sloped ? 1 : 0) + (bent ? 1 : 0);

  if (thread == 0) {  // of strata that share a slope, the first one's start counts
    flag = 0;
    while (flag < strata - 1 && !(masses[flag] > 0.0)) ++flag;
  }
  __syncthreads();
  double curvature = bent ? start[strata] * deviation * deviation : 0.0, turn = 0.0, most = 0.0;
  each([&](std::int64_t j, std::int64_t first, std::int64_t end) {
    for (std::int64_t i = first; i < end; i += team.size)
      if (base[i] != 0.0) most = fmax(most, fabs(fma(x[i], x[i], -wanted)));
    if (team.lane != 0) return;
    bends[j] = 0.0;
    slopes[j] = largest[j] < 0.0
                    ? 0.0
                    : deviation * start[interact ? j : flag] + 2.0 * curvature * mean_of(j) / deviation;
  });
  most = bent ? block_max(most) : 0.0;
  __syncthreads();

  const auto score = [&](double slope, double curve, double at) {
    return bent ? fma(slope, at, curve * fma(at, at, -wanted)) : slope * at;
  };
  const auto weight = [&](std::int64_t i, std::int64_t j) {
    return masses[j] * (base[i] * exp(score(slopes[j], curvature, x[i]) - logs[j]));
  };
  const auto at = [&](double t) {
    const double curve = t == 0.0 ? curvature : fma(t, turn, curvature);
    double value = 0.0, tops = 0.0;
    each([&](std::int64_t j, std::int64_t first, std::int64_t end) {
      const double slope = t == 0.0 ? slopes[j] : fma(t, bends[j], slopes[j]);
      double top = -HUGE_VAL, sum = 0.0;
      for (std::int64_t i = first; i < end; i += team.size)
        if (base[i] != 0.0) top = fmax(top, score(slope, curve, x[i]));
      top = team.max(top);
      for (std::int64_t i = first; i < end; i += team.size)
        if (base[i] != 0.0) sum = fma(base[i], exp(score(slope, curve, x[i]) - top), sum);
      const double level = top + log(team.sum(sum));
      value = fma(masses[j], level, value);
      tops = fma(masses[j], top, tops);
      if (team.lane == 0) logs[j] = level;
    });
    value = team.all(value);
    tops = team.all(tops);
    __syncthreads();
    return Point{value, tops};
  };

  Point now = at(0.0);
  int taken = 0;
  double worst = 0.0;
  Status state = converged;
  while (true) {
    double reach = 0.0, widest = 0.0;  // of the slopes: the sum over strata, or of the one the largest
    for (std::int64_t j = thread; j < strata; j += kThreads)
      if (masses[j] > 0.0 && largest[j] >= 0.0) {
        reach = fma(largest[j], fabs(slopes[j]), reach);
        widest = fmax(widest, largest[j] * fabs(slopes[j]));
      }
    reach = interact ? block_sum(reach) : block_max(widest);
    if (now.top < -kProof * fma(most, fabs(curvature), reach)) return stop(taken, infeasible);

    double last = 0.0, off = 0.0, gap = 0.0, broken = 0.0, shared = 0.0;
    each([&](std::int64_t j, std::int64_t first, std::int64_t end) {
      double linear = 0.0, quadratic = 0.0;
      for (std::int64_t i = first; i < end; i += team.size) {
        if (base[i] == 0.0) continue;
        const double w = weight(i, j);
        linear = fma(w, x[i], linear);
        if (!bent) continue;
        const double v = widen(values[i]);
        quadratic = fma(w, fma(x[i], x[i], -wanted), quadratic);
        off = fma(w, v * v - square, off);
      }
      linear = team.sum(linear);
      quadratic = team.sum(quadratic);
      last += quadratic;
      shared += linear;
      if (isnan(linear)) broken = 1.0;
      if (largest[j] >= 0.0) gap = fmax(gap, fabs(linear / masses[j]));
      if (team.lane != 0) return;
      gradient[j] = linear;
      mixed[j] = quadratic / masses[j];
    });
    last = team.all(last);
    shared = team.all(shared);
    worst = block_max(gap);
    broken = block_max(broken);
    if (!interact) worst = sloped ? fabs(shared) : 0.0;
    if (bent) keep_worst(worst, fabs(block_sum(off) / spread));
    if (sloped && broken > 0.0) worst = nan("");
    if (unknowns == 0 || worst <= settings.tolerance) break;
    if (taken == settings.steps) {
      state = unfinished;
      break;
    }

    double trace = 0.0, corner = 0.0, across = 0.0;
    each([&](std::int64_t j, std::int64_t first, std::int64_t end) {
      const double center_x = gradient[j] / masses[j], center_u = mixed[j];
      double own = 0.0, cross = 0.0, both = 0.0;
      for (std::int64_t i = first; i < end; i += team.size) {
        if (base[i] == 0.0) continue;
        const double w = weight(i, j), dx = x[i] - center_x;
        own = fma(w * dx, dx, own);
        if (!bent) continue;
        const double du = fma(x[i], x[i], -wanted) - center_u;
        cross = fma(w * dx, du, cross);
        both = fma(w * du, du, both);
      }
      own = team.sum(own);
      cross = team.sum(cross);
      corner += team.sum(both);
      if (largest[j] >= 0.0) {
        trace += own;
        across += cross;
      }
      if (team.lane != 0) return;
      bends[j] = own;
      mixed[j] = cross;
    });
    corner = team.all(corner);
    trace = team.all(trace);
    across = team.all(across);
    const double ridge = kRidge * (trace + corner) / unknowns + 1e-20;
    double pulled = 0.0, bound = 0.0;  // what the slopes take from the last gradient and from its pivot
    if (interact) {
      for (std::int64_t j = thread; j < strata; j += kThreads)
        if (masses[j] > 0.0 && largest[j] >= 0.0) {
          pulled = fma(mixed[j] / (bends[j] + ridge), gradient[j], pulled);
          bound = fma(mixed[j] / (bends[j] + ridge), mixed[j], bound);
        }
      pulled = block_sum(pulled);
      bound = block_sum(bound);
    } else if (sloped) {
      pulled = across / (trace + ridge) * shared;
      bound = across / (trace + ridge) * across;
    }
    const double pivot = corner + ridge - bound;
    turn = bent ? -(last - pulled) / (pivot < ridge ? ridge : pivot) : 0.0;
    const double common = -(shared + across * turn) / (trace + ridge);
    double slope = 0.0;
    __syncthreads();
    for (std::int64_t j = thread; j < strata; j += kThreads) {
      if (!(masses[j] > 0.0)) continue;
      const double own = interact ? -(gradient[j] + mixed[j] * turn) / (bends[j] + ridge) : common;
      bends[j] = largest[j] < 0.0 ? 0.0 : own;
      slope = fma(gradient[j], bends[j], slope);
    }
    slope = fma(last, turn, block_sum(slope));
    const double t = search(now, slope, at);
    for (std::int64_t j = thread; j < strata; j += kThreads)
      if (masses[j] > 0.0) slopes[j] = fma(t, bends[j], slopes[j]);
    curvature = fma(t, turn, curvature);
    ++taken;
    __syncthreads();
  }

  const double bend = bent ? curvature / (deviation * deviation) : 0.0;
  for (std::int64_t j = thread; j < strata; j += kThreads) {
    const std::int64_t from = interact ? j : flag;
    const bool in = masses[from] > 0.0 && largest[from] >= 0.0;
    dual[j] = in ? slopes[from] / deviation - 2.0 * bend * mean_of(from) : 0.0;
  }
  if (thread == 0) dual[strata] = bend;
  __syncthreads();
  for (std::int64_t j = team.index; j < strata; j += team.count)  // x becomes the weights, -1 at rows left out
    for (std::int64_t i = starts[j] + team.lane; i < starts[j + 1]; i += team.size)
      x[i] = masses[j] > 0.0 && base[i] != 0.0 ? weight(i, j) : -1.0;
  __syncthreads();
  for (std::int64_t o = thread / 32; o < shape.outcomes; o += kWarps) {
    double sum = 0.0;
    for (std::int64_t i = starts[0] + thread % 32; i < starts[strata]; i += 32)
      if (x[i] != -1.0) sum = fma(x[i], outcomes[i * shape.outcomes + o], sum);
    sum = warp_sum(sum);
    if (thread % 32 == 0) averages[o] = sum;
  }
  double sum = 0.0, sizes = 0.0;
  for (std::int64_t i = starts[0] + thread; i < starts[strata]; i += kThreads) {
    if (x[i] == -1.0) continue;
    sum += x[i];
    sizes = fma(x[i], x[i], sizes);
  }
  sum = block_sum(sum);
  sizes = block_sum(sizes);
  if (thread != 0) return;
  report[0] = worst;
  report[1] = sum * sum / sizes;
  report[2] = now.value;
  report[3] = taken;
  *status = state;
}

}  // namespace

void strata_cuda(double* dual, double* averages, double* report, std::int32_t* status, double* workspace,
                 const void* values, const std::int64_t* starts, const double* base, const double* masses,
                 const double* means, const double* squares, const double* outcomes, const double* start,
                 const StrataShape& shape, const Newton& settings, DType dtype, const CudaPlace& place) {
  if (shape.units == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = shape.rows >= shape.strata * kWideRows;
    const auto kernel = wide ? strata_kernel<true, T> : strata_kernel<false, T>;
    kernel<<<static_cast<unsigned>(shape.units), kThreads, 0, cuda::stream_of(place)>>>(
        dual, averages, report, status, workspace, static_cast<const T*>(values), starts, base, masses, means,
        squares, outcomes, start, shape, settings);
    cuda::check(cudaGetLastError(), "balance_strata launch");
  });
}

}  // namespace spurge::balance
