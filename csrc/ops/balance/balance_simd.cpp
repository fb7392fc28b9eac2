// The sweep of one large problem, and what Newton's method sums over the rows of small ones. Multiplications
// are fused with additions where the instruction set can.
#include "core/simd.hpp"
#include "ops/balance/balance.hpp"
#include "ops/balance/balance_math.hpp"

namespace spurge::balance::SPURGE_LEVEL {

namespace {

using V = spurge::SPURGE_LEVEL::Vec<double>;

// exp of numbers up to a few hundred, to a unit in the last place or two. Below -708 it stays at 3e-308.
V exponential(V x) {
  constexpr double kInverse[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  x = larger(V::all(-708.0), x);
  const V k = rounded(x * V::all(1.4426950408889634074));
  const V r = fused(k, V::all(-1.90821492927058770002e-10), fused(k, V::all(-6.93147180369123816490e-01), x));
  V sum = V::all(kInverse[0]);
  for (int i = 1; i < 14; ++i) sum = fused(sum, r, V::all(kInverse[i]));
  return times_power(sum, k);
}

// ---- one large problem ----------------------------------------------------------------------------

constexpr int kTogether = 8;  // rows that are scored, and then added, while they are in the nearest cache

template <int R, class T>
void score(double* scores, const T* rows, const double* dual, std::int64_t columns) {
  V sums[R];
  for (int r = 0; r < R; ++r) sums[r] = V::all(0);
  std::int64_t k = 0;
  for (; k + V::n <= columns; k += V::n) {
    const V d = V::load(dual + k);
    for (int r = 0; r < R; ++r) sums[r] = fused(V::load(rows + r * columns + k), d, sums[r]);
  }
  for (int r = 0; r < R; ++r) {
    scores[r] = sum(sums[r]);
    for (std::int64_t rest = k; rest < columns; ++rest)
      scores[r] += static_cast<double>(widen(rows[r * columns + rest])) * dual[rest];
  }
}

template <int R, class T>
void add(double* sums, const T* const* rows, const double* weights, std::int64_t columns) {
  V w[R];
  for (int r = 0; r < R; ++r) w[r] = V::all(weights[r]);
  std::int64_t k = 0;
  for (; k + V::n <= columns; k += V::n) {
    V sum = V::load(sums + k);
    for (int r = 0; r < R; ++r) sum = fused(w[r], V::load(rows[r] + k), sum);
    sum.store(sums + k);
  }
  for (; k < columns; ++k)
    for (int r = 0; r < R; ++r) sums[k] += weights[r] * static_cast<double>(widen(rows[r][k]));
}

// Rows of weight 0 do not count, whatever they hold: in their place stands one that does.
template <class T>
void add_all(double* sums, const T* rows, const double* weights, int some, std::int64_t columns) {
  int counts = 0;
  while (counts < some && weights[counts] == 0) ++counts;
  if (counts == some) return;
  const T* taken[kTogether];
  for (int r = 0; r < some; ++r) taken[r] = rows + (weights[r] == 0 ? counts : r) * columns;
  if (some == kTogether) return add<kTogether>(sums, taken, weights, columns);
  for (int r = 0; r < some; ++r) add<1>(sums, taken + r, weights + r, columns);
}

// What was summed so far moves to the larger top, if these rows have one.
void raise_top(ChunkSums& sums, double* of_columns, const double* scores, const double* base, int rows,
               std::int64_t columns) {
  double top = sums.top;
  for (int r = 0; r < rows; ++r) {
    sums.nan |= scores[r] != scores[r] || base[r] != base[r];
    if (base[r] > 0 && scores[r] > top) top = scores[r];
  }
  if (!(top > sums.top)) return;
  const double shrink = sums.weight > 0 ? __builtin_exp(sums.top - top) : 0.0;
  for (std::int64_t k = 0; k < columns; ++k) of_columns[k] *= shrink;
  sums.weight *= shrink;
  sums.top = top;
}

void weigh(double (&weights)[kTogether], const double* scores, const double* base, double top, int rows) {
  for (int r = 0; r < kTogether; ++r) weights[r] = r < rows && base[r] > 0 ? scores[r] - top : -kInfinity;
  for (int r = 0; r < kTogether; r += V::n) exponential(V::load(weights + r)).store(weights + r);
  for (int r = 0; r < rows; ++r)
    weights[r] = base[r] > 0 && scores[r] != -kInfinity ? weights[r] * base[r] : 0.0;
}

}  // namespace

template <class T>
ChunkSums sweep_chunk(double* scores, double* sums, const T* covariates, const double* base,
                      const double* dual, std::int64_t n, std::int64_t columns) {
  ChunkSums out{-kInfinity, 0.0, false};
  for (std::int64_t k = 0; k < columns; ++k) sums[k] = 0;
  for (std::int64_t i = 0; i < n; i += kTogether) {
    const T* const rows = covariates + i * columns;
    const int some = static_cast<int>(n - i < kTogether ? n - i : kTogether);
    if (some == kTogether) score<kTogether>(scores + i, rows, dual, columns);
    else
      for (int r = 0; r < some; ++r) score<1>(scores + i + r, rows + r * columns, dual, columns);
    raise_top(out, sums, scores + i, base + i, some, columns);
    if (out.top == -kInfinity) continue;

    double weights[kTogether];
    weigh(weights, scores + i, base + i, out.top, some);
    for (int r = 0; r < some; ++r) out.weight += weights[r];
    add_all(sums, rows, weights, some, columns);
  }
  return out;
}

// ---- small problems -------------------------------------------------------------------------------

namespace {

// A thread that works alone, and adds in order.
struct Alone {
  template <class F>
  void each(std::int64_t from, std::int64_t to, const F& f) const {
    for (std::int64_t i = from; i < to; ++i) f(i);
  }
  template <class F>
  double sum(double start, std::int64_t from, std::int64_t to, const F& f) const {
    for (std::int64_t i = from; i < to; ++i) start += f(i);
    return start;
  }
  void put(double& to, double x) const { to = x; }
};

void fill(double* a, std::int64_t n, double x) {
  for (std::int64_t i = 0; i < n; ++i) a[i] = x;
}

bool all_finite(const double* a, std::int64_t n) {
  bool all = true;
  for (std::int64_t i = 0; i < n; ++i) all &= finite(a[i]);
  return all;
}

constexpr std::int64_t kBlock = 256;  // rows whose covariates stay in the nearest cache

// y [K][N']: columns that vary, about their targets and in units of their deviations. Where the minimum is,
// weights . y is 0.
struct Problem {
  const BatchRows& rows;
  std::int64_t pad, columns;  // N', K
  double *y, *base, *scores, *weights;
  double* deviation;          // [K], 0 where a column is left out
  double *reach, *x, *trial;  // of the columns that vary: the largest size, the dual, and where a step ends
  Dense system{};
  double total = 0, mass = 0;  // of base, of the weights

  Problem(double* scratch, const BatchRows& rows, std::int64_t columns)
      : rows(rows), pad(padded(rows.n)), columns(columns) {
    Room room{scratch};
    room.take(columns * pad, y);
    room.take(pad, base, scores, weights);
    room.take(columns, deviation, reach, x, trial);
    room.take(columns, system.roots, system.gradient, system.direction);
    room.take(columns * columns, system.hessian);
  }

  double* column(std::int64_t k) const { return y + k * pad; }

  // `unfinished` where there is something to solve.
  template <class T>
  Status prepare(const T* covariates, const double* targets, const double* start) {
    if (!read_base() || !all_finite(targets, columns) || !all_finite(start, columns)) return not_finite;
    if (rows.n == 0) return infeasible;
    read(covariates, targets);
    return standardise(targets, start);
  }

  bool read_base() {
    for (std::int64_t i = 0; i < pad; ++i) {
      base[i] = i < rows.n ? rows.base[i] : 0.0;
      total += base[i];
    }
    return finite(total);
  }

  // By columns, in blocks, so that the rows are read from memory once. Pads repeat the first row.
  template <class T>
  void read(const T* covariates, const double* targets) {
    for (std::int64_t from = 0; from < pad; from += kBlock) {
      const std::int64_t to = from + kBlock < pad ? from + kBlock : pad;
      for (std::int64_t k = 0; k < columns; ++k)
        for (std::int64_t i = from; i < to; ++i) {
          const std::int64_t own = i < rows.n ? i : 0, row = rows.rows ? rows.rows[own] : own;
          column(k)[i] = static_cast<double>(widen(covariates[row * columns + k])) - targets[k];
        }
    }
  }

  Status standardise(const double* targets, const double* start) {
    bool possible = true;
    system.n = 0;
    for (std::int64_t k = 0; k < columns; ++k) {
      V sums = V::all(0), sizes = V::all(0);
      for (std::int64_t i = 0; i < pad; i += V::n) {
        const V v = V::load(column(k) + i);
        sums = fused(V::load(base + i), v, sums);
        sizes = larger(sizes, magnitude(v + V::all(targets[k])));
      }
      const double middle = sum(sums) / total, size = largest(sizes);
      if (!finite(middle)) return not_finite;
      deviation[k] = deviation_of(column(k), middle);
      if (!finite(deviation[k])) return not_finite;  // beyond the square root of the largest number
      if (varies(deviation[k], size)) {
        keep(k, start[k]);
      } else {
        possible &= agrees(size_of(middle), size, targets[k]);
        deviation[k] = 0;
      }
    }
    system.stride = system.n;
    fill(system.direction, system.n, 0);
    return possible ? unfinished : infeasible;
  }

  double deviation_of(const double* from, double middle) const {
    V squares = V::all(0);
    for (std::int64_t i = 0; i < pad; i += V::n) {
      const V apart = V::load(from + i) - V::all(middle);
      squares = fused(V::load(base + i) * apart, apart, squares);
    }
    return square_root(sum(squares) / total);
  }

  // In units of its deviation, column k becomes the next of those that vary.
  void keep(std::int64_t k, double start) {
    const V scale = V::all(1 / deviation[k]);
    V sizes = V::all(0);
    for (std::int64_t i = 0; i < pad; i += V::n) {
      const V v = V::load(column(k) + i) * scale;
      v.store(column(system.n) + i);
      sizes = larger(sizes, magnitude(v));
    }
    reach[system.n] = largest(sizes);
    x[system.n++] = start * deviation[k];
  }

  Point at(double t) {
    for (std::int64_t k = 0; k < system.n; ++k) trial[k] = multiply_add(t, system.direction[k], x[k]);
    V tops = V::all(-kInfinity);
    for (std::int64_t i = 0; i < pad; i += V::n) {
      V z = V::all(0);
      for (std::int64_t k = 0; k < system.n; ++k) z = fused(V::load(column(k) + i), V::all(trial[k]), z);
      z.store(scores + i);
      tops = larger(z, tops);
    }
    const double top = largest(tops);
    V sums = V::all(0);
    for (std::int64_t i = 0; i < pad; i += V::n) {
      const V w = V::load(base + i) * exponential(V::load(scores + i) - V::all(top));
      w.store(weights + i);
      sums = sums + w;
    }
    mass = sum(sums);
    return {top + __builtin_log(mass), top};
  }

  void move(double) {
    for (std::int64_t k = 0; k < system.n; ++k) x[k] = trial[k];
  }

  double sizes() const {
    double sum = 0;
    for (std::int64_t k = 0; k < system.n; ++k) sum += reach[k] * size_of(x[k]);
    return sum;
  }

  double gradient() {
    double worst = 0;
    for (std::int64_t k = 0; k < system.n; ++k) {
      V sums = V::all(0);
      for (std::int64_t i = 0; i < pad; i += V::n)
        sums = fused(V::load(weights + i), V::load(column(k) + i), sums);
      system.gradient[k] = sum(sums) / mass;
      worst = worse(worst, size_of(system.gradient[k]));
    }
    return worst;
  }

  double descend() {
    sum_hessian();
    solve(Alone{}, system);
    return dot(system.gradient, system.direction, system.n);
  }

  // The covariance, on and above the diagonal.
  void sum_hessian() {
    const std::int64_t n = system.n;
    fill(system.hessian, n * n, 0);
    for (std::int64_t from = 0; from < pad; from += kBlock) {
      const std::int64_t to = from + kBlock < pad ? from + kBlock : pad;
      for (std::int64_t j = 0; j < n; ++j) {
        std::int64_t k = j;
        for (; k + 6 <= n; k += 6) add_products<6>(j, k, from, to);
        for (; k + 2 <= n; k += 2) add_products<2>(j, k, from, to);
        for (; k < n; ++k) add_products<1>(j, k, from, to);
      }
    }
    const double* const means = system.gradient;
    for (std::int64_t j = 0; j < n; ++j)
      for (std::int64_t k = j; k < n; ++k) system.row(j)[k] = system.row(j)[k] / mass - means[j] * means[k];
  }

  template <int W>
  void add_products(std::int64_t j, std::int64_t k, std::int64_t from, std::int64_t to) {
    V sums[W];
    for (int c = 0; c < W; ++c) sums[c] = V::all(0);
    for (std::int64_t i = from; i < to; i += V::n) {
      const V own = V::load(weights + i) * V::load(column(j) + i);
      for (int c = 0; c < W; ++c) sums[c] = fused(own, V::load(column(k + c) + i), sums[c]);
    }
    for (int c = 0; c < W; ++c) system.row(j)[k + c] += sum(sums[c]);
  }

  void put_dual(double* dual) const {
    for (std::int64_t k = 0, kept = 0; k < columns; ++k)
      dual[k] = deviation[k] > 0 ? x[kept++] / deviation[k] : 0.0;
  }

  void put_means(double* means, const double* outcomes, std::int64_t count) const {
    for (std::int64_t o = 0; o < count; ++o) {
      double sum = 0;
      for (std::int64_t i = 0; i < rows.n; ++i)
        sum += weights[i] * outcomes[(rows.rows ? rows.rows[i] : i) * count + o];
      means[o] = sum / mass;
    }
  }

  double effective() const { return mass * mass / dot(weights, weights, rows.n); }
};

}  // namespace

template <class T>
Status solve_problem(double* dual, double* means, double* report, double* scratch, const T* covariates,
                     const BatchRows& rows, const double* targets, const double* outcomes,
                     const double* start, const BatchShape& shape, const Newton& settings) {
  Problem problem(scratch, rows, shape.columns);
  const Status able = problem.prepare(covariates, targets, start);
  const Solution found = able == unfinished ? minimise(problem, settings) : refused(able);
  double effective = kNaN;
  if (solved(found.status)) {
    problem.put_dual(dual);
    problem.put_means(means, outcomes, shape.outcomes);
    effective = problem.effective();
  }
  put_report(report, found, effective);
  return found.status;
}

// ---- one value in strata --------------------------------------------------------------------------

namespace {

// x [N']: values about the targets of their strata, in units of their deviation. The score of a row is
// slope x + curvature (x^2 - shift); what shift takes from it is added once for all rows.
struct Unit {
  const StrataRows& rows;
  bool interact, squared;
  std::int64_t count, pad;
  double *x, *weights;
  double *target, *sums, *first, *second, *third, *fourth;  // of each stratum; moments of x under the weights
  Arrow arrow{};
  double wanted;  // the mean of the squares
  double extent = 0, deviation = 0, square_deviation = 0;
  double squared_targets = 0, shift = 0;
  bool flat = false;

  Unit(double* scratch, const StrataRows& rows, const StrataShape& shape, const double* squares)
      : rows(rows),
        interact(shape.interact),
        squared(squares != nullptr),
        count(rows.strata),
        pad(rows.edges[rows.strata]),
        wanted(squares ? *squares : 0.0) {
    Room room{scratch};
    room.take(pad, x, weights);
    room.take(count, target, sums, first, second, third, fourth);
    room.take(count, arrow.slopes, arrow.direction, arrow.gradient, arrow.diagonal, arrow.border,
              arrow.reach);
    arrow.n = interact ? count : 1;
  }

  std::int64_t own(std::int64_t j) const { return interact ? j : 0; }  // the slope of a stratum
  bool moves(std::int64_t slope) const { return arrow.reach[slope] >= 0; }

  // `unfinished` where there is something to solve.
  template <class T>
  Status prepare(const T* values, const double* means, const double* start, std::int64_t strata) {
    if (!read_targets(means) || !all_finite(start, strata + 1)) return not_finite;
    if (!measure(read(values))) return not_finite;
    if (!standardise()) return infeasible;
    begin(start, strata);
    return unfinished;
  }

  bool read_targets(const double* means) {
    bool usable = finite(wanted);
    double pooled = 0;
    for (std::int64_t j = 0; j < count; ++j) {
      target[j] = means[rows.names[j]];
      usable &= finite(target[j]);
      pooled += rows.masses[j] * target[j];
    }
    if (!interact) fill(target, count, pooled);
    for (std::int64_t j = 0; j < count; ++j) squared_targets += rows.masses[j] * target[j] * target[j];
    return usable;
  }

  // The mean of the values under base.
  template <class T>
  double read(const T* values) {
    double sum = 0;
    for (std::int64_t i = 0; i < pad; ++i) {
      x[i] = static_cast<double>(widen(values[rows.rows[i]]));
      sum += rows.base[i] * x[i];
      extent = larger(extent, size_of(x[i]));
    }
    return sum / rows.total;
  }

  // Deviations under base, of the values and of their squares; false where numbers are too large for that.
  bool measure(double middle) {
    if (!finite(middle)) return false;
    double variance = 0, square_middle = 0, square_variance = 0;
    for (std::int64_t i = 0; i < pad; ++i) {
      variance += rows.base[i] * (x[i] - middle) * (x[i] - middle);
      square_middle += rows.base[i] * x[i] * x[i];
    }
    square_middle /= rows.total;
    for (std::int64_t i = 0; squared && i < pad; ++i)
      square_variance += rows.base[i] * (x[i] * x[i] - square_middle) * (x[i] * x[i] - square_middle);
    deviation = square_root(variance / rows.total);
    square_deviation = square_root(square_variance / rows.total);
    if (!finite(deviation) || !finite(square_deviation)) return false;
    flat = !varies(deviation, extent);
    if (flat) deviation = 1;
    arrow.bent = squared && varies(square_deviation, extent * extent);
    return true;
  }

  // False where a constant is not what is wanted.
  bool standardise() {
    bool possible = true;
    for (std::int64_t i = 0; squared && !arrow.bent && i < pad; ++i)
      possible &= agrees(size_of(x[i] * x[i] - wanted), extent * extent, wanted);
    double farthest = 0;
    arrow.reach[0] = 0;
    for (std::int64_t j = 0; j < count; ++j) {
      double low = kInfinity, high = -kInfinity, off = 0;
      for (std::int64_t i = rows.edges[j]; i < rows.edges[j + 1]; ++i) {
        low = smaller(low, x[i]);
        high = larger(high, x[i]);
        off = larger(off, size_of(x[i] - target[j]));
        x[i] = (x[i] - target[j]) / deviation;
      }
      farthest = larger(farthest, off / deviation);
      const bool constant = flat || (interact && !varies(high - low, extent));
      if (constant) possible &= agrees(off, extent, target[j]);
      arrow.reach[own(j)] = constant ? -1 : interact ? off / deviation : farthest;
    }
    if (arrow.bent) {
      shift = (wanted - squared_targets) / (deviation * deviation);
      arrow.widest = farthest * farthest + size_of(shift);
    }
    return possible;
  }

  // Slopes about the targets have a part of the curvature.
  void begin(const double* start, std::int64_t strata) {
    if (arrow.bent) arrow.curvature = start[strata] * deviation * deviation;
    arrow.unknowns = arrow.bent;
    for (std::int64_t j = 0; j < arrow.n; ++j) {
      arrow.unknowns += moves(j);
      arrow.direction[j] = 0;
      arrow.slopes[j] =
          moves(j) ? deviation * start[rows.names[j]] + 2 * arrow.curvature * target[j] / deviation : 0.0;
    }
  }

  Point at(double t) {
    const double curvature = arrow.curvature_at(t);
    Point now{-curvature * shift, -curvature * shift};
    for (std::int64_t j = 0; j < count; ++j) {
      const double top = weigh(j, arrow.slope_at(t, own(j)), curvature);
      now.value += rows.masses[j] * (top + __builtin_log(sums[j]));
      now.top += rows.masses[j] * top;
    }
    return now;
  }

  // Weights and moments of stratum j, beside its largest score.
  double weigh(std::int64_t j, double slope, double curvature) {
    const std::int64_t begin = rows.edges[j], end = rows.edges[j + 1];
    const V s = V::all(slope), c = V::all(curvature);
    V tops = V::all(-kInfinity);
    for (std::int64_t i = begin; i < end; i += V::n) {
      const V v = V::load(x + i);
      tops = larger(v * fused(c, v, s), tops);
    }
    const double top = largest(tops);
    V s0 = V::all(0), s1 = s0, s2 = s0, s3 = s0, s4 = s0;
    for (std::int64_t i = begin; i < end; i += V::n) {
      const V v = V::load(x + i), square = v * v;
      const V w = V::load(rows.base + i) * exponential(v * fused(c, v, s) - V::all(top)), bent = w * square;
      w.store(weights + i);
      s0 = s0 + w;
      s1 = fused(w, v, s1);
      s2 = s2 + bent;
      s3 = fused(bent, v, s3);
      s4 = fused(bent, square, s4);
    }
    sums[j] = sum(s0);
    first[j] = sum(s1) / sums[j];
    second[j] = sum(s2) / sums[j];
    third[j] = sum(s3) / sums[j];
    fourth[j] = sum(s4) / sums[j];
    return top;
  }

  void move(double t) { balance::move(Alone{}, arrow, t); }
  double sizes() const { return sizes_of(Alone{}, arrow); }

  double gradient() {
    double worst = 0, gap = 0;
    fill(arrow.gradient, arrow.n, 0);
    arrow.bend = -shift;
    for (std::int64_t j = 0; j < count; ++j) {
      const double m = rows.masses[j];
      if (moves(own(j))) {
        arrow.gradient[own(j)] += m * first[j];
        worst = interact ? worse(worst, size_of(first[j])) : size_of(arrow.gradient[0]);
      }
      if (!arrow.bent) continue;
      arrow.bend += m * second[j];
      gap += m * (2 * target[j] * deviation * first[j] + deviation * deviation * second[j]);
    }
    return arrow.bent ? worse(worst, size_of((gap + squared_targets - wanted) / square_deviation)) : worst;
  }

  double descend() {
    sum_hessian();
    solve(Alone{}, arrow);
    return slope_of(Alone{}, arrow);
  }

  void sum_hessian() {
    fill(arrow.diagonal, arrow.n, 0);
    fill(arrow.border, arrow.n, 0);
    arrow.corner = 0;
    for (std::int64_t j = 0; j < count; ++j) {
      const double m = rows.masses[j];
      if (moves(own(j))) arrow.diagonal[own(j)] += m * larger(second[j] - first[j] * first[j], 0);
      if (!arrow.bent) continue;
      if (moves(own(j))) arrow.border[own(j)] += m * (third[j] - first[j] * second[j]);
      arrow.corner += m * larger(fourth[j] - second[j] * second[j], 0);
    }
  }

  // From sums of their own to the masses.
  void scale_weights() {
    for (std::int64_t j = 0; j < count; ++j) {
      const double share = rows.masses[j] / sums[j];
      for (std::int64_t i = rows.edges[j]; i < rows.edges[j + 1]; ++i) weights[i] *= share;
    }
  }

  void put_dual(double* dual, std::int64_t strata) const {
    const double bend = arrow.bent ? arrow.curvature / (deviation * deviation) : 0.0;
    fill(dual, strata, 0);
    for (std::int64_t j = 0; j < arrow.n; ++j) {
      const double slope = moves(j) ? arrow.slopes[j] / deviation - 2 * bend * target[j] : 0.0;
      if (interact) dual[rows.names[j]] = slope;
      else fill(dual, strata, slope);
    }
    dual[strata] = bend;
  }

  void put_averages(double* averages, const double* outcomes, std::int64_t outcome_count) const {
    fill(averages, outcome_count, 0);
    for (std::int64_t j = 0; j < count; ++j)
      for (std::int64_t i = rows.edges[j]; i < rows.edges[j] + rows.sizes[j]; ++i)
        for (std::int64_t o = 0; o < outcome_count; ++o)
          averages[o] += weights[i] * outcomes[rows.rows[i] * outcome_count + o];
  }

  double effective() const {
    double mass = 0;
    for (std::int64_t j = 0; j < count; ++j) mass += rows.masses[j];
    return mass * mass / dot(weights, weights, pad);
  }
};

}  // namespace

template <class T>
Status solve_unit(double* dual, double* averages, double* report, double* scratch, const T* values,
                  const StrataRows& rows, const double* means, const double* squares, const double* outcomes,
                  const double* start, const StrataShape& shape, const Newton& settings) {
  Unit unit(scratch, rows, shape, squares);
  const Status able = unit.prepare(values, means, start, shape.strata);
  const Solution found = able == unfinished ? minimise(unit, settings) : refused(able);
  double effective = kNaN;
  if (solved(found.status)) {
    unit.scale_weights();
    unit.put_dual(dual, shape.strata);
    unit.put_averages(averages, outcomes, shape.outcomes);
    effective = unit.effective();
  }
  put_report(report, found, effective);
  return found.status;
}

#define SPURGE_INSTANTIATE(T)                                                                               \
  template ChunkSums sweep_chunk<T>(double*, double*, const T*, const double*, const double*, std::int64_t, \
                                    std::int64_t);                                                          \
  template Status solve_problem<T>(double*, double*, double*, double*, const T*, const BatchRows&,          \
                                   const double*, const double*, const double*, const BatchShape&,          \
                                   const Newton&);                                                          \
  template Status solve_unit<T>(double*, double*, double*, double*, const T*, const StrataRows&,            \
                                const double*, const double*, const double*, const double*,                 \
                                const StrataShape&, const Newton&);
SPURGE_INSTANTIATE(float)
SPURGE_INSTANTIATE(double)
SPURGE_INSTANTIATE(bf16)
SPURGE_INSTANTIATE(f16)
#undef SPURGE_INSTANTIATE

}  // namespace spurge::balance::SPURGE_LEVEL
