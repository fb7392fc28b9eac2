#pragma once
#include "core/half.hpp"

namespace spurge::ig {

// One term of either sum. V: float, double, or lanes of them.
template <class V>
SPURGE_HD V add_product(V sum, V a, V b) {
  return sum + a * b;
}

// Words of vector loops, for a single number.
template <class A>
SPURGE_HD A magnitude(A x) {
  return x < 0 ? -x : x;
}
template <class A>
SPURGE_HD A larger_or_nan(A a, A b) {
  return a > b || a != a ? a : b;
}

// What first_order keeps of a neuron's tokens: sums of the terms and of their sizes, and the largest reach.
template <class V>
struct FirstOrder {
  V total, size, reach;
};

template <class V>
SPURGE_HD void add(FirstOrder<V>& sums, const FirstOrder<V>& more) {
  sums.total = sums.total + more.total;
  sums.size = sums.size + more.size;
  sums.reach = larger_or_nan(more.reach, sums.reach);
}

template <class V>
SPURGE_HD FirstOrder<V> first_order_term(V p, V z, V scale) {
  const V product = p * z;
  return {product, magnitude(product), magnitude(z) * scale};
}

}  // namespace spurge::ig
