#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "ops/association/association_math.hpp"
#include "spurge/association.hpp"

namespace spurge::association {
namespace {

constexpr int kAcross = 16;             // threads along the columns, and along the rows
constexpr int kThreads = kAcross * kAcross;
constexpr int kEach = 4;                // columns of a thread, kAcross apart
constexpr int kColumns = kAcross * kEach;
constexpr int kSamples = 16;            // samples in shared memory at a time
constexpr int kPiece = 256;             // samples that float32 adds up, a multiple of kSamples
constexpr int kFolds = 64;              // classes that float32 adds up

template <class A>
__device__ __forceinline__ A magnitude(A x) {
  return x < 0 ? -x : x;
}

// A block has kAcross * R rows by kColumns columns and walks through all samples of all segments. The blocks of the
// first rows add up the activations too, each thread those that it loads.
template <int R, class T>
__global__ void __launch_bounds__(kThreads) associate_kernel(Block block) {
  using A = Acc<T>;
  constexpr int rows = kAcross * R, lanes = kThreads / kColumns;
  __shared__ A g[kSamples][rows];
  __shared__ A x[kSamples][kColumns];
  __shared__ double shares[lanes][kColumns];
  const auto* const features = static_cast<const T*>(block.features);
  const auto* const gradients = static_cast<const A*>(block.gradients);
  const int t = threadIdx.x, tx = t % kAcross, ty = t / kAcross, lane = t / kColumns;
  const std::int64_t row = std::int64_t(blockIdx.y) * rows, column = std::int64_t(blockIdx.x) * kColumns;
  const std::int64_t loaded = column + t % kColumns;  // the column that this thread loads
  A sums[R][kEach] = {}, logs[R][kEach] = {};
  int folds = 0;

  const auto each = [&](auto&& f) {  // f(i, j, index of the edge) of this thread's edges
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const std::int64_t o = row + ty + i * kAcross, m = column + tx + j * kAcross;
        if (o < block.outputs && m < block.width) f(i, j, o * block.width + m);
      }
  };
  const auto flush = [&] {
    each([&](int i, int j, std::int64_t at) {
      block.sums[at] += static_cast<double>(sums[i][j]);
      block.logs[at] += static_cast<double>(logs[i][j]);
      sums[i][j] = logs[i][j] = A(0);
    });
    folds = 0;
  };

  for (std::int64_t s = 0; s < block.segments; ++s) {
    const std::int64_t label = block.classes[s];
    if (label < 0 || label >= block.labels) continue;
    const std::int64_t begin = min(max(block.starts[s], std::int64_t(0)), block.samples);
    const std::int64_t end = min(max(block.starts[s + 1], begin), block.samples);
    const double scale = block.scales[s];
    const bool from_before = block.resumed && s == 0, goes_on = block.unfinished && s + 1 == block.segments;
    const bool whole = !from_before && !goes_on && end - begin <= kPiece;
    A acc[R][kEach] = {}, active = 0;
    double part[R][kEach] = {}, share = 0;
    if (from_before) each([&](int i, int j, std::int64_t at) { part[i][j] = block.carry[at]; });

    int since = 0;  // samples in acc
    for (std::int64_t n = begin; n < end; n += kSamples) {
#pragma unroll
      for (int k = lane; k < kSamples; k += lanes) {
        const bool inside = n + k < end && loaded < block.width;
        const A value = inside ? widen(features[(n + k) * block.width + loaded]) : A(0);
        x[k][t % kColumns] = magnitude(value);
        active += block.relu ? (value < 0 ? A(0) : value) : magnitude(value);
      }
#pragma unroll
      for (int i = t; i < kSamples * rows; i += kThreads) {
        const std::int64_t at = n + i / rows, o = row + i % rows;
        g[i / rows][i % rows] = at < end && o < block.outputs ? magnitude(gradients[at * block.outputs + o]) : A(0);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSamples; ++k) {
        A left[R], right[kEach];
#pragma unroll
        for (int i = 0; i < R; ++i) left[i] = g[k][ty + i * kAcross];
#pragma unroll
        for (int j = 0; j < kEach; ++j) right[j] = x[k][tx + j * kAcross];
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
          for (int j = 0; j < kEach; ++j) acc[i][j] = fma(left[i], right[j], acc[i][j]);
      }
      __syncthreads();
      since += kSamples;
      if (whole || (since < kPiece && n + kSamples < end)) continue;
      since = 0;
      share += static_cast<double>(active);
      active = 0;
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) part[i][j] += static_cast<double>(acc[i][j]), acc[i][j] = A(0);
    }

    if (blockIdx.y == 0) {
      shares[lane][t % kColumns] = share + static_cast<double>(active);
      __syncthreads();
      if (lane == 0 && loaded < block.width) {
        double total = 0;
        for (int k = 0; k < lanes; ++k) total += shares[k][t];
        block.activations[label * block.width + loaded] += scale * total;
      }
      __syncthreads();  // shares are read before they are written again
    }
    if (goes_on) {
      each([&](int i, int j, std::int64_t at) { block.carry[at] = part[i][j]; });
      continue;
    }
    each([&](int i, int j, std::int64_t at) {
      const A G = whole ? static_cast<A>(scale) * acc[i][j] : static_cast<A>(scale * part[i][j]);
      sums[i][j] += G;
      logs[i][j] += times_logarithm(G);
      const bool picked = block.target < 0 ? at / block.width == label : block.target == label;
      if (picked) block.picked[at] = static_cast<float>(G);
    });
    if (++folds == kFolds) flush();
  }
  flush();
}

template <int R, class T>
void launch(const Block& block, const CudaPlace& place) {
  const dim3 grid(cuda::blocks_for(block.width, kColumns), max(cuda::blocks_for(block.outputs, kAcross * R), 1u));
  associate_kernel<R, T><<<grid, kThreads, 0, cuda::stream_of(place)>>>(block);
  cuda::check(cudaGetLastError(), "associate launch");
}

}  // namespace

void associate_cuda(const Block& block, const CudaPlace& place) {
  if (block.segments == 0 || block.width == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(block.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int most = sizeof(Acc<T>) == 8 ? 2 : 4;  // rows of a thread that fit its registers
    if (block.outputs <= kAcross) launch<1, T>(block, place);
    else launch<most, T>(block, place);
  });
}

}  // namespace spurge::association
