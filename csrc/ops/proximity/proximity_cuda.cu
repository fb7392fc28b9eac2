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

// One block per row. A unit's rank is counted against all others: no sort, no workspace. `staged` keeps
// the row in shared memory, with NaN, which precedes nothing, at padding.
template <class T>
__global__ void scores_kernel(T* __restrict__ hard, T* __restrict__ soft, T* __restrict__ grad,
                              const T* __restrict__ scores, const std::int32_t* __restrict__ ids,
                              const std::int32_t* __restrict__ bitmap, const std::int64_t* __restrict__ label,
                              Shape shape, std::int64_t k, double sharpness, bool staged) {
  extern __shared__ double row_memory[];
  __shared__ double scratch[kMostThreads / 32];
  __shared__ Unit last, next;  // the last of the top-k, and the one behind it
  T* const row = reinterpret_cast<T*>(row_memory);
  const std::int64_t r = blockIdx.x, b = r % shape.examples, y = label[b];
  const T not_a_number = static_cast<T>(nan(""));
  scores += r * shape.units;
  ids += b * shape.units;
  hard += r * shape.sets;
  soft += r * shape.sets;
  grad += r * shape.sets * shape.units;
  const auto score_at = [&](std::int64_t t) { return staged ? row[t] : ids[t] >= 0 ? scores[t] : not_a_number; };

  double n = 0, sum = 0, size = 0;
  for (std::int64_t t = threadIdx.x; t < shape.units; t += blockDim.x) {
    const bool real = ids[t] >= 0;
    if (staged) row[t] = real ? scores[t] : not_a_number;
    if (!real) continue;
    n += 1;
    sum += scores[t];
    size += fabs(static_cast<double>(scores[t]));
  }
  n = block_sum(n, scratch);
  sum = block_sum(sum, scratch);
  size = block_sum(size, scratch);
  const bool empty = n == 0;
  if (empty || !isfinite(size) || y < 0 || y >= shape.labels) {
    const T value = empty ? T(0) : not_a_number;
    for (std::int64_t g = threadIdx.x; g < shape.sets; g += blockDim.x) hard[g] = soft[g] = value;
    for (std::int64_t i = threadIdx.x; i < shape.sets * shape.units; i += blockDim.x)
      grad[i] = ids[i % shape.units] >= 0 ? value : T(0);
    return;
  }

  const double mean = sum / n;
  double variance = 0;
  for (std::int64_t t = threadIdx.x; t < shape.units; t += blockDim.x) {
    if (ids[t] < 0) continue;
    const double d = score_at(t) - mean;
    variance += d * d;
  }
  variance = block_sum(variance, scratch) / n;
  const double temp = temperature(sharpness, variance, size / n);

  const std::int64_t chosen = n < k ? static_cast<std::int64_t>(n) : k;
  for (std::int64_t t = threadIdx.x; t < shape.units; t += blockDim.x) {
    if (ids[t] < 0) continue;
    const Unit unit{static_cast<double>(score_at(t)), t};
    std::int64_t rank = 0;
    for (std::int64_t u = 0; u < shape.units; ++u) rank += precedes({static_cast<double>(score_at(u)), u}, unit);
    if (rank == chosen - 1) last = unit;
    if (rank == chosen) next = unit;
  }
  __syncthreads();
  const double tau = n > k ? 0.5 * last.score + 0.5 * next.score : last.score - temp;

  double total = 0;
  for (std::int64_t t = threadIdx.x; t < shape.units; t += blockDim.x)
    if (ids[t] >= 0) total += membership(score_at(t), tau, temp);
  total = block_sum(total, scratch);

  for (std::int64_t g = 0; g < shape.sets; ++g) {
    const std::int32_t* const bits = golden_bits(bitmap, shape, g, y);
    Sums sums;
    for (std::int64_t t = threadIdx.x; t < shape.units; t += blockDim.x) {
      if (ids[t] < 0 || !member(bits, shape.words, ids[t])) continue;
      const Unit unit{static_cast<double>(score_at(t)), t};
      const double m = membership(unit.score, tau, temp);
      sums.inside += m;
      sums.mass += m * unit.score;
      if (precedes(last, unit)) continue;
      sums.hits += 1;
      sums.hit_scores += unit.score;
    }
    sums.all = total;
    sums.inside = block_sum(sums.inside, scratch);
    sums.mass = block_sum(sums.mass, scratch);
    sums.hits = block_sum(sums.hits, scratch);
    sums.hit_scores = block_sum(sums.hit_scores, scratch);
    if (threadIdx.x == 0) {
      hard[g] = static_cast<T>(hard_value(sums, static_cast<double>(chosen)));
      soft[g] = static_cast<T>(soft_value(sums));
    }
    const Slope slope = slope_of(sums);
    for (std::int64_t t = threadIdx.x; t < shape.units; t += blockDim.x) {
      const double a = score_at(t), m = membership(a, tau, temp);
      const bool real = ids[t] >= 0, in_set = real && member(bits, shape.words, ids[t]);
      grad[g * shape.units + t] =
          real ? static_cast<T>(soft_slope(slope, a, m, membership_slope(m, temp), in_set)) : T(0);
    }
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
  const auto stream = cuda::stream_of(place);
  if (dtype == DType::f64)
    launch<double>(hard, soft, grad, scores, ids, bitmap, label, shape, k, sharpness, stream);
  else if (dtype == DType::f32)
    launch<float>(hard, soft, grad, scores, ids, bitmap, label, shape, k, sharpness, stream);
  else
    fail("scores: dtype must be float32 or float64, got ", name(dtype));
}

}  // namespace spurge::proximity
