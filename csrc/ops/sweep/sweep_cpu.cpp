#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/sweep/sweep_math.hpp"

namespace spurge::sweep {

namespace {

struct Range {
  std::int64_t begin, end;
};

// The columns that no row of the edit touches, as ranges.
std::vector<Range> standing(const std::int64_t* rows, const Shape& shape) {
  std::vector<std::int64_t> edited(rows, rows + shape.edited);
  std::sort(edited.begin(), edited.end());
  std::vector<Range> ranges;
  std::int64_t next = 0;
  for (std::size_t e = 0; e < edited.size(); next = edited[e++] + 1) {
    SPURGE_CHECK(edited[e] >= 0 && edited[e] < shape.outputs, "rows: must lie in [0, ", shape.outputs, "), got ",
                 edited[e]);
    SPURGE_CHECK(e == 0 || edited[e] != edited[e - 1], "rows: must be distinct, got ", edited[e], " twice");
    if (next < edited[e]) ranges.push_back({next, edited[e]});
  }
  if (next < shape.outputs) ranges.push_back({next, shape.outputs});
  return ranges;
}

// The largest of the logits in [begin, end), which may not be empty; NaN if one of them is.
template <class L>
L largest(const L* logits, std::int64_t begin, std::int64_t end) {
  using Bits = std::conditional_t<sizeof(L) == 4, std::int32_t, std::int64_t>;
  constexpr int lanes = static_cast<int>(64 / sizeof(L));  // independent, so that the compiler can use vectors
  L best = logits[begin];
  Bits ordinary = best == best;
  std::int64_t j = begin;
  if (end - begin >= 2 * lanes) {
    L some[lanes];
    Bits real[lanes];
    for (int k = 0; k < lanes; ++k) {
      some[k] = best;
      real[k] = -1;
    }
    for (; j + lanes <= end; j += lanes)
      for (int k = 0; k < lanes; ++k) {
        const L x = logits[j + k];
        some[k] = x > some[k] ? x : some[k];
        real[k] &= -Bits(x == x);
      }
    for (int k = 0; k < lanes; ++k) {
      best = some[k] > best ? some[k] : best;
      ordinary &= real[k];
    }
  }
  for (; j < end; ++j) {
    best = logits[j] > best ? logits[j] : best;
    ordinary &= logits[j] == logits[j];
  }
  return ordinary ? best : std::numeric_limits<L>::quiet_NaN();
}

template <class L, class D>
Span interval(const L* logits, const D* shifts, const std::int64_t* rows, std::int64_t edited,
              const std::vector<Range>& ranges, std::int64_t label, Span span) {
  Line mine{logits[label], 0.0};
  for (std::int64_t e = 0; e < edited; ++e)
    if (rows[e] == label) mine.shift = shifts[e];
  if (!usable(mine)) return nothing();
  const auto against = [&](std::int64_t begin, std::int64_t end) {  // false at NaN
    if (begin >= end) return true;
    const Line rival{largest(logits, begin, end), 0.0};
    if (!usable(rival)) return false;
    keep(span, mine, rival, label <= begin);
    return true;
  };
  for (const Range& range : ranges) {
    const std::int64_t cut = std::clamp(label, range.begin, range.end);
    if (!against(range.begin, cut) || !against(cut, range.end)) return nothing();
  }
  for (std::int64_t e = 0; e < edited; ++e) {
    if (rows[e] == label) continue;
    const Line rival{logits[rows[e]], shifts[e]};
    if (!usable(rival)) return nothing();
    keep(span, mine, rival, label < rows[e]);
  }
  return finished(span);
}

template <class L, class D>
void intervals(double* out, const L* logits, const D* shifts, const std::int64_t* rows, const std::int64_t* labels,
               Span span, const Shape& shape, int threads) {
  const std::vector<Range> ranges = standing(rows, shape);
  for (std::int64_t n = 0; n < shape.samples; ++n)
    SPURGE_CHECK(labels[n] >= 0 && labels[n] < shape.outputs, "labels: must lie in [0, ", shape.outputs, "), got ",
                 labels[n], " at row ", n);
  const std::int64_t grain = kStreamedPerThread / (shape.outputs + 16 * shape.edited + 16) + 1;
  parallel_for(shape.samples, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const Span kept = interval(logits + n * shape.outputs, shifts + n * shape.edited, rows, shape.edited, ranges,
                                 labels[n], span);
      out[2 * n] = kept.low;
      out[2 * n + 1] = kept.high;
    }
  });
}

}  // namespace

void correct_interval_cpu(double* out, const void* logits, const void* shifts, const std::int64_t* rows,
                          const std::int64_t* labels, double low, double high, const Shape& shape, DType logits_type,
                          DType shifts_type, int threads) {
  dispatch_32_or_64("logits", logits_type, [&](auto logit) {
    dispatch_32_or_64("shifts", shifts_type, [&](auto shift) {
      using L = typename decltype(logit)::type;
      using D = typename decltype(shift)::type;
      intervals(out, static_cast<const L*>(logits), static_cast<const D*>(shifts), rows, labels, Span{low, high},
                shape, threads);
    });
  });
}

}  // namespace spurge::sweep
