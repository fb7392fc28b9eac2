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

int padded(std::int64_t columns) { return static_cast<int>((columns + kSide - 1) / kSide * kSide); }

// Shared memory of the Hessian and of a tile of rows, columns rounded up to whole squares.
std::size_t shared_bytes(std::int64_t columns) {
  return sizeof(double) * padded(columns) * (padded(columns) + kStride);
}

struct Vectors {
  double x[kMost], trial[kMost], direction[kMost], gradient[kMost], work[kMost], deviation[kMost], largest[kMost];
  double tile_weights[kTile];
  int kept[kMost];  // of the columns that vary
  int count, state;
};

// hessian [K, K], row stride `side`, lower squares of sum of w (y - mean) (y - mean)'; y column-major.
// Groups of threads, one thread a square, share a tile's rows; their sums are added in order of groups.
__device__ void sum_hessian(double* hessian, double* tile, Vectors& v, const double* y, const double* weights,
                            double scale, std::int64_t rows, int side) {
  __shared__ double parts[kThreads];
  const int squares = side / kSide, all = squares * (squares + 1) / 2, groups = kThreads / all;
  const int square = threadIdx.x % all, group = threadIdx.x / all;
  int down = 0;
  while ((down + 1) * (down + 2) / 2 <= square) ++down;
  const int across = square - down * (down + 1) / 2;
  double sums[kSide][kSide] = {};
  for (std::int64_t first = 0; first < rows; first += kTile) {
    __syncthreads();
    for (int at = threadIdx.x; at < side * kTile; at += kThreads) {
      const int a = at / kTile, r = at % kTile;
      const bool there = a < v.count && first + r < rows;
      tile[a * kStride + r] = there ? y[v.kept[a] * rows + first + r] - v.gradient[a] : 0.0;
      if (a == 0) v.tile_weights[r] = first + r < rows ? weights[first + r] * scale : 0.0;
    }
    __syncthreads();
    for (int r = group; group < groups && r < kTile; r += groups) {
      double left[kSide], right[kSide];
#pragma unroll
      for (int k = 0; k < kSide; ++k) {
        left[k] = tile[(down * kSide + k) * kStride + r] * v.tile_weights[r];
        right[k] = tile[(across * kSide + k) * kStride + r];
      }
#pragma unroll
      for (int a = 0; a < kSide; ++a)
#pragma unroll
        for (int b = 0; b < kSide; ++b) sums[a][b] = fma(left[a], right[b], sums[a][b]);
    }
  }
#pragma unroll
  for (int a = 0; a < kSide; ++a)
#pragma unroll
    for (int b = 0; b < kSide; ++b) {
      parts[threadIdx.x] = sums[a][b];
      __syncthreads();
      if (group == 0) {
        double sum = parts[square];
        for (int g = 1; g < groups; ++g) sum += parts[g * all + square];
        hessian[(down * kSide + a) * side + across * kSide + b] = sum;
      }
      __syncthreads();
    }
}

// direction = -(hessian + ridge)^-1 gradient, by Cholesky's factors in place of the hessian.
__device__ void solve(double* hessian, Vectors& v, int side) {
  const int count = v.count, thread = threadIdx.x;
  double trace = 0.0;
  for (int k = 0; k < count; ++k) trace += hessian[k * side + k];
  const double ridge = kRidge * trace / count + 1e-20;
  __syncthreads();
  if (thread < count) {
    hessian[thread * side + thread] += ridge;
    v.work[thread] = -v.gradient[thread];
  }
  for (int j = 0; j < count; ++j) {
    __syncthreads();
    const double pivot = hessian[j * side + j], root = sqrt(pivot < ridge ? ridge : pivot);
    __syncthreads();
    if (thread == j) hessian[j * side + j] = root;
    if (thread > j && thread < count) hessian[thread * side + j] /= root;
    __syncthreads();
    for (int at = thread; at < count * count; at += kThreads) {
      const int a = at / count, b = at % count;
      if (b > j && a >= b) hessian[a * side + b] -= hessian[a * side + j] * hessian[b * side + j];
    }
  }
  for (int j = 0; j < count; ++j) {
    __syncthreads();
    const double entry = v.work[j] / hessian[j * side + j];
    if (thread == j) v.trial[j] = entry;
    if (thread > j && thread < count) v.work[thread] -= hessian[thread * side + j] * entry;
  }
  for (int j = count - 1; j >= 0; --j) {
    __syncthreads();
    const double entry = v.trial[j] / hessian[j * side + j];
    if (thread == j) v.direction[j] = entry;
    if (thread < j) v.trial[thread] -= hessian[j * side + thread] * entry;
  }
  __syncthreads();
}

// A block is a problem.
template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_kernel(double* __restrict__ dual, double* __restrict__ means, double* __restrict__ report,
                 std::int32_t* __restrict__ status, double* __restrict__ y, const T* __restrict__ c,
                 const double* __restrict__ base, const double* __restrict__ targets,
                 const double* __restrict__ outcomes, const double* __restrict__ start, BatchShape shape,
                 Newton settings, int side) {
  extern __shared__ double hessian[];
  __shared__ Vectors v;
  double* const tile = hessian + side * side;
  const std::int64_t p = blockIdx.x, rows = shape.rows, columns = shape.columns;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  dual += p * columns;
  means += p * shape.outcomes;
  report += p * kReport;
  status += p;
  y += p * rows * (columns + 1);
  c += p * rows * columns;
  if (!shape.shared_base) base += p * rows;
  targets += p * columns;
  start += p * columns;
  double* const weights = y + rows * columns;
  const auto stop = [&](int taken, Status why) {
    give_up(dual, columns, means, shape.outcomes, report, status, taken, why);
  };

  double total = 0.0, inside = 0.0, lost = 0.0;
  for (std::int64_t i = thread; i < rows; i += kThreads) {
    if (base[i] == 0.0) continue;
    inside = 1.0;
    total += base[i];
    if (!finite(base[i])) lost = 1.0;
  }
  for (std::int64_t k = thread; k < columns; k += kThreads)
    if (!finite(targets[k]) || !finite(start[k])) lost = 1.0;
  for (std::int64_t at = thread; at < rows * columns; at += kThreads) {
    const std::int64_t i = at / columns, k = at % columns;
    const double value = base[i] != 0.0 ? double(widen(c[at])) : 0.0;
    y[k * rows + i] = value;
    if (!finite(value)) lost = 1.0;
  }
  if (block_max(lost) > 0.0) return stop(0, not_finite);
  if (block_max(inside) == 0.0) return stop(0, infeasible);
  total = block_sum(total);

  if (thread == 0) v.state = 0;
  for (int k = warp; k < columns; k += kWarps) {
    double* const column = y + k * rows;
    const double target = targets[k];
    double middle = 0.0, square = 0.0, size = 0.0, most = 0.0;
    for (std::int64_t i = lane; i < rows; i += 32) {
      size = fmax(size, fabs(column[i]));
      if (base[i] != 0.0) middle = fma(base[i] / total, column[i] - target, middle);
    }
    size = warp_max(size);
    middle = warp_sum(middle);
    for (std::int64_t i = lane; i < rows; i += 32) {
      const double apart = column[i] - target - middle;
      if (base[i] != 0.0) square = fma(base[i] / total, apart * apart, square);
    }
    const double deviation = sqrt(warp_sum(square));
    const bool varies = deviation > kConstant * size;
    for (std::int64_t i = lane; varies && i < rows; i += 32) {
      column[i] = base[i] != 0.0 ? (column[i] - target) / deviation : 0.0;
      most = fmax(most, fabs(column[i]));
    }
    most = warp_max(most);
    if (lane != 0) continue;
    const bool wrong = !varies && fabs(middle) > kEqual * fmax(size, fabs(target));
    v.work[k] = wrong ? 2.0 : varies ? 1.0 : 0.0;
    v.direction[k] = deviation;
    v.trial[k] = most;
  }
  __syncthreads();
  if (thread == 0) {
    v.count = 0;
    for (int k = 0; k < columns; ++k) {
      if (v.work[k] == 2.0) v.state = 1;
      if (v.work[k] != 1.0) continue;
      v.kept[v.count] = k;
      v.deviation[v.count] = v.direction[k];
      v.largest[v.count] = v.trial[k];
      v.x[v.count++] = start[k] * v.direction[k];
    }
  }
  __syncthreads();
  if (v.state != 0) return stop(0, infeasible);
  const int count = v.count;

  double scale = 0.0;  // weights * scale sum to 1
  const auto at = [&](double t) {
    __syncthreads();
    if (thread < count) v.trial[thread] = t == 0.0 ? v.x[thread] : fma(t, v.direction[thread], v.x[thread]);
    __syncthreads();
    double top = -HUGE_VAL, sum = 0.0;
    for (std::int64_t i = thread; i < rows; i += kThreads) {
      double z = 0.0;
      for (int a = 0; a < count; ++a) z = fma(y[v.kept[a] * rows + i], v.trial[a], z);
      weights[i] = z;
      if (base[i] != 0.0) top = fmax(top, z);
    }
    top = block_max(top);
    for (std::int64_t i = thread; i < rows; i += kThreads) {
      weights[i] = base[i] != 0.0 ? base[i] * exp(weights[i] - top) : 0.0;
      sum += weights[i];
    }
    sum = block_sum(sum);
    scale = 1.0 / sum;
    return Point{top + log(sum), top};
  };

  Point now = at(0.0);
  int taken = 0;
  double worst = 0.0;
  Status state = converged;
  while (true) {
    double reach = 0.0;
    for (int a = 0; a < count; ++a) reach = fma(v.largest[a], fabs(v.x[a]), reach);
    if (now.top < -kProof * reach) return stop(taken, infeasible);
    for (int a = warp; a < count; a += kWarps) {
      const double* const column = y + v.kept[a] * rows;
      double sum = 0.0;
      for (std::int64_t i = lane; i < rows; i += 32) sum = fma(weights[i], column[i], sum);
      sum = warp_sum(sum);
      if (lane == 0) v.gradient[a] = sum * scale;
    }
    __syncthreads();
    worst = 0.0;
    for (int a = 0; a < count; ++a) keep_worst(worst, fabs(v.gradient[a]));
    if (count == 0 || worst <= settings.tolerance) break;
    if (taken == settings.steps) {
      state = unfinished;
      break;
    }
    sum_hessian(hessian, tile, v, y, weights, scale, rows, (count + kSide - 1) / kSide * kSide);
    solve(hessian, v, (count + kSide - 1) / kSide * kSide);
    double slope = 0.0;
    for (int a = 0; a < count; ++a) slope = fma(v.gradient[a], v.direction[a], slope);
    const double t = search(now, slope, at);
    __syncthreads();
    if (thread < count) v.x[thread] = fma(t, v.direction[thread], v.x[thread]);
    __syncthreads();
    ++taken;
  }

  for (int k = thread; k < columns; k += kThreads) dual[k] = 0.0;
  __syncthreads();
  if (thread < count) dual[v.kept[thread]] = v.x[thread] / v.deviation[thread];
  for (std::int64_t o = warp; o < shape.outcomes; o += kWarps) {
    double sum = 0.0;
    for (std::int64_t i = lane; i < rows; i += 32)
      if (base[i] != 0.0) sum = fma(weights[i] * scale, outcomes[i * shape.outcomes + o], sum);
    sum = warp_sum(sum);
    if (lane == 0) means[o] = sum;
  }
  double sum = 0.0, squares = 0.0;
  for (std::int64_t i = thread; i < rows; i += kThreads) {
    const double w = weights[i] * scale;
    sum += w;
    squares = fma(w, w, squares);
  }
  sum = block_sum(sum);
  squares = block_sum(squares);
  if (thread != 0) return;
  report[0] = worst;
  report[1] = sum * sum / squares;
  report[2] = now.value;
  report[3] = taken;
  *status = state;
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
        dual, means, report, status, workspace, static_cast<const T*>(covariates), base, targets, outcomes, start,
        shape, settings, padded(shape.columns));
    cuda::check(cudaGetLastError(), "balance_batch launch");
  });
}

}  // namespace spurge::balance
