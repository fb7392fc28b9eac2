#include <algorithm>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "ops/sweep/sweep_math.hpp"

namespace spurge::sweep {
namespace {

constexpr int kThreads = 256;
constexpr int kPanel = 4096;     // outputs whose edits shared memory holds at a time
constexpr int kOutOfRange = 0x7fffffff;
constexpr unsigned kAll = 0xffffffffu;

// The edit of each output from `first` on, -1 where there is none; of a row named twice the last.
__device__ void find_edits(int (&edits)[kPanel], const std::int64_t* rows, const Shape& shape, std::int64_t first) {
  __syncthreads();  // the table of the panel before has been read
  for (int j = threadIdx.x; j < kPanel && first + j < shape.outputs; j += kThreads) edits[j] = -1;
  __syncthreads();
  for (std::int64_t e = threadIdx.x; e < shape.edited; e += kThreads)
    if (rows[e] >= first && rows[e] - first < kPanel) atomicMax(&edits[rows[e] - first], static_cast<int>(e));
  __syncthreads();
}

// So many lanes of a warp, a power of two, share a sample and look at different rivals: clipping by minimum and maximum
// is the same in any order.
struct Lanes {
  int count;

  __device__ int over(int x) const {
    for (int step = count / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(kAll, x, step));
    return x;
  }
  __device__ Span over(Span span) const {
    for (int step = count / 2; step > 0; step /= 2) {
      const double low = __shfl_xor_sync(kAll, span.low, step), high = __shfl_xor_sync(kAll, span.high, step);
      span.low = low > span.low ? low : span.low;
      span.high = high < span.high ? high : span.high;
    }
    return span;
  }
};

template <class L, class D>
__global__ void interval_kernel(double* __restrict__ out, const L* __restrict__ logits, const D* __restrict__ shifts,
                                const std::int64_t* __restrict__ rows, const std::int64_t* __restrict__ labels,
                                Span range, Shape shape, Lanes lanes) {
  __shared__ int edits[kPanel];
  const int lane = threadIdx.x % lanes.count, samples = kThreads / lanes.count;  // of the block at once
  const std::int64_t step = std::int64_t(gridDim.x) * samples;
  if (shape.outputs <= kPanel) find_edits(edits, rows, shape, 0);

  for (std::int64_t some = std::int64_t(blockIdx.x) * samples; some < shape.samples; some += step) {
    const std::int64_t n = some + threadIdx.x / lanes.count;
    const bool real = n < shape.samples;  // all threads meet at the panels' barriers
    const std::int64_t label = real ? labels[n] : -1;
    int own = -1;  // the label's edit
    for (std::int64_t e = lane; e < shape.edited; e += lanes.count) {
      if (rows[e] < 0 || rows[e] >= shape.outputs) own = kOutOfRange;
      else if (rows[e] == label) own = max(own, static_cast<int>(e));
    }
    own = lanes.over(own);
    bool lost = own == kOutOfRange || label < 0 || label >= shape.outputs;
    const L* const z = logits + n * shape.outputs;
    const D* const s = shifts + n * shape.edited;
    Line mine{0.0, 0.0};
    if (!lost) mine = {static_cast<double>(z[label]), own < 0 ? 0.0 : static_cast<double>(s[own])};
    lost = lost || !usable(mine);

    Span span = range;
    for (std::int64_t first = 0; first < shape.outputs; first += kPanel) {
      if (shape.outputs > kPanel) find_edits(edits, rows, shape, first);
      const std::int64_t end = shape.outputs - first < kPanel ? shape.outputs : first + kPanel;
      for (std::int64_t j = first + lane; !lost && j < end; j += lanes.count) {
        if (j == label) continue;
        const int edit = edits[j - first];
        const Line rival{static_cast<double>(z[j]), edit < 0 ? 0.0 : static_cast<double>(s[edit])};
        if (usable(rival)) keep(span, mine, rival, label < j);
        else span = nothing();
      }
    }
    span = lanes.over(span);
    if (lane != 0 || !real) continue;
    span = lost ? nothing() : finished(span);
    out[2 * n] = span.low;
    out[2 * n + 1] = span.high;
  }
}

}  // namespace

void correct_interval_cuda(double* out, const void* logits, const void* shifts, const std::int64_t* rows,
                           const std::int64_t* labels, double low, double high, const Shape& shape,
                           DType logits_type, DType shifts_type, const CudaPlace& place) {
  if (shape.samples == 0) return;
  const cuda::Guard guard(place);
  Lanes lanes{1};
  while (lanes.count < 32 && lanes.count < shape.outputs) lanes.count *= 2;
  constexpr std::int64_t most = 4096;  // blocks: each makes its table once, and takes several shares of the samples
  const std::int64_t shares = cuda::blocks_for(shape.samples, kThreads / lanes.count);
  const auto blocks = static_cast<unsigned>(std::min(most, shares));
  dispatch_32_or_64("logits", logits_type, [&](auto logit) {
    dispatch_32_or_64("shifts", shifts_type, [&](auto shift) {
      using L = typename decltype(logit)::type;
      using D = typename decltype(shift)::type;
      interval_kernel<<<blocks, kThreads, 0, cuda::stream_of(place)>>>(
          out, static_cast<const L*>(logits), static_cast<const D*>(shifts), rows, labels, Span{low, high}, shape, lanes);
      cuda::check(cudaGetLastError(), "correct_interval launch");
    });
  });
}

}  // namespace spurge::sweep
