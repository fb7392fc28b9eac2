#pragma once
// ig: the sums of integrated gradients, and of first-order estimates, over the activations behind a linear layer.
#include "spurge/types.hpp"

namespace spurge::ig {

// out[i] = sum_s weights[s] * grads[s, i]
//
// grads [nodes, size]; weights [nodes] on the host; out [size] float32 (float64 for f64). The sum runs
// over s in order: bitwise the same for any number of threads, any instruction set, and on the GPU.
void node_sum_cpu(void* out, const void* grads, const double* weights, std::int64_t nodes, std::int64_t size,
                  DType dtype, int threads);
void node_sum_cuda(void* out, const void* grads, const double* weights, std::int64_t nodes, std::int64_t size,
                   DType dtype, const CudaPlace& place);

// out[b, k] = sum over the tokens t that mask keeps of p[b, t, k] * z[b, t, k]
//
// p, z [examples, tokens, width]; mask [examples, tokens] of bytes, 0 drops a token whatever it holds;
// null keeps all. out [examples, width] float32 (float64 for f64). On the CPU the sum runs over t in
// order (bitwise the same for any number of threads and any instruction set); on the GPU in a fixed
// order of its own (bitwise the same from run to run on one GPU).
void multiply_sum_cpu(void* out, const void* p, const void* z, const std::uint8_t* mask, std::int64_t examples,
                      std::int64_t tokens, std::int64_t width, DType dtype, int threads);
void multiply_sum_cuda(void* out, const void* p, const void* z, const std::uint8_t* mask, std::int64_t examples,
                       std::int64_t tokens, std::int64_t width, DType dtype, const CudaPlace& place);

// Over the tokens t that mask keeps, with the product never in memory:
//   total[b, k]     = sum of p[b, t, k] * z[b, t, k], bit for bit multiply_sum's
//   magnitude[b, k] = sum of |p[b, t, k] * z[b, t, k]|
//   reach[b, k]     = the largest |z[b, t, k]| * scale[b, t], or 0 where that is more; NaN where one is
//
// p, z, mask and the orders of the sums as in multiply_sum; scale [examples, tokens] and the three results
// [examples, width] float32 (float64 for f64).
void first_order_cpu(void* total, void* magnitude, void* reach, const void* p, const void* z, const void* scale,
                     const std::uint8_t* mask, std::int64_t examples, std::int64_t tokens, std::int64_t width,
                     DType dtype, int threads);
void first_order_cuda(void* total, void* magnitude, void* reach, const void* p, const void* z, const void* scale,
                      const std::uint8_t* mask, std::int64_t examples, std::int64_t tokens, std::int64_t width,
                      DType dtype, const CudaPlace& place);

}  // namespace spurge::ig
