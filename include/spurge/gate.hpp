#pragma once
// gate: multiply activations by gates. A gate of 1 leaves a neuron as it is, 0 erases it.
#include "spurge/types.hpp"

namespace spurge::gate {

// out[s, i] = x[i] + (alphas[s] - 1) * u[i]
//
// The rows of all quadrature nodes at once: x holds the unedited rows behind a down projection and u
// the projection's output, so that out[s] is what x would be with u scaled by alphas[s].
// x, u [size]; out [nodes, size]; alphas [nodes] on the host. Every result is bitwise the same for
// any number of threads, any instruction set, and on the GPU.
void open_rows_cpu(void* out, const void* x, const void* u, const double* alphas, std::int64_t nodes,
                   std::int64_t size, DType dtype, int threads);
void open_rows_cuda(void* out, const void* x, const void* u, const double* alphas, std::int64_t nodes,
                    std::int64_t size, DType dtype, const CudaPlace& place);

// z[p, r, columns[j]] *= gates[p, j], in place
//
// z [particles, rows, width]; columns [n], distinct, in any order; gates [particles, n] float32. Bitwise
// as above. The CPU refuses columns outside [0, width) and columns named twice; the CUDA kernel cannot
// look before it runs: it stops the device on the former, and the latter is a data race.
void gate_columns_cpu(void* z, const std::int64_t* columns, const float* gates, std::int64_t particles,
                      std::int64_t rows, std::int64_t width, std::int64_t n, DType dtype, int threads);
void gate_columns_cuda(void* z, const std::int64_t* columns, const float* gates, std::int64_t particles,
                       std::int64_t rows, std::int64_t width, std::int64_t n, DType dtype,
                       const CudaPlace& place);

}  // namespace spurge::gate
