#include <algorithm>
#include <limits>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/proximity/proximity_math.hpp"

namespace spurge::proximity {

namespace {

constexpr std::int64_t kRowsPerThread = 256;  // about 0.1 ms of work

// Scratch of one thread, for one row after the other.
struct Row {
  std::vector<Unit> units;  // the real ones, in the order of the row
  std::vector<Unit> order;
  std::vector<double> memberships;
  Unit last{};       // the last of the top-k
  double t = 1;      // T
  double total = 0;  // sum of the memberships
};

// What all golden sets share. False if a score is NaN or infinite.
template <class T>
bool read_row(Row& row, const T* scores, const std::int32_t* ids, std::int64_t units, std::int64_t k,
              double sharpness) {
  row.units.clear();
  double sum = 0, size = 0;
  for (std::int64_t t = 0; t < units; ++t) {
    if (ids[t] < 0) continue;
    const double a = scores[t];
    row.units.push_back({a, t});
    sum += a;
    size += std::abs(a);
  }
  if (!std::isfinite(size)) return false;
  const auto n = static_cast<std::int64_t>(row.units.size());
  const double mean = sum / static_cast<double>(n);
  double variance = 0;
  for (const Unit& u : row.units) variance += (u.score - mean) * (u.score - mean);
  row.t = temperature(sharpness, variance / static_cast<double>(n), size / static_cast<double>(n));

  double tau;
  row.order = row.units;
  if (n > k) {
    const auto next = row.order.begin() + k;
    std::nth_element(row.order.begin(), next, row.order.end(), precedes);
    row.last = *std::max_element(row.order.begin(), next, precedes);
    tau = 0.5 * row.last.score + 0.5 * next->score;
  } else {
    row.last = *std::max_element(row.order.begin(), row.order.end(), precedes);
    tau = row.last.score - row.t;
  }
  row.total = 0;
  row.memberships.clear();
  for (const Unit& u : row.units) {
    row.memberships.push_back(membership(u.score, tau, row.t));
    row.total += row.memberships.back();
  }
  return true;
}

Sums sum_set(const Row& row, const std::int32_t* ids, const std::int32_t* bits, std::int64_t words) {
  Sums sums;
  sums.all = row.total;
  for (std::size_t i = 0; i < row.units.size(); ++i) {
    const Unit& u = row.units[i];
    if (!member(bits, words, ids[u.index])) continue;
    sums.inside += row.memberships[i];
    sums.mass += row.memberships[i] * u.score;
    if (precedes(row.last, u)) continue;
    sums.hits += 1;
    sums.hit_scores += u.score;
  }
  return sums;
}

template <class T>
void score_row(Row& row, T* hard, T* soft, T* grad, const T* scores, const std::int32_t* ids,
               const std::int32_t* bitmap, std::int64_t label, const Shape& shape, std::int64_t k, double sharpness) {
  std::fill(grad, grad + shape.sets * shape.units, T(0));
  const bool empty = std::all_of(ids, ids + shape.units, [](std::int32_t id) { return id < 0; });
  if (empty || !read_row(row, scores, ids, shape.units, k, sharpness)) {
    const T value = empty ? T(0) : std::numeric_limits<T>::quiet_NaN();
    std::fill(hard, hard + shape.sets, value);
    std::fill(soft, soft + shape.sets, value);
    for (std::int64_t i = 0; i < shape.sets * shape.units; ++i)
      if (ids[i % shape.units] >= 0) grad[i] = value;
    return;
  }
  const auto chosen = static_cast<double>(std::min<std::int64_t>(k, static_cast<std::int64_t>(row.units.size())));
  for (std::int64_t g = 0; g < shape.sets; ++g) {
    const std::int32_t* const bits = golden_bits(bitmap, shape, g, label);
    const Sums sums = sum_set(row, ids, bits, shape.words);
    hard[g] = static_cast<T>(hard_value(sums, chosen));
    soft[g] = static_cast<T>(soft_value(sums));
    for (std::size_t i = 0; i < row.units.size(); ++i) {
      const Unit& u = row.units[i];
      const bool in_set = member(bits, shape.words, ids[u.index]);
      grad[g * shape.units + u.index] = static_cast<T>(soft_slope(sums, u.score, row.memberships[i], row.t, in_set));
    }
  }
}

template <class T>
void score_rows(T* hard, T* soft, T* grad, const T* scores, const std::int32_t* ids, const std::int32_t* bitmap,
                const std::int64_t* label, const Shape& s, std::int64_t k, double sharpness, int threads) {
  parallel_for(s.rows, kRowsPerThread, threads, [=](std::int64_t begin, std::int64_t end) {
    Row row;
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t b = r % s.examples;
      score_row(row, hard + r * s.sets, soft + r * s.sets, grad + r * s.sets * s.units, scores + r * s.units,
                ids + b * s.units, bitmap, label[b], s, k, sharpness);
    }
  });
}

}  // namespace

void scores_cpu(void* hard, void* soft, void* grad, const void* scores, const std::int32_t* ids,
                const std::int32_t* bitmap, const std::int64_t* label, const Shape& shape, std::int64_t k,
                double sharpness, DType dtype, int threads) {
  for (std::int64_t b = 0; b < shape.examples; ++b)
    SPURGE_CHECK(label[b] >= 0 && label[b] < shape.labels, "labels: must lie in [0, ", shape.labels, "), got ",
                 label[b]);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    score_rows(static_cast<T*>(hard), static_cast<T*>(soft), static_cast<T*>(grad), static_cast<const T*>(scores), ids,
               bitmap, label, shape, k, sharpness, threads);
  };
  if (dtype == DType::f64) run(double());
  else if (dtype == DType::f32) run(float());
  else fail("scores: dtype must be float32 or float64, got ", name(dtype));
}

}  // namespace spurge::proximity
