#include "core/simd.hpp"
#include "ops/gate/gate.hpp"
#include "ops/gate/gate_math.hpp"

namespace spurge::gate::SPURGE_LEVEL {

using spurge::SPURGE_LEVEL::Lanes;
using spurge::SPURGE_LEVEL::One;

// out[i] = x[i] + shift * u[i]
template <class T>
void open_block(T* __restrict out, const T* __restrict x, const T* __restrict u, Acc<T> shift, std::int64_t n) {
  using V = Lanes<Acc<T>>;
  using S = One<Acc<T>>;
  std::int64_t i = 0;
  for (; i + V::n <= n; i += V::n) open(V::load(x + i), V::load(u + i), V(shift)).store(out + i);
  for (; i < n; ++i) open(S::load(x + i), S::load(u + i), S(shift)).store(out + i);
}

// z[i] *= gates[i]
template <class T>
void gate_row(T* __restrict z, const float* __restrict gates, std::int64_t n) {
  using V = Lanes<Acc<T>>;
  using S = One<Acc<T>>;
  std::int64_t i = 0;
  for (; i + V::n <= n; i += V::n) gated(V::load(z + i), V::load(gates + i)).store(z + i);
  for (; i < n; ++i) gated(S::load(z + i), S::load(gates + i)).store(z + i);
}

// z[columns[j]] *= gates[j]
template <class T>
void gate_scattered(T* __restrict z, const std::int64_t* __restrict columns, const float* __restrict gates,
                    std::int64_t n) {
  using S = One<Acc<T>>;
  for (std::int64_t j = 0; j < n; ++j) {
    T* const at = z + columns[j];
    gated(S::load(at), S::load(gates + j)).store(at);
  }
}

#define SPURGE_INSTANTIATE(T)                                                                    \
  template void open_block<T>(T*, const T*, const T*, Acc<T>, std::int64_t);                     \
  template void gate_row<T>(T*, const float*, std::int64_t);                                     \
  template void gate_scattered<T>(T*, const std::int64_t*, const float*, std::int64_t);
SPURGE_INSTANTIATE(float)
SPURGE_INSTANTIATE(double)
SPURGE_INSTANTIATE(bf16)
SPURGE_INSTANTIATE(f16)
#undef SPURGE_INSTANTIATE

}  // namespace spurge::gate::SPURGE_LEVEL
