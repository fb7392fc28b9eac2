#include <algorithm>
#include <limits>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/median/median.hpp"

namespace spurge::median {

namespace {

constexpr std::int64_t kLongest = 1 << 27;     // a tile's keys are counted in 32 bits
constexpr std::int64_t kTogether = 2 * kTile;  // columns read at once: fewer pages to look up

void check_rows(const std::int64_t* order, const std::int64_t* starts, const Shape& shape) {
  for (std::int64_t i = 0; i < shape.chosen; ++i)
    SPURGE_CHECK(order[i] >= 0 && order[i] < shape.rows, "order: must lie in [0, ", shape.rows, "), got ", order[i]);
  for (std::int64_t s = 0; s <= shape.segments; ++s)
    SPURGE_CHECK(starts[s] >= (s ? starts[s - 1] : 0) && starts[s] <= shape.chosen,
                 "starts: must ascend within [0, ", shape.chosen, "], got ", starts[s], " at ", s);
}

}  // namespace

void segment_medians_cpu(void* out, const void* features, const std::int64_t* order, const std::int64_t* starts,
                         const Shape& shape, Transform transform, DType dtype, int threads) {
  check_rows(order, starts, shape);
  std::int64_t longest = 0;
  for (std::int64_t s = 0; s < shape.segments; ++s) longest = std::max(longest, starts[s + 1] - starts[s]);
  SPURGE_CHECK(longest < kLongest, "starts: segments must have fewer than ", kLongest, " rows, got ", longest);
  const std::int64_t groups = (shape.columns + kTogether - 1) / kTogether;
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto find = SPURGE_SELECT(medians<T>);
    const auto* const x = static_cast<const T*>(features);
    auto* const o = static_cast<Acc<T>*>(out);
    const auto body = [&](std::int64_t begin, std::int64_t end) {
      std::vector<Key<T>> scratch(static_cast<std::size_t>(longest * kTogether));
      for (std::int64_t group = begin; group < end; ++group) {
        const std::int64_t m = group * kTogether, some = std::min(kTogether, shape.columns - m);
        for (std::int64_t s = 0; s < shape.segments; ++s) {
          Acc<T>* const to = o + s * shape.columns + m;
          const std::int64_t n = starts[s + 1] - starts[s];
          if (n == 0) std::fill(to, to + some, std::numeric_limits<Acc<T>>::quiet_NaN());
          else find(to, scratch.data(), x + m, shape.columns, order + starts[s], n, some, transform);
        }
      }
    };
    parallel_for(groups, kElementsPerThread / (kTogether * (shape.chosen + shape.segments) + 1) + 1, threads, body);
  });
}

}  // namespace spurge::median
