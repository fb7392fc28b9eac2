#pragma once
// association: how strongly each weight of a linear layer belongs to each class, one block of samples at a time.
#include "spurge/types.hpp"

namespace spurge::association {

// One block: `samples` rows, sorted by class into `segments` runs; run s is rows starts[s] .. starts[s + 1] - 1.
//
//   G_s[o, m] = scales[s] * sum over the run of |gradients[n, o]| * |features[n, m]|
//   sums += G_s,  logs += G_s log G_s (0 at 0),  both over the runs that end in this block
//   picked[o, m] = G_s[o, m] of the run whose class is `target`; with target -1, in row o of the run of class o
//   activations[classes[s], m] += scales[s] * sum over the run of |features[n, m]| (relu: of its positive part)
//
// A run may span blocks: `resumed` says that the first one began before, with its sum so far, not yet scaled, in
// carry; `unfinished` that the last one goes on, with its sum left in carry.
struct Block {
  double* sums;         // [outputs, width], changed
  double* logs;         // [outputs, width], changed
  double* carry;        // [outputs, width], read where resumed, written where unfinished; else may be null
  float* picked;        // [outputs, width], changed where said above
  double* activations;  // [labels, width], changed
  const void* features;         // [samples, width], dtype
  const void* gradients;        // [samples, outputs], float32 (float64 for f64)
  const std::int64_t* starts;   // [segments + 1], ascending from 0 to samples
  const std::int64_t* classes;  // [segments], distinct, below labels
  const double* scales;         // [segments]
  std::int64_t samples, width, outputs, segments, labels, target;
  bool relu, resumed, unfinished;
  DType dtype;
  double* workspace;  // associate_workspace doubles on the GPU; on the CPU null
};

// Doubles that the GPU works in: what each of several parts of the samples comes to, for outputs so few that one part
// would leave most of the GPU idle.
std::int64_t associate_workspace(std::int64_t samples, std::int64_t width, std::int64_t outputs);

// Products and short sums in float32 (float64 for f64), what they add up to in float64. On the CPU bitwise the same
// for any number of threads, though not for every instruction set: those that can fuse a multiplication with the
// addition do so here. On the GPU bitwise the same from run to run on one GPU. Products below the smallest normal
// float32 may count as 0. The CPU refuses starts and classes that are not as said. The CUDA kernel cannot look before it
// runs: where starts do not ascend from 0 to samples, or a class is out of range, it leaves NaN in sums, logs, picked,
// activations and an unfinished carry.
void associate_cpu(const Block& block, int threads);
void associate_cuda(const Block& block, const CudaPlace& place);

}  // namespace spurge::association
