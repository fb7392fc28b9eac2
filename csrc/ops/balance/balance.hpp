#pragma once
// Inner loops of the CPU kernels; balance_simd.cpp is compiled once per instruction set.
#include "core/isa.hpp"
#include "ops/balance/balance_math.hpp"

namespace spurge::balance {

constexpr std::int64_t kLane = 8;  // rows are padded to a multiple of this, by copies of a row with base 0
constexpr std::int64_t kChunk = 1024;  // rows of a sweep whose sums are added up before they meet others

SPURGE_HD std::int64_t padded(std::int64_t n) { return (n + kLane - 1) / kLane * kLane; }

// Of a chunk: its largest score, the sum of its weights times exp(-top), and whether a number is NaN.
struct ChunkSums {
  double top, weight;
  bool nan;
};

// Rows of a problem that have a base.
struct BatchRows {
  const std::int64_t* rows;  // numbers of the n rows, or null where they are 0 to n - 1
  const double* base;        // [n], above 0
  std::int64_t n;
};

SPURGE_HD std::int64_t batch_scratch(std::int64_t rows, std::int64_t columns) {
  return (columns + 3) * padded(rows) + columns * (columns + 7);
}

// Rows of the strata with mass, each stratum padded; the same for all units.
struct StrataRows {
  const std::int64_t* rows;   // [padded], pads repeat the first of their stratum
  const double* base;         // [padded], 0 at pads
  const std::int64_t* edges;  // [strata + 1], multiples of kLane
  const std::int64_t* sizes;  // [strata], without pads
  const std::int64_t* names;  // [strata]: number of each among all S
  const double* masses;       // [strata]
  std::int64_t strata;        // with mass
  double total;               // of the base
};

inline std::int64_t strata_scratch(const StrataRows& rows) {
  return 2 * rows.edges[rows.strata] + 12 * rows.strata;
}

SPURGE_EACH_LEVEL(
    // sums[k] = sum_i base[i] exp(z[i] - top) covariates[i, k], z = covariates . dual into scores, of n <=
    // kChunk rows.
    template <class T>
    ChunkSums sweep_chunk(double* scores, double* sums, const T* covariates, const double* base,
                          const double* dual, std::int64_t n, std::int64_t columns);

    // One problem of the batch; `means` takes averages of outcomes [N, V]. Where nothing balances, the report
    // is all that is written.
    template <class T>
    Status solve_problem(double* dual, double* means, double* report, double* scratch, const T* covariates,
                         const BatchRows& rows, const double* targets, const double* outcomes,
                         const double* start, const BatchShape& shape, const Newton& settings);

    // One unit, in the same way; `squares` null where the square is not balanced.
    template <class T> Status solve_unit(double* dual, double* averages, double* report, double* scratch,
                                         const T* values, const StrataRows& rows, const double* means,
                                         const double* squares, const double* outcomes, const double* start,
                                         const StrataShape& shape, const Newton& settings);)

}  // namespace spurge::balance
