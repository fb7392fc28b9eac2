#pragma once
#include <cmath>
#include <cstdint>

#include "core/half.hpp"

namespace spurge::association {

SPURGE_HD float logarithm(float x) { return ::logf(x); }
SPURGE_HD double logarithm(double x) { return ::log(x); }

// x log x, 0 at 0.
template <class A>
SPURGE_HD A times_logarithm(A x) {
  return x == 0 ? A(0) : x * logarithm(x);
}

// How the GPU cuts a block's samples, so that few outputs keep it busy, too.
struct Cut {
  std::int64_t step, count;  // samples of each part but the last one, and parts
};

SPURGE_HD Cut cut_samples(std::int64_t samples, std::int64_t width, std::int64_t outputs) {
  constexpr std::int64_t few = 16, busy = 512, least = 512, tile = 64;  // outputs; blocks; samples of a part; columns
  const std::int64_t blocks = (width + tile - 1) / tile;
  std::int64_t count = outputs <= few ? busy / (blocks > 0 ? blocks : 1) : 1;
  count = count < samples / least ? count : samples / least;
  if (count < 2) return {samples, 1};
  const std::int64_t step = (samples + count - 1) / count;
  return {step, (samples + step - 1) / step};
}

}  // namespace spurge::association
