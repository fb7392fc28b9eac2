#pragma once
// Newton's method on the dual of entropy balancing, once for the CPU and the GPU. A Problem sums over its
// rows what f is made of; a Team computes with the sums: one thread alone, or those of a warp or a block.
//
//   team.each(from, to, f)        f(i) for each i, seen by all afterwards
//   team.sum(start, from, to, f)  start + sum of f(i), known to all
//   team.put(to, x)               one of them writes, all see it
#include "core/half.hpp"
#include "spurge/balance.hpp"

namespace spurge::balance {

constexpr double kReach = 4.0;       // longest step, by the square root of its Newton decrement
constexpr double kRidge = 1e-12;     // of the direction only, beside the mean of the Hessian's diagonal
constexpr double kConstant = 1e-13;  // a standard deviation below this share of the largest value is rounding
constexpr double kEqual = 1e-10;     // of two constants
constexpr double kProof = 1e-12;     // rounding of the largest score, beside the sizes that were added
constexpr double kFall = 1e-4;       // Armijo: share of the slope that a step has to fall by
constexpr double kNoise = 1e-13;     // of f
constexpr int kTrials = 40;          // of a step

constexpr int kSweepRows = 256;   // rows whose sums a block of the GPU adds up before they meet others
constexpr int kStrataArrays = 9;  // of a number for each stratum, in what the GPU works in

constexpr double kInfinity = __builtin_huge_val();
constexpr double kNaN = __builtin_nan("");

SPURGE_HD double larger(double a, double b) { return a > b ? a : b; }
SPURGE_HD double smaller(double a, double b) { return a < b ? a : b; }
SPURGE_HD double size_of(double x) { return x < 0 ? -x : x; }
SPURGE_HD bool finite(double x) { return x - x == 0; }

// The larger, and NaN for good.
SPURGE_HD double worse(double worst, double x) { return x > worst || x != x ? x : worst; }

SPURGE_HD double square_root(double x) {
#ifdef __CUDA_ARCH__
  return ::sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

// a b + c, rounded once on the GPU.
SPURGE_HD double multiply_add(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return ::fma(a, b, c);
#else
  return a * b + c;
#endif
}

SPURGE_HD double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t k = 0; k < n; ++k) sum = multiply_add(a[k], b[k], sum);
  return sum;
}

// Takes arrays out of the memory that a problem works in, one behind the other.
struct Room {
  double* next;
  template <class... Arrays>
  SPURGE_HD void take(std::int64_t n, Arrays&... arrays) {
    ((arrays = next, next += n), ...);
  }
};

// ---- columns that vary, and constants -------------------------------------------------------------

SPURGE_HD bool varies(double deviation, double largest) { return deviation > kConstant * largest; }

SPURGE_HD bool agrees(double apart, double largest, double target) {
  return apart <= kEqual * larger(largest, size_of(target));
}

// ---- Newton's method ------------------------------------------------------------------------------

// f at a dual, and the largest score there.
struct Point {
  double value, top;
};

// What became of a problem; where nothing balances, its numbers are NaN.
struct Solution {
  Status status;
  std::int32_t steps;
  double worst, value;
};

SPURGE_HD Solution refused(Status why, std::int32_t steps = 0) { return {why, steps, kNaN, kNaN}; }

SPURGE_HD bool solved(Status status) { return status == converged || status == unfinished; }

SPURGE_HD void put_report(double* report, const Solution& found, double effective) {
  report[0] = found.worst;
  report[1] = effective;
  report[2] = found.value;
  report[3] = found.steps;
}

// Where every score lies below the target's, no weights reach it. `sizes` bounds what a score is a sum of.
SPURGE_HD bool outside(const Point& now, double sizes) { return now.top < -kProof * sizes; }

// The full step, or as much of it as the decrement allows.
SPURGE_HD double first_length(double slope) {
  return smaller(1.0, kReach / square_root(larger(-slope, 1e-300)));
}

// Armijo's rule for a step of length t.
SPURGE_HD bool fell(const Point& from, const Point& to, double t, double slope) {
  return to.value <= from.value + kFall * t * slope + kNoise * (1 + size_of(from.value));
}

// The next length to try: where the parabola through value and slope turns.
SPURGE_HD double shortened(double t, const Point& from, const Point& to, double slope) {
  const double turn = -slope * t / (2 * (to.value - from.value - t * slope));
  return t * (turn > 0.1 ? smaller(turn, 0.5) : 0.1);
}

// Minimises f from where the problem stands, its direction being 0. A problem has
//   Point at(double t)   f at dual + t direction
//   void move(double t)  dual += t direction, t the last that was tried
//   double sizes()       what is added up, at most, for the largest score
//   double gradient()    sums the gradient; the worst standardised difference
//   double descend()     direction = -(Hessian + ridge)^-1 gradient; the slope of f along it
template <class Problem>
SPURGE_HD Solution minimise(Problem& problem, const Newton& settings) {
  Point now = problem.at(0);
  for (std::int32_t steps = 0;; ++steps) {
    if (outside(now, problem.sizes())) return refused(infeasible, steps);
    const double worst = problem.gradient();
    if (worst <= settings.tolerance) return {converged, steps, worst, now.value};
    if (steps == settings.steps) return {unfinished, steps, worst, now.value};

    const double slope = problem.descend();
    double t = first_length(slope);
    Point next = problem.at(t);
    for (int trials = 1; trials < kTrials && !fell(now, next, t, slope); ++trials) {
      t = shortened(t, now, next, slope);
      next = problem.at(t);
    }
    problem.move(t);
    now = next;
  }
}

// Of the direction only: what keeps Hessians of collinear columns positive.
SPURGE_HD double ridge_of(double trace, std::int64_t unknowns) {
  return kRidge * trace / static_cast<double>(unknowns) + 1e-20;
}

// ---- direction by Cholesky ------------------------------------------------------------------------

// Newton's system of n columns. The Hessian stands on and above the diagonal, Cholesky's factor L below it,
// and L's own diagonal in `roots`.
struct Dense {
  double *hessian, *roots, *gradient, *direction;
  std::int64_t n, stride;

  SPURGE_HD double* row(std::int64_t i) const { return hessian + i * stride; }
};

// L L' = Hessian + ridge; false where rounding leaves no root.
template <class Team>
SPURGE_HD bool factorise(const Team& team, const Dense& a, double ridge) {
  for (std::int64_t j = 0; j < a.n; ++j) {
    const double* const row = a.row(j);
    const double pivot = row[j] + ridge - dot(row, row, j);
    if (!(pivot > 0)) return false;
    const double root = square_root(pivot);
    team.put(a.roots[j], root);
    team.each(j + 1, a.n, [&](std::int64_t i) { a.row(i)[j] = (row[i] - dot(a.row(i), row, j)) / root; });
  }
  return true;
}

// L L' direction = -gradient.
template <class Team>
SPURGE_HD void substitute(const Team& team, const Dense& a) {
  double* const x = a.direction;
  for (std::int64_t i = 0; i < a.n; ++i) {
    const double known = team.sum(0.0, 0, i, [&](std::int64_t k) { return a.row(i)[k] * x[k]; });
    team.put(x[i], (-a.gradient[i] - known) / a.roots[i]);
  }
  for (std::int64_t i = a.n - 1; i >= 0; --i) {
    const double rest = team.sum(x[i], i + 1, a.n, [&](std::int64_t k) { return -a.row(k)[i] * x[k]; });
    team.put(x[i], rest / a.roots[i]);
  }
}

// (Hessian + ridge) direction = -gradient; more ridge where rounding left no root. A Hessian that is not
// finite gives a direction that is not, which no line search accepts.
template <class Team>
SPURGE_HD void solve(const Team& team, const Dense& a) {
  double trace = 0;
  for (std::int64_t k = 0; k < a.n; ++k) trace += a.row(k)[k];
  double ridge = ridge_of(trace, a.n);
  while (finite(ridge) && !factorise(team, a, ridge)) ridge *= 100;
  if (finite(ridge)) substitute(team, a);
  else team.each(0, a.n, [&](std::int64_t k) { a.direction[k] = kNaN; });
}

// ---- direction by an arrow ------------------------------------------------------------------------

// Newton's system of strata: n slopes, whose Hessian is diagonal, and a curvature that borders it. Slopes
// that stay 0 have a negative reach, and zeros in gradient, diagonal and border.
struct Arrow {
  double *slopes, *direction, *gradient, *diagonal, *border;
  double* reach;  // the largest size of what a slope multiplies
  std::int64_t n, unknowns;
  bool bent;  // whether there is a curvature; without one it stays 0, and so do
  double curvature, turn, bend, corner, widest;  // its direction, gradient, Hessian and reach

  SPURGE_HD double slope_at(double t, std::int64_t j) const {
    return multiply_add(t, direction[j], slopes[j]);
  }
  SPURGE_HD double curvature_at(double t) const { return multiply_add(t, turn, curvature); }
};

template <class Team>
SPURGE_HD double sizes_of(const Team& team, const Arrow& a) {
  return team.sum(a.widest * size_of(a.curvature), 0, a.n,
                  [&](std::int64_t j) { return a.reach[j] * size_of(a.slopes[j]); });
}

template <class Team>
SPURGE_HD void move(const Team& team, Arrow& a, double t) {
  team.each(0, a.n, [&](std::int64_t j) { a.slopes[j] = a.slope_at(t, j); });
  a.curvature = a.curvature_at(t);
}

// (Hessian + ridge) direction = -gradient: first the curvature, all slopes eliminated, then they.
template <class Team>
SPURGE_HD void solve(const Team& team, Arrow& a) {
  const double trace = team.sum(0.0, 0, a.n, [&](std::int64_t j) { return a.diagonal[j]; });
  const double ridge = ridge_of(trace + a.corner, a.unknowns);
  const auto eliminated = [&](double start, const double* column) {
    return team.sum(start, 0, a.n,
                    [&](std::int64_t j) { return -a.border[j] * column[j] / (a.diagonal[j] + ridge); });
  };
  if (a.bent)
    a.turn = -eliminated(a.bend, a.gradient) / larger(eliminated(a.corner + ridge, a.border), ridge);
  team.each(0, a.n, [&](std::int64_t j) {
    a.direction[j] = -(a.gradient[j] + a.border[j] * a.turn) / (a.diagonal[j] + ridge);
  });
}

// Of f along the direction.
template <class Team>
SPURGE_HD double slope_of(const Team& team, const Arrow& a) {
  const auto product = [&](std::int64_t j) { return a.gradient[j] * a.direction[j]; };
  return team.sum(0.0, 0, a.n, product) + a.bend * a.turn;
}

}  // namespace spurge::balance
