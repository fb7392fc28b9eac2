#pragma once
#include <cmath>

#include "core/half.hpp"

namespace spurge::association {

SPURGE_HD float logarithm(float x) { return ::logf(x); }
SPURGE_HD double logarithm(double x) { return ::log(x); }

// x log x, 0 at 0.
template <class A>
SPURGE_HD A times_logarithm(A x) {
  return x == 0 ? A(0) : x * logarithm(x);
}

}  // namespace spurge::association
