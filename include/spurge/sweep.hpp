#pragma once
// sweep: for which rates of an edit a linear layer's prediction is right (FCR, Eq. 8).
#include "spurge/types.hpp"

namespace spurge::sweep {

struct Shape {
  std::int64_t samples, outputs, edited;  // N, O, E
};

// With logits + r * shifts in the columns `rows`, and the plain logits elsewhere, the prediction (the largest
// logit, the smaller index first among equals) is labels[n] for the r of a closed interval; out[n] is its part in
// [low, high], and (inf, -inf) where that is empty.
//
// A crossing is (rival's logit - label's logit) / (label's shift - rival's shift) in float64; where the label
// would lose the tie there, the interval ends one float64 before. A sample with NaN, or with a shift that is not
// finite, is empty; infinite logits stay where they are. logits [samples, outputs] and shifts [samples, edited],
// each f32 or f64; rows [edited], distinct; labels [samples]; out [samples, 2]. Bitwise the same for any number of
// threads and on the GPU. The CPU refuses rows and labels outside [0, outputs) and rows named twice; the CUDA
// kernel cannot look before it runs: such samples are empty, and of a row named twice any shift may count.
void correct_interval_cpu(double* out, const void* logits, const void* shifts, const std::int64_t* rows,
                          const std::int64_t* labels, double low, double high, const Shape& shape, DType logits_type,
                          DType shifts_type, int threads);
void correct_interval_cuda(double* out, const void* logits, const void* shifts, const std::int64_t* rows,
                           const std::int64_t* labels, double low, double high, const Shape& shape,
                           DType logits_type, DType shifts_type, const CudaPlace& place);

}  // namespace spurge::sweep
