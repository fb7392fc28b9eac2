#include <algorithm>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/ig/ig.hpp"
#include "spurge/ig.hpp"

namespace spurge::ig {

namespace {

// Columns of one pass over the tokens: their sums stay in the first cache.
constexpr std::int64_t kColumns = 2048;

}  // namespace

void node_sum_cpu(void* out, const void* grads, const double* weights, std::int64_t nodes, std::int64_t size,
                  DType dtype, int threads) {
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto sum = SPURGE_SELECT(sum_nodes<T>);
    const std::vector<Acc<T>> w(weights, weights + nodes);
    auto* const o = static_cast<Acc<T>*>(out);
    const auto* const g = static_cast<const T*>(grads);
    const auto body = [&](std::int64_t begin, std::int64_t end) {
      sum(o + begin, g + begin, size, w.data(), nodes, end - begin);
    };
    parallel_for(size, kStreamedPerThread / std::max<std::int64_t>(nodes, 1), threads, body, kLaneAlign);
  });
}

void multiply_sum_cpu(void* out, const void* p, const void* z, const std::uint8_t* mask, std::int64_t examples,
                      std::int64_t tokens, std::int64_t width, DType dtype, int threads) {
  const std::int64_t blocks = (width + kColumns - 1) / kColumns;
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto sum = SPURGE_SELECT(sum_tokens<T>);
    const auto body = [=](std::int64_t begin, std::int64_t end) {
      std::vector<std::int64_t> kept;
      for (std::int64_t item = begin, known = -1; item < end; ++item) {
        const std::int64_t b = item / blocks, k = item % blocks * kColumns, n = std::min(kColumns, width - k);
        if (b != known) {
          known = b;
          kept.clear();
          for (std::int64_t t = 0; t < tokens; ++t)
            if (!mask || mask[b * tokens + t]) kept.push_back(t);
        }
        Acc<T>* const o = static_cast<Acc<T>*>(out) + b * width + k;
        const std::int64_t first = b * tokens * width + k;
        std::fill(o, o + n, Acc<T>(0));
        sum(o, static_cast<const T*>(p) + first, static_cast<const T*>(z) + first, width, kept.data(),
            static_cast<std::int64_t>(kept.size()), n);
      }
    };
    const std::int64_t work = std::max<std::int64_t>(tokens * std::min(kColumns, width), 1);
    parallel_for(examples * blocks, kStreamedPerThread / work + 1, threads, body);
  });
}

}  // namespace spurge::ig
