#pragma once
// MacU, Eq. 6, one unit and one set at a time, in float64.
#include <cmath>
#include <cstdint>

#include "core/half.hpp"
#include "spurge/proximity.hpp"

namespace spurge::proximity {

constexpr double kEpsilon = 1e-6;      // of the soft mean score: an empty intersection fades to 0
constexpr double kSharpestRow = 1e-3;  // T is at least this share of mean|a|: equal scores have no ranking

// The order of the top-k: the larger score first, then the smaller index. NaN precedes nothing.
struct Unit {
  double score;
  std::int64_t index;
};
SPURGE_HD bool precedes(const Unit& a, const Unit& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

SPURGE_HD bool member(const std::int32_t* bits, std::int64_t words, std::int32_t id) {
  const auto v = static_cast<std::uint32_t>(id);
  if (words == 0) return false;
  const bool known = v / 32 < words;  // not a branch: membership is hard to predict
  return known & (static_cast<std::uint32_t>(bits[known ? v / 32 : 0]) >> (v % 32));
}

SPURGE_HD const std::int32_t* golden_bits(const std::int32_t* bitmap, const Shape& shape, std::int64_t set,
                                          std::int64_t label) {
  return bitmap + (set * shape.labels + label) * shape.words;
}

// ---- a row ----------------------------------------------------------------------------------------

// The sigmoid of a row: threshold tau, temperature T, and how T moves with a score a:
//   d T / d a = per_deviation (a - mean) + per_sign sign(a)
struct Sigmoid {
  double tau = 0, t = 1, mean = 0;
  double per_deviation = 0, per_sign = 0;

  SPURGE_HD double temperature_slope(double score) const {
    const double sign = score > 0 ? 1.0 : score < 0 ? -1.0 : 0.0;
    return per_deviation * (score - mean) + per_sign * sign;
  }
};

// All but tau, from the n units' mean, variance and mean size.
SPURGE_HD Sigmoid sigmoid(double sharpness, double n, double mean, double variance, double mean_size) {
  Sigmoid s;
  s.mean = mean;
  const double deviation = std::sqrt(variance), wanted = sharpness * deviation, least = kSharpestRow * mean_size;
  if (wanted > least) {
    s.t = wanted;
    s.per_deviation = sharpness / (n * deviation);
  } else if (least > 0) {
    s.t = least;
    s.per_sign = kSharpestRow / n;
  }  // all scores 0: any T gives the same memberships
  return s;
}

SPURGE_HD double membership(double score, const Sigmoid& s) { return 1.0 / (1.0 + std::exp((s.tau - score) / s.t)); }

// ---- a row and a set ------------------------------------------------------------------------------

struct Sums {
  double all = 0;         // sum of m over the row's units
  double inside = 0;      // sum of m over the set's
  double mass = 0;        // sum of m a over the set's
  double hits = 0;        // |C ∩ G|
  double hit_scores = 0;  // sum of a over C ∩ G
};

SPURGE_HD double hard_value(const Sums& s, double chosen) {
  return s.hits > 0 ? s.hits / chosen + s.hit_scores / s.hits : 0.0;
}

SPURGE_HD double soft_value(const Sums& s) { return s.inside / s.all + s.mass / (s.inside + kEpsilon); }

// ---- the derivative -------------------------------------------------------------------------------

// What the derivatives by hard and soft of one set hand on: to the membership m of every unit `all`, to that of a
// member `inside + per_score a`, to a member's own score `per_score m`, and `hit` where it is among the best.
struct Pull {
  double all, inside, per_score, hit;
};
SPURGE_HD Pull pull_of(const Sums& s, double by_hard, double by_soft) {
  const double per_score = by_soft / (s.inside + kEpsilon), mean = s.mass / (s.inside + kEpsilon);
  return {-by_soft * s.inside / (s.all * s.all), by_soft / s.all - per_score * mean, per_score,
          s.hits > 0 ? by_hard / s.hits : 0.0};
}

// By a score through its own membership, of which `by_membership` is the derivative.
SPURGE_HD double through_membership(double by_membership, double m, double t) { return by_membership * m * (1.0 - m) / t; }

// By a score through threshold and temperature: `last` for the last of the best, `next` for the unit behind it, and
// for every unit temperature times Sigmoid::temperature_slope.
struct Border {
  Unit last, next;  // next only where there are more units than best ones
};
struct Rest {
  double last, next, temperature;
};
// From sums over the row of through_membership, and of that times (a - tau) / T.
SPURGE_HD Rest rest_of(double sum, double stretched, bool more) {
  // tau is the middle of last and next, or last - T
  return more ? Rest{-0.5 * sum, -0.5 * sum, -stretched} : Rest{-sum, 0.0, sum - stretched};
}

}  // namespace spurge::proximity
