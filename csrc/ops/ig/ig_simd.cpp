#include "core/simd.hpp"
#include "ops/ig/ig.hpp"
#include "ops/ig/ig_math.hpp"

namespace spurge::ig::SPURGE_LEVEL {

using spurge::SPURGE_LEVEL::Lanes;
using spurge::SPURGE_LEVEL::One;

// out[i] = sum_s weights[s] * grads[s * stride + i]
template <class V, class T>
SPURGE_HD void sum_nodes_at(Acc<T>* out, const T* grads, std::int64_t stride, const Acc<T>* weights,
                            std::int64_t nodes) {
  V sum(Acc<T>(0));
  for (std::int64_t s = 0; s < nodes; ++s) sum = add_product(sum, V(weights[s]), V::load(grads + s * stride));
  sum.store(out);
}

template <class T>
void sum_nodes(Acc<T>* __restrict out, const T* __restrict grads, std::int64_t stride,
               const Acc<T>* __restrict weights, std::int64_t nodes, std::int64_t n) {
  using V = Lanes<T>;
  using S = One<T>;
  std::int64_t i = 0;
  for (; i + V::n <= n; i += V::n) sum_nodes_at<V>(out + i, grads + i, stride, weights, nodes);
  for (; i < n; ++i) sum_nodes_at<S>(out + i, grads + i, stride, weights, nodes);
}

// out[i] += p[t0 + i] * z[t0 + i], then t1, ...: a few tokens a pass, so that out is loaded less often
template <class V, int Tokens, class T>
SPURGE_HD void sum_tokens_at(Acc<T>* out, const T* p, const T* z, std::int64_t stride, const std::int64_t* tokens) {
  V sum = V::load(out);
  for (int k = 0; k < Tokens; ++k)
    sum = add_product(sum, V::load(p + tokens[k] * stride), V::load(z + tokens[k] * stride));
  sum.store(out);
}

template <int Tokens, class T>
SPURGE_HD void sum_tokens_pass(Acc<T>* __restrict out, const T* __restrict p, const T* __restrict z,
                               std::int64_t stride, const std::int64_t* __restrict tokens, std::int64_t n) {
  using V = Lanes<T>;
  using S = One<T>;
  std::int64_t i = 0;
  for (; i + V::n <= n; i += V::n) sum_tokens_at<V, Tokens>(out + i, p + i, z + i, stride, tokens);
  for (; i < n; ++i) sum_tokens_at<S, Tokens>(out + i, p + i, z + i, stride, tokens);
}

template <class T>
void sum_tokens(Acc<T>* out, const T* p, const T* z, std::int64_t stride, const std::int64_t* tokens,
                std::int64_t count, std::int64_t n) {
  std::int64_t k = 0;
  for (; k + 4 <= count; k += 4) sum_tokens_pass<4>(out, p, z, stride, tokens + k, n);
  for (; k < count; ++k) sum_tokens_pass<1>(out, p, z, stride, tokens + k, n);
}

// The same for what first_order keeps; scale is by token.
template <class V, int Tokens, class T>
SPURGE_HD void first_order_at(Acc<T>* total, Acc<T>* size, Acc<T>* reach, const T* p, const T* z, std::int64_t stride,
                              const Acc<T>* scale, const std::int64_t* tokens) {
  FirstOrder<V> sums{V::load(total), V::load(size), V::load(reach)};
  for (int k = 0; k < Tokens; ++k) {
    const std::int64_t t = tokens[k];
    add(sums, first_order_term(V::load(p + t * stride), V::load(z + t * stride), V(scale[t])));
  }
  sums.total.store(total), sums.size.store(size), sums.reach.store(reach);
}

template <int Tokens, class T>
SPURGE_HD void first_order_pass(Acc<T>* __restrict total, Acc<T>* __restrict size, Acc<T>* __restrict reach,
                                const T* __restrict p, const T* __restrict z, std::int64_t stride,
                                const Acc<T>* __restrict scale, const std::int64_t* __restrict tokens,
                                std::int64_t n) {
  using V = Lanes<T>;
  using S = One<T>;
  std::int64_t i = 0;
  for (; i + V::n <= n; i += V::n)
    first_order_at<V, Tokens>(total + i, size + i, reach + i, p + i, z + i, stride, scale, tokens);
  for (; i < n; ++i) first_order_at<S, Tokens>(total + i, size + i, reach + i, p + i, z + i, stride, scale, tokens);
}

template <class T>
void first_order_tokens(const FirstOrderRows<T>& out, const T* p, const T* z, std::int64_t stride,
                        const Acc<T>* scale, const std::int64_t* tokens, std::int64_t count, std::int64_t n) {
  std::int64_t k = 0;
  for (; k + 4 <= count; k += 4)
    first_order_pass<4>(out.total, out.size, out.reach, p, z, stride, scale, tokens + k, n);
  for (; k < count; ++k) first_order_pass<1>(out.total, out.size, out.reach, p, z, stride, scale, tokens + k, n);
}

#define SPURGE_INSTANTIATE(T)                                                                              \
  template void sum_nodes<T>(Acc<T>*, const T*, std::int64_t, const Acc<T>*, std::int64_t, std::int64_t);  \
  template void sum_tokens<T>(Acc<T>*, const T*, const T*, std::int64_t, const std::int64_t*, std::int64_t, \
                              std::int64_t);                                                               \
  template void first_order_tokens<T>(const FirstOrderRows<T>&, const T*, const T*, std::int64_t,          \
                                      const Acc<T>*, const std::int64_t*, std::int64_t, std::int64_t);
SPURGE_INSTANTIATE(float)
SPURGE_INSTANTIATE(double)
SPURGE_INSTANTIATE(bf16)
SPURGE_INSTANTIATE(f16)
#undef SPURGE_INSTANTIATE

}  // namespace spurge::ig::SPURGE_LEVEL
