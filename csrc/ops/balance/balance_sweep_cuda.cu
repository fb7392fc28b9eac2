#include <algorithm>

#include "ops/balance/balance_device.cuh"

namespace spurge::balance {
namespace {

using namespace device;

constexpr int kChunk = 1024;  // rows of a block
constexpr int kAcross = 32;   // columns that a block of combine_kernel sums
static_assert(kChunk % kThreads == 0);

// Rows of a block. `lanes`, a power of two, of a warp share a row, and take as many columns at once.
template <class T>
struct Chunk {
  double* weights;  // in shared memory; first the scores
  const T* covariates;
  const double* base;
  std::int64_t columns;
  int rows, lanes;
  int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;

  __device__ double covariate(int r, std::int64_t k) const { return widen(covariates[r * columns + k]); }

  __device__ void score(double* scores, const double* dual) const {
    for (int start = 0; start < kChunk; start += groups) {
      const int r = start + group;
      double z = 0.0;
      if (r < rows)
        for (std::int64_t k = lane; k < columns; k += lanes) z = fma(covariate(r, k), dual[k], z);
      for (int step = lanes / 2; step > 0; step /= 2) z += __shfl_xor_sync(kAll, z, step);
      if (lane != 0 || r >= rows) continue;
      weights[r] = z;
      scores[r] = z;
    }
    __syncthreads();
  }

  // The largest score; NaN where a row is.
  __device__ double top() const {
    double top = -HUGE_VAL, lost = 0.0;
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      if (isnan(weights[r]) || isnan(base[r])) lost = 1.0;
      if (base[r] > 0.0) top = fmax(top, weights[r]);
    }
    return over_block<Max>(lost) > 0.0 ? nan("") : over_block<Max>(top);
  }

  // The weights beside the largest score, and their sum.
  __device__ double weigh(double top) const {
    double sum = 0.0;
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      weights[r] = base[r] > 0.0 && top != -HUGE_VAL ? base[r] * exp(weights[r] - top) : 0.0;
      sum += weights[r];
    }
    return over_block<Sum>(sum);
  }

  __device__ void sum_columns(double* to) const {
    __shared__ double sums[kThreads];
    for (std::int64_t some = 0; some < columns; some += lanes) {
      const std::int64_t k = some + lane;
      double mine = 0.0;
      if (k < columns)
        for (int r = group; r < rows; r += groups)
          if (weights[r] != 0.0) mine = fma(weights[r], covariate(r, k), mine);
      sums[threadIdx.x] = mine;
      for (int half = kThreads / 2; half >= lanes; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      }
      if (group == 0 && k < columns) to[k] = sums[threadIdx.x];
      __syncthreads();
    }
  }
};

// A chunk's partials: its largest score (NaN where a row is), the sum of its weights beside that, and K sums.
template <class T>
__global__ void chunk_kernel(double* __restrict__ scores, double* __restrict__ partials,
                             const T* __restrict__ covariates, const double* __restrict__ base,
                             const double* __restrict__ dual, SweepShape shape, int lanes) {
  __shared__ double weights[kChunk];
  const std::int64_t first = std::int64_t(blockIdx.x) * kChunk, columns = shape.columns;
  const int rows = static_cast<int>(shape.rows - first < kChunk ? shape.rows - first : kChunk);
  const Chunk<T> chunk{weights, covariates + first * columns, base + first, columns, rows, lanes};
  chunk.score(scores + first, dual);
  const double top = chunk.top(), sum = chunk.weigh(top);
  partials += blockIdx.x * (columns + 2);
  if (threadIdx.x == 0) {
    partials[0] = top;
    partials[1] = sum;
  }
  if (!isnan(top)) chunk.sum_columns(partials + 2);
}

// Thread (x, y) sums the chunks y, y + kWarps, ... of column x; the lanes y are then added in order.
__global__ void combine_kernel(double* __restrict__ mean, double* __restrict__ value,
                               const double* __restrict__ partials, std::int64_t chunks,
                               std::int64_t columns) {
  __shared__ double lanes[kWarps][kAcross];
  const int x = threadIdx.x % kAcross, y = threadIdx.x / kAcross;
  const std::int64_t k = std::int64_t(blockIdx.x) * kAcross + x, stride = columns + 2;
  double top = -HUGE_VAL, lost = 0.0, total = 0.0, sum = 0.0;
  for (std::int64_t n = threadIdx.x; n < chunks; n += kThreads) {
    if (isnan(partials[n * stride])) lost = 1.0;
    top = fmax(top, partials[n * stride]);
  }
  lost = over_block<Max>(lost);
  top = lost > 0.0 ? nan("") : over_block<Max>(top);
  const bool usable = lost == 0.0 && top != -HUGE_VAL;
  for (std::int64_t n = threadIdx.x; usable && n < chunks; n += kThreads)
    if (partials[n * stride] != -HUGE_VAL)
      total += exp(partials[n * stride] - top) * partials[n * stride + 1];
  total = over_block<Sum>(total);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    value[0] = usable ? top + log(total) : top;
    value[1] = top;
  }
  for (std::int64_t n = y; usable && k < columns && n < chunks; n += kWarps)
    if (partials[n * stride] != -HUGE_VAL)
      sum = fma(exp(partials[n * stride] - top), partials[n * stride + 2 + k], sum);
  lanes[y][x] = sum;
  __syncthreads();
  if (y != 0 || k >= columns) return;
  for (int other = 1; other < kWarps; ++other) sum += lanes[other][x];
  mean[k] = usable ? sum / total : nan("");
}

}  // namespace

void sweep_cuda(double* scores, double* mean, double* value, double* workspace, const void* covariates,
                const double* base, const double* dual, const SweepShape& shape, DType dtype,
                const CudaPlace& place) {
  const cuda::Guard guard(place);
  const auto stream = cuda::stream_of(place);
  const unsigned chunks = cuda::blocks_for(shape.rows, kChunk);
  int lanes = 1;
  while (lanes < 32 && lanes < shape.columns) lanes *= 2;
  if (chunks > 0)
    dispatch_floating(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      chunk_kernel<<<chunks, kThreads, 0, stream>>>(scores, workspace, static_cast<const T*>(covariates),
                                                    base, dual, shape, lanes);
      cuda::check(cudaGetLastError(), "balance_sweep launch");
    });
  combine_kernel<<<std::max(1u, cuda::blocks_for(shape.columns, kAcross)), kThreads, 0, stream>>>(
      mean, value, workspace, chunks, shape.columns);
  cuda::check(cudaGetLastError(), "balance_sweep launch");
}

}  // namespace spurge::balance
