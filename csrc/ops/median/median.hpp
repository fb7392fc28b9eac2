#pragma once
// Inner loops of the CPU kernel; median_simd.cpp is compiled once per instruction set.
#include "core/isa.hpp"
#include "ops/median/median_math.hpp"

namespace spurge::median {

constexpr std::int64_t kTile = 16;  // columns: one cache line of float32

SPURGE_EACH_LEVEL(
    // out[m] = the median over i < n of transform(features[rows[i] * stride + m]), for m < columns; n > 0.
    // scratch: n keys for each column, columns rounded up to a multiple of kTile.
    template <class T> void medians(Acc<T>* out, Key<T>* scratch, const T* features, std::int64_t stride,
                                    const std::int64_t* rows, std::int64_t n, std::int64_t columns,
                                    Transform transform);)

}  // namespace spurge::median
