#include "core/simd.hpp"
#include "ops/gate/gate.hpp"
#include "ops/gate/gate_math.hpp"

namespace spurge::gate::SPURGE_LEVEL {

using spurge::SPURGE_LEVEL::finish;
using spurge::SPURGE_LEVEL::Lanes;
using spurge::SPURGE_LEVEL::One;

// out[s * stride + i] = x[i] + shifts[s] * u[i]
template <class V, bool PastCaches, class T>
SPURGE_HD void open_at(T* out, std::int64_t stride, const T* x, const T* u, const Acc<T>* shifts, std::int64_t nodes) {
  const V xs = V::load(x), us = V::load(u);
  for (std::int64_t s = 0; s < nodes; ++s) {
    const V opened = open(xs, us, V(shifts[s]));
    if (PastCaches) opened.store_past_caches(out + s * stride);
    else opened.store(out + s * stride);
  }
}

template <bool PastCaches, class T>
SPURGE_HD void open_all(T* __restrict out, std::int64_t stride, const T* __restrict x, const T* __restrict u,
                        const Acc<T>* __restrict shifts, std::int64_t nodes, std::int64_t n) {
  using V = Lanes<T>;
  std::int64_t i = 0;
  for (; i + V::n <= n; i += V::n) open_at<V, PastCaches>(out + i, stride, x + i, u + i, shifts, nodes);
  for (; i < n; ++i) open_at<One<T>, false>(out + i, stride, x + i, u + i, shifts, nodes);
  if (PastCaches) finish();
}

template <class T>
void open_nodes(T* out, std::int64_t stride, const T* x, const T* u, const Acc<T>* shifts, std::int64_t nodes,
                std::int64_t n, bool past_caches) {
  if (past_caches) open_all<true>(out, stride, x, u, shifts, nodes, n);
  else open_all<false>(out, stride, x, u, shifts, nodes, n);
}

// z[i] *= gates[i]
template <class V, class T>
SPURGE_HD void gate_at(T* z, const float* gates) {
  gated(V::load(z), V::load(gates)).store(z);
}

template <class T>
void gate_row(T* __restrict z, const float* __restrict gates, std::int64_t n) {
  using V = Lanes<T>;
  std::int64_t i = 0;
  for (; i + V::n <= n; i += V::n) gate_at<V>(z + i, gates + i);
  for (; i < n; ++i) gate_at<One<T>>(z + i, gates + i);
}

// z[columns[j]] *= gates[j]
template <class T>
void gate_scattered(T* __restrict z, const std::int64_t* __restrict columns, const float* __restrict gates,
                    std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) gate_at<One<T>>(z + columns[j], gates + j);
}

#define SPURGE_INSTANTIATE(T)                                                                             \
  template void open_nodes<T>(T*, std::int64_t, const T*, const T*, const Acc<T>*, std::int64_t, std::int64_t, \
                              bool);                                                                      \
  template void gate_row<T>(T*, const float*, std::int64_t);                                              \
  template void gate_scattered<T>(T*, const std::int64_t*, const float*, std::int64_t);
SPURGE_INSTANTIATE(float)
SPURGE_INSTANTIATE(double)
SPURGE_INSTANTIATE(bf16)
SPURGE_INSTANTIATE(f16)
#undef SPURGE_INSTANTIATE

}  // namespace spurge::gate::SPURGE_LEVEL
