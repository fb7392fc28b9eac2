#pragma once
// swarm: one iteration of a particle swarm.
#include "spurge/types.hpp"

namespace spurge::swarm {

struct Step {
  float inertia, cognitive, social;  // w, c1, c2
  float low, high;                   // the box
  float max_velocity;                // largest move per dimension and iteration
  std::uint64_t seed;                // key of the random numbers
  std::uint32_t iteration;           // their counter
};

// v <- clip(w v + c1 r1 (best - x) + c2 r2 (leader - x), max_velocity);  x <- clip(x + v, [low, high])
//
// Where x had to be clipped, v changes its sign: the particle comes back from the wall. r1, r2 are
// uniform in [0, 1): two words of Philox-4x32-10 with key = seed and counter = (block of dimensions,
// particle, iteration, 0), so they depend on nothing else. position, velocity [particles, dimensions]
// in and out; best [particles, dimensions]; leader [dimensions]. Bitwise the same for any number of
// threads, any instruction set, and on the GPU.
void step_cpu(float* position, float* velocity, const float* best, const float* leader, std::int64_t particles,
              std::int64_t dimensions, const Step& step, int threads);
void step_cuda(float* position, float* velocity, const float* best, const float* leader, std::int64_t particles,
               std::int64_t dimensions, const Step& step, const CudaPlace& place);

// best[p] <- position[p] and best_fitness[p] <- fitness[p] where fitness[p] > best_fitness[p] (so NaN
// never wins); *leader <- the index of the largest best_fitness, the smallest such index on ties.
// fitness, best_fitness [particles]; at least one particle. Bitwise as above.
void best_cpu(std::int64_t* leader, float* best, float* best_fitness, const float* position, const float* fitness,
              std::int64_t particles, std::int64_t dimensions, int threads);
void best_cuda(std::int64_t* leader, float* best, float* best_fitness, const float* position, const float* fitness,
               std::int64_t particles, std::int64_t dimensions, const CudaPlace& place);

}  // namespace spurge::swarm
