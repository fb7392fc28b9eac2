#include <algorithm>

#include "ops/balance/balance_device.cuh"

namespace spurge::balance {
namespace {

using namespace device;

constexpr int kChunk = 1024;  // rows of a block
constexpr int kAcross = 32;   // columns that a block of combine_kernel sums
static_assert(kChunk % kThreads == 0);

// A chunk's partials: its largest score (NaN where a row is), the sum of its weights relative to that, and its K sums.
// `lanes`, a power of two, of a warp share a row, and take as many columns at once.
template <class T>
__global__ void chunk_kernel(double* __restrict__ scores, double* __restrict__ partials, const T* __restrict__ c,
                             const double* __restrict__ base, const double* __restrict__ dual, SweepShape shape,
                             int lanes) {
  __shared__ double weights[kChunk];
  __shared__ double sums[kThreads];
  const std::int64_t first = std::int64_t(blockIdx.x) * kChunk, columns = shape.columns;
  const int rows = static_cast<int>(shape.rows - first < kChunk ? shape.rows - first : kChunk);
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  c += first * columns;
  base += first;
  for (int start = 0; start < kChunk; start += groups) {
    const int r = start + group;
    double z = 0.0;
    if (r < rows)
      for (std::int64_t k = lane; k < columns; k += lanes) z = fma(double(widen(c[r * columns + k])), dual[k], z);
    for (int step = lanes / 2; step > 0; step /= 2) z += __shfl_xor_sync(kAll, z, step);
    if (lane != 0 || r >= rows) continue;
    weights[r] = z;
    scores[first + r] = z;
  }
  __syncthreads();

  double top = -HUGE_VAL, lost = 0.0, sum = 0.0;
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    if (isnan(weights[r]) || isnan(base[r])) lost = 1.0;
    if (base[r] > 0.0) top = fmax(top, weights[r]);
  }
  lost = block_max(lost);
  top = lost > 0.0 ? nan("") : block_max(top);
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    weights[r] = base[r] > 0.0 && top != -HUGE_VAL ? base[r] * exp(weights[r] - top) : 0.0;
    sum += weights[r];
  }
  sum = block_sum(sum);
  partials += blockIdx.x * (columns + 2);
  if (threadIdx.x == 0) {
    partials[0] = top;
    partials[1] = sum;
  }
  if (lost > 0.0) return;
  for (std::int64_t some = 0; some < columns; some += lanes) {
    const std::int64_t k = some + lane;
    double mine = 0.0;
    if (k < columns)
      for (int r = group; r < rows; r += groups)
        if (weights[r] != 0.0) mine = fma(weights[r], double(widen(c[r * columns + k])), mine);
    sums[threadIdx.x] = mine;
    for (int half = kThreads / 2; half >= lanes; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (group == 0 && k < columns) partials[2 + k] = sums[threadIdx.x];
    __syncthreads();
  }
}

// Thread (x, y) sums the chunks y, y + kWarps, ... of column x; the lanes y are then added in order.
__global__ void combine_kernel(double* __restrict__ mean, double* __restrict__ value,
                               const double* __restrict__ partials, std::int64_t chunks, std::int64_t columns) {
  __shared__ double lanes[kWarps][kAcross];
  const int x = threadIdx.x % kAcross, y = threadIdx.x / kAcross;
  const std::int64_t k = std::int64_t(blockIdx.x) * kAcross + x, stride = columns + 2;
  double top = -HUGE_VAL, lost = 0.0, total = 0.0, sum = 0.0;
  for (std::int64_t n = threadIdx.x; n < chunks; n += kThreads) {
    if (isnan(partials[n * stride])) lost = 1.0;
    top = fmax(top, partials[n * stride]);
  }
  lost = block_max(lost);
  top = lost > 0.0 ? nan("") : block_max(top);
  const bool usable = lost == 0.0 && top != -HUGE_VAL;
  for (std::int64_t n = threadIdx.x; usable && n < chunks; n += kThreads)
    if (partials[n * stride] != -HUGE_VAL) total += exp(partials[n * stride] - top) * partials[n * stride + 1];
  total = block_sum(total);
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
                const double* base, const double* dual, const SweepShape& shape, DType dtype, const CudaPlace& place) {
  const cuda::Guard guard(place);
  const auto stream = cuda::stream_of(place);
  const unsigned chunks = cuda::blocks_for(shape.rows, kChunk);
  int lanes = 1;
  while (lanes < 32 && lanes < shape.columns) lanes *= 2;
  if (chunks > 0)
    dispatch_floating(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      chunk_kernel<<<chunks, kThreads, 0, stream>>>(scores, workspace, static_cast<const T*>(covariates), base, dual,
                                                    shape, lanes);
      cuda::check(cudaGetLastError(), "balance_sweep launch");
    });
  combine_kernel<<<std::max(1u, cuda::blocks_for(shape.columns, kAcross)), kThreads, 0, stream>>>(
      mean, value, workspace, chunks, shape.columns);
  cuda::check(cudaGetLastError(), "balance_sweep launch");
}

}  // namespace spurge::balance
