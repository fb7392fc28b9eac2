#pragma once
// What every kernel of the C++ face shares. Plain C++17: no CUDA, no Python, no torch. Where results are called bitwise
// the same, NaN is any NaN: its sign and payload may differ.
#include <cstdint>

namespace spurge {

// Element type of a buffer. Kernels take `void*` and one of these, and accumulate in float32
// (float64 for f64).
enum class DType : int { f32, f64, bf16, f16 };

// Where a CUDA kernel runs: work is queued on `stream` (a cudaStream_t) of `device`; nothing waits.
struct CudaPlace {
  int device = 0;
  void* stream = nullptr;
};

}  // namespace spurge
