#include <cmath>

#include "cuda/launch.cuh"
#include "ops/swarm/swarm_math.hpp"

namespace spurge::swarm {
namespace {

constexpr int kThreads = 256;

// A thread computes one Philox block and moves the two dimensions that it serves.
__global__ void step_kernel(float* __restrict__ position, float* __restrict__ velocity,
                            const float* __restrict__ best, const float* __restrict__ leader, std::int64_t particles,
                            std::int64_t dimensions, Step step) {
  const std::int64_t per_row = (dimensions + kChunk - 1) / kChunk * kLanes;
  const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= particles * per_row) return;
  const std::int64_t p = i / per_row, block = i % per_row;
  const std::int64_t first = block / kLanes * kChunk + block % kLanes, second = first + kLanes;
  if (first >= dimensions) return;
  const PhiloxBlock words = draw(step, p, block);
  const std::int64_t at = p * dimensions;
  move(position[at + first], velocity[at + first], best[at + first], leader[first], words.word[0], words.word[1], step);
  if (second >= dimensions) return;
  move(position[at + second], velocity[at + second], best[at + second], leader[second], words.word[2], words.word[3],
       step);
}

// One block per particle.
__global__ void remember_kernel(float* __restrict__ best, float* __restrict__ best_fitness,
                                const float* __restrict__ position, const float* __restrict__ fitness,
                                std::int64_t dimensions) {
  const std::int64_t p = blockIdx.x;
  const bool better = fitness[p] > best_fitness[p];
  __syncthreads();  // every thread has read best_fitness before one writes it
  if (!better) return;
  if (threadIdx.x == 0) best_fitness[p] = fitness[p];
  for (std::int64_t d = threadIdx.x; d < dimensions; d += blockDim.x)
    best[p * dimensions + d] = position[p * dimensions + d];
}

// One block: the largest value, the smallest index among equals; NaN is smaller than all.
__global__ void leader_kernel(std::int64_t* leader, const float* __restrict__ fitness, std::int64_t particles) {
  __shared__ float tops[kThreads];
  __shared__ std::int64_t indices[kThreads];
  float top = -INFINITY;
  std::int64_t index = 0;
  for (std::int64_t p = threadIdx.x; p < particles; p += kThreads)
    if (fitness[p] > top) top = fitness[index = p];
  tops[threadIdx.x] = top;
  indices[threadIdx.x] = index;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) continue;
    const int other = threadIdx.x + half;
    const bool ahead = tops[other] > tops[threadIdx.x];
    const bool level = tops[other] == tops[threadIdx.x] && indices[other] < indices[threadIdx.x];
    if (!ahead && !level) continue;
    tops[threadIdx.x] = tops[other];
    indices[threadIdx.x] = indices[other];
  }
  if (threadIdx.x == 0) *leader = indices[0];
}

}  // namespace

void step_cuda(float* position, float* velocity, const float* best, const float* leader, std::int64_t particles,
               std::int64_t dimensions, const Step& step, const CudaPlace& place) {
  const std::int64_t threads = particles * ((dimensions + kChunk - 1) / kChunk * kLanes);
  if (threads == 0) return;
  const cuda::Guard guard(place);
  step_kernel<<<cuda::blocks_for(threads, kThreads), kThreads, 0, cuda::stream_of(place)>>>(
      position, velocity, best, leader, particles, dimensions, step);
  cuda::check(cudaGetLastError(), "swarm_step launch");
}

void best_cuda(std::int64_t* leader, float* best, float* best_fitness, const float* position, const float* fitness,
               std::int64_t particles, std::int64_t dimensions, const CudaPlace& place) {
  const cuda::Guard guard(place);
  const auto stream = cuda::stream_of(place);
  remember_kernel<<<static_cast<unsigned>(particles), kThreads, 0, stream>>>(best, best_fitness, position, fitness,
                                                                             dimensions);
  cuda::check(cudaGetLastError(), "swarm_best launch");
  leader_kernel<<<1, kThreads, 0, stream>>>(leader, best_fitness, particles);
  cuda::check(cudaGetLastError(), "swarm_best launch");
}

}  // namespace spurge::swarm
