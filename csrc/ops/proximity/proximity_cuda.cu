#include <algorithm>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "ops/proximity/proximity_math.hpp"

namespace spurge::proximity {
namespace {

constexpr int kMostThreads = 256;
constexpr std::size_t kShared = 40 * 1024;  // a longer row is read from global memory again and again

// The sum over the block, for every thread, in an order that depends on the block's size only.
__device__ double block_sum(double x, double* scratch) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
  return sum;
}

// The units of a row. `staged`, where it is not null, keeps the scores in shared memory, with NaN, which precedes
// nothing, at padding.
template <class T>
struct Row {
  const T* scores;
  const std::int32_t* ids;
  T* staged;
  std::int64_t units;

  __device__ bool real(std::int64_t t) const { return ids[t] >= 0; }
  __device__ T score(std::int64_t t) const { return staged ? staged[t] : given(t); }
  __device__ T given(std::int64_t t) const { return real(t) ? scores[t] : static_cast<T>(nan("")); }
  __device__ Unit unit(std::int64_t t) const { return {static_cast<double>(score(t)), t}; }

  template <class F>
  __device__ void each(F f) const {  // f(t) of this thread's units
    for (std::int64_t t = threadIdx.x; t < units; t += blockDim.x) f(t);
  }
  template <class F>
  __device__ void each_real(F f) const {
    each([&](std::int64_t t) {
      if (real(t)) f(t);
    });
  }
};

// Of the real units.
struct Moments {
  double n = 0, sum = 0, size = 0;  // how many, of scores, of their magnitudes
};

template <class T>
__device__ Moments stage(const Row<T>& row, double* scratch) {
  Moments m;
  row.each([&](std::int64_t t) {
    const T score = row.given(t);
    if (row.staged) row.staged[t] = score;
    if (!row.real(t)) return;
    m.n += 1;
    m.sum += score;
    m.size += fabs(static_cast<double>(score));
  });
  return {block_sum(m.n, scratch), block_sum(m.sum, scratch), block_sum(m.size, scratch)};
}

template <class T>
__device__ double variance(const Row<T>& row, const Moments& m, double* scratch) {
  const double mean = m.sum / m.n;
  double squares = 0;
  row.each_real([&](std::int64_t t) {
    const double d = row.score(t) - mean;
    squares += d * d;
  });
  return block_sum(squares, scratch) / m.n;
}

// The last of the top-k, and the unit behind it. A unit's rank is counted against all others: no sort, no workspace.
struct Border {
  Unit last, next;
};

template <class T>
__device__ void find(Border& border, const Row<T>& row, std::int64_t chosen) {
  row.each_real([&](std::int64_t t) {
    const Unit unit = row.unit(t);
    std::int64_t rank = 0;
    for (std::int64_t u = 0; u < row.units; ++u) rank += precedes(row.unit(u), unit);
    if (rank == chosen - 1) border.last = unit;
    if (rank == chosen) border.next = unit;
  });
  __syncthreads();
}

// m = membership(score) of a row
struct Soft {
  double tau, temp;
  __device__ double operator()(double score) const { return membership(score, tau, temp); }
};

template <class T>
__device__ double total_membership(const Row<T>& row, const Soft& soft, double* scratch) {
  double total = 0;
  row.each_real([&](std::int64_t t) { total += soft(row.score(t)); });
  return block_sum(total, scratch);
}

// A golden set, as bits.
struct Golden {
  const std::int32_t* bits;
  std::int64_t words;
  __device__ bool has(std::int32_t id) const { return member(bits, words, id); }
};

template <class T>
__device__ Sums sums_of(const Golden& golden, const Row<T>& row, const Soft& soft, const Unit& last, double total,
                        double* scratch) {
  Sums sums;
  row.each_real([&](std::int64_t t) {
    if (!golden.has(row.ids[t])) return;
    const Unit unit = row.unit(t);
    const double m = soft(unit.score);
    sums.inside += m;
    sums.mass += m * unit.score;
    if (precedes(last, unit)) return;
    sums.hits += 1;
    sums.hit_scores += unit.score;
  });
  sums.all = total;
  sums.inside = block_sum(sums.inside, scratch);
  sums.mass = block_sum(sums.mass, scratch);
  sums.hits = block_sum(sums.hits, scratch);
  sums.hit_scores = block_sum(sums.hit_scores, scratch);
  return sums;
}

template <class T>
__device__ void put_slopes(T* grad, const Golden& golden, const Row<T>& row, const Soft& soft, const Sums& sums) {
  const Slope slope = slope_of(sums);
  row.each([&](std::int64_t t) {
    const double a = row.score(t), m = soft(a);
    const bool real = row.real(t), in_set = real && golden.has(row.ids[t]);
    grad[t] = real ? static_cast<T>(soft_slope(slope, a, m, membership_slope(m, soft.temp), in_set)) : T(0);
  });
}

// One block per row.
template <class T>
__global__ void scores_kernel(T* __restrict__ hard, T* __restrict__ soft, T* __restrict__ grad,
                              const T* __restrict__ scores, const std::int32_t* __restrict__ ids,
                              const std::int32_t* __restrict__ bitmap, const std::int64_t* __restrict__ label,
                              Shape shape, std::int64_t k, double sharpness, bool staged) {
  extern __shared__ double row_memory[];
  __shared__ double scratch[kMostThreads / 32];
  __shared__ Border border;
  const std::int64_t r = blockIdx.x, b = r % shape.examples, y = label[b];
  const Row<T> row{scores + r * shape.units, ids + b * shape.units,
                   staged ? reinterpret_cast<T*>(row_memory) : nullptr, shape.units};
  hard += r * shape.sets;
  soft += r * shape.sets;
  grad += r * shape.sets * shape.units;

  const Moments moments = stage(row, scratch);
  const bool empty = moments.n == 0;
  if (empty || !isfinite(moments.size) || y < 0 || y >= shape.labels) {
    const T value = empty ? T(0) : static_cast<T>(nan(""));
    for (std::int64_t g = threadIdx.x; g < shape.sets; g += blockDim.x) hard[g] = soft[g] = value;
    for (std::int64_t i = threadIdx.x; i < shape.sets * shape.units; i += blockDim.x)
      grad[i] = row.real(i % shape.units) ? value : T(0);
    return;
  }

  const double temp = temperature(sharpness, variance(row, moments, scratch), moments.size / moments.n);
  const std::int64_t chosen = moments.n < k ? static_cast<std::int64_t>(moments.n) : k;
  find(border, row, chosen);
  const double tau = moments.n > k ? 0.5 * border.last.score + 0.5 * border.next.score : border.last.score - temp;
  const Soft membership_of{tau, temp};
  const double total = total_membership(row, membership_of, scratch);

  for (std::int64_t g = 0; g < shape.sets; ++g) {
    const Golden golden{golden_bits(bitmap, shape, g, y), shape.words};
    const Sums sums = sums_of(golden, row, membership_of, border.last, total, scratch);
    if (threadIdx.x == 0) {
      hard[g] = static_cast<T>(hard_value(sums, static_cast<double>(chosen)));
      soft[g] = static_cast<T>(soft_value(sums));
    }
    put_slopes(grad + g * shape.units, golden, row, membership_of, sums);
  }
}

template <class T>
void launch(void* hard, void* soft, void* grad, const void* scores, const std::int32_t* ids,
            const std::int32_t* bitmap, const std::int64_t* label, const Shape& shape, std::int64_t k,
            double sharpness, cudaStream_t stream) {
  const auto warps = std::min<std::int64_t>((shape.units + 31) / 32, kMostThreads / 32);
  const auto threads = static_cast<unsigned>(std::max<std::int64_t>(warps, 1) * 32);
  const std::size_t bytes = static_cast<std::size_t>(shape.units) * sizeof(T);
  const bool staged = bytes <= kShared;
  scores_kernel<T><<<static_cast<unsigned>(shape.rows), threads, staged ? bytes : 0, stream>>>(
      static_cast<T*>(hard), static_cast<T*>(soft), static_cast<T*>(grad), static_cast<const T*>(scores), ids, bitmap,
      label, shape, k, sharpness, staged);
  cuda::check(cudaGetLastError(), "proximity launch");
}

}  // namespace

void scores_cuda(void* hard, void* soft, void* grad, const void* scores, const std::int32_t* ids,
                 const std::int32_t* bitmap, const std::int64_t* label, const Shape& shape, std::int64_t k,
                 double sharpness, DType dtype, const CudaPlace& place) {
  if (shape.rows == 0) return;
  const cuda::Guard guard(place);
  dispatch_32_or_64("scores", dtype, [&](auto tag) {
    launch<typename decltype(tag)::type>(hard, soft, grad, scores, ids, bitmap, label, shape, k, sharpness,
                                         cuda::stream_of(place));
  });
}

}  // namespace spurge::proximity
