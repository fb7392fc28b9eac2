#include <algorithm>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "ops/median/median_math.hpp"

namespace spurge::median {
namespace {

constexpr int kColumns = 32;  // of a block: one warp reads a row's neighbours
constexpr int kWarps = 8;     // rows at once
constexpr int kBatch = 8;     // rows that a thread reads before it counts the first
constexpr int kBits = 8;      // of a key in each pass: a histogram of them for each column fits in shared memory
constexpr int kBins = 1 << kBits;
constexpr int kShare = kBins / kWarps;        // bins that a warp adds up
constexpr std::size_t kKept = 56 * 1024;      // bytes of keys in shared memory

// A value as an unsigned number of the same order, in as many bits as its type has.
template <class T>
struct Ordered {
  using U = Unsigned<Key<T>>;
  static constexpr U top = U(1) << (8 * sizeof(U) - 1);
  __device__ static U of(T v) { return static_cast<U>(key_of(v)) ^ top; }
  __device__ static T value(U key) { return value_of(static_cast<Key<T>>(key ^ top)); }
};
template <class T>
struct OrderedHalf {
  using U = std::uint16_t;
  __device__ static U of(float v) {
    T half;
    narrow(half, v + 0.0f);  // exact: no transform needs another format; -0 becomes 0
    return static_cast<U>(half.bits & 0x8000u ? ~half.bits : half.bits | 0x8000u);
  }
  __device__ static float value(U key) {
    return widen(T{static_cast<U>(key & 0x8000u ? key & 0x7fffu : ~key)});
  }
};
template <>
struct Ordered<bf16> : OrderedHalf<bf16> {};
template <>
struct Ordered<f16> : OrderedHalf<f16> {};

// Some rows of a column, and what is to be done with each before its median. `kept`, where it is not null, has room in
// shared memory for this thread's keys.
template <class T>
struct Rows {
  using U = typename Ordered<T>::U;
  const T* features;
  const std::int64_t* order;
  std::int64_t begin, end, rows, columns, m;
  Transform transform;
  int* bad;  // set to 1 where a value is NaN or a row does not exist
  U* kept;

  // Calls f with the keys of the rows w, w + kWarps, ...; reads several before the first call.
  template <class F>
  __device__ void read(const F& f) const {
    for (std::int64_t first = begin + threadIdx.y; first < end; first += kWarps * kBatch) {
      T values[kBatch];
      bool there[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const std::int64_t i = first + j * kWarps, row = i < end ? order[i] : 0;
        there[j] = i < end && row >= 0 && row < rows;
        if (there[j]) values[j] = features[row * columns + m];
        else if (i < end) atomicExch(bad, 1);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (!there[j]) continue;
        const Acc<T> v = transformed(widen(values[j]), transform);
        if (v != v) atomicExch(bad, 1);
        const U key = Ordered<T>::of(v);
        const std::int64_t i = first + j * kWarps;
        if (kept) kept[(i - begin) * kColumns + threadIdx.x] = key;
        f(key);
      }
    }
  }

  // The same again.
  template <class F>
  __device__ void again(const F& f) const {
    if (!kept) return read(f);
    if (*bad) return;  // some keys are not there, and the median is NaN
    for (std::int64_t i = begin + threadIdx.y; i < end; i += kWarps) f(kept[(i - begin) * kColumns + threadIdx.x]);
  }
};

// One block per segment and kColumns columns. A radix selection: each pass counts the keys that agree with what is
// known of the lower middle by their next bits; a last one finds the smallest key above it. Segments of up to `capacity`
// rows are read from memory once.
template <class T>
__global__ void __launch_bounds__(kColumns * kWarps)
    medians_kernel(Acc<T>* __restrict__ out, const T* __restrict__ features, const std::int64_t* __restrict__ order,
                   const std::int64_t* __restrict__ starts, Shape shape, Transform transform, std::int64_t capacity) {
  using U = typename Ordered<T>::U;
  extern __shared__ double memory[];
  __shared__ unsigned counts[kBins][kColumns], shares[kWarps][kColumns];
  __shared__ U prefix[kColumns];
  __shared__ unsigned long long rank[kColumns], not_more[kColumns];
  __shared__ U next[kWarps][kColumns];
  __shared__ int bad[kColumns];
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
    const Rows<T> rows{features, order, begin, end, shape.rows, shape.columns, m, transform, &bad[k],
                       n <= capacity ? reinterpret_cast<U*>(memory) : nullptr};

    if (possible) {
      for (int left = 8 * sizeof(U); left > 0; left -= kBits) {
        const int shift = left - kBits;
        for (int bin = w; bin < kBins; bin += kWarps) counts[bin][k] = 0;
        __syncthreads();
        const auto count = [&](U key) { atomicAdd(&counts[key >> shift & (kBins - 1)][k], 1u); };
        const U known = prefix[k];
        if (real && left == 8 * sizeof(U)) rows.read(count);
        else if (real) rows.again([&](U key) { if (key >> left == known) count(key); });
        __syncthreads();
        unsigned share = 0;
        for (int bin = w * kShare; bin < (w + 1) * kShare; ++bin) share += counts[bin][k];
        shares[w][k] = share;
        __syncthreads();
        if (w == 0) {
          unsigned long long before = 0;
          int warp = 0;
          while (warp < kWarps - 1 && before + shares[warp][k] <= rank[k]) before += shares[warp++][k];
          int bin = warp * kShare;
          while (bin < kBins - 1 && before + counts[bin][k] <= rank[k]) before += counts[bin++][k];
          rank[k] -= before;
          not_more[k] += before + (shift == 0 ? counts[bin][k] : 0);
          prefix[k] = static_cast<U>(known << kBits | bin);
        }
        __syncthreads();
      }
      U above = static_cast<U>(~U(0));
      const U low = prefix[k];
      if (real && n % 2 == 0 && not_more[k] <= static_cast<unsigned long long>(n / 2))
        rows.again([&](U key) { if (key > low && key < above) above = key; });
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
    to = middle(Ordered<T>::value(first), Ordered<T>::value(second));
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
    // How long each segment is, only the device knows: keys are kept where the segments of mean length have room.
    constexpr std::int64_t room = kKept / (kColumns * sizeof(typename Ordered<T>::U));
    const bool keep = shape.chosen <= shape.segments * room;
    if (keep)
      cuda::check(cudaFuncSetAttribute(medians_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kKept),
                  "segment_medians shared memory");
    medians_kernel<T><<<grid, dim3(kColumns, kWarps), keep ? kKept : 0, cuda::stream_of(place)>>>(
        static_cast<Acc<T>*>(out), static_cast<const T*>(features), order, starts, shape, transform, keep ? room : 0);
    cuda::check(cudaGetLastError(), "segment_medians launch");
  });
}

}  // namespace spurge::median
