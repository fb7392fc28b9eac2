#include <algorithm>

#include "cuda/vec.cuh"
#include "ops/balance/balance_device.cuh"

namespace spurge::balance {
namespace {

using namespace device;

constexpr int kRows = kSweepRows;                  // of a block: a thread for each
constexpr int kPanel = 4096;                       // columns whose sums shared memory holds
constexpr std::int64_t kTileBytes = 64 * 1024;     // of covariates that are read twice, the second time from the cache
constexpr int kAcross = 32;                        // columns that a block of combine_kernel sums
static_assert(kRows == kThreads && kPanel % kThreads == 0);

// How the threads of a block share its work; powers of two.
struct Split {
  int lanes;   // of a warp, to a row's score
  int across;  // threads to a row's columns
  int tile;    // rows whose covariates the cache keeps between their score and their part in the sums
};

// Rows of a block. Their weights stand beside the largest score so far: where a larger one comes, what was added up
// shrinks, so that covariates are read from memory once.
template <int W, class T>
struct Chunk {
  const T* covariates;
  const double *base, *dual;
  double* scores;
  double* sums;  // in shared memory: thread t's at t, t + kThreads, ...
  std::int64_t columns;
  int rows;
  Split split;

  // Scores of the rows from begin on, into memory that all threads see and into `to`.
  __device__ void score(double* to, int begin, int end) const {
    const int lane = threadIdx.x % split.lanes, group = threadIdx.x / split.lanes, groups = kThreads / split.lanes;
    for (int start = begin; start < end; start += groups) {
      const int r = start + group;
      double z = 0.0;
      for (std::int64_t k = lane * W; r < end && k < columns; k += split.lanes * W) {
        const auto xs = *reinterpret_cast<const cuda::Pack<T, W>*>(covariates + r * columns + k);
#pragma unroll
        for (int i = 0; i < W; ++i) z = fma(static_cast<double>(widen(xs.v[i])), dual[k + i], z);
      }
      for (int step = split.lanes / 2; step > 0; step /= 2) z += __shfl_xor_sync(kAll, z, step);
      if (lane != 0 || r >= end) continue;
      to[r - begin] = z;
      scores[r] = z;
    }
  }

  __device__ double weight(int r, double z, double top) const {
    return base[r] > 0.0 && top != -HUGE_VAL ? base[r] * exp(z - top) : 0.0;
  }

  // Adds weights [end - begin] times the rows to the sums of the columns [first, last), after these shrank.
  __device__ void add_rows(const double* weights, double shrunk, int begin, int end, std::int64_t first,
                           std::int64_t last) const {
    const int group = threadIdx.x / split.across, groups = kThreads / split.across;
    double* sum = sums + threadIdx.x;
    for (std::int64_t k = first + threadIdx.x % split.across; k < last; k += split.across, sum += kThreads) {
      double mine = *sum * shrunk;
      for (int r = begin + group; r < end; r += groups)
        if (weights[r - begin] != 0.0)
          mine = fma(weights[r - begin], static_cast<double>(widen(covariates[r * columns + k])), mine);
      *sum = mine;
    }
  }

  __device__ void clear(std::int64_t first, std::int64_t last) const {
    for (int t = threadIdx.x; t < kPanel && (t < kThreads || t < last - first); t += kThreads) sums[t] = 0.0;
  }

  // Threads that share a column add up what they have.
  __device__ void put_sums(double* to, std::int64_t first, std::int64_t last) const {
    for (int half = kThreads / 2; half >= split.across; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    const int own = split.across < kThreads ? split.across : kPanel;
    for (int t = threadIdx.x; t < own && first + t < last; t += kThreads) to[first + t] = sums[t];
  }
};

// A chunk's partials: its largest score (NaN where a row is), the sum of its weights beside that, and K sums.
template <int W, class T>
__global__ void __launch_bounds__(kThreads) chunk_kernel(double* __restrict__ scores, double* __restrict__ partials,
                                                         const T* __restrict__ covariates,
                                                         const double* __restrict__ base,
                                                         const double* __restrict__ dual, SweepShape shape,
                                                         Split split) {
  extern __shared__ double sums[];
  __shared__ double weights[2][kRows];
  const std::int64_t row = std::int64_t(blockIdx.x) * kRows, columns = shape.columns;
  const int rows = static_cast<int>(shape.rows - row < kRows ? shape.rows - row : kRows);
  const Chunk<W, T> chunk{covariates + row * columns, base + row, dual, scores + row, sums, columns, rows, split};
  std::int64_t last = columns < kPanel ? columns : kPanel;
  double top = -HUGE_VAL, total = 0.0;
  chunk.clear(0, last);
  // A tile's scores go where the rows before the last ones had theirs: every thread has passed a barrier since it read them.
  for (int begin = 0, turn = 0; begin < rows; begin += split.tile, turn ^= 1) {
    const int end = begin + split.tile < rows ? begin + split.tile : rows, r = begin + threadIdx.x;
    chunk.score(weights[turn], begin, end);
    __syncthreads();
    const double z = r < end ? weights[turn][threadIdx.x] : -HUGE_VAL;
    const bool lost = r < end && (isnan(z) || isnan(chunk.base[r]));
    const double here = over_block<Worst>(lost ? nan("") : r < end && chunk.base[r] > 0.0 ? z : -HUGE_VAL);
    const double before = top;
    top = worse(top, here);
    const double shrunk = before == top ? 1.0 : exp(before - top);
    total *= shrunk;
    if (r < end) {
      weights[turn][threadIdx.x] = chunk.weight(r, z, top);
      total += weights[turn][threadIdx.x];
    }
    __syncthreads();
    chunk.add_rows(weights[turn], shrunk, begin, end, 0, last);
  }
  total = over_block<Sum>(total);
  partials += blockIdx.x * (columns + 2);
  if (threadIdx.x == 0) {
    partials[0] = top;
    partials[1] = total;
  }
  if (isnan(top)) return;
  chunk.put_sums(partials + 2, 0, last);
  if (columns <= kPanel) return;  // those beyond are read a second time
  if (threadIdx.x < rows) weights[0][threadIdx.x] = chunk.weight(threadIdx.x, chunk.scores[threadIdx.x], top);
  __syncthreads();
  for (std::int64_t first = kPanel; first < columns; first = last) {
    last = columns - first < kPanel ? columns : first + kPanel;
    chunk.clear(first, last);
    chunk.add_rows(weights[0], 1.0, 0, rows, first, last);
    chunk.put_sums(partials + 2, first, last);
  }
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
  const unsigned chunks = cuda::blocks_for(shape.rows, kRows);
  if (chunks > 0)
    dispatch_floating(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const std::int64_t K = shape.columns;
      const auto* const xs = static_cast<const T*>(covariates);
      constexpr int W = cuda::kWidest<T>;
      const bool packed = cuda::fits_packs<T>(K, {xs});
      Split split{1, 1, 32};
      while (split.lanes < 32 && split.lanes * (packed ? W : 1) < K) split.lanes *= 2;
      while (split.across < kThreads && split.across < K) split.across *= 2;
      while (split.tile < kRows && 2 * split.tile * K * std::int64_t(sizeof(T)) <= kTileBytes) split.tile *= 2;
      const unsigned each = std::max(1u, cuda::blocks_for(std::min<std::int64_t>(K, kPanel), kThreads));  // sums of a thread
      const std::size_t bytes = each * kThreads * sizeof(double);
      if (packed)
        chunk_kernel<W><<<chunks, kThreads, bytes, stream>>>(scores, workspace, xs, base, dual, shape, split);
      else
        chunk_kernel<1><<<chunks, kThreads, bytes, stream>>>(scores, workspace, xs, base, dual, shape, split);
      cuda::check(cudaGetLastError(), "balance_sweep launch");
    });
  combine_kernel<<<std::max(1u, cuda::blocks_for(shape.columns, kAcross)), kThreads, 0, stream>>>(
      mean, value, workspace, chunks, shape.columns);
  cuda::check(cudaGetLastError(), "balance_sweep launch");
}

}  // namespace spurge::balance
