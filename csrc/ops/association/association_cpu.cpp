#include <cmath>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "spurge/association.hpp"

namespace spurge::association {

void associate_cpu(const Block& block, int threads) {
  dispatch_floating(block.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* const x = static_cast<const T*>(block.features);
    const auto* const g = static_cast<const Acc<T>*>(block.gradients);
    const std::int64_t M = block.width, O = block.outputs;
    parallel_for(M, 1, threads, [&](std::int64_t begin, std::int64_t end) {
      std::vector<double> sum(static_cast<std::size_t>(O));
      for (std::int64_t m = begin; m < end; ++m)
        for (std::int64_t s = 0; s < block.segments; ++s) {
          double active = 0;
          for (std::int64_t o = 0; o < O; ++o)
            sum[o] = block.resumed && s == 0 ? block.carry[o * M + m] : 0.0;
          for (std::int64_t n = block.starts[s]; n < block.starts[s + 1]; ++n) {
            const double v = widen(x[n * M + m]);
            active += block.relu ? (v < 0 ? 0 : v) : std::fabs(v);
            for (std::int64_t o = 0; o < O; ++o) sum[o] += std::fabs(double(g[n * O + o])) * std::fabs(v);
          }
          const std::int64_t c = block.classes[s];
          block.activations[c * M + m] += block.scales[s] * active;
          for (std::int64_t o = 0; o < O; ++o) {
            if (block.unfinished && s + 1 == block.segments) {
              block.carry[o * M + m] = sum[o];
              continue;
            }
            const double G = block.scales[s] * sum[o];
            block.sums[o * M + m] += G;
            if (G != 0) block.logs[o * M + m] += G * std::log(G);
            if (block.target == -1 ? o == c : c == block.target) block.picked[o * M + m] = static_cast<float>(G);
          }
        }
    });
  });
}

}  // namespace spurge::association
