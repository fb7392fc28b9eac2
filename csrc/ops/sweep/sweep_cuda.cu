#include <algorithm>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "ops/sweep/sweep_math.hpp"

namespace spurge::sweep {
namespace {

constexpr int kWarps = 8;  // one sample each
constexpr unsigned kAll = 0xffffffffu;

__device__ double shuffled(double x, int step) { return __shfl_xor_sync(kAll, x, step); }

// Lanes look at different rivals; clipping by minimum and maximum is the same in any order.
template <class L, class D>
__global__ void interval_kernel(double* __restrict__ out, const L* __restrict__ logits, const D* __restrict__ shifts,
                                const std::int64_t* __restrict__ rows, const std::int64_t* __restrict__ labels,
                                Span range, Shape shape) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (n >= shape.samples) return;
  const int lane = threadIdx.x;
  const std::int64_t label = labels[n];
  logits += n * shape.outputs;
  shifts += n * shape.edited;
  bool lost = label < 0 || label >= shape.outputs;
  Line mine{lost ? 0.0 : static_cast<double>(logits[label]), 0.0};
  for (std::int64_t e = 0; e < shape.edited; ++e) {
    lost |= rows[e] < 0 || rows[e] >= shape.outputs;
    if (rows[e] == label) mine.shift = shifts[e];
  }
  lost |= !usable(mine);

  Span span = range;
  for (std::int64_t j = lane; !lost && j < shape.outputs; j += 32) {
    if (j == label) continue;
    Line rival{static_cast<double>(logits[j]), 0.0};
    for (std::int64_t e = 0; e < shape.edited; ++e)
      if (rows[e] == j) rival.shift = shifts[e];
    if (usable(rival)) keep(span, mine, rival, label < j);
    else span = nothing();
  }
  for (int step = 16; step > 0; step /= 2) {
    const Span other{shuffled(span.low, step), shuffled(span.high, step)};
    span.low = other.low > span.low ? other.low : span.low;
    span.high = other.high < span.high ? other.high : span.high;
  }
  if (lane != 0) return;
  span = lost ? nothing() : finished(span);
  out[2 * n] = span.low;
  out[2 * n + 1] = span.high;
}

}  // namespace

void correct_interval_cuda(double* out, const void* logits, const void* shifts, const std::int64_t* rows,
                           const std::int64_t* labels, double low, double high, const Shape& shape,
                           DType logits_type, DType shifts_type, const CudaPlace& place) {
  if (shape.samples == 0) return;
  const cuda::Guard guard(place);
  dispatch_32_or_64("logits", logits_type, [&](auto logit) {
    dispatch_32_or_64("shifts", shifts_type, [&](auto shift) {
      using L = typename decltype(logit)::type;
      using D = typename decltype(shift)::type;
      interval_kernel<<<cuda::blocks_for(shape.samples, kWarps), dim3(32, kWarps), 0, cuda::stream_of(place)>>>(
          out, static_cast<const L*>(logits), static_cast<const D*>(shifts), rows, labels, Span{low, high}, shape);
      cuda::check(cudaGetLastError(), "correct_interval launch");
    });
  });
}

}  // namespace spurge::sweep
