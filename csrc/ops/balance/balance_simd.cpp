// Newton's method on the dual of entropy balancing, and the sweep of one large problem. Covariates are widened to
// float64 when they are read; multiplications are fused with additions where the instruction set can.
#include "ops/balance/balance.hpp"
#include "ops/balance/balance_math.hpp"

#if defined(SPURGE_LEVEL_avx2) || defined(SPURGE_LEVEL_avx512)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own avx512fintrin.h
#endif

namespace spurge::balance::SPURGE_LEVEL {

namespace {

constexpr double kInfinity = __builtin_inf();
constexpr double kNaN = __builtin_nan("");

// ---- Vec: some float64 lanes -----------------------------------------------------------------------------------------

#if defined(SPURGE_LEVEL_avx512)

struct Vec {
  static constexpr int n = 8;
  __m512d v;
  static Vec all(double x) { return {_mm512_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec widened(const double* p) { return load(p); }
  static Vec widened(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static Vec widened(const f16* p) {
    return {_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static Vec widened(const bf16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)))};
  }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  double sum() const { return _mm512_reduce_add_pd(v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend Vec fused(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend Vec either(Vec a, Vec b) { return {_mm512_max_pd(a.v, b.v)}; }  // the larger; b where one is NaN
  friend Vec rounded(Vec x) { return {_mm512_roundscale_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Vec times_power(Vec x, Vec k) { return {_mm512_scalef_pd(x.v, k.v)}; }  // x 2^k
};

#elif defined(SPURGE_LEVEL_avx2)

struct Vec {
  static constexpr int n = 4;
  __m256d v;
  static Vec all(double x) { return {_mm256_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec widened(const double* p) { return load(p); }
  static Vec widened(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static Vec widened(const f16* p) {
    return {_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static Vec widened(const bf16* p) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)))};
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  double sum() const {
    double x[n];
    store(x);
    return (x[0] + x[1]) + (x[2] + x[3]);
  }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend Vec fused(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend Vec either(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
  friend Vec rounded(Vec x) { return {_mm256_round_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Vec times_power(Vec x, Vec k) {
    const __m256i bits = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(k.v));
    const __m256i power = _mm256_slli_epi64(_mm256_add_epi64(bits, _mm256_set1_epi64x(1023)), 52);
    return {_mm256_mul_pd(x.v, _mm256_castsi256_pd(power))};
  }
};

#else

struct Vec {
  static constexpr int n = 4;
  double v[n];
  template <class F>
  static Vec each(F f) {
    Vec to;
    for (int i = 0; i < n; ++i) to.v[i] = f(i);
    return to;
  }
  static Vec all(double x) {
    return each([&](int) { return x; });
  }
  static Vec load(const double* p) {
    return each([&](int i) { return p[i]; });
  }
  template <class T>
  static Vec widened(const T* p) {
    return each([&](int i) { return static_cast<double>(widen(p[i])); });
  }
  void store(double* p) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  double sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
  friend Vec operator+(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend Vec operator-(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend Vec operator*(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend Vec fused(Vec a, Vec b, Vec c) { return a * b + c; }
  friend Vec either(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend Vec rounded(Vec x) {
    return each([&](int i) { return __builtin_nearbyint(x.v[i]); });
  }
  friend Vec times_power(Vec x, Vec k) {
    return each([&](int i) { return __builtin_ldexp(x.v[i], k.v[i] == k.v[i] ? static_cast<int>(k.v[i]) : 0); });
  }
};

#endif

// exp of numbers up to a few hundred, to a unit in the last place or two; below -708 it stays at 3e-308, NaN is NaN.
Vec exponential(Vec x) {
  constexpr double kInverse[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                 1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
                                 1.0 / 6,          0.5,             1.0,            1.0};
  x = either(Vec::all(-708.0), x);
  const Vec k = rounded(x * Vec::all(1.4426950408889634074));
  const Vec r = fused(k, Vec::all(-1.90821492927058770002e-10), fused(k, Vec::all(-6.93147180369123816490e-01), x));
  Vec sum = Vec::all(kInverse[0]);
  for (int i = 1; i < 14; ++i) sum = fused(sum, r, Vec::all(kInverse[i]));
  return times_power(sum, k);
}

double largest(Vec x) {
  double lanes[Vec::n], top = -kInfinity;
  x.store(lanes);
  for (double lane : lanes) top = lane > top || lane != lane ? lane : top;
  return top;
}

// ---- one large problem -----------------------------------------------------------------------------------------------

constexpr int kTogether = 8;  // rows that give their scores, and then their sums, while they are in the nearest cache

template <int R, class T>
void scores_of(double* scores, const T* rows, const double* dual, std::int64_t columns) {
  Vec sums[R];
  for (int r = 0; r < R; ++r) sums[r] = Vec::all(0);
  std::int64_t k = 0;
  for (; k + Vec::n <= columns; k += Vec::n) {
    const Vec d = Vec::load(dual + k);
    for (int r = 0; r < R; ++r) sums[r] = fused(Vec::widened(rows + r * columns + k), d, sums[r]);
  }
  for (int r = 0; r < R; ++r) {
    scores[r] = sums[r].sum();
    for (std::int64_t rest = k; rest < columns; ++rest)
      scores[r] += static_cast<double>(widen(rows[r * columns + rest])) * dual[rest];
  }
}

template <int R, class T>
void add_rows(double* sums, const T* rows, const double* weights, std::int64_t columns) {
  Vec w[R];
  for (int r = 0; r < R; ++r) w[r] = Vec::all(weights[r]);
  std::int64_t k = 0;
  for (; k + Vec::n <= columns; k += Vec::n) {
    Vec sum = Vec::load(sums + k);
    for (int r = 0; r < R; ++r) sum = fused(w[r], Vec::widened(rows + r * columns + k), sum);
    sum.store(sums + k);
  }
  for (; k < columns; ++k)
    for (int r = 0; r < R; ++r) sums[k] += weights[r] * static_cast<double>(widen(rows[r * columns + k]));
}

}  // namespace

template <class T>
ChunkSums sweep_chunk(double* scores, double* sums, const T* covariates, const double* base, const double* dual,
                      std::int64_t n, std::int64_t columns) {
  ChunkSums out{-kInfinity, 0.0, false};
  for (std::int64_t k = 0; k < columns; ++k) sums[k] = 0;
  for (std::int64_t i = 0; i < n; i += kTogether) {
    const T* const rows = covariates + i * columns;
    const int some = static_cast<int>(n - i < kTogether ? n - i : kTogether);
    double* const z = scores + i;
    if (some == kTogether) scores_of<kTogether>(z, rows, dual, columns);
    else
      for (int r = 0; r < some; ++r) scores_of<1>(z + r, rows + r * columns, dual, columns);
    double top = out.top;
    for (int r = 0; r < some; ++r) {
      out.nan |= z[r] != z[r] || base[i + r] != base[i + r];
      if (base[i + r] > 0 && z[r] > top) top = z[r];
    }
    if (top > out.top) {
      const double shrink = out.weight > 0 ? __builtin_exp(out.top - top) : 0.0;
      for (std::int64_t k = 0; k < columns; ++k) sums[k] *= shrink;
      out.weight *= shrink;
      out.top = top;
    }
    if (top == -kInfinity) continue;
    double weights[kTogether];
    for (int r = 0; r < kTogether; ++r) weights[r] = r < some && base[i + r] > 0 ? z[r] - top : -kInfinity;
    for (int r = 0; r < kTogether; r += Vec::n) exponential(Vec::load(weights + r)).store(weights + r);
    for (int r = 0; r < some; ++r) {
      weights[r] = base[i + r] > 0 ? weights[r] * base[i + r] : 0.0;
      out.weight += weights[r];
    }
    if (some == kTogether) add_rows<kTogether>(sums, rows, weights, columns);
    else
      for (int r = 0; r < some; ++r) add_rows<1>(sums, rows + r * columns, weights + r, columns);
  }
  return out;
}

// ---- small problems --------------------------------------------------------------------------------------------------

namespace {

double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

// Solves (a + ridge) x = b for a symmetric a [n, n] by Cholesky, in `factor`; more ridge where rounding left no root. An
// `a` that is not finite gives an x that is not, which no line search accepts.
void solve(double* x, double* factor, const double* a, const double* b, double ridge, std::int64_t n) {
  for (bool done = false; !done && finite(ridge); ridge *= 100) {
    done = true;
    for (std::int64_t j = 0; done && j < n; ++j) {
      for (std::int64_t i = j; done && i < n; ++i) {
        const double rest = a[i * n + j] + (i == j ? ridge : 0.0) - dot(factor + i * n, factor + j * n, j);
        if (i == j) done = rest > 0, factor[j * n + j] = __builtin_sqrt(rest);
        else factor[i * n + j] = rest / factor[j * n + j];
      }
    }
  }
  for (std::int64_t i = 0; i < n; ++i) x[i] = (b[i] - dot(factor + i * n, x, i)) / factor[i * n + i];
  for (std::int64_t i = n - 1; i >= 0; --i) {
    for (std::int64_t k = i + 1; k < n; ++k) x[i] -= factor[k * n + i] * x[k];
    x[i] /= factor[i * n + i];
  }
}

void nothing(double* a, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) a[i] = kNaN;
}

constexpr std::int64_t kBlock = 256;  // rows whose covariates stay in the nearest cache

// Scaled covariates y [K][n'] of one problem, by columns; where the minimum is, weights . y is 0.
struct Problem {
  const double *y, *base;
  double *scores, *weights;
  std::int64_t pad, columns;
  double value = 0, top = 0, sum = 0;

  // value, largest score and weights (times their sum) at x.
  void at(const double* x) {
    Vec highest = Vec::all(-kInfinity);
    for (std::int64_t i = 0; i < pad; i += Vec::n) {
      Vec z = Vec::all(0);
      for (std::int64_t k = 0; k < columns; ++k) z = fused(Vec::load(y + k * pad + i), Vec::all(x[k]), z);
      z.store(scores + i);
      highest = either(z, highest);
    }
    top = largest(highest);
    Vec sums = Vec::all(0);
    for (std::int64_t i = 0; i < pad; i += Vec::n) {
      const Vec w = Vec::load(base + i) * exponential(Vec::load(scores + i) - Vec::all(top));
      w.store(weights + i);
      sums = sums + w;
    }
    sum = sums.sum();
    value = top + __builtin_log(sum);
  }

  double worst(double* gradient) const {
    double most = 0;
    for (std::int64_t k = 0; k < columns; ++k) {
      Vec sums = Vec::all(0);
      for (std::int64_t i = 0; i < pad; i += Vec::n)
        sums = fused(Vec::load(weights + i), Vec::load(y + k * pad + i), sums);
      gradient[k] = sums.sum() / sum;
      most = larger(most, size_of(gradient[k]));
    }
    return most;
  }

  template <int W>
  void add_products(double* hessian, std::int64_t j, std::int64_t k, std::int64_t from, std::int64_t to) const {
    Vec sums[W];
    for (int c = 0; c < W; ++c) sums[c] = Vec::all(0);
    for (std::int64_t i = from; i < to; i += Vec::n) {
      const Vec own = Vec::load(weights + i) * Vec::load(y + j * pad + i);
      for (int c = 0; c < W; ++c) sums[c] = fused(own, Vec::load(y + (k + c) * pad + i), sums[c]);
    }
    for (int c = 0; c < W; ++c) hessian[(k + c) * columns + j] += sums[c].sum();
  }

  // The covariance, below the diagonal and on it.
  void covariance(double* hessian, const double* gradient) const {
    for (std::int64_t e = 0; e < columns * columns; ++e) hessian[e] = 0;
    for (std::int64_t from = 0; from < pad; from += kBlock) {
      const std::int64_t to = from + kBlock < pad ? from + kBlock : pad;
      for (std::int64_t j = 0; j < columns; ++j) {
        std::int64_t k = j;
        for (; k + 6 <= columns; k += 6) add_products<6>(hessian, j, k, from, to);
        for (; k + 2 <= columns; k += 2) add_products<2>(hessian, j, k, from, to);
        for (; k < columns; ++k) add_products<1>(hessian, j, k, from, to);
      }
    }
    for (std::int64_t k = 0; k < columns; ++k)
      for (std::int64_t j = 0; j <= k; ++j)
        hessian[k * columns + j] = hessian[k * columns + j] / sum - gradient[j] * gradient[k];
  }
};

}  // namespace

template <class T>
Status solve_problem(double* dual, double* means, double* report, double* scratch, const T* covariates,
                     const BatchRows& rows, const double* targets, const double* outcomes, const double* start,
                     const BatchShape& shape, const Newton& settings) {
  const std::int64_t all = shape.columns, n = rows.n, pad = padded(n);
  double* const y = scratch;
  double* const weights = y + all * pad;
  double* const scores = weights + pad;
  double* const base = scores + pad;
  double* const hessian = base + pad;
  double* const per = hessian + 2 * all * all;  // arrays of a number for each column
  double *const deviation = per, *const x = per + all, *const trial = per + 2 * all, *const gradient = per + 3 * all,
                *const direction = per + 4 * all, *const extent = per + 5 * all;
  nothing(dual, all);
  nothing(means, shape.outcomes);
  nothing(report, 3);
  report[3] = 0;
  bool usable = true;
  for (std::int64_t k = 0; k < all; ++k) usable &= finite(targets[k]) && finite(start[k]);
  double total = 0;
  for (std::int64_t i = 0; i < pad; ++i) {
    base[i] = i < n ? rows.base[i] : 0.0;
    total += base[i];
  }
  usable &= finite(total);
  if (!usable) return not_finite;

  // By columns, about the target; a column in blocks, so that the rows are read from memory once.
  for (std::int64_t from = 0; from < pad; from += kBlock) {
    const std::int64_t to = from + kBlock < pad ? from + kBlock : pad;
    for (std::int64_t k = 0; k < all; ++k)
      for (std::int64_t i = from; i < to; ++i) {
        const std::int64_t own = i < n ? i : 0, row = rows.rows ? rows.rows[own] : own;
        y[k * pad + i] = n ? static_cast<double>(widen(covariates[row * all + k])) - targets[k] : 0.0;
      }
  }
  std::int64_t kept = 0;
  std::int64_t* const column = reinterpret_cast<std::int64_t*>(per + 6 * all);
  bool possible = n > 0;
  for (std::int64_t k = 0; k < all; ++k) {
    const double* const from = y + k * pad;
    Vec sums = Vec::all(0), high = Vec::all(0);
    for (std::int64_t i = 0; i < pad; i += Vec::n) {
      const Vec v = Vec::load(from + i), c = v + Vec::all(targets[k]);
      sums = fused(Vec::load(base + i), v, sums);
      high = either(high, either(c, Vec::all(0) - c));
    }
    const double middle = sums.sum() / total;
    if (n && !finite(middle)) return not_finite;
    Vec squares = Vec::all(0);
    for (std::int64_t i = 0; i < pad; i += Vec::n) {
      const Vec apart = Vec::load(from + i) - Vec::all(middle);
      squares = fused(Vec::load(base + i) * apart, apart, squares);
    }
    extent[k] = larger(largest(high), 0);
    deviation[k] = n ? __builtin_sqrt(squares.sum() / total) : 0.0;
    if (!finite(deviation[k])) return not_finite;  // beyond the square root of the largest number
    if (deviation[k] > kConstant * extent[k]) {
      column[kept] = k;
      const Vec scale = Vec::all(1 / deviation[k]);
      for (std::int64_t i = 0; i < pad; i += Vec::n) (Vec::load(from + i) * scale).store(y + kept * pad + i);
      ++kept;
    } else {
      possible &= size_of(middle) <= kEqual * larger(extent[k], size_of(targets[k]));
    }
  }
  if (!possible) return infeasible;
  for (std::int64_t c = 0; c < kept; ++c) {
    x[c] = start[column[c]] * deviation[column[c]];
    Vec high = Vec::all(0);
    for (std::int64_t i = 0; i < pad; i += Vec::n) {
      const Vec v = Vec::load(y + c * pad + i);
      high = either(high, either(v, Vec::all(0) - v));
    }
    extent[c] = largest(high);  // of the scaled column, for the rounding of scores
  }

  Problem problem{y, base, scores, weights, pad, kept};
  problem.at(x);
  Status status = unfinished;
  std::int32_t taken = 0;
  double worst = 0;
  for (;; ++taken) {
    double sizes = 0;
    for (std::int64_t c = 0; c < kept; ++c) sizes += extent[c] * size_of(x[c]);
    report[3] = taken;
    if (problem.top < -kProof * sizes) return infeasible;
    worst = problem.worst(gradient);
    if (worst <= settings.tolerance) status = converged;
    if (status == converged || taken == settings.steps) break;
    problem.covariance(hessian, gradient);
    double trace = 0;
    for (std::int64_t c = 0; c < kept; ++c) trace += hessian[c * kept + c];
    solve(direction, hessian + all * all, hessian, gradient, kRidge * trace / static_cast<double>(kept) + 1e-20, kept);
    for (std::int64_t c = 0; c < kept; ++c) direction[c] = -direction[c];
    const double slope = dot(gradient, direction, kept), before = problem.value;
    double t = smaller(1.0, kReach / __builtin_sqrt(larger(-slope, 1e-300)));
    for (int go = 0; go < kTrials; ++go) {
      for (std::int64_t c = 0; c < kept; ++c) trial[c] = x[c] + t * direction[c];
      problem.at(trial);
      if (fell(before, problem.value, t, slope)) break;
      t = shortened(t, before, problem.value, slope);
    }
    for (std::int64_t c = 0; c < kept; ++c) x[c] = trial[c];
  }
  for (std::int64_t k = 0; k < all; ++k) dual[k] = 0;
  for (std::int64_t c = 0; c < kept; ++c) dual[column[c]] = x[c] / deviation[column[c]];
  double squares = 0;
  for (std::int64_t i = 0; i < n; ++i) squares += weights[i] * weights[i];
  for (std::int64_t o = 0; o < shape.outcomes; ++o) {
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i)
      sum += weights[i] * outcomes[(rows.rows ? rows.rows[i] : i) * shape.outcomes + o];
    means[o] = sum / problem.sum;
  }
  report[0] = worst;
  report[1] = problem.sum * problem.sum / squares;
  report[2] = problem.value;
  return status;
}

// ---- one value in strata -----------------------------------------------------------------------------------------------

namespace {

// Values x of one unit about the targets of their strata; scores are x (slope + curvature x) - curvature shift.
struct Unit {
  const StrataRows& rows;
  const double* x;
  double* weights;
  double shift;
  double *sums, *first, *second, *third, *fourth;  // of each stratum: of weights times 1, x, x^2, x^3, x^4
  double value = 0, top = 0;

  void at(const double* slopes, double curvature) {
    value = top = -curvature * shift;
    const Vec c = Vec::all(curvature);
    for (std::int64_t j = 0; j < rows.strata; ++j) {
      const Vec slope = Vec::all(slopes[j]);
      Vec highest = Vec::all(-kInfinity);
      for (std::int64_t i = rows.edges[j]; i < rows.edges[j + 1]; i += Vec::n) {
        const Vec v = Vec::load(x + i);
        highest = either(v * fused(c, v, slope), highest);
      }
      const double high = largest(highest);
      Vec s0 = Vec::all(0), s1 = s0, s2 = s0, s3 = s0, s4 = s0;
      for (std::int64_t i = rows.edges[j]; i < rows.edges[j + 1]; i += Vec::n) {
        const Vec v = Vec::load(x + i), square = v * v;
        const Vec w = Vec::load(rows.base + i) * exponential(v * fused(c, v, slope) - Vec::all(high));
        w.store(weights + i);
        s0 = s0 + w;
        s1 = fused(w, v, s1);
        const Vec bent = w * square;
        s2 = s2 + bent;
        s3 = fused(bent, v, s3);
        s4 = fused(bent, square, s4);
      }
      sums[j] = s0.sum();
      first[j] = s1.sum() / sums[j];
      second[j] = s2.sum() / sums[j];
      third[j] = s3.sum() / sums[j];
      fourth[j] = s4.sum() / sums[j];
      value += rows.masses[j] * (high + __builtin_log(sums[j]));
      top += rows.masses[j] * high;
    }
  }
};

}  // namespace

template <class T>
Status solve_unit(double* dual, double* averages, double* report, double* scratch, const T* values,
                  const StrataRows& rows, const double* means, const double* squares, const double* outcomes,
                  const double* start, const StrataShape& shape, const Newton& settings) {
  const std::int64_t count = rows.strata, pad = rows.edges[count], slot = count + 1;
  double* const x = scratch;
  double* const weights = x + pad;
  double* const per = weights + pad;  // arrays of a number for each stratum
  double *const target = per, *const slopes = per + slot, *const trial = per + 2 * slot,
                *const direction = per + 3 * slot, *const gradient = per + 4 * slot, *const border = per + 5 * slot,
                *const diagonal = per + 6 * slot, *const moments = per + 7 * slot, *const varies = per + 12 * slot,
                *const reach = per + 13 * slot;
  nothing(dual, shape.strata + 1);
  nothing(averages, shape.outcomes);
  nothing(report, 3);
  report[3] = 0;

  bool usable = !squares || finite(*squares);
  for (std::int64_t j = 0; j <= shape.strata; ++j) usable &= finite(start[j]);
  double overall = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    target[j] = means[rows.names[j]];
    usable &= finite(target[j]);
    overall += rows.masses[j] * target[j];
  }
  if (!usable) return not_finite;
  if (!shape.interact)
    for (std::int64_t j = 0; j < count; ++j) target[j] = overall;
  const double wanted = squares ? *squares : 0.0;

  double middle = 0, extent = 0;
  for (std::int64_t i = 0; i < pad; ++i) {
    x[i] = static_cast<double>(widen(values[rows.rows[i]]));
    middle += rows.base[i] * x[i];
    extent = larger(extent, size_of(x[i]));
  }
  middle /= rows.total;
  if (!finite(middle)) return not_finite;
  double variance = 0, square_mean = 0, square_variance = 0;
  for (std::int64_t i = 0; i < pad; ++i) {
    variance += rows.base[i] * (x[i] - middle) * (x[i] - middle);
    square_mean += rows.base[i] * x[i] * x[i];
  }
  square_mean /= rows.total;
  for (std::int64_t i = 0; squares && i < pad; ++i)
    square_variance += rows.base[i] * (x[i] * x[i] - square_mean) * (x[i] * x[i] - square_mean);
  double deviation = __builtin_sqrt(variance / rows.total);
  const double spread = __builtin_sqrt(square_variance / rows.total);
  if (!finite(deviation) || !finite(spread)) return not_finite;  // too large to square
  const bool flat = deviation <= kConstant * extent;
  if (flat) deviation = 1;
  const bool bent = squares && spread > kConstant * extent * extent;

  bool possible = true;
  double farthest = 0, target_square = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    double low = kInfinity, high = -kInfinity, off = 0;
    for (std::int64_t i = rows.edges[j]; i < rows.edges[j + 1]; ++i) {
      low = smaller(low, x[i]);
      high = larger(high, x[i]);
      off = larger(off, size_of(x[i] - target[j]));
      if (squares && !bent) possible &= size_of(x[i] * x[i] - wanted) <= kEqual * larger(extent * extent, size_of(wanted));
      x[i] = (x[i] - target[j]) / deviation;
    }
    varies[j] = !(flat || (shape.interact && high - low <= kConstant * extent));
    if (!varies[j]) possible &= off <= kEqual * larger(extent, size_of(target[j]));
    reach[j] = off / deviation;
    farthest = larger(farthest, reach[j]);
    target_square += rows.masses[j] * target[j] * target[j];
  }
  if (!possible) return infeasible;
  const double shift = bent ? (wanted - target_square) / (deviation * deviation) : 0.0;
  double curvature = bent ? start[shape.strata] * deviation * deviation : 0.0;
  for (std::int64_t j = 0; j < count; ++j) {
    const std::int64_t own = shape.interact ? rows.names[j] : rows.names[0];
    slopes[j] = varies[j] != 0 ? deviation * start[own] + 2 * curvature * target[j] / deviation : 0.0;
  }

  Unit unit{rows,           x, weights, shift, moments, moments + slot, moments + 2 * slot, moments + 3 * slot,
            moments + 4 * slot};
  unit.at(slopes, curvature);
  Status status = unfinished;
  double worst = 0;
  for (std::int32_t taken = 0;; ++taken) {
    report[3] = taken;
    double sizes = size_of(curvature) * (farthest * farthest + size_of(shift));
    for (std::int64_t j = 0; j < count; ++j) sizes += size_of(slopes[j]) * reach[j];
    if (unit.top < -kProof * sizes) return infeasible;

    // Gradient, and the Hessian: diagonal, border and corner of an arrow; without `interact` the diagonal is one number.
    double mean_gap = 0, square_gap = 0, corner = 0, bend = -shift, trace = 0, edge = 0, inside = 0;
    worst = 0;
    std::int64_t free = 0;  // strata whose slope moves
    for (std::int64_t j = 0; j < count; ++j) {
      const double m = rows.masses[j], e1 = unit.first[j], e2 = unit.second[j];
      gradient[j] = varies[j] != 0 ? m * e1 : 0.0;
      diagonal[j] = varies[j] != 0 ? m * larger(e2 - e1 * e1, 0) : 0.0;
      border[j] = varies[j] != 0 && bent ? m * (unit.third[j] - e1 * e2) : 0.0;
      mean_gap += m * e1;
      square_gap += m * (2 * target[j] * deviation * e1 + deviation * deviation * e2);
      corner += m * larger(unit.fourth[j] - e2 * e2, 0);
      bend += m * e2;
      if (varies[j] == 0) continue;
      if (shape.interact) worst = larger(worst, size_of(e1));
      ++free;
    }
    if (!shape.interact && !flat) {
      worst = size_of(mean_gap);
      for (std::int64_t j = 0; j < count; ++j) inside += diagonal[j], edge += border[j];
    }
    if (bent) worst = larger(worst, size_of((square_gap + target_square - wanted) / spread));
    if (worst <= settings.tolerance) status = converged;
    if (status == converged || taken == settings.steps) break;

    for (std::int64_t j = 0; j < count; ++j) trace += diagonal[j];
    if (bent) trace += corner;
    const std::int64_t unknowns = bent + (shape.interact ? free : free > 0);
    const double ridge = kRidge * trace / static_cast<double>(unknowns) + 1e-20;
    double schur = corner + ridge, rest = bend, slope = 0, turn = 0;
    if (shape.interact) {
      for (std::int64_t j = 0; j < count; ++j) {
        if (varies[j] == 0) continue;
        schur -= border[j] * border[j] / (diagonal[j] + ridge);
        rest -= border[j] * gradient[j] / (diagonal[j] + ridge);
      }
    } else if (!flat) {
      schur -= edge * edge / (inside + ridge);
      rest -= edge * mean_gap / (inside + ridge);
    }
    if (bent) turn = -rest / larger(schur, ridge);
    for (std::int64_t j = 0; j < count; ++j) {
      direction[j] = 0;
      if (varies[j] == 0) continue;
      direction[j] = shape.interact ? -(gradient[j] + border[j] * turn) / (diagonal[j] + ridge)
                                    : -(mean_gap + edge * turn) / (inside + ridge);
      slope += gradient[j] * direction[j];
    }
    slope += bend * turn;
    const double before = unit.value, bow = curvature;
    double t = smaller(1.0, kReach / __builtin_sqrt(larger(-slope, 1e-300)));
    for (int go = 0; go < kTrials; ++go) {
      for (std::int64_t j = 0; j < count; ++j) trial[j] = slopes[j] + t * direction[j];
      curvature = bow + t * turn;
      unit.at(trial, curvature);
      if (fell(before, unit.value, t, slope)) break;
      t = shortened(t, before, unit.value, slope);
    }
    for (std::int64_t j = 0; j < count; ++j) slopes[j] = trial[j];
  }

  for (std::int64_t j = 0; j <= shape.strata; ++j) dual[j] = 0;
  const double bow = bent ? curvature / (deviation * deviation) : 0.0;
  dual[shape.strata] = bow;
  for (std::int64_t j = 0; j < count; ++j)
    if (varies[j] != 0) dual[rows.names[j]] = slopes[j] / deviation - 2 * bow * target[j];
  if (!shape.interact && count && varies[0] != 0)
    for (std::int64_t j = 0; j < shape.strata; ++j) dual[j] = dual[rows.names[0]];
  double weight = 0, weight_squares = 0;
  for (std::int64_t o = 0; o < shape.outcomes; ++o) averages[o] = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    const double share = rows.masses[j] / unit.sums[j];
    weight += rows.masses[j];
    for (std::int64_t i = rows.edges[j]; i < rows.edges[j] + rows.sizes[j]; ++i) {
      const double w = share * weights[i];
      weight_squares += w * w;
      for (std::int64_t o = 0; o < shape.outcomes; ++o)
        averages[o] += w * outcomes[rows.rows[i] * shape.outcomes + o];
    }
  }
  report[0] = worst;
  report[1] = weight * weight / weight_squares;
  report[2] = unit.value;
  return status;
}

#define SPURGE_INSTANTIATE(T)                                                                                        \
  template ChunkSums sweep_chunk<T>(double*, double*, const T*, const double*, const double*, std::int64_t,         \
                                    std::int64_t);                                                                   \
  template Status solve_problem<T>(double*, double*, double*, double*, const T*, const BatchRows&, const double*,   \
                                   const double*, const double*, const BatchShape&, const Newton&);                 \
  template Status solve_unit<T>(double*, double*, double*, double*, const T*, const StrataRows&, const double*,     \
                                const double*, const double*, const double*, const StrataShape&, const Newton&);
SPURGE_INSTANTIATE(float)
SPURGE_INSTANTIATE(double)
SPURGE_INSTANTIATE(bf16)
SPURGE_INSTANTIATE(f16)
#undef SPURGE_INSTANTIATE

}  // namespace spurge::balance::SPURGE_LEVEL
