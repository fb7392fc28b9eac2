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
constexpr std::int64_t kColumnsOfThree = kColumns / 2;  // with three sums each

// `columns` columns from `column` on, of one example.
struct Block {
  std::int64_t example, column, columns;
};

// Calls body(block, kept) for blocks of at most `most` columns that cover all examples; kept: the tokens that count.
template <class Body>
void over_blocks(const std::uint8_t* mask, std::int64_t examples, std::int64_t tokens, std::int64_t width,
                 std::int64_t most, int threads, const Body& body) {
  const std::int64_t blocks = (width + most - 1) / most;
  const auto some = [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::int64_t> kept;
    for (std::int64_t item = begin, known = -1; item < end; ++item) {
      const std::int64_t b = item / blocks, k = item % blocks * most;
      if (b != known) {
        known = b;
        kept.clear();
        for (std::int64_t t = 0; t < tokens; ++t)
          if (!mask || mask[b * tokens + t]) kept.push_back(t);
      }
      body(Block{b, k, std::min(most, width - k)}, kept);
    }
  };
  const std::int64_t work = std::max<std::int64_t>(tokens * std::min(most, width), 1);
  parallel_for(examples * blocks, kStreamedPerThread / work + 1, threads, some);
}

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
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto sum = SPURGE_SELECT(sum_tokens<T>);
    const auto body = [=](const Block& at, const std::vector<std::int64_t>& kept) {
      const std::int64_t first = at.example * tokens * width + at.column;
      Acc<T>* const o = static_cast<Acc<T>*>(out) + at.example * width + at.column;
      std::fill(o, o + at.columns, Acc<T>(0));
      sum(o, static_cast<const T*>(p) + first, static_cast<const T*>(z) + first, width, kept.data(),
          static_cast<std::int64_t>(kept.size()), at.columns);
    };
    over_blocks(mask, examples, tokens, width, kColumns, threads, body);
  });
}

void first_order_cpu(void* total, void* magnitude, void* reach, const void* p, const void* z, const void* scale,
                     const std::uint8_t* mask, std::int64_t examples, std::int64_t tokens, std::int64_t width,
                     DType dtype, int threads) {
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto sum = SPURGE_SELECT(first_order_tokens<T>);
    const auto body = [=](const Block& at, const std::vector<std::int64_t>& kept) {
      const std::int64_t first = at.example * tokens * width + at.column;
      const auto row = [&](void* out) {
        Acc<T>* const o = static_cast<Acc<T>*>(out) + at.example * width + at.column;
        std::fill(o, o + at.columns, Acc<T>(0));
        return o;
      };
      sum({row(total), row(magnitude), row(reach)}, static_cast<const T*>(p) + first,
          static_cast<const T*>(z) + first, width, static_cast<const Acc<T>*>(scale) + at.example * tokens,
          kept.data(), static_cast<std::int64_t>(kept.size()), at.columns);
    };
    over_blocks(mask, examples, tokens, width, kColumnsOfThree, threads, body);
  });
}

}  // namespace spurge::ig
