#include "core/simd.hpp"
#include "ops/proximity/proximity.hpp"

namespace spurge::proximity::SPURGE_LEVEL {

namespace {

using V = spurge::SPURGE_LEVEL::Vec<double>;

// kLanes neighbours.
struct Lanes {
  static constexpr int n = static_cast<int>(kLanes) / V::n;
  V v[n];

  template <class F>
  SPURGE_HD static Lanes each(const F& f) {
    Lanes to;
    SPURGE_UNROLL
    for (int i = 0; i < n; ++i) to.v[i] = f(i);
    return to;
  }
  SPURGE_HD static Lanes all(double x) {
    return each([&](int) { return V::all(x); });
  }
  SPURGE_HD static Lanes load(const double* p) {
    return each([&](int i) { return V::load(p + i * V::n); });
  }
  SPURGE_HD void store(double* p) const {
    SPURGE_UNROLL
    for (int i = 0; i < n; ++i) v[i].store(p + i * V::n);
  }
  SPURGE_HD friend Lanes operator+(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  SPURGE_HD friend Lanes operator-(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  SPURGE_HD friend Lanes operator*(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  SPURGE_HD friend Lanes operator/(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  SPURGE_HD double sum() const {
    double x[kLanes];
    store(x);
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }
};

// exp to a unit in the last place or two, without fused multiplication; between -708 and 708, where it stays beyond.
V exponential(V x) {
  constexpr double kInverse[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  x = larger(V::all(-708.0), smaller(V::all(708.0), x));
  const V k = rounded(x * V::all(1.4426950408889634074));
  const V r = (x - k * V::all(6.93147180369123816490e-01)) - k * V::all(1.90821492927058770002e-10);
  V sum = V::all(kInverse[0]);
  for (int i = 1; i < 14; ++i) sum = sum * r + V::all(kInverse[i]);
  return times_power(sum, k);
}

SPURGE_HD Lanes size_of(Lanes x) {
  return Lanes::each([&](int i) { return magnitude(x.v[i]); });
}

}  // namespace

Moments moments(const double* a, std::int64_t n) {
  Lanes sum = Lanes::all(0), size = sum;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Lanes x = Lanes::load(a + i);
    sum = sum + x;
    size = size + size_of(x);
  }
  return {sum.sum(), size.sum()};
}

double squares(const double* a, double mean, std::int64_t n) {
  const Lanes middle = Lanes::all(mean);
  Lanes sum = Lanes::all(0);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Lanes apart = Lanes::load(a + i) - middle;
    sum = sum + apart * apart;
  }
  return sum.sum();
}

Under under(const double* a, double border, std::int64_t n) {
  const double none = -__builtin_inf();
  const V high = V::all(border), one = V::all(1), zero = V::all(0), least = V::all(none);
  Lanes top = Lanes::all(none), others = Lanes::all(0);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Lanes x = Lanes::load(a + i);
    SPURGE_UNROLL
    for (int j = 0; j < Lanes::n; ++j) {
      const auto below = x.v[j] < high;
      top.v[j] = larger(top.v[j], select(below, x.v[j], least));
      others.v[j] = others.v[j] + select(below, zero, one);
    }
  }
  double lanes[kLanes];
  top.store(lanes);
  double largest = lanes[0];
  for (int j = 1; j < kLanes; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  return {largest, others.sum()};
}

void mark_above(double* marks, const double* a, double border, std::int64_t n) {
  const V low = V::all(border), one = V::all(1), zero = V::all(0);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Lanes x = Lanes::load(a + i);
    Lanes::each([&](int j) { return select(low < x.v[j], one, zero); }).store(marks + i);
  }
}

double memberships(double* m, const double* a, const Sigmoid& sigmoid, std::int64_t n) {
  const Lanes tau = Lanes::all(sigmoid.tau), t = Lanes::all(sigmoid.t), one = Lanes::all(1);
  Lanes total = Lanes::all(0);
  std::int64_t i = 0;
  for (; i < n; i += kLanes) {
    const Lanes x = (tau - Lanes::load(a + i)) / t;
    const Lanes found = one / (one + Lanes::each([&](int j) { return exponential(x.v[j]); }));
    found.store(m + i);
    if (i + kLanes <= n) total = total + found;
  }
  if (i == n) return total.sum();
  for (std::int64_t j = n; j < i; ++j) m[j] = 0;
  return (total + Lanes::load(m + i - kLanes)).sum();
}

Sums sums_of(const Line& line, const double* members, double total) {
  Lanes inside = Lanes::all(0), mass = inside, hits = inside, scores = inside;
  for (std::int64_t i = 0; i < line.n; i += kLanes) {
    const Lanes g = Lanes::load(members + i), a = Lanes::load(line.a + i);
    const Lanes m = g * Lanes::load(line.m + i), hit = g * Lanes::load(line.best + i);
    inside = inside + m;
    mass = mass + m * a;
    hits = hits + hit;
    scores = scores + hit * a;
  }
  return {total, inside.sum(), mass.sum(), hits.sum(), scores.sum()};
}

void add_pull(double* by_membership, double* by_score, const Line& line, const double* members, const Pull& pull) {
  const Lanes inside = Lanes::all(pull.inside), per_score = Lanes::all(pull.per_score), hit = Lanes::all(pull.hit);
  for (std::int64_t i = 0; i < line.n; i += kLanes) {
    const Lanes g = Lanes::load(members + i), m = Lanes::load(line.m + i), best = Lanes::load(line.best + i);
    (Lanes::load(by_membership + i) + g * (inside + per_score * Lanes::load(line.a + i))).store(by_membership + i);
    (Lanes::load(by_score + i) + g * (per_score * m + hit * best)).store(by_score + i);
  }
}

Turns add_memberships(double* by_score, const double* by_membership, const Line& line, double all,
                      const Sigmoid& sigmoid) {
  const Lanes one = Lanes::all(1), every = Lanes::all(all), t = Lanes::all(sigmoid.t), tau = Lanes::all(sigmoid.tau);
  Lanes sum = Lanes::all(0), stretched = sum;
  for (std::int64_t i = 0; i < line.n; i += kLanes) {
    const Lanes m = Lanes::load(line.m + i);
    const Lanes turn = (Lanes::load(by_membership + i) + every) * m * (one - m) / t;
    (Lanes::load(by_score + i) + turn).store(by_score + i);
    sum = sum + turn;
    stretched = stretched + turn * ((Lanes::load(line.a + i) - tau) / t);
  }
  return {sum.sum(), stretched.sum()};
}

}  // namespace spurge::proximity::SPURGE_LEVEL
