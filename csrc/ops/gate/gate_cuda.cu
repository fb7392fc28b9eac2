#include <algorithm>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "ops/gate/gate_math.hpp"
#include "spurge/gate.hpp"

namespace spurge::gate {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerThread = 4;  // of gate_columns: a gate is read once for so many rows

template <int W, class T>
__global__ void open_rows_kernel(T* __restrict__ out, const T* __restrict__ x, const T* __restrict__ u,
                                 cuda::Numbers<Acc<T>> shifts, int nodes, std::int64_t size) {
  using Pack = cuda::Pack<T, W>;
  const std::int64_t i = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * W;
  if (i >= size) return;
  const Pack xs = *reinterpret_cast<const Pack*>(x + i);
  const Pack us = *reinterpret_cast<const Pack*>(u + i);
  for (int s = 0; s < nodes; ++s) {
    Pack os;
#pragma unroll
    for (int k = 0; k < W; ++k) narrow(os.v[k], open<Acc<T>>(widen(xs.v[k]), widen(us.v[k]), shifts.v[s]));
    *reinterpret_cast<Pack*>(out + s * size + i) = os;
  }
}

// Thread x takes W chosen columns, thread y a few rows of one particle. Where the columns are neighbours
// (all of them are, when every neuron is chosen), they are read and written as one pack; where a thread has one column,
// it reads several rows before it writes them, so that they do not wait for each other.
template <int W, class T>
__global__ void gate_columns_kernel(T* __restrict__ z, const std::int64_t* __restrict__ columns,
                                    const float* __restrict__ gates, std::int64_t rows, std::int64_t width,
                                    std::int64_t n) {
  using Pack = cuda::Pack<T, W>;
  constexpr int batch = W == 1 ? kRowsPerThread : 1;
  const std::int64_t j = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * W;
  if (j >= n) return;
  std::int64_t at[W];
  float gate[W];
  cuda::load_packs(at, columns + j);
  cuda::load_packs(gate, gates + std::int64_t(blockIdx.z) * n + j);
  bool together = at[0] % W == 0;
#pragma unroll
  for (int k = 0; k < W; ++k) {
    if (at[k] < 0 || at[k] >= width) __trap();  // out of range: like torch's index kernels, stop the device
    together = together && at[k] == at[0] + k;
  }
  const std::int64_t step = gridDim.y;
  for (std::int64_t r = blockIdx.y; r < rows; r += batch * step) {
    T* const row = z + (blockIdx.z * rows + r) * width;
    if (W > 1 && together) {
      Pack zs = *reinterpret_cast<const Pack*>(row + at[0]);
#pragma unroll
      for (int k = 0; k < W; ++k) narrow(zs.v[k], gated<Acc<T>>(widen(zs.v[k]), gate[k]));
      *reinterpret_cast<Pack*>(row + at[0]) = zs;
      continue;
    }
    T values[batch][W];
#pragma unroll
    for (int i = 0; i < batch; ++i)
      for (int k = 0; k < W; ++k)
        if (r + i * step < rows) values[i][k] = row[i * step * width + at[k]];
#pragma unroll
    for (int i = 0; i < batch; ++i)
      for (int k = 0; k < W; ++k)
        if (r + i * step < rows) narrow(row[i * step * width + at[k]], gated<Acc<T>>(widen(values[i][k]), gate[k]));
  }
}

}  // namespace

void open_rows_cuda(void* out, const void* x, const void* u, const double* alphas, std::int64_t nodes,
                    std::int64_t size, DType dtype, const CudaPlace& place) {
  if (size == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* const xs = static_cast<const T*>(x);
    const auto* const us = static_cast<const T*>(u);
    constexpr int W = cuda::kWidest<T>;
    const bool packed = cuda::fits_packs<T>(size, {out, x, u});
    for (std::int64_t s = 0; s < nodes; s += cuda::Numbers<Acc<T>>::most) {
      const int some = static_cast<int>(std::min<std::int64_t>(nodes - s, cuda::Numbers<Acc<T>>::most));
      cuda::Numbers<Acc<T>> shifts{};
      for (int k = 0; k < some; ++k) shifts.v[k] = static_cast<Acc<T>>(alphas[s + k] - 1.0);
      T* const o = static_cast<T*>(out) + s * size;
      const auto stream = cuda::stream_of(place);
      if (packed)
        open_rows_kernel<W><<<cuda::blocks_for(size, kThreads * W), kThreads, 0, stream>>>(o, xs, us, shifts, some, size);
      else
        open_rows_kernel<1><<<cuda::blocks_for(size, kThreads), kThreads, 0, stream>>>(o, xs, us, shifts, some, size);
      cuda::check(cudaGetLastError(), "open_rows launch");
    }
  });
}

void gate_columns_cuda(void* z, const std::int64_t* columns, const float* gates, std::int64_t particles,
                       std::int64_t rows, std::int64_t width, std::int64_t n, DType dtype,
                       const CudaPlace& place) {
  constexpr std::int64_t most = 65535;  // blocks along y and z
  if (particles * rows * n == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int W = cuda::kWidest<T>;
    const bool packed = n == width && cuda::fits_packs<T>(width, {z, columns, gates});
    const auto stripes = static_cast<unsigned>(std::min(most, (rows + kRowsPerThread - 1) / kRowsPerThread));
    for (std::int64_t p = 0; p < particles; p += most) {
      const dim3 grid(cuda::blocks_for(n, kThreads * (packed ? W : 1)), stripes,
                      static_cast<unsigned>(std::min(most, particles - p)));
      T* const zs = static_cast<T*>(z) + p * rows * width;
      const auto stream = cuda::stream_of(place);
      if (packed)
        gate_columns_kernel<W><<<grid, kThreads, 0, stream>>>(zs, columns, gates + p * n, rows, width, n);
      else
        gate_columns_kernel<1><<<grid, kThreads, 0, stream>>>(zs, columns, gates + p * n, rows, width, n);
      cuda::check(cudaGetLastError(), "gate_columns launch");
    }
  });
}

}  // namespace spurge::gate
