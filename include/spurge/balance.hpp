#pragma once
// balance: entropy balancing, the weights closest to given ones under which covariates have wanted means.
//
//   w[i] = base[i] exp(c[i] . dual) / sum,   f(dual) = log sum_i base[i] exp((c[i] - target) . dual)
//
// f is convex, its gradient the difference of the weighted means from the target, its Hessian their covariance. Where
// max_i (c[i] - target) . dual < 0 over rows of base > 0, the target lies outside the rows' convex hull: infeasible.
// Covariates of any dtype; all arithmetic and all other arrays float64. Multiplications are fused with additions where
// the instruction set can: the number of threads changes no bit, the instruction set and the GPU may change the last.
#include "spurge/types.hpp"

namespace spurge::balance {

// What became of a problem. After `infeasible` and `not_finite` all its numbers but the steps are NaN.
enum Status : std::int32_t { converged = 0, infeasible = 1, unfinished = 2, not_finite = 3 };

constexpr std::int64_t kReport = 4;  // worst standardised difference, effective sample size, f, Newton steps

// ---- one large problem: value and gradient, each covariate read once ------------------------------------------------

struct SweepShape {
  std::int64_t rows, columns;  // N, K
};

// Doubles of workspace that the GPU needs; the CPU needs none.
std::int64_t sweep_workspace(const SweepShape& shape);

// scores[i] = covariates[i] . dual; mean = the covariates' means under base exp(scores); value = log of the sum of those
// weights, and the largest score of a row with base > 0. Rows of weight 0 do not count, whatever they hold; without any
// other value is -inf and mean NaN. NaN spreads; a score of +inf makes mean and log NaN.
void sweep_cpu(double* scores, double* mean, double* value, const void* covariates, const double* base,
               const double* dual, const SweepShape& shape, DType dtype, int threads);
void sweep_cuda(double* scores, double* mean, double* value, double* workspace, const void* covariates,
                const double* base, const double* dual, const SweepShape& shape, DType dtype, const CudaPlace& place);

// ---- many small problems, each solved by Newton's method ------------------------------------------------------------

struct Newton {
  double tolerance;    // worst standardised difference that counts as balanced
  std::int32_t steps;  // at most
};

struct BatchShape {
  std::int64_t problems, rows, columns, outcomes;  // P, N, K, V
  bool shared_base;                                // base [N] for all problems, else [P, N]
};

constexpr std::int64_t kMostColumnsCuda = 64;  // K on the GPU: the Hessian lives in shared memory

// covariates [P, N, K]; targets and start [P, K]; outcomes [N, V], averaged under the weights into means [P, V];
// dual [P, K]; report [P, 4]; status [P]. Scales do not matter: columns are used in units of their standard deviation
// under base; a constant one is left out where its target agrees, and makes the problem infeasible otherwise.
// workspace: batch_workspace doubles on the GPU, null on the CPU.
std::int64_t batch_workspace(const BatchShape& shape);
void batch_cpu(double* dual, double* means, double* report, std::int32_t* status, const void* covariates,
               const double* base, const double* targets, const double* outcomes, const double* start,
               const BatchShape& shape, const Newton& settings, DType dtype, int threads);
void batch_cuda(double* dual, double* means, double* report, std::int32_t* status, double* workspace,
                const void* covariates, const double* base, const double* targets, const double* outcomes,
                const double* start, const BatchShape& shape, const Newton& settings, DType dtype,
                const CudaPlace& place);

// ---- one value in strata, for many units ----------------------------------------------------------------------------

struct StrataShape {
  std::int64_t units, rows, strata, outcomes;  // U, N, S, V
  bool interact;                               // a slope for each stratum, else one for all
};

// Rows of stratum j, starts[j] to starts[j + 1] - 1, get the total weight masses[j]; inside it
// w[i] ~ base[i] exp(slope[j] v[i] + curvature v[i]^2), so that the value's mean in each stratum is means[u, j] (without
// `interact`: its mean over all is sum_j masses[j] means[u, j]) and that of its square over all squares[u] (null: not
// balanced). values [U, N]; start and dual [U, S + 1], slopes and then the curvature; averages [U, V].
// The CPU refuses starts that do not ascend from 0 to N; the CUDA kernel cannot look before it runs, and says not_finite.
// The Hessian is an arrow and solved in O(S). workspace: strata_workspace doubles on the GPU, null on the CPU.
std::int64_t strata_workspace(const StrataShape& shape);
void strata_cpu(double* dual, double* averages, double* report, std::int32_t* status, const void* values,
                const std::int64_t* starts, const double* base, const double* masses, const double* means,
                const double* squares, const double* outcomes, const double* start, const StrataShape& shape,
                const Newton& settings, DType dtype, int threads);
void strata_cuda(double* dual, double* averages, double* report, std::int32_t* status, double* workspace,
                 const void* values, const std::int64_t* starts, const double* base, const double* masses,
                 const double* means, const double* squares, const double* outcomes, const double* start,
                 const StrataShape& shape, const Newton& settings, DType dtype, const CudaPlace& place);

}  // namespace spurge::balance
