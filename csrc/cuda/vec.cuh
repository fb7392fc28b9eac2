#pragma once
// Pack<T, W>: W neighbours that travel in one memory transaction, 16 bytes at most.
#include <cuda_runtime.h>

#include <cstdint>

#include "core/half.hpp"

namespace spurge::cuda {

template <class T>
constexpr int kWidest = static_cast<int>(16 / sizeof(T));

template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T v[W];
};

// The widest pack that every pointer and every row length allows: kWidest<T> or 1.
template <class T>
bool fits_packs(std::int64_t row, std::initializer_list<const void*> pointers) {
  bool fits = row % kWidest<T> == 0;
  for (const void* p : pointers) fits = fits && reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
  return fits;
}

// W neighbours, read 16 bytes at a time where there are so many; `from` is aligned to that.
template <int W, class T>
__device__ __forceinline__ void load_packs(T (&to)[W], const T* from) {
  constexpr int part = W < kWidest<T> ? W : kWidest<T>;
#pragma unroll
  for (int i = 0; i < W; i += part) {
    const auto pack = *reinterpret_cast<const Pack<T, part>*>(from + i);
#pragma unroll
    for (int k = 0; k < part; ++k) to[i + k] = pack.v[k];
  }
}

// Accumulators of a pack: float or double, stored 16 bytes at a time.
template <class A, int W>
__device__ __forceinline__ void store_sums(A* to, const A (&sums)[W]) {
  constexpr int part = W < kWidest<A> ? W : kWidest<A>;
#pragma unroll
  for (int i = 0; i < W; i += part) {
    Pack<A, part> pack;
#pragma unroll
    for (int k = 0; k < part; ++k) pack.v[k] = sums[i + k];
    *reinterpret_cast<Pack<A, part>*>(to + i) = pack;
  }
}

// Host numbers that travel as a kernel argument, so that no copy has to be queued.
template <class A>
struct Numbers {
  static constexpr int most = 64;
  A v[most];
};

}  // namespace spurge::cuda
