#include "core/check.hpp"
#include "ops/balance/balance_device.cuh"

namespace spurge::balance {
namespace {

using namespace device;

constexpr int kMost = static_cast<int>(kMostColumnsCuda);
constexpr int kTile = 32;           // rows in shared memory at once
constexpr int kStride = kTile + 1;  // of a column of them: no bank conflicts
constexpr int kSide = 4;            // a thread sums a square of the Hessian
static_assert(kMost % kSide == 0 && (kMost / kSide) * (kMost / kSide + 1) / 2 <= kThreads);

// Up to whole squares; a row of the Hessian is one longer, for no bank conflicts either.
SPURGE_HD int padded(std::int64_t columns) { return static_cast<int>((columns + kSide - 1) / kSide * kSide); }

// Shared memory of the Hessian and of a tile of rows.
std::size_t shared_bytes(std::int64_t columns) {
  return sizeof(double) * padded(columns) * (padded(columns) + 1 + kStride);
}

// Of the columns that vary, but for the deviation.
struct Vectors {
  double x[kMost], trial[kMost], direction[kMost], gradient[kMost], roots[kMost], reach[kMost];
  double deviation[kMost];  // of all columns, 0 where one is left out
  double tile_weights[kTile];
  int kept[kMost];
  int count;
};

// A thread's square of the Hessian, of those on and below the diagonal. Groups of threads share a tile's
// rows.
struct Square {
  int all, index, groups, group, down, across;
  double sums[kSide][kSide] = {};

  __device__ explicit Square(int side) {
    const int squares = side / kSide;
    all = squares * (squares + 1) / 2;
    index = threadIdx.x % all;
    groups = kThreads / all;
    group = threadIdx.x / all;
    down = 0;
    while ((down + 1) * (down + 2) / 2 <= index) ++down;
    across = index - down * (down + 1) / 2;
  }

  __device__ void add(const double* tile, const double* weights) {
    for (int r = group; group < groups && r < kTile; r += groups) {
      double left[kSide], right[kSide];
#pragma unroll
      for (int k = 0; k < kSide; ++k) {
        left[k] = tile[(down * kSide + k) * kStride + r] * weights[r];
        right[k] = tile[(across * kSide + k) * kStride + r];
      }
#pragma unroll
      for (int a = 0; a < kSide; ++a)
#pragma unroll
        for (int b = 0; b < kSide; ++b) sums[a][b] = fma(left[a], right[b], sums[a][b]);
    }
  }

  // The groups' sums, added in order, above the diagonal.
  __device__ void put(const Dense& system) const {
    __shared__ double parts[kThreads];
#pragma unroll
    for (int a = 0; a < kSide; ++a)
#pragma unroll
      for (int b = 0; b < kSide; ++b) {
        parts[threadIdx.x] = sums[a][b];
        __syncthreads();
        if (group == 0) {
          double sum = parts[index];
          for (int g = 1; g < groups; ++g) sum += parts[g * all + index];
          system.row(across * kSide + b)[down * kSide + a] = sum;
        }
        __syncthreads();
      }
  }
};

// What a block works on. y [K][N]: columns about their targets, in units of their deviations; 0 at rows
// without base.
template <class T>
struct Problem {
  double *y, *weights, *tile;
  Vectors& v;
  Dense system;
  const T* covariates;
  const double *base, *targets, *start;
  std::int64_t rows, columns;
  double total = 0, scale = 0;  // of base; weights * scale sum to 1

  __device__ std::int64_t begin() const { return 0; }
  __device__ std::int64_t end() const { return rows; }
  __device__ double* column(std::int64_t k) const { return y + k * rows; }

  // `unfinished` where there is something to solve.
  __device__ Status prepare() {
    const Status able = read();
    if (able != unfinished) return able;
    const Warp warp;
    double wrong = 0.0;
    for (std::int64_t k = warp.index; k < columns; k += Warp::count)
      if (!standardise(warp, k)) wrong = 1.0;
    if (over_block<Max>(wrong) > 0.0) return infeasible;
    if (threadIdx.x == 0) keep();
    __syncthreads();
    system.n = v.count;
    system.stride = padded(system.n) + 1;
    return unfinished;
  }

  __device__ Status read() {
    double inside = 0.0, lost = 0.0;
    for (std::int64_t i = threadIdx.x; i < rows; i += kThreads) {
      if (base[i] == 0.0) continue;
      inside = 1.0;
      total += base[i];
      if (!finite(base[i])) lost = 1.0;
    }
    for (std::int64_t k = threadIdx.x; k < columns; k += kThreads)
      if (!finite(targets[k]) || !finite(start[k])) lost = 1.0;
    for (std::int64_t at = threadIdx.x; at < rows * columns; at += kThreads) {
      const std::int64_t i = at / columns, k = at % columns;
      const double value = base[i] != 0.0 ? double(widen(covariates[at])) : 0.0;
      column(k)[i] = value;
      if (!finite(value)) lost = 1.0;
    }
    if (over_block<Max>(lost) > 0.0) return not_finite;
    if (over_block<Max>(inside) == 0.0) return infeasible;
    total = over_block<Sum>(total);
    return unfinished;
  }

  // False where column k is a constant, but not what is wanted.
  __device__ bool standardise(const Warp& warp, std::int64_t k) {
    double* const from = column(k);
    const double target = targets[k];
    double middle = 0.0, square = 0.0, size = 0.0, most = 0.0;
    for (std::int64_t i = warp.lane; i < rows; i += Warp::size) {
      size = fmax(size, fabs(from[i]));
      if (base[i] != 0.0) middle = fma(base[i] / total, from[i] - target, middle);
    }
    size = warp.max(size);
    middle = warp.sum(middle);
    for (std::int64_t i = warp.lane; i < rows; i += Warp::size) {
      const double apart = from[i] - target - middle;
      if (base[i] != 0.0) square = fma(base[i] / total, apart * apart, square);
    }
    const double deviation = sqrt(warp.sum(square));
    const bool kept = varies(deviation, size);
    for (std::int64_t i = warp.lane; kept && i < rows; i += Warp::size) {
      from[i] = base[i] != 0.0 ? (from[i] - target) / deviation : 0.0;
      most = fmax(most, fabs(from[i]));
    }
    most = warp.max(most);
    if (warp.lane == 0) {
      v.deviation[k] = kept ? deviation : 0.0;
      v.reach[k] = most;
    }
    return kept || agrees(fabs(middle), size, target);
  }

  // Lists the columns that vary.
  __device__ void keep() {
    v.count = 0;
    for (int k = 0; k < columns; ++k) {
      if (!(v.deviation[k] > 0.0)) continue;
      v.kept[v.count] = k;
      v.reach[v.count] = v.reach[k];
      v.direction[v.count] = 0.0;
      v.x[v.count++] = start[k] * v.deviation[k];
    }
  }

  __device__ Point at(double t) {
    const Block block;
    block.each(0, system.n, [&](std::int64_t k) { v.trial[k] = fma(t, v.direction[k], v.x[k]); });
    double top = -HUGE_VAL, sum = 0.0;
    for (std::int64_t i = threadIdx.x; i < rows; i += kThreads) {
      double z = 0.0;
      for (int k = 0; k < system.n; ++k) z = fma(column(v.kept[k])[i], v.trial[k], z);
      weights[i] = z;
      if (base[i] != 0.0) top = fmax(top, z);
    }
    top = block.max(top);
    for (std::int64_t i = threadIdx.x; i < rows; i += kThreads) {
      weights[i] = base[i] != 0.0 ? base[i] * exp(weights[i] - top) : 0.0;
      sum += weights[i];
    }
    sum = block.sum(sum);
    scale = 1.0 / sum;
    return {top + log(sum), top};
  }

  __device__ void move(double) {
    Block{}.each(0, system.n, [&](std::int64_t k) { v.x[k] = v.trial[k]; });
  }

  __device__ double sizes() const {
    double sum = 0.0;
    for (int k = 0; k < system.n; ++k) sum = fma(v.reach[k], fabs(v.x[k]), sum);
    return sum;
  }

  __device__ double gradient() {
    const Warp warp;
    for (std::int64_t k = warp.index; k < system.n; k += Warp::count) {
      const double* const from = column(v.kept[k]);
      double sum = 0.0;
      for (std::int64_t i = warp.lane; i < rows; i += Warp::size) sum = fma(weights[i], from[i], sum);
      sum = warp.sum(sum);
      if (warp.lane == 0) v.gradient[k] = sum * scale;
    }
    __syncthreads();
    double worst = 0.0;
    for (int k = 0; k < system.n; ++k) worst = worse(worst, fabs(v.gradient[k]));
    return worst;
  }

  __device__ double descend() {
    sum_hessian();
    if (threadIdx.x < Warp::size) solve(Warp{}, system);
    __syncthreads();
    return dot(v.gradient, v.direction, system.n);
  }

  // Squares of sum of w (y - mean) (y - mean)'.
  __device__ void sum_hessian() {
    const int side = padded(system.n);
    Square square(side);
    for (std::int64_t first = 0; first < rows; first += kTile) {
      __syncthreads();
      load_tile(first, side);
      __syncthreads();
      square.add(tile, v.tile_weights);
    }
    square.put(system);
  }

  __device__ void load_tile(std::int64_t first, int side) {
    for (int at = threadIdx.x; at < side * kTile; at += kThreads) {
      const int k = at / kTile, r = at % kTile;
      const bool there = k < system.n && first + r < rows;
      tile[k * kStride + r] = there ? column(v.kept[k])[first + r] - v.gradient[k] : 0.0;
      if (k == 0) v.tile_weights[r] = first + r < rows ? weights[first + r] * scale : 0.0;
    }
  }

  __device__ void put_dual(double* dual) const {
    const Block block;
    block.each(0, columns, [&](std::int64_t k) { dual[k] = 0.0; });
    block.each(0, system.n, [&](std::int64_t k) { dual[v.kept[k]] = v.x[k] / v.deviation[v.kept[k]]; });
  }

  __device__ void scale_weights() {
    Block{}.each(0, rows, [&](std::int64_t i) { weights[i] = base[i] != 0.0 ? weights[i] * scale : -1.0; });
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_kernel(double* __restrict__ dual, double* __restrict__ means, double* __restrict__ report,
                 std::int32_t* __restrict__ status, double* __restrict__ y, const T* __restrict__ covariates,
                 const double* __restrict__ base, const double* __restrict__ targets,
                 const double* __restrict__ outcomes, const double* __restrict__ start, BatchShape shape,
                 Newton settings) {
  extern __shared__ double hessian[];
  __shared__ Vectors v;
  const std::int64_t p = blockIdx.x, rows = shape.rows, columns = shape.columns;
  const int side = padded(columns);
  y += p * rows * (columns + 1);
  Problem<T> problem{y,
                     y + rows * columns,
                     hessian + side * (side + 1),
                     v,
                     {hessian, v.roots, v.gradient, v.direction, 0, 0},
                     covariates + p * rows * columns,
                     shape.shared_base ? base : base + p * rows,
                     targets + p * columns,
                     start + p * columns,
                     rows,
                     columns};
  const Results to{dual + p * columns, means + p * shape.outcomes, report + p * kReport, status + p, columns,
                   shape.outcomes};
  solve_into(to, problem, outcomes, settings);
}

}  // namespace

void batch_cuda(double* dual, double* means, double* report, std::int32_t* status, double* workspace,
                const void* covariates, const double* base, const double* targets, const double* outcomes,
                const double* start, const BatchShape& shape, const Newton& settings, DType dtype,
                const CudaPlace& place) {
  SPURGE_CHECK(shape.columns <= kMostColumnsCuda, "covariates: ", shape.columns, " columns, at most ",
               kMostColumnsCuda, " on the GPU");
  if (shape.problems == 0) return;
  const cuda::Guard guard(place);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::size_t bytes = shared_bytes(shape.columns);
    cuda::check(cudaFuncSetAttribute(batch_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes(kMostColumnsCuda))),
                "balance_batch shared memory");
    batch_kernel<<<static_cast<unsigned>(shape.problems), kThreads, bytes, cuda::stream_of(place)>>>(
        dual, means, report, status, workspace, static_cast<const T*>(covariates), base, targets, outcomes,
        start, shape, settings);
    cuda::check(cudaGetLastError(), "balance_batch launch");
  });
}

}  // namespace spurge::balance
