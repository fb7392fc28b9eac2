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
  return v / 32 < words && (static_cast<std::uint32_t>(bits[v / 32]) >> (v % 32) & 1u);
}

SPURGE_HD const std::int32_t* golden_bits(const std::int32_t* bitmap, const Shape& shape, std::int64_t set,
                                          std::int64_t label) {
  return bitmap + (set * shape.labels + label) * shape.words;
}

SPURGE_HD double temperature(double sharpness, double variance, double mean_size) {
  const double wanted = sharpness * std::sqrt(variance), least = kSharpestRow * mean_size;
  return wanted > least ? wanted : least > 0 ? least : 1.0;  // all scores 0: any T gives the same memberships
}

SPURGE_HD double membership(double score, double tau, double t) { return 1.0 / (1.0 + std::exp((tau - score) / t)); }

// Of one row and set.
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

// d m / d score; tau and T are constants
SPURGE_HD double membership_slope(double m, double t) { return m * (1.0 - m) / t; }

// d soft / d score. Divided once per row and set, so that a unit costs multiplications only.
struct Slope {
  double share_in, share_out, mean, per_inside;
};
SPURGE_HD Slope slope_of(const Sums& s) {
  const double all2 = s.all * s.all, inside = s.inside + kEpsilon;
  return {(s.all - s.inside) / all2, -s.inside / all2, s.mass / inside, 1.0 / inside};
}
SPURGE_HD double soft_slope(const Slope& s, double score, double m, double dm, bool in_set) {
  const double g = in_set;  // not a branch: membership is hard to predict
  return dm * (g * s.share_in + (1.0 - g) * s.share_out) + g * ((m + dm * (score - s.mean)) * s.per_inside);
}

}  // namespace spurge::proximity
