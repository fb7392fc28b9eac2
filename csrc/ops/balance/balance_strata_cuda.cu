#include "ops/balance/balance_device.cuh"

namespace spurge::balance {
namespace {

using namespace device;

constexpr int kWideRows = 256;  // of a stratum, on average: from here on the whole block shares it

// What a block works on; a team takes a stratum. The score of a row is slope x + curvature u, with
// x = (value - target) / deviation and u = x^2 - shift.
template <bool wide, class T>
struct Unit {
  double* weights;  // x; in the end the weights, below 0 at rows left out
  const T* values;
  const std::int64_t* starts;
  const double *base, *masses, *means, *start;
  std::int64_t rows, strata;
  bool interact, squared;
  double wanted;           // the mean of the squares
  double* logs;            // of each stratum: of the sum of base exp(score)
  double *first, *second;  // of each stratum: the means of x and of u
  Arrow arrow{};
  Team<wide> team{};
  double pooled = 0, squared_targets = 0;
  double total = 0, extent = 0, deviation = 0, square_middle = 0, square_deviation = 0, shift = 0;

  __device__ std::int64_t begin() const { return starts[0]; }
  __device__ std::int64_t end() const { return starts[strata]; }
  __device__ std::int64_t own(std::int64_t j) const { return interact ? j : 0; }  // the slope of a stratum
  __device__ bool moves(std::int64_t slope) const { return arrow.reach[slope] >= 0.0; }
  __device__ double target(std::int64_t j) const { return interact ? means[j] : pooled; }
  __device__ double u(double x) const { return fma(x, x, -shift); }
  __device__ double score(double slope, double curvature, double x) const {
    return arrow.bent ? fma(slope, x, curvature * u(x)) : slope * x;
  }
  __device__ double weight(std::int64_t i, std::int64_t j) const {
    const double z = score(arrow.slopes[own(j)], arrow.curvature, weights[i]);
    return masses[j] * (base[i] * exp(z - logs[j]));
  }

  // The team's strata with mass, and its thread's rows of one with base.
  template <class F>
  __device__ void each_stratum(const F& f) const {
    for (std::int64_t j = team.index; j < strata; j += team.count)
      if (masses[j] > 0.0) f(j);
  }
  template <class F>
  __device__ void each_row(std::int64_t j, const F& f) const {
    for (std::int64_t i = starts[j] + team.lane; i < starts[j + 1]; i += team.size)
      if (base[i] != 0.0) f(i);
  }
  // The sum of what every team's threads know in common.
  __device__ double sum_of_teams(double x) const { return over_block<Sum>(team.lane == 0 ? x : 0.0); }

  // `unfinished` where there is something to solve.
  __device__ Status prepare() {
    const Status able = measure();
    if (able != unfinished) return able;
    if (!standardise()) return infeasible;
    begin_slopes();
    return unfinished;
  }

  // Above 0 where a number is not finite, or borders do not ascend from 0 to N.
  __device__ double read_targets() {
    double lost = finite(wanted) && starts[0] == 0 && starts[strata] == rows ? 0.0 : 1.0;
    for (std::int64_t j = threadIdx.x; j <= strata; j += kThreads) {
      if (!finite(start[j])) lost = 1.0;
      if (j == strata) continue;
      if (starts[j] > starts[j + 1]) lost = 1.0;
      if (!finite(masses[j]) || (masses[j] > 0.0 && !finite(means[j]))) lost = 1.0;
      if (masses[j] > 0.0) pooled = fma(masses[j], means[j], pooled);
    }
    return lost;
  }

  // Deviation under base, and the middle of the squares.
  __device__ Status measure() {
    if (over_block<Max>(read_targets()) > 0.0) return not_finite;  // before a row is looked for
    double lost = 0.0, missing = 0.0, middle = 0.0, variance = 0.0;
    each_stratum([&](std::int64_t j) {
      double inside = 0.0;
      each_row(j, [&](std::int64_t i) {
        const double v = widen(values[i]);
        if (!finite(base[i]) || !finite(v)) lost = 1.0;
        inside = 1.0;
        total += base[i];
        middle = fma(base[i], v, middle);
        extent = fmax(extent, fabs(v));
      });
      if (team.max(inside) == 0.0) missing = 1.0;
    });
    if (over_block<Max>(lost) > 0.0) return not_finite;
    missing = over_block<Max>(missing);
    total = over_block<Sum>(total);
    if (missing > 0.0 || total == 0.0) return infeasible;
    middle = over_block<Sum>(middle) / total;
    extent = over_block<Max>(extent);
    pooled = over_block<Sum>(pooled);

    each_stratum([&](std::int64_t j) {
      each_row(j, [&](std::int64_t i) {
        const double v = widen(values[i]), share = base[i] / total;
        variance = fma(share, (v - middle) * (v - middle), variance);
        square_middle = fma(share, v * v, square_middle);
      });
      squared_targets = fma(masses[j], target(j) * target(j), squared_targets);
    });
    deviation = sqrt(over_block<Sum>(variance));
    square_middle = over_block<Sum>(square_middle);
    squared_targets = sum_of_teams(squared_targets);
    return unfinished;
  }

  // False where a constant is not what is wanted.
  __device__ bool standardise() {
    const bool flat = !varies(deviation, extent);
    if (flat) deviation = 1.0;
    double wrong = 0.0, farthest = 0.0, off_square = 0.0, square_variance = 0.0, kept = 0.0;
    each_stratum([&](std::int64_t j) {
      double low = HUGE_VAL, high = -HUGE_VAL, most = 0.0;
      each_row(j, [&](std::int64_t i) {
        const double v = widen(values[i]), apart = v * v - square_middle, x = (v - target(j)) / deviation;
        weights[i] = x;
        low = fmin(low, v);
        high = fmax(high, v);
        most = fmax(most, fabs(x));
        square_variance = fma(base[i] / total, apart * apart, square_variance);
        off_square = fmax(off_square, fabs(v * v - wanted));
      });
      low = -team.max(-low);
      high = team.max(high);
      most = team.max(most);
      const bool constant = flat || (interact && !varies(high - low, extent));
      const double off = fmax(fabs(low - target(j)), fabs(high - target(j)));
      if (constant && !agrees(off, extent, target(j))) wrong = 1.0;
      if (!constant) kept += 1.0;
      farthest = fmax(farthest, most);
      if (interact && team.lane == 0) arrow.reach[j] = constant ? -1.0 : most;
    });
    square_deviation = sqrt(over_block<Sum>(square_variance));
    off_square = over_block<Max>(off_square);
    kept = sum_of_teams(kept);
    farthest = over_block<Max>(farthest);
    if (!interact && threadIdx.x == 0) arrow.reach[0] = flat ? -1.0 : farthest;
    arrow.bent = squared && varies(square_deviation, extent * extent);
    arrow.unknowns = arrow.bent + (interact ? static_cast<std::int64_t>(kept) : !flat);
    if (squared && !arrow.bent && !agrees(off_square, extent * extent, wanted)) wrong = 1.0;
    return over_block<Max>(wrong) == 0.0;
  }

  // Slopes about the targets have a part of the curvature. Strata that share one take the first one's start.
  __device__ void begin_slopes() {
    if (arrow.bent) {
      arrow.curvature = start[strata] * deviation * deviation;
      shift = (wanted - squared_targets) / (deviation * deviation);
      each_stratum([&](std::int64_t j) {
        each_row(j, [&](std::int64_t i) { arrow.widest = fmax(arrow.widest, fabs(u(weights[i]))); });
      });
      arrow.widest = over_block<Max>(arrow.widest);
    }
    const Block block;
    block.each(0, arrow.n, [&](std::int64_t j) {
      std::int64_t from = j;
      while (!interact && from < strata - 1 && !(masses[from] > 0.0)) ++from;
      if (!(masses[from] > 0.0)) arrow.reach[j] = -1.0;
      arrow.slopes[j] =
          moves(j) ? deviation * start[from] + 2.0 * arrow.curvature * target(j) / deviation : 0.0;
      arrow.direction[j] = arrow.gradient[j] = arrow.diagonal[j] = arrow.border[j] = 0.0;
    });
  }

  __device__ Point at(double t) {
    const double curvature = arrow.curvature_at(t);
    Point now{};
    each_stratum([&](std::int64_t j) {
      const double slope = arrow.slope_at(t, own(j));
      double top = -HUGE_VAL, sum = 0.0;
      each_row(j, [&](std::int64_t i) { top = fmax(top, score(slope, curvature, weights[i])); });
      top = team.max(top);
      each_row(j, [&](std::int64_t i) {
        sum = fma(base[i], exp(score(slope, curvature, weights[i]) - top), sum);
      });
      const double level = top + log(team.sum(sum));
      now.value = fma(masses[j], level, now.value);
      now.top = fma(masses[j], top, now.top);
      if (team.lane == 0) logs[j] = level;
    });
    return {sum_of_teams(now.value), sum_of_teams(now.top)};
  }

  __device__ void move(double t) { balance::move(Block{}, arrow, t); }
  __device__ double sizes() const { return sizes_of(Block{}, arrow); }

  __device__ double gradient() {
    double worst = 0.0, bend = 0.0, gap = 0.0, shared = 0.0;
    each_stratum([&](std::int64_t j) {
      double linear = 0.0, quadratic = 0.0;
      each_row(j, [&](std::int64_t i) {
        const double w = weight(i, j);
        linear = fma(w, weights[i], linear);
        if (!arrow.bent) return;
        const double v = widen(values[i]);
        quadratic = fma(w, u(weights[i]), quadratic);
        gap = fma(w, v * v - wanted, gap);
      });
      linear = team.sum(linear);
      quadratic = team.sum(quadratic);
      shared += linear;
      bend += quadratic;
      if (interact && moves(j)) worst = worse(worst, fabs(linear / masses[j]));
      if (team.lane != 0) return;
      first[j] = linear / masses[j];
      second[j] = quadratic / masses[j];
      if (interact && moves(j)) arrow.gradient[j] = linear;
    });
    if (interact) {
      worst = over_block<Worst>(worst);
    } else if (moves(0)) {
      shared = sum_of_teams(shared);
      worst = fabs(shared);
      if (threadIdx.x == 0) arrow.gradient[0] = shared;
    }
    if (!arrow.bent) return worst;
    arrow.bend = sum_of_teams(bend);
    return worse(worst, fabs(over_block<Sum>(gap) / square_deviation));
  }

  __device__ double descend() {
    sum_hessian();
    const Block block;
    solve(block, arrow);
    return slope_of(block, arrow);
  }

  __device__ void sum_hessian() {
    double diagonal = 0.0, border = 0.0, corner = 0.0;
    each_stratum([&](std::int64_t j) {
      double own_x = 0.0, cross = 0.0, own_u = 0.0;
      each_row(j, [&](std::int64_t i) {
        const double w = weight(i, j), dx = weights[i] - first[j];
        own_x = fma(w * dx, dx, own_x);
        if (!arrow.bent) return;
        const double du = u(weights[i]) - second[j];
        cross = fma(w * dx, du, cross);
        own_u = fma(w * du, du, own_u);
      });
      own_x = team.sum(own_x);
      cross = team.sum(cross);
      diagonal += own_x;
      border += cross;
      corner += team.sum(own_u);
      if (!interact || !moves(j) || team.lane != 0) return;
      arrow.diagonal[j] = own_x;
      arrow.border[j] = cross;
    });
    arrow.corner = sum_of_teams(corner);
    if (!interact && moves(0)) {
      diagonal = sum_of_teams(diagonal);
      border = sum_of_teams(border);
      if (threadIdx.x == 0) arrow.diagonal[0] = diagonal, arrow.border[0] = border;
    }
    // No barrier: what strata wrote of their own is ordered by the sums, and a slope that all share belongs to thread 0,
    // which wrote its numbers and is the only one to read them.
  }

  __device__ void put_dual(double* dual) const {
    const double bend = arrow.bent ? arrow.curvature / (deviation * deviation) : 0.0;
    Block{}.each(0, strata, [&](std::int64_t j) {
      dual[j] = moves(own(j)) ? arrow.slopes[own(j)] / deviation - 2.0 * bend * target(j) : 0.0;
    });
    if (threadIdx.x == 0) dual[strata] = bend;
  }

  __device__ void scale_weights() {
    for (std::int64_t j = team.index; j < strata; j += team.count)
      for (std::int64_t i = starts[j] + team.lane; i < starts[j + 1]; i += team.size)
        weights[i] = masses[j] > 0.0 && base[i] != 0.0 ? weight(i, j) : -1.0;
    __syncthreads();
  }
};

template <bool wide, class T>
__global__ void __launch_bounds__(kThreads)
    strata_kernel(double* __restrict__ dual, double* __restrict__ averages, double* __restrict__ report,
                  std::int32_t* __restrict__ status, double* __restrict__ workspace,
                  const T* __restrict__ values, const std::int64_t* __restrict__ starts,
                  const double* __restrict__ base, const double* __restrict__ masses,
                  const double* __restrict__ means, const double* __restrict__ squares,
                  const double* __restrict__ outcomes, const double* __restrict__ start, StrataShape shape,
                  Newton settings) {
  const std::int64_t u = blockIdx.x, rows = shape.rows, strata = shape.strata, duals = strata + 1;
  Unit<wide, T> unit{nullptr,
                     values + u * rows,
                     starts,
                     base,
                     masses,
                     means + u * strata,
                     start + u * duals,
                     rows,
                     strata,
                     shape.interact,
                     squares != nullptr,
                     squares ? squares[u] : 0.0};
  Room room{workspace + u * (rows + kStrataArrays * strata)};
  room.take(rows, unit.weights);
  room.take(strata, unit.logs, unit.first, unit.second);
  Arrow& a = unit.arrow;
  room.take(strata, a.slopes, a.direction, a.gradient, a.diagonal, a.border, a.reach);
  a.n = shape.interact ? strata : 1;
  const Results to{dual + u * duals, averages + u * shape.outcomes, report + u * kReport, status + u, duals,
                   shape.outcomes};
  solve_into(to, unit, outcomes, settings);
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
