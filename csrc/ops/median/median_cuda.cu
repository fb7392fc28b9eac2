#include <algorithm>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "ops/median/median_math.hpp"

namespace spurge::median {
namespace {

constexpr int kColumns = 32;  // of a block: one warp reads a row's neighbours
constexpr int kWarps = 8;     // rows at once
constexpr int kBits = 7;      // of a key in each pass: a histogram of them for each column fits in shared memory
constexpr int kBins = 1 << kBits;

// One block per segment and kColumns columns. A radix selection: each pass counts the keys that agree with what is
// known of the lower middle by their next bits; a last one finds the smallest key above it.
template <class T>
__global__ void medians_kernel(Acc<T>* __restrict__ out, const T* __restrict__ features,
                               const std::int64_t* __restrict__ order, const std::int64_t* __restrict__ starts,
                               Shape shape, Transform transform) {
  using K = Key<T>;
  using U = Unsigned<K>;
  constexpr U top = U(1) << (8 * sizeof(U) - 1);  // turns the order of signed keys into that of unsigned ones
  __shared__ unsigned counts[kBins][kColumns];
  __shared__ U prefix[kColumns];
  __shared__ unsigned long long rank[kColumns], not_more[kColumns];
  __shared__ U next[kWarps][kColumns];
  __shared__ int bad[kColumns];  // NaN, or rows that do not exist
  const int k = threadIdx.x, w = threadIdx.y;
  const std::int64_t m = std::int64_t(blockIdx.x) * kColumns + k;
  const bool real = m < shape.columns;

  for (std::int64_t s = blockIdx.y; s < shape.segments; s += gridDim.y) {
    const std::int64_t begin = starts[s], end = starts[s + 1], n = end - begin;
    const bool possible = begin >= 0 && end <= shape.chosen && n > 0;
    // No barrier before, nor behind: after a segment's last one only warp 0 touches these, and all others wait for it
    // at the first one of the next, behind which they read them.
    if (w == 0) {
      prefix[k] = 0;
      rank[k] = possible ? (n - 1) / 2 : 0;
      not_more[k] = 0;
      bad[k] = !possible;
    }
    const auto key_at = [&](std::int64_t i) {
      const std::int64_t row = order[i];
      if (row < 0 || row >= shape.rows) {
        atomicExch(&bad[k], 1);
        return U(0);
      }
      const Acc<T> v = transformed(widen(features[row * shape.columns + m]), transform);
      if (v != v) atomicExch(&bad[k], 1);
      return static_cast<U>(key_of(v)) ^ top;
    };

    if (possible) {
      for (int left = 8 * sizeof(U); left > 0;) {
        const int bits = left < kBits ? left : kBits, shift = left - bits;
        for (int bin = w; bin < kBins; bin += kWarps) counts[bin][k] = 0;
        __syncthreads();
        if (real)
          for (std::int64_t i = begin + w; i < end; i += kWarps) {
            const U key = key_at(i);
            if (left == 8 * sizeof(U) || key >> left == prefix[k])
              atomicAdd(&counts[key >> shift & ((U(1) << bits) - 1)][k], 1u);
          }
        __syncthreads();
        if (w == 0) {
          unsigned long long before = 0;
          int bin = 0;
          while (bin < kBins - 1 && before + counts[bin][k] <= rank[k]) before += counts[bin++][k];
          rank[k] -= before;
          not_more[k] += before + (shift == 0 ? counts[bin][k] : 0);
          prefix[k] = prefix[k] << bits | static_cast<U>(bin);
        }
        __syncthreads();
        left = shift;
      }
      U above = ~U(0);
      if (real && n % 2 == 0 && not_more[k] <= static_cast<unsigned long long>(n / 2))
        for (std::int64_t i = begin + w; i < end; i += kWarps) {
          const U key = key_at(i);
          if (key > prefix[k] && key < above) above = key;
        }
      next[w][k] = above;
    }
    __syncthreads();
    if (w != 0 || !real) continue;
    Acc<T>& to = out[s * shape.columns + m];
    if (bad[k]) {
      to = static_cast<Acc<T>>(nan(""));
      continue;
    }
    const U first = prefix[k];
    U second = first;
    if (n % 2 == 0 && not_more[k] <= static_cast<unsigned long long>(n / 2)) {
      second = next[0][k];
      for (int other = 1; other < kWarps; ++other) second = next[other][k] < second ? next[other][k] : second;
    }
    to = middle(value_of(static_cast<K>(first ^ top)), value_of(static_cast<K>(second ^ top)));
  }
}

}  // namespace

void segment_medians_cuda(void* out, const void* features, const std::int64_t* order, const std::int64_t* starts,
                          const Shape& shape, Transform transform, DType dtype, const CudaPlace& place) {
  constexpr std::int64_t most = 65535;  // blocks along y
  if (shape.segments * shape.columns == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(cuda::blocks_for(shape.columns, kColumns),
                    static_cast<unsigned>(std::min(shape.segments, most)));
    medians_kernel<T><<<grid, dim3(kColumns, kWarps), 0, cuda::stream_of(place)>>>(
        static_cast<Acc<T>*>(out), static_cast<const T*>(features), order, starts, shape, transform);
    cuda::check(cudaGetLastError(), "segment_medians launch");
  });
}

}  // namespace spurge::median
