#pragma once
#include "core/half.hpp"

namespace spurge::gate {

// V: float, double, or lanes of them.
template <class V>
SPURGE_HD V open(V x, V u, V shift) {
  return x + shift * u;  // shift = alpha - 1
}

template <class V>
SPURGE_HD V gated(V z, V gate) {
  return z * gate;
}

}  // namespace spurge::gate
