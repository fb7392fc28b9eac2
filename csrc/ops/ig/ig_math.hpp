#pragma once
#include "core/half.hpp"

namespace spurge::ig {

// One term of either sum. V: float, double, or lanes of them.
template <class V>
SPURGE_HD V add_product(V sum, V a, V b) {
  return sum + a * b;
}

}  // namespace spurge::ig
