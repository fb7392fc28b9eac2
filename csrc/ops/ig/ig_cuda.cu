#include <algorithm>
#include <type_traits>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "ops/ig/ig_math.hpp"
#include "spurge/ig.hpp"

namespace spurge::ig {
namespace {

constexpr int kThreads = 256;

constexpr unsigned kAll = 0xffffffffu;

// multiply_sum, first_order: a block is a few packs of columns, 128 bytes of a row, by many token lanes, so that a single
// example of some thousand neurons fills a GPU. The lanes decide the order of the sums, so their number depends on the
// type and the alignment alone, not on how many examples there are.
template <int W>
constexpr int kAcross = W == 1 ? 32 : 8;
template <int W>
constexpr int kTokens = kThreads / kAcross<W>;
constexpr int kWarps = kThreads / 32;

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

template <class A>
__device__ __forceinline__ void add(A& sum, A more) {
  sum += more;
}
template <class A>
__device__ __forceinline__ A from_lane(A x, int step) {
  return __shfl_xor_sync(kAll, x, step);
}
template <class A>
__device__ __forceinline__ FirstOrder<A> from_lane(const FirstOrder<A>& x, int step) {
  return {from_lane(x.total, step), from_lane(x.size, step), from_lane(x.reach, step)};
}

// Adds up what the token lanes of each column have: those of a warp, then the warps in order. Thread t < kAcross * W
// gets the block's column t.
template <int W, class Sums>
__device__ __forceinline__ Sums over_lanes(Sums (&sums)[W]) {
  __shared__ Sums warps[kWarps][kAcross<W> * W];
  const int t = threadIdx.y * kAcross<W> + threadIdx.x;
#pragma unroll
  for (int step = kAcross<W>; step < 32; step *= 2)
#pragma unroll
    for (int k = 0; k < W; ++k) add(sums[k], from_lane(sums[k], step));
  if (t % 32 < kAcross<W>)
#pragma unroll
    for (int k = 0; k < W; ++k) warps[t / 32][threadIdx.x * W + k] = sums[k];
  __syncthreads();
  Sums all{};
  if (t >= kAcross<W> * W) return all;
  all = warps[0][t];
  for (int warp = 1; warp < kWarps; ++warp) add(all, warps[warp][t]);
  return all;
}

// Calls add(k, p, z, index of the token) for the tokens y, y + kTokens, ... of example b that the mask keeps; several are
// read before the first is added.
template <int W, int batch, class T, class Add>
__device__ __forceinline__ void each_token(const T* p, const T* z, const std::uint8_t* mask, std::int64_t b,
                                           std::int64_t i, std::int64_t tokens, std::int64_t width, const Add& add) {
  using Pack = cuda::Pack<T, W>;
  for (std::int64_t first = threadIdx.y; first < tokens; first += batch * kTokens<W>) {
    Pack ps[batch], zs[batch];
    bool kept[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const std::int64_t t = first + j * kTokens<W>;
      kept[j] = t < tokens && (!mask || mask[b * tokens + t]);
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (!kept[j]) continue;
      const std::int64_t at = (b * tokens + first + j * kTokens<W>) * width + i;
      ps[j] = *reinterpret_cast<const Pack*>(p + at);
      zs[j] = *reinterpret_cast<const Pack*>(z + at);
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (!kept[j]) continue;
#pragma unroll
      for (int k = 0; k < W; ++k) add(k, widen(ps[j].v[k]), widen(zs[j].v[k]), b * tokens + first + j * kTokens<W>);
    }
  }
}

template <int W, class T>
__global__ void __launch_bounds__(kThreads) multiply_sum_kernel(Acc<T>* __restrict__ out, const T* __restrict__ p,
                                                                const T* __restrict__ z,
                                                                const std::uint8_t* __restrict__ mask,
                                                                std::int64_t tokens, std::int64_t width) {
  const std::int64_t b = blockIdx.y, column = std::int64_t(blockIdx.x) * kAcross<W> * W, i = column + threadIdx.x * W;
  Acc<T> sums[W] = {};
  if (i < width)
    each_token<W, 4>(p, z, mask, b, i, tokens, width, [&](int k, Acc<T> p_at, Acc<T> z_at, std::int64_t) {
      sums[k] = add_product<Acc<T>>(sums[k], p_at, z_at);
    });
  const Acc<T> all = over_lanes<W>(sums);
  const int t = threadIdx.y * kAcross<W> + threadIdx.x;
  if (t < kAcross<W> * W && column + t < width) out[b * width + column + t] = all;
}

// The same for what first_order keeps.
template <int W, class T>
__global__ void __launch_bounds__(kThreads, 3)  // without the 3 nvcc spills for sm_120
    first_order_kernel(FirstOrder<Acc<T>*> out, const T* __restrict__ p, const T* __restrict__ z,
                       const Acc<T>* __restrict__ scale, const std::uint8_t* __restrict__ mask, std::int64_t tokens,
                       std::int64_t width) {
  const std::int64_t b = blockIdx.y, column = std::int64_t(blockIdx.x) * kAcross<W> * W, i = column + threadIdx.x * W;
  FirstOrder<Acc<T>> sums[W] = {};
  if (i < width)
    each_token<W, 2>(p, z, mask, b, i, tokens, width, [&](int k, Acc<T> p_at, Acc<T> z_at, std::int64_t token) {
      add(sums[k], first_order_term(p_at, z_at, scale[token]));
    });
  const FirstOrder<Acc<T>> all = over_lanes<W>(sums);
  const int t = threadIdx.y * kAcross<W> + threadIdx.x;
  if (t >= kAcross<W> * W || column + t >= width) return;
  const std::int64_t at = b * width + column + t;
  out.total[at] = all.total;
  out.size[at] = all.size;
  out.reach[at] = all.reach;
}

// Calls launch(pack, b, grid, block) for the examples from b on, as many as a grid can hold, until all are done; pack is
// how many columns p and z can be read at a time.
template <class T, class Launch>
void over_examples(std::int64_t examples, std::int64_t width, const void* p, const void* z, const Launch& launch) {
  constexpr std::int64_t most = 65535;  // blocks along y
  const auto each = [&](auto pack) {
    constexpr int W = decltype(pack)::value;
    const unsigned across = cuda::blocks_for(width, kAcross<W> * W);
    for (std::int64_t b = 0; b < examples; b += most)
      launch(pack, b, dim3(across, static_cast<unsigned>(std::min(most, examples - b))), dim3(kAcross<W>, kTokens<W>));
  };
  if (cuda::fits_packs<T>(width, {p, z})) each(std::integral_constant<int, cuda::kWidest<T>>{});
  else each(std::integral_constant<int, 1>{});
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
    over_examples<T>(examples, width, p, z, [&](auto pack, std::int64_t b, dim3 grid, dim3 block) {
      constexpr int W = decltype(pack)::value;
      const std::int64_t first = b * tokens * width;
      multiply_sum_kernel<W><<<grid, block, 0, cuda::stream_of(place)>>>(
          static_cast<Acc<T>*>(out) + b * width, static_cast<const T*>(p) + first, static_cast<const T*>(z) + first,
          mask ? mask + b * tokens : nullptr, tokens, width);
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
    over_examples<T>(examples, width, p, z, [&](auto pack, std::int64_t b, dim3 grid, dim3 block) {
      constexpr int W = decltype(pack)::value;
      const auto row = [&](void* out) { return static_cast<Acc<T>*>(out) + b * width; };
      const FirstOrder<Acc<T>*> out{row(total), row(magnitude), row(reach)};
      const std::int64_t first = b * tokens * width;
      first_order_kernel<W><<<grid, block, 0, cuda::stream_of(place)>>>(
          out, static_cast<const T*>(p) + first, static_cast<const T*>(z) + first,
          static_cast<const Acc<T>*>(scale) + b * tokens, mask ? mask + b * tokens : nullptr, tokens, width);
      cuda::check(cudaGetLastError(), "first_order launch");
    });
  });
}

}  // namespace spurge::ig
