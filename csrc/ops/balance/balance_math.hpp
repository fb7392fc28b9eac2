#pragma once
// The rules of Newton's method that the CPU and the GPU share.
#include "core/half.hpp"
#include "spurge/balance.hpp"

namespace spurge::balance {

constexpr double kReach = 4.0;       // longest step, by the square root of its Newton decrement
constexpr double kRidge = 1e-12;     // of the direction only, beside the mean of the Hessian's diagonal
constexpr double kConstant = 1e-13;  // a standard deviation below this share of the largest value is rounding
constexpr double kEqual = 1e-10;     // of two constants
constexpr double kProof = 1e-12;     // rounding of the largest score, beside the sizes that were added
constexpr double kFall = 1e-4;       // Armijo: share of the slope that a step has to fall by
constexpr double kNoise = 1e-13;     // of f
constexpr int kTrials = 40;          // of a step

SPURGE_HD double larger(double a, double b) { return a > b ? a : b; }
SPURGE_HD double smaller(double a, double b) { return a < b ? a : b; }
SPURGE_HD double size_of(double x) { return x < 0 ? -x : x; }
SPURGE_HD bool finite(double x) { return x - x == 0; }

// Whether f fell enough along a step of length t.
SPURGE_HD bool fell(double before, double after, double t, double slope) {
  return after <= before + kFall * t * slope + kNoise * (1 + size_of(before));
}

// The next length to try: where the parabola through value and slope turns.
SPURGE_HD double shortened(double t, double before, double after, double slope) {
  const double turn = -slope * t / (2 * (after - before - t * slope));
  return t * (turn > 0.1 ? smaller(turn, 0.5) : 0.1);
}

}  // namespace spurge::balance
