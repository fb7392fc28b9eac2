#pragma once
// Inner loops of the CPU kernels; ig_simd.cpp is compiled once per instruction set.
#include <cstdint>

#include "core/half.hpp"
#include "core/isa.hpp"
#include "ops/ig/ig_math.hpp"

namespace spurge::ig {

// Rows of first_order's results, from some column on.
template <class T>
using FirstOrderRows = FirstOrder<Acc<T>*>;

SPURGE_EACH_LEVEL(
    template <class T> void sum_nodes(Acc<T>* out, const T* grads, std::int64_t stride, const Acc<T>* weights,
                                      std::int64_t nodes, std::int64_t n);
    template <class T> void sum_tokens(Acc<T>* out, const T* p, const T* z, std::int64_t stride,
                                       const std::int64_t* tokens, std::int64_t count, std::int64_t n);
    template <class T> void first_order_tokens(const FirstOrderRows<T>& out, const T* p, const T* z,
                                               std::int64_t stride, const Acc<T>* scale,
                                               const std::int64_t* tokens, std::int64_t count, std::int64_t n);)

}  // namespace spurge::ig
