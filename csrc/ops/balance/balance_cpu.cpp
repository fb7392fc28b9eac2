#include <algorithm>
#include <cmath>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/balance/balance.hpp"

namespace spurge::balance {

namespace {

void check_not_negative(const char* name, const double* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    SPURGE_CHECK(!(x[i] < 0), name, ": must not be negative, got ", x[i], " at ", i);
}

void fill(double* a, std::int64_t n, double x) { std::fill(a, a + n, x); }

// What is said of a problem that nothing balances.
void blank(double* dual, std::int64_t duals, double* means, std::int64_t outcomes) {
  fill(dual, duals, kNaN);
  fill(means, outcomes, kNaN);
}

// The strata with mass, and their rows with base; `unfinished` where there is something to solve.
struct SortedRows {
  std::vector<std::int64_t> rows, edges{0}, sizes, names;
  std::vector<double> base, masses;
  double total = 0;
  Status able = unfinished;

  SortedRows(const std::int64_t* starts, const double* all_base, const double* all_masses,
             std::int64_t strata) {
    bool usable = true, present = true;
    for (std::int64_t j = 0; j < strata; ++j) {
      usable &= finite(all_masses[j]);
      if (!(all_masses[j] > 0)) continue;
      names.push_back(j), masses.push_back(all_masses[j]);
      for (std::int64_t i = starts[j]; i < starts[j + 1]; ++i) {
        if (all_base[i] == 0) continue;
        usable &= finite(all_base[i]);
        rows.push_back(i), base.push_back(all_base[i]);
        total += all_base[i];
      }
      present &= close_stratum() > 0;
    }
    if (!present || names.empty()) able = infeasible;
    if (!usable) able = not_finite;
  }

  // Pads the last stratum; how many rows it has without.
  std::int64_t close_stratum() {
    const auto first = edges.back(), size = static_cast<std::int64_t>(rows.size()) - first;
    rows.resize(static_cast<std::size_t>(first + padded(size)),
                size ? rows[static_cast<std::size_t>(first)] : 0);
    base.resize(rows.size(), 0.0);
    edges.push_back(static_cast<std::int64_t>(rows.size()));
    sizes.push_back(size);
    return size;
  }

  StrataRows view() const {
    const auto strata = static_cast<std::int64_t>(names.size());
    return {rows.data(), base.data(), edges.data(), sizes.data(), names.data(), masses.data(), strata, total};
  }
};

void check_starts(const std::int64_t* starts, std::int64_t strata, std::int64_t rows) {
  for (std::int64_t j = 0; j <= strata; ++j) {
    const std::int64_t least = j ? starts[j - 1] : 0, most = j ? rows : 0;
    SPURGE_CHECK(starts[j] >= least && starts[j] <= most && (j < strata || starts[j] == rows),
                 "starts: must ascend from 0 to ", rows, ", got ", starts[j], " at ", j);
  }
}

}  // namespace

std::int64_t sweep_workspace(const SweepShape& shape) {
  return (shape.rows + kSweepRows - 1) / kSweepRows * (shape.columns + 2);
}

std::int64_t batch_workspace(const BatchShape& shape) {
  return shape.problems * shape.rows * (shape.columns + 1);
}

std::int64_t strata_workspace(const StrataShape& shape) {
  return shape.units * (shape.rows + kStrataArrays * shape.strata);
}

void sweep_cpu(double* scores, double* mean, double* value, const void* covariates, const double* base,
               const double* dual, const SweepShape& shape, DType dtype, int threads) {
  check_not_negative("base", base, shape.rows);
  const std::int64_t n = shape.rows, columns = shape.columns, chunks = (n + kChunk - 1) / kChunk;
  std::vector<ChunkSums> parts(static_cast<std::size_t>(chunks));
  std::vector<double> sums(static_cast<std::size_t>(chunks * columns));
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto chunk = SPURGE_SELECT(sweep_chunk<T>);
    const auto body = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c) {
        const std::int64_t first = c * kChunk, some = std::min(kChunk, n - first);
        parts[static_cast<std::size_t>(c)] =
            chunk(scores + first, sums.data() + c * columns,
                  static_cast<const T*>(covariates) + first * columns, base + first, dual, some, columns);
      }
    };
    parallel_for(chunks, kStreamedPerThread / (kChunk * (columns + 1)) + 1, threads, body);
  });
  bool nan = false;
  double top = -kInfinity, weight = 0;
  for (const ChunkSums& part : parts) nan |= part.nan, top = std::max(top, part.top);
  fill(mean, columns, 0.0);
  for (std::int64_t c = 0; c < chunks; ++c) {
    const ChunkSums& part = parts[static_cast<std::size_t>(c)];
    if (part.top == -kInfinity) continue;
    const double share = part.top == top ? 1.0 : std::exp(part.top - top);
    weight += share * part.weight;
    for (std::int64_t k = 0; k < columns; ++k)
      mean[k] += share * sums[static_cast<std::size_t>(c * columns + k)];
  }
  const bool empty = top == -kInfinity;
  for (std::int64_t k = 0; k < columns; ++k) mean[k] = nan || empty ? kNaN : mean[k] / weight;
  value[0] = nan ? kNaN : empty ? -kInfinity : top + std::log(weight);
  value[1] = nan ? kNaN : top;
}

void batch_cpu(double* dual, double* means, double* report, std::int32_t* status, const void* covariates,
               const double* base, const double* targets, const double* outcomes, const double* start,
               const BatchShape& shape, const Newton& settings, DType dtype, int threads) {
  const std::int64_t n = shape.rows, columns = shape.columns;
  check_not_negative("base", base, shape.shared_base ? n : shape.problems * n);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto solve = SPURGE_SELECT(solve_problem<T>);
    const auto body = [&](std::int64_t begin, std::int64_t end) {
      std::vector<double> scratch(static_cast<std::size_t>(batch_scratch(n, columns)));
      std::vector<std::int64_t> rows;
      std::vector<double> weights;
      for (std::int64_t p = begin; p < end; ++p) {
        if (p == begin || !shape.shared_base) {
          const double* const own = shape.shared_base ? base : base + p * n;
          rows.clear(), weights.clear();
          for (std::int64_t i = 0; i < n; ++i)
            if (own[i] != 0) rows.push_back(i), weights.push_back(own[i]);
        }
        const auto kept = static_cast<std::int64_t>(rows.size());
        const BatchRows taken{kept == n ? nullptr : rows.data(), weights.data(), kept};
        double* const own_dual = dual + p * columns;
        double* const own_means = means + p * shape.outcomes;
        const Status found = solve(own_dual, own_means, report + p * kReport, scratch.data(),
                                   static_cast<const T*>(covariates) + p * n * columns, taken,
                                   targets + p * columns, outcomes, start + p * columns, shape, settings);
        if (!solved(found)) blank(own_dual, columns, own_means, shape.outcomes);
        status[p] = found;
      }
    };
    parallel_for(shape.problems, kElementsPerThread / (10 * n * (columns + 4) + 1) + 1, threads, body);
  });
}

void strata_cpu(double* dual, double* averages, double* report, std::int32_t* status, const void* values,
                const std::int64_t* starts, const double* base, const double* masses, const double* means,
                const double* squares, const double* outcomes, const double* start, const StrataShape& shape,
                const Newton& settings, DType dtype, int threads) {
  const std::int64_t n = shape.rows;
  check_not_negative("base", base, n);
  check_not_negative("masses", masses, shape.strata);
  check_starts(starts, shape.strata, n);
  const SortedRows sorted(starts, base, masses, shape.strata);
  const StrataRows rows = sorted.view();
  const std::int64_t duals = shape.strata + 1;
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto solve = SPURGE_SELECT(solve_unit<T>);
    const auto body = [&](std::int64_t begin, std::int64_t end) {
      std::vector<double> scratch(static_cast<std::size_t>(strata_scratch(rows)));
      for (std::int64_t u = begin; u < end; ++u) {
        double* const own_dual = dual + u * duals;
        double* const own_averages = averages + u * shape.outcomes;
        double* const own_report = report + u * kReport;
        Status found = sorted.able;
        if (found == unfinished)
          found = solve(own_dual, own_averages, own_report, scratch.data(),
                        static_cast<const T*>(values) + u * n, rows, means + u * shape.strata,
                        squares ? squares + u : nullptr, outcomes, start + u * duals, shape, settings);
        else put_report(own_report, refused(found), kNaN);
        if (!solved(found)) blank(own_dual, duals, own_averages, shape.outcomes);
        status[u] = found;
      }
    };
    parallel_for(shape.units, kElementsPerThread / (30 * (n + shape.strata) + 1) + 1, threads, body);
  });
}

}  // namespace spurge::balance
