#pragma once
// Teams of threads, which sum in a fixed order, and what the kernels of balance write in the end.
#include <cmath>
#include <cstdint>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "ops/balance/balance_math.hpp"

namespace spurge::balance::device {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

// ---- over a warp, and over a block: every thread calls these and gets the result ------------------

struct Sum {
  __device__ static double of(double a, double b) { return a + b; }
};
struct Max {  // passes NaN over
  __device__ static double of(double a, double b) { return fmax(a, b); }
};
struct Worst {  // keeps NaN
  __device__ static double of(double a, double b) { return worse(a, b); }
};

template <class Op>
__device__ double over_warp(double x) {
  for (int step = 16; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// Also orders the block's writes before its reads.
template <class Op>
__device__ double over_block(double x) {
  __shared__ double parts[kWarps];
  x = over_warp<Op>(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int k = 1; k < kWarps; ++k) x = Op::of(x, parts[k]);
  return x;
}

// ---- teams ----------------------------------------------------------------------------------------

// The whole block, or one of its warps.
template <bool whole>
struct Team {
  static constexpr int size = whole ? kThreads : 32, count = whole ? 1 : kWarps;
  int lane = threadIdx.x % size, index = threadIdx.x / size;

  __device__ void meet() const {
    if (whole) __syncthreads();
    else __syncwarp();
  }
  template <class Op>
  __device__ double over(double x) const {
    return whole ? over_block<Op>(x) : over_warp<Op>(x);
  }
  __device__ double sum(double x) const { return over<Sum>(x); }
  __device__ double max(double x) const { return over<Max>(x); }

  // As balance_math.hpp has them.
  template <class F>
  __device__ void each(std::int64_t from, std::int64_t to, const F& f) const {
    for (std::int64_t i = from + lane; i < to; i += size) f(i);
    meet();
  }
  template <class F>
  __device__ double sum(double start, std::int64_t from, std::int64_t to, const F& f) const {
    double mine = 0;
    for (std::int64_t i = from + lane; i < to; i += size) mine += f(i);
    return start + sum(mine);
  }
  __device__ void put(double& to, double x) const {
    meet();
    if (lane == 0) to = x;
    meet();
  }
};
using Warp = Team<false>;
using Block = Team<true>;

// ---- results --------------------------------------------------------------------------------------

// Of a problem.
struct Results {
  double *dual, *means, *report;
  std::int32_t* status;
  std::int64_t duals, outcomes;
};

// Averages of outcomes [N, V] under the weights of rows begin to end - 1; those below 0 do not count.
__device__ inline void put_means(const Results& to, const double* outcomes, const double* weights,
                                 std::int64_t begin, std::int64_t end) {
  const Warp warp;
  for (std::int64_t o = warp.index; o < to.outcomes; o += Warp::count) {
    double sum = 0.0;
    for (std::int64_t i = begin + warp.lane; i < end; i += Warp::size)
      if (!(weights[i] < 0.0)) sum = fma(weights[i], outcomes[i * to.outcomes + o], sum);
    sum = warp.sum(sum);
    if (warp.lane == 0) to.means[o] = sum;
  }
}

__device__ inline double effective(const double* weights, std::int64_t begin, std::int64_t end) {
  double sum = 0.0, squares = 0.0;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    if (weights[i] < 0.0) continue;
    sum += weights[i];
    squares = fma(weights[i], weights[i], squares);
  }
  sum = over_block<Sum>(sum);
  return sum * sum / over_block<Sum>(squares);
}

// Solves the problem, and writes what became of it.
template <class Problem>
__device__ void solve_into(const Results& to, Problem& problem, const double* outcomes,
                           const Newton& settings) {
  const Block block;
  const Status able = problem.prepare();
  const Solution found = able == unfinished ? minimise(problem, settings) : refused(able);
  double size = kNaN;
  if (solved(found.status)) {
    problem.put_dual(to.dual);
    problem.scale_weights();
    put_means(to, outcomes, problem.weights, problem.begin(), problem.end());
    size = effective(problem.weights, problem.begin(), problem.end());
  } else {
    block.each(0, to.duals, [&](std::int64_t k) { to.dual[k] = kNaN; });
    block.each(0, to.outcomes, [&](std::int64_t o) { to.means[o] = kNaN; });
  }
  if (threadIdx.x != 0) return;
  put_report(to.report, found, size);
  *to.status = found.status;
}

}  // namespace spurge::balance::device
