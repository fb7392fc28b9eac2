#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/gate/gate.hpp"
#include "spurge/gate.hpp"

namespace spurge::gate {

namespace {

// From here on the rows will not stay in a cache until they are read: write past it. Measured with 2 to 8
// nodes: no gain at 20 MB, twice as fast at 100 MB.
constexpr std::int64_t kPastCaches = std::int64_t(32) << 20;
constexpr std::int64_t kStoreBytes = 64;  // one such store

bool goes_past_caches(const void* out, std::int64_t nodes, std::int64_t row_bytes) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(out) % kStoreBytes == 0 && row_bytes % kStoreBytes == 0;
  return aligned && nodes * row_bytes >= kPastCaches;
}

// Above this share of a row, one vector pass over the whole row beats touching the columns singly.
constexpr std::int64_t kDenseShare = 16;

// Lanes want NaNs without a payload.
float plain(float gate) { return std::isnan(gate) ? std::numeric_limits<float>::quiet_NaN() : gate; }

void check_columns(const std::int64_t* columns, std::int64_t n, std::int64_t width) {
  std::vector<bool> seen(static_cast<std::size_t>(width), false);
  for (std::int64_t j = 0; j < n; ++j) {
    const std::int64_t c = columns[j];
    SPURGE_CHECK(c >= 0 && c < width, "columns: must lie in [0, ", width, "), got ", c);
    SPURGE_CHECK(!seen[static_cast<std::size_t>(c)], "columns: must be distinct, got ", c, " twice");
    seen[static_cast<std::size_t>(c)] = true;
  }
}

}  // namespace

void open_rows_cpu(void* out, const void* x, const void* u, const double* alphas, std::int64_t nodes,
                   std::int64_t size, DType dtype, int threads) {
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto open = SPURGE_SELECT(open_nodes<T>);
    std::vector<Acc<T>> shifts;
    for (std::int64_t s = 0; s < nodes; ++s) shifts.push_back(static_cast<Acc<T>>(alphas[s] - 1.0));
    const bool past_caches = goes_past_caches(out, nodes, size * static_cast<std::int64_t>(sizeof(T)));
    const auto body = [&](std::int64_t begin, std::int64_t end) {
      open(static_cast<T*>(out) + begin, size, static_cast<const T*>(x) + begin, static_cast<const T*>(u) + begin,
           shifts.data(), nodes, end - begin, past_caches);
    };
    parallel_for(size, kStreamedPerThread / std::max<std::int64_t>(nodes, 1), threads, body, kLaneAlign);
  });
}

void gate_columns_cpu(void* z, const std::int64_t* columns, const float* gates, std::int64_t particles,
                      std::int64_t rows, std::int64_t width, std::int64_t n, DType dtype, int threads) {
  check_columns(columns, n, width);
  const bool dense = n * kDenseShare >= width;
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto row = SPURGE_SELECT(gate_row<T>);
    const auto scattered = SPURGE_SELECT(gate_scattered<T>);
    auto* const zs = static_cast<T*>(z);
    const auto body = [=](std::int64_t begin, std::int64_t end) {
      std::vector<float> full(static_cast<std::size_t>(dense ? width : 0), 1.0f);
      for (std::int64_t r = begin, p = -1; r < end; ++r) {
        if (dense && r / rows != p) {
          p = r / rows;
          for (std::int64_t j = 0; j < n; ++j) full[static_cast<std::size_t>(columns[j])] = plain(gates[p * n + j]);
        }
        if (dense) row(zs + r * width, full.data(), width);
        else scattered(zs + r * width, columns, gates + r / rows * n, n);
      }
    };
    const std::int64_t touched = std::max<std::int64_t>(dense ? width : n, 1);
    parallel_for(particles * rows, kStreamedPerThread / touched + 1, threads, body);
  });
}

}  // namespace spurge::gate
