#pragma once
// What the kernels of balance share: sums over a warp and a block in a fixed order, and Newton's line search.
#include <cmath>
#include <cstdint>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "ops/balance/balance_math.hpp"

namespace spurge::balance::device {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ inline double warp_sum(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// NaN is passed over.
__device__ inline double warp_max(double x) {
  for (int step = 16; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// Every thread of the block calls these and gets the result; they also order the block's writes before its reads.
__device__ inline double block_sum(double x) {
  __shared__ double parts[kWarps];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int k = 1; k < kWarps; ++k) x += parts[k];
  return x;
}

__device__ inline double block_max(double x) {
  __shared__ double parts[kWarps];
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int k = 1; k < kWarps; ++k) x = fmax(x, parts[k]);
  return x;
}

// Keeps the larger, and NaN for good.
__device__ inline void keep_worst(double& worst, double x) {
  if (x > worst || isnan(x)) worst = x;
}

// f, and the largest score: below 0, the target is outside.
struct Point {
  double value, top;
};

// Shortens the step until at(step) is low enough; `now` becomes the last point tried.
template <class At>
__device__ double search(Point& now, double slope, const At& at) {
  double t = fmin(1.0, kReach / sqrt(fmax(-slope, 1e-300)));
  Point trial{};
  for (int k = 0; k < kTrials; ++k) {
    trial = at(t);
    if (fell(now.value, trial.value, t, slope)) break;
    t = shortened(t, now.value, trial.value, slope);
  }
  now = trial;
  return t;
}

// The results of a problem without a solution.
__device__ inline void give_up(double* dual, std::int64_t duals, double* means, std::int64_t outcomes, double* report,
                               std::int32_t* status, int taken, Status why) {
  const double none = nan("");
  for (std::int64_t k = threadIdx.x; k < duals; k += kThreads) dual[k] = none;
  for (std::int64_t v = threadIdx.x; v < outcomes; v += kThreads) means[v] = none;
  if (threadIdx.x != 0) return;
  report[0] = report[1] = report[2] = none;
  report[3] = taken;
  *status = why;
}

}  // namespace spurge::balance::device
