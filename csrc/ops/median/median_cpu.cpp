#include <algorithm>
#include <limits>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/median/median_math.hpp"

namespace spurge::median {

void segment_medians_cpu(void* out, const void* features, const std::int64_t* order, const std::int64_t* starts,
                         const Shape& shape, Transform transform, DType dtype, int threads) {
  for (std::int64_t i = 0; i < shape.chosen; ++i)
    SPURGE_CHECK(order[i] >= 0 && order[i] < shape.rows, "order: must lie in [0, ", shape.rows, "), got ", order[i]);
  for (std::int64_t s = 0; s <= shape.segments; ++s)
    SPURGE_CHECK(starts[s] >= (s ? starts[s - 1] : 0) && starts[s] <= shape.chosen,
                 "starts: must ascend within [0, ", shape.chosen, "], got ", starts[s], " at ", s);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto* const x = static_cast<const T*>(features);
    auto* const o = static_cast<A*>(out);
    parallel_for(shape.columns, 16, threads, [&](std::int64_t begin, std::int64_t end) {
      std::vector<A> column;
      for (std::int64_t m = begin; m < end; ++m)
        for (std::int64_t s = 0; s < shape.segments; ++s) {
          column.clear();
          bool nan = false;
          for (std::int64_t i = starts[s]; i < starts[s + 1]; ++i) {
            column.push_back(transformed<A>(widen(x[order[i] * shape.columns + m]), transform));
            nan |= column.back() != column.back();
          }
          A& to = o[s * shape.columns + m];
          if (nan || column.empty()) {
            to = std::numeric_limits<A>::quiet_NaN();
            continue;
          }
          const auto half = column.begin() + static_cast<std::ptrdiff_t>(column.size() / 2);
          std::nth_element(column.begin(), half, column.end());
          to = column.size() % 2 ? *half : middle(*std::max_element(column.begin(), half), *half);
        }
    });
  });
}

}  // namespace spurge::median
