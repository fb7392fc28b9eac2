#pragma once
#include <cstdint>
#include <type_traits>

#include "core/half.hpp"
#include "spurge/median.hpp"

namespace spurge::median {

// A value as a whole number of the same order: comparisons become exact for infinities, zeros and subnormals.
template <class T>
struct KeyOf {
  using type = std::int32_t;
};
template <>
struct KeyOf<double> {
  using type = std::int64_t;
};
template <class T>
using Key = typename KeyOf<T>::type;

template <class K>
using Unsigned = std::make_unsigned_t<K>;

template <class K>
constexpr K kMagnitude = static_cast<K>(static_cast<Unsigned<K>>(-1) >> 1);  // all bits but the sign: the largest key
template <class K>
constexpr int kSign = 8 * sizeof(K) - 1;  // its bit
constexpr std::int32_t kInfinity = 0x7f800000;  // its key, in float32

// The negative values' order is the reverse of their magnitudes'.
template <class K>
SPURGE_HD K folded(K bits) {
  return bits ^ ((bits >> kSign<K>) & kMagnitude<K>);
}

template <class A>
SPURGE_HD Key<A> key_of(A v) {
  Key<A> bits;
  v += A(0);  // -0 becomes 0
  memcpy(&bits, &v, sizeof bits);
  return folded(bits);
}
SPURGE_HD float value_of(std::int32_t key) {
  float v;
  key = folded(key);
  memcpy(&v, &key, sizeof v);
  return v;
}
SPURGE_HD double value_of(std::int64_t key) {
  double v;
  key = folded(key);
  memcpy(&v, &key, sizeof v);
  return v;
}

template <class A>
SPURGE_HD A transformed(A v, Transform transform) {
  switch (transform) {
    case Transform::raw: break;
    case Transform::magnitude: return v < A(0) ? -v : v;
    case Transform::positive: return v < A(0) ? A(0) : v;  // NaN stays
    case Transform::negative: return v > A(0) ? A(0) : -v;
  }
  return v;
}

// Of the middle two. Halves first, so that nothing overflows.
SPURGE_HD float middle(float a, float b) {
  return a == b ? a : static_cast<float>(0.5 * static_cast<double>(a) + 0.5 * static_cast<double>(b));
}
SPURGE_HD double middle(double a, double b) { return a == b ? a : 0.5 * a + 0.5 * b; }

}  // namespace spurge::median
