#pragma once
// What the kernels use of CUDA, on the host: stands before the toolkit's header in the include path of sources that
// rewrite.py made of .cu files. A block's threads are fibers; emulation.cpp runs them.
#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ __attribute__((always_inline)) inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace spurge::emulation {

enum class Order { forward, backward, shuffled };  // of blocks, and of the threads of a block

// What no result may depend on.
struct Policy {
  Order order = Order::forward;
  std::uint64_t seed = 1;              // of the shuffled order
  unsigned char poison = 0xff;         // fills shared memory before each block
  std::int64_t most_blocks = 65535;    // along an axis, where a kernel takes several shares a block
  std::size_t staged = 40 * 1024;      // bytes of a row that proximity keeps in shared memory
};
extern Policy policy;
extern cudaError_t last_error;

struct Grid {
  dim3 blocks, threads;
  std::size_t shared;
  Grid(dim3 blocks, dim3 threads, std::size_t shared, cudaStream_t) : blocks(blocks), threads(threads), shared(shared) {}
};

struct Here {
  uint3 thread, block;
  dim3 threads, blocks;
};
const Here& here();  // of the thread that runs

// Runs all threads of all blocks. Throws std::runtime_error where threads miss a barrier or trap.
void launch(const char* kernel, const Grid& grid, const std::function<void()>& thread);
bool register_shared(void* memory, std::size_t bytes);
void* dynamic_shared();  // what lies beyond it, nobody may touch
void allow_dynamic(int bytes);

void block_barrier(const char* file, int line);
void warp_barrier(unsigned mask, const char* file, int line);
std::uint64_t warp_xor(unsigned mask, std::uint64_t value, int lanes, const char* file, int line);
[[noreturn]] void trap();

}  // namespace spurge::emulation

#define threadIdx (::spurge::emulation::here().thread)
#define blockIdx (::spurge::emulation::here().block)
#define blockDim (::spurge::emulation::here().threads)
#define gridDim (::spurge::emulation::here().blocks)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  spurge::emulation::block_barrier(file, line);
}
inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  spurge::emulation::warp_barrier(mask, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = spurge::emulation::warp_xor(mask, bits, lanes, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
[[noreturn]] inline void __trap() { spurge::emulation::trap(); }
template <class T>
T atomicAdd(T* to, T value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* to, T value) {
  return __atomic_exchange_n(to, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* to, T value) {
  T before = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (before < value && !__atomic_compare_exchange_n(to, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = spurge::emulation::last_error;
  spurge::emulation::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : error ? "invalid argument" : "no error";
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
inline cudaError_t cudaMalloc(void** to, std::size_t bytes) { return *to = std::malloc(bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* at) { return std::free(at), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
  spurge::emulation::allow_dynamic(bytes);
  return cudaSuccess;
}
