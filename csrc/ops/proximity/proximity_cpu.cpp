#include <algorithm>
#include <limits>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/proximity/proximity_math.hpp"

namespace spurge::proximity {

namespace {

constexpr std::int64_t kRowsPerThread = 256;  // about 0.1 ms of work

// Up to here one pass with a short sorted list finds the best; beyond, a selection.
constexpr std::size_t kShortList = 32;

// Scratch of one thread, for one row after the other: one entry per real unit, in the order of the row.
struct Row {
  explicit Row(std::int64_t units)
      : a(static_cast<std::size_t>(units)), m(a.size()), dm(a.size()), index(a.size()), in_set(a.size()), order(a.size()) {}

  std::size_t n = 0;
  std::vector<double> a, m, dm;  // score, membership and its slope
  std::vector<std::int64_t> index;
  std::vector<char> in_set;
  std::vector<Unit> order;
  Unit last{};       // the last of the top-k
  double total = 0;  // sum of m

  Unit unit(std::size_t i) const { return {a[i], index[i]}; }
};

// Finds the last of the k best, and returns the unit behind it; k < row.n.
Unit select(Row& row, std::size_t k) {
  Unit* const order = row.order.data();
  if (k >= kShortList) {
    for (std::size_t i = 0; i < row.n; ++i) order[i] = row.unit(i);
    std::nth_element(order, order + k, order + row.n, precedes);
    row.last = *std::max_element(order, order + k, precedes);
    return order[k];
  }
  for (std::size_t i = 0; i < row.n; ++i) {
    const Unit unit = row.unit(i);
    if (i > k && !precedes(unit, order[k])) continue;
    std::size_t at = std::min(i, k);  // pushes the worst out
    for (; at > 0 && precedes(unit, order[at - 1]); --at) order[at] = order[at - 1];
    order[at] = unit;
  }
  row.last = order[k - 1];
  return order[k];
}

// What all golden sets share. False if there is no unit, or a score is NaN or infinite.
template <class T>
bool read_row(Row& row, const T* scores, const std::int32_t* ids, std::int64_t units, std::int64_t k,
              double sharpness) {
  row.n = 0;
  double sum = 0, size = 0;
  for (std::int64_t t = 0; t < units; ++t) {
    if (ids[t] < 0) continue;
    const double a = scores[t];
    row.a[row.n] = a;
    row.index[row.n++] = t;
    sum += a;
    size += std::abs(a);
  }
  if (row.n == 0 || !std::isfinite(size)) return false;
  const auto n = static_cast<double>(row.n);
  const double mean = sum / n;
  double variance = 0;
  for (std::size_t i = 0; i < row.n; ++i) variance += (row.a[i] - mean) * (row.a[i] - mean);
  const double t = temperature(sharpness, variance / n, size / n);

  double tau;
  if (k < static_cast<std::int64_t>(row.n)) {
    const Unit next = select(row, static_cast<std::size_t>(k));
    tau = 0.5 * row.last.score + 0.5 * next.score;
  } else {
    row.last = row.unit(0);
    for (std::size_t i = 1; i < row.n; ++i)
      if (precedes(row.last, row.unit(i))) row.last = row.unit(i);
    tau = row.last.score - t;
  }
  row.total = 0;
  for (std::size_t i = 0; i < row.n; ++i) {
    row.m[i] = membership(row.a[i], tau, t);
    row.total += row.m[i];
  }
  for (std::size_t i = 0; i < row.n; ++i) row.dm[i] = membership_slope(row.m[i], t);
  return true;
}

Sums sum_set(Row& row, const std::int32_t* ids, const std::int32_t* bits, std::int64_t words) {
  Sums sums;
  sums.all = row.total;
  for (std::size_t i = 0; i < row.n; ++i) {
    const bool in_set = member(bits, words, ids[row.index[i]]);
    row.in_set[i] = in_set;
    const double g = in_set, hit = in_set & !precedes(row.last, row.unit(i));
    sums.inside += g * row.m[i];
    sums.mass += g * row.m[i] * row.a[i];
    sums.hits += hit;
    sums.hit_scores += hit * row.a[i];
  }
  return sums;
}

template <class T>
void score_row(Row& row, T* hard, T* soft, T* grad, const T* scores, const std::int32_t* ids,
               const std::int32_t* bitmap, std::int64_t label, const Shape& shape, std::int64_t k, double sharpness) {
  std::fill(grad, grad + shape.sets * shape.units, T(0));
  const bool usable = read_row(row, scores, ids, shape.units, k, sharpness);
  if (!usable) {
    const T value = row.n == 0 ? T(0) : std::numeric_limits<T>::quiet_NaN();
    std::fill(hard, hard + shape.sets, value);
    std::fill(soft, soft + shape.sets, value);
    for (std::int64_t g = 0; g < shape.sets; ++g)
      for (std::size_t i = 0; i < row.n; ++i) grad[g * shape.units + row.index[i]] = value;
    return;
  }
  const double chosen = std::min(static_cast<double>(k), static_cast<double>(row.n));
  for (std::int64_t g = 0; g < shape.sets; ++g) {
    const Sums sums = sum_set(row, ids, golden_bits(bitmap, shape, g, label), shape.words);
    hard[g] = static_cast<T>(hard_value(sums, chosen));
    soft[g] = static_cast<T>(soft_value(sums));
    const Slope slope = slope_of(sums);
    T* const to = grad + g * shape.units;
    for (std::size_t i = 0; i < row.n; ++i)
      to[row.index[i]] = static_cast<T>(soft_slope(slope, row.a[i], row.m[i], row.dm[i], row.in_set[i]));
  }
}

template <class T>
void score_rows(T* hard, T* soft, T* grad, const T* scores, const std::int32_t* ids, const std::int32_t* bitmap,
                const std::int64_t* label, const Shape& s, std::int64_t k, double sharpness, int threads) {
  parallel_for(s.rows, kRowsPerThread, threads, [=](std::int64_t begin, std::int64_t end) {
    Row row(s.units);
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
  dispatch_32_or_64("scores", dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    score_rows(static_cast<T*>(hard), static_cast<T*>(soft), static_cast<T*>(grad), static_cast<const T*>(scores), ids,
               bitmap, label, shape, k, sharpness, threads);
  });
}

}  // namespace spurge::proximity
