#include <algorithm>
#include <limits>

#include "core/parallel.hpp"
#include "ops/swarm/swarm.hpp"

namespace spurge::swarm {

void step_cpu(float* position, float* velocity, const float* best, const float* leader, std::int64_t particles,
              std::int64_t dimensions, const Step& step, int threads) {
  const auto row = SPURGE_SELECT(move_row);
  const auto body = [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p)
      row(position + p * dimensions, velocity + p * dimensions, best + p * dimensions, leader, dimensions, p, step);
  };
  parallel_for(particles, kElementsPerThread / std::max<std::int64_t>(dimensions, 1) + 1, threads, body);
}

void best_cpu(std::int64_t* leader, float* best, float* best_fitness, const float* position, const float* fitness,
              std::int64_t particles, std::int64_t dimensions, int threads) {
  const auto body = [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      if (!(fitness[p] > best_fitness[p])) continue;
      best_fitness[p] = fitness[p];
      std::copy_n(position + p * dimensions, dimensions, best + p * dimensions);
    }
  };
  parallel_for(particles, kElementsPerThread / std::max<std::int64_t>(dimensions, 1) + 1, threads, body);
  float top = -std::numeric_limits<float>::infinity();
  *leader = 0;
  for (std::int64_t p = 0; p < particles; ++p)
    if (best_fitness[p] > top) top = best_fitness[*leader = p];
}

}  // namespace spurge::swarm
