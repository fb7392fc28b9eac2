#pragma once
// What every launcher needs. The stream is the caller's own; nothing here waits or allocates.
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "spurge/types.hpp"

namespace spurge::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes the place's device current for the scope; costs nothing when it already is. An error that others left is
// cleared, so that no launch is blamed for it, or, where it cannot be, reported as theirs.
class Guard {
 public:
  explicit Guard(const CudaPlace& place) {
    if (cudaGetLastError() != cudaSuccess) check(cudaGetLastError(), "CUDA had failed before this call");
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == place.device) previous_ = -1;
    else check(cudaSetDevice(place.device), "cudaSetDevice");
  }
  ~Guard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  int previous_ = -1;
};

inline cudaStream_t stream_of(const CudaPlace& place) { return static_cast<cudaStream_t>(place.stream); }

inline unsigned blocks_for(std::int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace spurge::cuda
