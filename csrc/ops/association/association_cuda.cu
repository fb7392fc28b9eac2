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

// Blocks that a multiprocessor should hold, 0 for no bound: without one nvcc takes 254 registers for sm_100, and spills for
// sm_86 and sm_89 where it need not; with one, for others.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kResident = 2;
#else
constexpr int kResident = 0;
#endif
template <int R, class A, bool cuts>
constexpr int kBlocks = sizeof(A) == 8 ? 0 : R == 1 ? (cuts ? 2 : 3) : kResident;

template <class A>
__device__ __forceinline__ A magnitude(A x) {
  return x < 0 ? -x : x;
}

// What a thread works on: R rows by kEach columns of edges, kAcross apart, and the column of features that it loads.
template <int R>
struct Thread {
  static constexpr int rows = kAcross * R;           // of the block
  static constexpr int lanes = kThreads / kColumns;  // threads that load the same column
  int t = threadIdx.x, tx = t % kAcross, ty = t / kAcross;
  int lane = t / kColumns, own = t % kColumns;
  std::int64_t row = std::int64_t(blockIdx.y) * rows, column = std::int64_t(blockIdx.x) * kColumns;
  std::int64_t loaded = column + own;

  template <class F>
  __device__ __forceinline__ void each(const Block& block, F&& f) const {  // f(i, j, index of the edge)
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const std::int64_t o = row + ty + i * kAcross, m = column + tx + j * kAcross;
        if (o < block.outputs && m < block.width) f(i, j, o * block.width + m);
      }
  }
};

// A few samples in shared memory: magnitudes of the block's rows of gradients and columns of features.
template <int R, class A>
struct Stage {
  A g[kSamples][Thread<R>::rows];
  A x[kSamples][kColumns];
};

// What the parts of the samples come to, where there are several: for each part the sums and logs of the classes that lie
// in it wholly, and bare sums of one that began before it (head) and of one that begins in it and goes on (tail).
struct Room {
  std::int64_t edges, width;
  double *sums, *logs, *heads, *tails, *head_activations, *tail_activations;

  __device__ __forceinline__ Room(const Block& block, const Cut& cut)
      : edges(block.outputs * block.width),
        width(block.width),
        sums(block.workspace),
        logs(sums + cut.count * edges),
        heads(logs + cut.count * edges),
        tails(heads + cut.count * edges),
        head_activations(tails + cut.count * edges),
        tail_activations(head_activations + cut.count * width) {}
};

// The samples of a class that the call has, and how they go together with other calls'.
struct Segment {
  std::int64_t label, begin, end;
  double scale;
  bool from_before, goes_on;

  __device__ __forceinline__ Segment(const Block& block, std::int64_t s)
      : label(block.classes[s]),
        begin(block.starts[s]),
        end(block.starts[s + 1]),
        scale(block.scales[s]),
        from_before(block.resumed && s == 0),
        goes_on(block.unfinished && s + 1 == block.segments) {}
  __device__ __forceinline__ bool possible(const Block& block, std::int64_t s) const {
    const bool joined = (s > 0 || begin == 0) && (s + 1 < block.segments || end == block.samples);
    return joined && begin >= 0 && begin <= end && end <= block.samples && label >= 0 && label < block.labels;
  }
  // The part that it begins in, and whether another part or call has a share in it.
  __device__ __forceinline__ std::int64_t first_part(const Cut& cut) const {
    const std::int64_t part = begin / cut.step;
    return part < cut.count ? part : cut.count - 1;
  }
  __device__ __forceinline__ bool is_cut(const Cut& cut) const {
    return from_before || goes_on || end > (first_part(cut) + 1) * cut.step;
  }
};

// The samples from n on; adds this thread's to `active`.
template <class T, int R>
__device__ __forceinline__ void load_features(Stage<R, Acc<T>>& stage, Acc<T>& active, const Block& block,
                                              const Thread<R>& me, std::int64_t n, std::int64_t end) {
  using A = Acc<T>;
  const auto* const features = static_cast<const T*>(block.features);
#pragma unroll
  for (int k = me.lane; k < kSamples; k += Thread<R>::lanes) {
    const bool inside = n + k < end && me.loaded < block.width;
    const A value = inside ? widen(features[(n + k) * block.width + me.loaded]) : A(0);
    stage.x[k][me.own] = magnitude(value);
    active += block.relu ? (value < 0 ? A(0) : value) : magnitude(value);
  }
}

template <int R, class A>
__device__ __forceinline__ void load_gradients(Stage<R, A>& stage, const Block& block, const Thread<R>& me,
                                               std::int64_t n, std::int64_t end) {
  constexpr int rows = Thread<R>::rows;
  const auto* const gradients = static_cast<const A*>(block.gradients);
#pragma unroll
  for (int i = me.t; i < kSamples * rows; i += kThreads) {
    const std::int64_t at = n + i / rows, o = me.row + i % rows;
    const bool inside = at < end && o < block.outputs;
    stage.g[i / rows][i % rows] = inside ? magnitude(gradients[at * block.outputs + o]) : A(0);
  }
}

// acc += g^T x of the stage
template <int R, class A>
__device__ __forceinline__ void add_products(A (&acc)[R][kEach], const Stage<R, A>& stage, const Thread<R>& me) {
#pragma unroll
  for (int k = 0; k < kSamples; ++k) {
    A left[R], right[kEach];
#pragma unroll
    for (int i = 0; i < R; ++i) left[i] = stage.g[k][me.ty + i * kAcross];
#pragma unroll
    for (int j = 0; j < kEach; ++j) right[j] = stage.x[k][me.tx + j * kAcross];
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) acc[i][j] = fma(left[i], right[j], acc[i][j]);
  }
}

// Moves what float32 has added up to float64.
template <int R, class A>
__device__ __forceinline__ void move_up(double (&part)[R][kEach], A (&acc)[R][kEach]) {
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) part[i][j] += static_cast<double>(acc[i][j]), acc[i][j] = A(0);
}

// The activations of the block's columns, of which each lane has a share: put(total) takes them.
template <int R, class Put>
__device__ __forceinline__ void add_activations(const Block& block, double (*shares)[kColumns], const Thread<R>& me,
                                                double share, const Put& put) {
  shares[me.lane][me.own] = share;
  __syncthreads();
  if (me.lane == 0 && me.loaded < block.width) {
    double total = 0;
    for (int k = 0; k < Thread<R>::lanes; ++k) total += shares[k][me.own];
    put(total);
  }
  __syncthreads();  // shares are read before they are written again
}

// Sums and logs of a thread's edges over some classes, on their way to memory.
template <int R, class A>
struct Folded {
  A sums[R][kEach] = {}, logs[R][kEach] = {};
  int classes = 0;

  __device__ __forceinline__ void add(int i, int j, A gradient) {
    sums[i][j] += gradient;
    logs[i][j] += times_logarithm(gradient);
  }
  __device__ __forceinline__ void flush(const Block& block, const Thread<R>& me, double* all_sums, double* all_logs) {
    me.each(block, [&](int i, int j, std::int64_t at) {
      all_sums[at] += static_cast<double>(sums[i][j]);
      all_logs[at] += static_cast<double>(logs[i][j]);
      sums[i][j] = logs[i][j] = A(0);
    });
    classes = 0;
  }
};

// What borders that do not ascend from 0 to N, or classes out of range, give: the host can't look without waiting.
template <int R>
__device__ __forceinline__ void refuse(const Block& block, const Thread<R>& me) {
  me.each(block, [&](int, int, std::int64_t at) {
    block.sums[at] = block.logs[at] = block.picked[at] = nan("");
    if (block.unfinished) block.carry[at] = nan("");
  });
  if (blockIdx.y != 0 || me.lane != 0 || me.loaded >= block.width) return;
  for (std::int64_t c = 0; c < block.labels; ++c) block.activations[c * block.width + me.loaded] = nan("");
}

__device__ __forceinline__ bool is_picked(const Block& block, std::int64_t at, std::int64_t label) {
  return block.target < 0 ? at / block.width == label : block.target == label;
}

// A block has kAcross * R rows by kColumns columns and walks through the samples of its part. The blocks of the first rows
// add up the activations too, each thread those that it loads.
template <int R, class T, bool cuts>
__global__ void __launch_bounds__(kThreads, kBlocks<R, Acc<T>, cuts>) associate_kernel(Block block, Cut cut) {
  using A = Acc<T>;
  __shared__ Stage<R, A> stage;
  __shared__ double shares[Thread<R>::lanes][kColumns];
  const Thread<R> me;
  Folded<R, A> folded;
  const std::int64_t part_begin = cuts ? blockIdx.z * cut.step : 0;
  const std::int64_t part_end = cuts && part_begin + cut.step < block.samples ? part_begin + cut.step : block.samples;
  double *sums = block.sums, *logs = block.logs;
  if (cuts) {
    const Room room(block, cut);
    sums = room.sums + blockIdx.z * room.edges;
    logs = room.logs + blockIdx.z * room.edges;
    me.each(block, [&](int, int, std::int64_t at) { sums[at] = logs[at] = 0.0; });
  }

  for (std::int64_t s = 0; s < block.segments; ++s) {
    const Segment segment(block, s);
    if (!segment.possible(block, s)) {
      if (!cuts) refuse(block, me);
      return;  // of several parts, combine_kernel refuses
    }
    const bool here = !cuts || segment.first_part(cut) == blockIdx.z, head = segment.from_before || !here;
    if (!here && (segment.begin >= part_end || segment.end <= part_begin)) continue;
    const bool alone = cuts ? !segment.is_cut(cut) : !segment.from_before && !segment.goes_on;
    const bool apart = cuts && !alone;  // another kernel puts it together
    const bool whole = alone && segment.end - segment.begin <= kPiece;
    const std::int64_t end = cuts && part_end < segment.end ? part_end : segment.end;
    A acc[R][kEach] = {}, active = 0;
    double part[R][kEach] = {}, share = 0;
    if (segment.from_before && !apart)
      me.each(block, [&](int i, int j, std::int64_t at) { part[i][j] = block.carry[at]; });

    int since = 0;  // samples in acc
    for (std::int64_t n = here ? segment.begin : part_begin; n < end; n += kSamples) {
      load_features<T>(stage, active, block, me, n, end);
      load_gradients(stage, block, me, n, end);
      __syncthreads();
      add_products(acc, stage, me);
      __syncthreads();
      since += kSamples;
      if (whole || (since < kPiece && n + kSamples < end)) continue;
      since = 0;
      share += static_cast<double>(active);
      active = 0;
      move_up(part, acc);
    }

    if (blockIdx.y == 0)
      add_activations(block, shares, me, share + static_cast<double>(active), [&](double total) {
        if (apart) {
          const Room room(block, cut);
          (head ? room.head_activations : room.tail_activations)[blockIdx.z * block.width + me.loaded] = total;
        } else {
          block.activations[segment.label * block.width + me.loaded] += segment.scale * total;
        }
      });
    if (apart || segment.goes_on) {
      double* to = block.carry;
      if (apart) {
        const Room room(block, cut);
        to = (head ? room.heads : room.tails) + blockIdx.z * room.edges;
      }
      me.each(block, [&](int i, int j, std::int64_t at) { to[at] = part[i][j]; });
      continue;
    }
    me.each(block, [&](int i, int j, std::int64_t at) {
      const double scale = segment.scale;
      const A gradient = whole ? static_cast<A>(scale) * acc[i][j] : static_cast<A>(scale * part[i][j]);
      folded.add(i, j, gradient);
      if (is_picked(block, at, segment.label)) block.picked[at] = static_cast<float>(gradient);
    });
    if (++folded.classes == kFolds) folded.flush(block, me, sums, logs);
  }
  folded.flush(block, me, sums, logs);
}

// Puts the parts together, in their order: a thread for each edge and, behind those, for each column of the activations.
template <class A>
__global__ void combine_kernel(Block block, Cut cut) {
  const Room room(block, cut);
  const std::int64_t at = std::int64_t(blockIdx.x) * kThreads + threadIdx.x, m = at - room.edges;
  if (m >= room.width) return;
  const bool edge = m < 0;
  const std::int64_t stride = edge ? room.edges : room.width, own = edge ? at : m;
  const double* const heads = edge ? room.heads : room.head_activations;
  const double* const tails = edge ? room.tails : room.tail_activations;
  double sums = 0.0, logs = 0.0;
  for (std::int64_t part = 0; edge && part < cut.count; ++part) {
    sums += room.sums[part * stride + at];
    logs += room.logs[part * stride + at];
  }
  bool lost = false;
  for (std::int64_t s = 0; !lost && s < block.segments; ++s) {
    const Segment segment(block, s);
    lost = !segment.possible(block, s);
    if (lost || !segment.is_cut(cut)) continue;
    std::int64_t part = segment.first_part(cut);
    double total = (segment.from_before ? heads : tails)[part * stride + own];
    while (++part < cut.count && part * cut.step < segment.end) total += heads[part * stride + own];
    if (!edge) {
      block.activations[segment.label * room.width + m] += segment.scale * total;
      continue;
    }
    if (segment.from_before) total += block.carry[at];
    if (segment.goes_on) {
      block.carry[at] = total;
      continue;
    }
    const A gradient = static_cast<A>(segment.scale * total);
    sums += static_cast<double>(gradient);
    logs += static_cast<double>(times_logarithm(gradient));
    if (is_picked(block, at, segment.label)) block.picked[at] = static_cast<float>(gradient);
  }
  if (edge) {
    block.sums[at] = lost ? nan("") : block.sums[at] + sums;
    block.logs[at] = lost ? nan("") : block.logs[at] + logs;
    if (lost) block.picked[at] = nan("");
    if (lost && block.unfinished) block.carry[at] = nan("");
  } else if (lost) {
    for (std::int64_t c = 0; c < block.labels; ++c) block.activations[c * room.width + m] = nan("");
  }
}

template <int R, class T>
void launch(const Block& block, const CudaPlace& place) {
  const dim3 grid(cuda::blocks_for(block.width, kColumns), max(cuda::blocks_for(block.outputs, kAcross * R), 1u));
  const Cut cut{block.samples, 1};
  associate_kernel<R, T, false><<<grid, kThreads, 0, cuda::stream_of(place)>>>(block, cut);
  cuda::check(cudaGetLastError(), "associate launch");
}

template <class T>
void launch_parts(const Block& block, const Cut& cut, const CudaPlace& place) {
  using A = Acc<T>;
  const dim3 grid(cuda::blocks_for(block.width, kColumns), 1, static_cast<unsigned>(cut.count));
  associate_kernel<1, T, true><<<grid, kThreads, 0, cuda::stream_of(place)>>>(block, cut);
  cuda::check(cudaGetLastError(), "associate launch");
  const unsigned blocks = cuda::blocks_for((block.outputs + 1) * block.width, kThreads);
  combine_kernel<A><<<blocks, kThreads, 0, cuda::stream_of(place)>>>(block, cut);
  cuda::check(cudaGetLastError(), "associate launch");
}

}  // namespace

void associate_cuda(const Block& block, const CudaPlace& place) {
  if (block.segments == 0 || block.width == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(block.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int most = sizeof(Acc<T>) == 8 ? 2 : 4;  // rows of a thread that fit its registers
    const Cut cut = cut_samples(block.samples, block.width, block.outputs);
    if (cut.count > 1) launch_parts<T>(block, cut, place);
    else if (block.outputs <= kAcross) launch<1, T>(block, place);
    else launch<most, T>(block, place);
  });
}

}  // namespace spurge::association
