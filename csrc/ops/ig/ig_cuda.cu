#include <algorithm>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "ops/ig/ig_math.hpp"
#include "spurge/ig.hpp"

namespace spurge::ig {
namespace {

constexpr int kThreads = 256;

// multiply_sum: a block is kAcross packs of columns by kTokens token lanes.
constexpr int kAcross = 32;
constexpr int kTokens = 8;

// out[i] (+)= sum_s weights[s] * grads[s, i]; `more` continues a sum of over Numbers::most nodes.
template <int W, class T>
__global__ void node_sum_kernel(Acc<T>* __restrict__ out, const T* __restrict__ grads,
                                cuda::Numbers<Acc<T>> weights, int nodes, std::int64_t size, bool more) {
  using Pack = cuda::Pack<T, W>;
  const std::int64_t i = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * W;
  if (i >= size) return;
  Acc<T> sums[W];
#pragma unroll
  for (int k = 0; k < W; ++k) sums[k] = more ? out[i + k] : Acc<T>(0);
#pragma unroll 4
  for (int s = 0; s < nodes; ++s) {
    const Pack g = *reinterpret_cast<const Pack*>(grads + s * size + i);
#pragma unroll
    for (int k = 0; k < W; ++k) sums[k] = add_product<Acc<T>>(sums[k], weights.v[s], widen(g.v[k]));
  }
  cuda::store_sums(out + i, sums);
}

// Lane y sums the tokens y, y + kTokens, ...; lane 0 then adds the lanes in order.
template <int W, class T>
__global__ void multiply_sum_kernel(Acc<T>* __restrict__ out, const T* __restrict__ p, const T* __restrict__ z,
                                    const std::uint8_t* __restrict__ mask, std::int64_t tokens,
                                    std::int64_t width) {
  using Pack = cuda::Pack<T, W>;
  __shared__ Acc<T> lanes[kTokens][W][kAcross];
  const std::int64_t b = blockIdx.y, i = (std::int64_t(blockIdx.x) * kAcross + threadIdx.x) * W;
  Acc<T> sums[W] = {};
  if (i < width) {
#pragma unroll 2
    for (std::int64_t t = threadIdx.y; t < tokens; t += kTokens) {
      if (mask && !mask[b * tokens + t]) continue;
      const std::int64_t at = (b * tokens + t) * width + i;
      const Pack ps = *reinterpret_cast<const Pack*>(p + at);
      const Pack zs = *reinterpret_cast<const Pack*>(z + at);
#pragma unroll
      for (int k = 0; k < W; ++k) sums[k] = add_product<Acc<T>>(sums[k], widen(ps.v[k]), widen(zs.v[k]));
    }
  }
#pragma unroll
  for (int k = 0; k < W; ++k) lanes[threadIdx.y][k][threadIdx.x] = sums[k];
  __syncthreads();
  if (threadIdx.y != 0 || i >= width) return;
#pragma unroll
  for (int k = 0; k < W; ++k)
    for (int y = 1; y < kTokens; ++y) sums[k] += lanes[y][k][threadIdx.x];
  cuda::store_sums(out + b * width + i, sums);
}

}  // namespace

void node_sum_cuda(void* out, const void* grads, const double* weights, std::int64_t nodes, std::int64_t size,
                   DType dtype, const CudaPlace& place) {
  if (size == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int W = cuda::kWidest<T>;
    const bool packed = cuda::fits_packs<T>(size, {out, grads});
    auto* const o = static_cast<Acc<T>*>(out);
    std::int64_t s = 0;
    do {  // once for no nodes, too: their sum is 0
      const int some = static_cast<int>(std::min<std::int64_t>(nodes - s, cuda::Numbers<Acc<T>>::most));
      cuda::Numbers<Acc<T>> w{};
      for (int k = 0; k < some; ++k) w.v[k] = static_cast<Acc<T>>(weights[s + k]);
      const auto* const g = static_cast<const T*>(grads) + s * size;
      const auto stream = cuda::stream_of(place);
      if (packed)
        node_sum_kernel<W><<<cuda::blocks_for(size, kThreads * W), kThreads, 0, stream>>>(o, g, w, some, size, s > 0);
      else
        node_sum_kernel<1><<<cuda::blocks_for(size, kThreads), kThreads, 0, stream>>>(o, g, w, some, size, s > 0);
      cuda::check(cudaGetLastError(), "node_sum launch");
      s += cuda::Numbers<Acc<T>>::most;
    } while (s < nodes);
  });
}

void multiply_sum_cuda(void* out, const void* p, const void* z, const std::uint8_t* mask, std::int64_t examples,
                       std::int64_t tokens, std::int64_t width, DType dtype, const CudaPlace& place) {
  constexpr std::int64_t most = 65535;  // blocks along y
  if (examples * width == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int W = cuda::kWidest<T>;
    const bool packed = cuda::fits_packs<T>(width, {out, p, z});
    for (std::int64_t b = 0; b < examples; b += most) {
      const dim3 block(kAcross, kTokens);
      const dim3 grid(cuda::blocks_for(width, kAcross * (packed ? W : 1)),
                      static_cast<unsigned>(std::min(most, examples - b)));
      const std::int64_t first = b * tokens * width;
      auto* const o = static_cast<Acc<T>*>(out) + b * width;
      const auto* const ps = static_cast<const T*>(p) + first;
      const auto* const zs = static_cast<const T*>(z) + first;
      const auto* const kept = mask ? mask + b * tokens : nullptr;
      const auto stream = cuda::stream_of(place);
      if (packed) multiply_sum_kernel<W><<<grid, block, 0, stream>>>(o, ps, zs, kept, tokens, width);
      else multiply_sum_kernel<1><<<grid, block, 0, stream>>>(o, ps, zs, kept, tokens, width);
      cuda::check(cudaGetLastError(), "multiply_sum launch");
    }
  });
}

}  // namespace spurge::ig
