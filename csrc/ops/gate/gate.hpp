#pragma once
// Inner loops of the CPU kernels; gate_simd.cpp is compiled once per instruction set.
#include <cstdint>

#include "core/half.hpp"
#include "core/isa.hpp"

namespace spurge::gate {

SPURGE_EACH_LEVEL(
    template <class T> void open_nodes(T* out, std::int64_t stride, const T* x, const T* u, const Acc<T>* shifts,
                                       std::int64_t nodes, std::int64_t n, bool past_caches);
    template <class T> void gate_row(T* z, const float* gates, std::int64_t n);
    template <class T> void gate_scattered(T* z, const std::int64_t* columns, const float* gates, std::int64_t n);)

}  // namespace spurge::gate
