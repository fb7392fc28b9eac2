#include <algorithm>

#include "core/dtype.hpp"
#include "cuda/launch.cuh"
#include "ops/proximity/proximity_math.hpp"

namespace spurge::proximity {
namespace {

constexpr int kMostThreads = 256;
constexpr std::size_t kShared = 40 * 1024;  // a longer row is read from global memory again and again

// The sum over the block, for every thread, in an order that depends on the block's size only.
__device__ double block_sum(double x, double* scratch) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
  return sum;
}

// The units of a row. `staged`, where it is not null, keeps the scores in shared memory, with NaN, which precedes
// nothing, at padding.
template <class T>
struct Row {
  const T* scores;
  const std::int32_t* ids;
  T* staged;
  std::int64_t units;

  __device__ bool real(std::int64_t t) const { return ids[t] >= 0; }
  __device__ T score(std::int64_t t) const { return staged ? staged[t] : given(t); }
  __device__ T given(std::int64_t t) const { return real(t) ? scores[t] : static_cast<T>(nan("")); }
  __device__ Unit unit(std::int64_t t) const { return {static_cast<double>(score(t)), t}; }

  template <class F>
  __device__ void each(F f) const {  // f(t) of this thread's units
    for (std::int64_t t = threadIdx.x; t < units; t += blockDim.x) f(t);
  }
  template <class F>
  __device__ void each_real(F f) const {
    each([&](std::int64_t t) {
      if (real(t)) f(t);
    });
  }
};

// Of the real units.
struct Moments {
  double n = 0, sum = 0, size = 0;  // how many, of scores, of their magnitudes
};

template <class T>
__device__ Moments stage(const Row<T>& row, double* scratch) {
  Moments m;
  row.each([&](std::int64_t t) {
    const T score = row.given(t);
    if (row.staged) row.staged[t] = score;
    if (!row.real(t)) return;
    m.n += 1;
    m.sum += score;
    m.size += fabs(static_cast<double>(score));
  });
  return {block_sum(m.n, scratch), block_sum(m.sum, scratch), block_sum(m.size, scratch)};
}

template <class T>
__device__ double variance(const Row<T>& row, const Moments& m, double* scratch) {
  const double mean = m.sum / m.n;
  double squares = 0;
  row.each_real([&](std::int64_t t) {
    const double d = row.score(t) - mean;
    squares += d * d;
  });
  return block_sum(squares, scratch) / m.n;
}

// A unit's rank is counted against all others: no sort, no workspace.
template <class T>
__device__ void find(Border& border, const Row<T>& row, std::int64_t chosen) {
  row.each_real([&](std::int64_t t) {
    const Unit unit = row.unit(t);
    std::int64_t rank = 0;
    for (std::int64_t u = 0; u < row.units; ++u) rank += precedes(row.unit(u), unit);
    if (rank == chosen - 1) border.last = unit;
    if (rank == chosen) border.next = unit;
  });
  __syncthreads();
}

// What a row is asked.
struct Question {
  const std::int32_t *ids, *bitmap;
  const std::int64_t* label;
  Shape shape;
  std::int64_t k;
  double sharpness;

  __device__ std::int64_t example() const { return blockIdx.x % shape.examples; }
  __device__ const std::int32_t* own_ids() const { return ids + example() * shape.units; }
};

// A row that can be scored, as every thread knows it: one block for each.
template <class T>
struct Known {
  const Row<T>& row;
  const Question& asked;
  double* scratch;
  std::int64_t chosen = 0;
  bool empty = false, more = false;
  Sigmoid of;
  Unit last{};
  double total = 0;

  // False if there is no unit, a score is NaN or infinite, or the label is out of range.
  __device__ bool read(Border& border) {
    const Moments moments = stage(row, scratch);
    const std::int64_t label = asked.label[asked.example()];
    empty = moments.n == 0;
    if (empty || !isfinite(moments.size) || label < 0 || label >= asked.shape.labels) return false;
    const double spread = variance(row, moments, scratch);
    of = sigmoid(asked.sharpness, moments.n, moments.sum / moments.n, spread, moments.size / moments.n);
    more = moments.n > asked.k;
    chosen = more ? asked.k : static_cast<std::int64_t>(moments.n);
    find(border, row, chosen);
    last = border.last;
    of.tau = more ? 0.5 * last.score + 0.5 * border.next.score : last.score - of.t;
    row.each_real([&](std::int64_t t) { total += membership(row.score(t), of); });
    total = block_sum(total, scratch);
    return true;
  }

  __device__ const std::int32_t* bits(std::int64_t set) const {
    return golden_bits(asked.bitmap, asked.shape, set, asked.label[asked.example()]);
  }
  __device__ bool best(const Unit& unit) const { return !precedes(last, unit); }

  __device__ Sums sums(const std::int32_t* bits) const {
    Sums sums;
    row.each_real([&](std::int64_t t) {
      if (!member(bits, asked.shape.words, row.ids[t])) return;
      const Unit unit = row.unit(t);
      const double m = membership(unit.score, of);
      sums.inside += m;
      sums.mass += m * unit.score;
      if (!best(unit)) return;
      sums.hits += 1;
      sums.hit_scores += unit.score;
    });
    sums.all = total;
    sums.inside = block_sum(sums.inside, scratch);
    sums.mass = block_sum(sums.mass, scratch);
    sums.hits = block_sum(sums.hits, scratch);
    sums.hit_scores = block_sum(sums.hit_scores, scratch);
    return sums;
  }

  // By the score of t through its own membership, for one set.
  __device__ double turn(std::int64_t t, const std::int32_t* bits, const Pull& pull) const {
    const double a = row.score(t), m = membership(a, of);
    const double inside = member(bits, asked.shape.words, row.ids[t]) ? pull.inside + pull.per_score * a : 0.0;
    return through_membership(inside + pull.all, m, of.t);
  }
};

template <class T>
__global__ void scores_kernel(T* __restrict__ hard, T* __restrict__ soft, const T* __restrict__ scores,
                              Question asked, bool staged) {
  extern __shared__ double row_memory[];
  __shared__ double scratch[kMostThreads / 32];
  __shared__ Border border;
  const std::int64_t r = blockIdx.x, sets = asked.shape.sets;
  const Row<T> row{scores + r * asked.shape.units, asked.own_ids(),
                   staged ? reinterpret_cast<T*>(row_memory) : nullptr, asked.shape.units};
  hard += r * sets;
  soft += r * sets;

  Known<T> known{row, asked, scratch};
  if (!known.read(border)) {
    const T value = known.empty ? T(0) : static_cast<T>(nan(""));
    for (std::int64_t g = threadIdx.x; g < sets; g += blockDim.x) hard[g] = soft[g] = value;
    return;
  }
  for (std::int64_t g = 0; g < sets; ++g) {
    const Sums sums = known.sums(known.bits(g));
    if (threadIdx.x != 0) continue;
    hard[g] = static_cast<T>(hard_value(sums, static_cast<double>(known.chosen)));
    soft[g] = static_cast<T>(soft_value(sums));
  }
}

// Adds what the derivatives by one set's hard and soft give to the scores; the first set writes.
template <class T>
__device__ void add_set(T* grad, const Known<T>& known, std::int64_t set, double by_hard, double by_soft,
                        const Border& border) {
  const std::int32_t* const bits = known.bits(set);
  const Pull pull = pull_of(known.sums(bits), by_hard, by_soft);
  double sum = 0, stretched = 0;
  known.row.each_real([&](std::int64_t t) {
    const double turn = known.turn(t, bits, pull);
    sum += turn;
    stretched += turn * ((known.row.score(t) - known.of.tau) / known.of.t);
  });
  sum = block_sum(sum, known.scratch);
  stretched = block_sum(stretched, known.scratch);
  const Rest rest = rest_of(sum, stretched, known.more);
  known.row.each_real([&](std::int64_t t) {
    const Unit unit = known.row.unit(t);
    double whole = known.turn(t, bits, pull) + rest.temperature * known.of.temperature_slope(unit.score);
    if (member(bits, known.asked.shape.words, known.row.ids[t]))
      whole += pull.per_score * membership(unit.score, known.of) + (known.best(unit) ? pull.hit : 0.0);
    if (t == border.last.index) whole += rest.last;
    if (known.more && t == border.next.index) whole += rest.next;
    grad[t] = static_cast<T>(set == 0 ? whole : static_cast<double>(grad[t]) + whole);
  });
}

template <class T>
__global__ void gradient_kernel(T* __restrict__ grad, const T* __restrict__ by_hard, const T* __restrict__ by_soft,
                                const T* __restrict__ scores, Question asked, bool staged) {
  extern __shared__ double row_memory[];
  __shared__ double scratch[kMostThreads / 32];
  __shared__ Border border;
  const std::int64_t r = blockIdx.x, sets = asked.shape.sets;
  const Row<T> row{scores + r * asked.shape.units, asked.own_ids(),
                   staged ? reinterpret_cast<T*>(row_memory) : nullptr, asked.shape.units};
  grad += r * asked.shape.units;

  Known<T> known{row, asked, scratch};
  const bool readable = known.read(border);
  row.each([&](std::int64_t t) {
    if (!readable || sets == 0 || !row.real(t)) grad[t] = readable || !row.real(t) ? T(0) : static_cast<T>(nan(""));
  });
  if (!readable) return;
  for (std::int64_t g = 0; g < sets; ++g)
    add_set(grad, known, g, by_hard[r * sets + g], by_soft[r * sets + g], border);
}

// How a row of so many units is given to a block.
struct Block {
  unsigned threads;
  std::size_t bytes;  // of shared memory that keep its scores
  bool staged;
};

template <class T>
Block block_for(std::int64_t units) {
  const auto warps = std::min<std::int64_t>((units + 31) / 32, kMostThreads / 32);
  const auto threads = static_cast<unsigned>(std::max<std::int64_t>(warps, 1) * 32);
  const std::size_t bytes = static_cast<std::size_t>(units) * sizeof(T);
  const bool staged = bytes <= kShared;
  return {threads, staged ? bytes : 0, staged};
}

}  // namespace

void scores_cuda(void* hard, void* soft, const void* scores, const std::int32_t* ids, const std::int32_t* bitmap,
                 const std::int64_t* label, const Shape& shape, std::int64_t k, double sharpness, DType dtype,
                 const CudaPlace& place) {
  if (shape.rows == 0) return;
  const cuda::Guard guard(place);
  const Question asked{ids, bitmap, label, shape, k, sharpness};
  dispatch_32_or_64("scores", dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Block block = block_for<T>(shape.units);
    scores_kernel<T><<<static_cast<unsigned>(shape.rows), block.threads, block.bytes, cuda::stream_of(place)>>>(
        static_cast<T*>(hard), static_cast<T*>(soft), static_cast<const T*>(scores), asked, block.staged);
    cuda::check(cudaGetLastError(), "proximity launch");
  });
}

void gradient_cuda(void* grad, const void* by_hard, const void* by_soft, const void* scores, const std::int32_t* ids,
                   const std::int32_t* bitmap, const std::int64_t* label, const Shape& shape, std::int64_t k,
                   double sharpness, DType dtype, const CudaPlace& place) {
  if (shape.rows == 0) return;
  const cuda::Guard guard(place);
  const Question asked{ids, bitmap, label, shape, k, sharpness};
  dispatch_32_or_64("scores", dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Block block = block_for<T>(shape.units);
    gradient_kernel<T><<<static_cast<unsigned>(shape.rows), block.threads, block.bytes, cuda::stream_of(place)>>>(
        static_cast<T*>(grad), static_cast<const T*>(by_hard), static_cast<const T*>(by_soft),
        static_cast<const T*>(scores), asked, block.staged);
    cuda::check(cudaGetLastError(), "proximity gradient launch");
  });
}

}  // namespace spurge::proximity
