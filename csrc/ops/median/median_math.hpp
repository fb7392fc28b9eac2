#pragma once
#include "core/half.hpp"
#include "spurge/median.hpp"

namespace spurge::median {

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

// Of the middle two; halves first, so that nothing overflows.
template <class A>
SPURGE_HD A middle(A a, A b) {
  return a == b ? a : A(0.5) * a + A(0.5) * b;
}

}  // namespace spurge::median
