#pragma once
#include <cmath>

#include "core/half.hpp"
#include "spurge/sweep.hpp"

namespace spurge::sweep {

// Rates at which the label has won against every rival so far.
struct Span {
  double low, high;
};

// One class at rate r: logit + r * shift.
struct Line {
  double logit, shift;
};

SPURGE_HD bool finite(double x) { return x - x == 0; }

SPURGE_HD bool usable(Line line) { return line.logit == line.logit && finite(line.shift); }

SPURGE_HD Span nothing() { return {INFINITY, -INFINITY}; }

// Keeps the rates at which `mine` is above `rival`; at a tie it wins if `first`.
SPURGE_HD void keep(Span& span, Line mine, Line rival, bool first) {
  const bool apart = !(mine.logit == rival.logit);  // also keeps the difference of two infinities from being NaN
  const double gap = apart ? rival.logit - mine.logit : 0.0;
  const double slope = apart || finite(mine.logit) ? mine.shift - rival.shift : 0.0;
  if (slope == 0) {
    if (!(gap < 0 || (gap == 0 && first))) span = nothing();
    return;
  }
  double at = gap / slope;
  if (!first) at = nextafter(at, static_cast<double>(slope > 0 ? INFINITY : -INFINITY));
  at += 0.0;  // -0, of a quotient too small for float64, becomes 0: which zero stays must not depend on the order
  if (slope > 0) span.low = at > span.low ? at : span.low;
  else span.high = at < span.high ? at : span.high;
}

SPURGE_HD Span finished(Span span) { return span.low <= span.high ? span : nothing(); }

}  // namespace spurge::sweep
