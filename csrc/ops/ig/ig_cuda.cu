#include <algorithm>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "ops/ig/ig_math.hpp"
#include "spurge/ig.hpp"

namespace spurge::ig {
namespace {

constexpr int kThreads = 256;

// multiply_sum, first_order: a block is kAcross packs of columns by kTokens token lanes.
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

// The same for what first_order keeps.
template <int W, class T>
__global__ void first_order_kernel(FirstOrder<Acc<T>*> out, const T* __restrict__ p, const T* __restrict__ z,
                                   const Acc<T>* __restrict__ scale, const std::uint8_t* __restrict__ mask,
                                   std::int64_t tokens, std::int64_t width) {
  using Pack = cuda::Pack<T, W>;
  __shared__ FirstOrder<Acc<T>> lanes[kTokens][W][kAcross];
  const std::int64_t b = blockIdx.y, i = (std::int64_t(blockIdx.x) * kAcross + threadIdx.x) * W;
  FirstOrder<Acc<T>> sums[W] = {};
  if (i < width) {
#pragma unroll 2
    for (std::int64_t t = threadIdx.y; t < tokens; t += kTokens) {
      if (mask && !mask[b * tokens + t]) continue;
      const std::int64_t at = (b * tokens + t) * width + i;
      const Acc<T> s = scale[b * tokens + t];
      const Pack ps = *reinterpret_cast<const Pack*>(p + at);
      const Pack zs = *reinterpret_cast<const Pack*>(z + at);
#pragma unroll
      for (int k = 0; k < W; ++k) add(sums[k], first_order_term(widen(ps.v[k]), widen(zs.v[k]), s));
    }
  }
#pragma unroll
  for (int k = 0; k < W; ++k) lanes[threadIdx.y][k][threadIdx.x] = sums[k];
  __syncthreads();
  if (threadIdx.y != 0 || i >= width) return;
  Acc<T> total[W], size[W], reach[W];
#pragma unroll
  for (int k = 0; k < W; ++k) {
    for (int y = 1; y < kTokens; ++y) add(sums[k], lanes[y][k][threadIdx.x]);
    total[k] = sums[k].total, size[k] = sums[k].size, reach[k] = sums[k].reach;
  }
  cuda::store_sums(out.total + b * width + i, total);
  cuda::store_sums(out.size + b * width + i, size);
  cuda::store_sums(out.reach + b * width + i, reach);
}

// Calls launch(b, grid, block) for the examples from b on, as many as a grid can hold, until all are done.
template <class Launch>
void over_examples(std::int64_t examples, std::int64_t width, int pack, const Launch& launch) {
  constexpr std::int64_t most = 65535;  // blocks along y
  const dim3 block(kAcross, kTokens);
  const unsigned across = cuda::blocks_for(width, kAcross * pack);
  for (std::int64_t b = 0; b < examples; b += most)
    launch(b, dim3(across, static_cast<unsigned>(std::min(most, examples - b))), block);
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
  if (examples * width == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int W = cuda::kWidest<T>;
    const bool packed = cuda::fits_packs<T>(width, {out, p, z});
    over_examples(examples, width, packed ? W : 1, [&](std::int64_t b, dim3 grid, dim3 block) {
      const std::int64_t first = b * tokens * width;
      auto* const o = static_cast<Acc<T>*>(out) + b * width;
      const auto* const ps = static_cast<const T*>(p) + first;
      const auto* const zs = static_cast<const T*>(z) + first;
      const auto* const kept = mask ? mask + b * tokens : nullptr;
      const auto stream = cuda::stream_of(place);
      if (packed) multiply_sum_kernel<W><<<grid, block, 0, stream>>>(o, ps, zs, kept, tokens, width);
      else multiply_sum_kernel<1><<<grid, block, 0, stream>>>(o, ps, zs, kept, tokens, width);
      cuda::check(cudaGetLastError(), "multiply_sum launch");
    });
  });
}

void first_order_cuda(void* total, void* magnitude, void* reach, const void* p, const void* z, const void* scale,
                      const std::uint8_t* mask, std::int64_t examples, std::int64_t tokens, std::int64_t width,
                      DType dtype, const CudaPlace& place) {
  if (examples * width == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int W = cuda::kWidest<T>;
    const bool packed = cuda::fits_packs<T>(width, {total, magnitude, reach, p, z});
    over_examples(examples, width, packed ? W : 1, [&](std::int64_t b, dim3 grid, dim3 block) {
      const auto row = [&](void* out) { return static_cast<Acc<T>*>(out) + b * width; };
      const std::int64_t first = b * tokens * width;
      const FirstOrder<Acc<T>*> o{row(total), row(magnitude), row(reach)};
      const auto* const ps = static_cast<const T*>(p) + first;
      const auto* const zs = static_cast<const T*>(z) + first;
      const auto* const scales = static_cast<const Acc<T>*>(scale) + b * tokens;
      const auto* const kept = mask ? mask + b * tokens : nullptr;
      const auto stream = cuda::stream_of(place);
      if (packed) first_order_kernel<W><<<grid, block, 0, stream>>>(o, ps, zs, scales, kept, tokens, width);
      else first_order_kernel<1><<<grid, block, 0, stream>>>(o, ps, zs, scales, kept, tokens, width);
      cuda::check(cudaGetLastError(), "first_order launch");
    });
  });
}

}  // namespace spurge::ig
