#pragma once
// median: the medians of columns over segments of rows (NeuronTune's scores).
#include "spurge/types.hpp"

namespace spurge::median {

// What is taken of each value before its median.
enum class Transform : int { raw, magnitude, positive, negative };  // v, |v|, max(v, 0), max(-v, 0)

struct Shape {
  std::int64_t rows, columns;     // N, M
  std::int64_t chosen, segments;  // n, S
};

// out[s, m] = median of transform(features[order[i], m]) over i in [starts[s], starts[s + 1])
//
// The mean of the middle two where a segment has an even number of rows; NaN where it has none, or where a value
// is NaN. features [rows, columns]; order [chosen], in any sequence, rows may repeat; starts [segments + 1],
// ascending, within [0, chosen]; out [segments, columns] float32 (float64 for f64). The value of a selection does
// not depend on how it was found: bitwise the same for any number of threads, any instruction set, and on the GPU.
// The CPU refuses rows outside [0, rows) and starts that descend; the CUDA kernel cannot look before it runs, and
// gives NaN for their segments.
void segment_medians_cpu(void* out, const void* features, const std::int64_t* order, const std::int64_t* starts,
                         const Shape& shape, Transform transform, DType dtype, int threads);
void segment_medians_cuda(void* out, const void* features, const std::int64_t* order, const std::int64_t* starts,
                          const Shape& shape, Transform transform, DType dtype, const CudaPlace& place);

}  // namespace spurge::median
