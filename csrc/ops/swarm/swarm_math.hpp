#pragma once
// One particle and dimension. Products and sums round one by one, in this order, on every processor:
// the build forbids contraction to fused multiply-add (cmake/SpurgeKernels.cmake).
#include "core/philox.hpp"
#include "spurge/swarm.hpp"

namespace spurge::swarm {

// A Philox block serves two dimensions. Rows are cut into chunks of 2 * kLanes dimensions; block j of
// a chunk serves its dimensions j and j + kLanes: vectors of any width up to kLanes read it in order.
constexpr int kLanes = 16;
constexpr int kChunk = 2 * kLanes;

SPURGE_HD PhiloxBlock draw(const Step& step, std::int64_t particle, std::int64_t block) {
  return philox({{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(particle), step.iteration, 0u}},
                static_cast<std::uint32_t>(step.seed), static_cast<std::uint32_t>(step.seed >> 32));
}

SPURGE_HD float clip(float x, float low, float high) {  // NaN stays NaN
  const float above = x < low ? low : x;
  return above > high ? high : above;
}

SPURGE_HD void move(float& position, float& velocity, float best, float leader, std::uint32_t word1,
                                  std::uint32_t word2, const Step& step) {
  const float x = position;
  const float pull1 = step.cognitive * uniform(word1) * (best - x);
  const float pull2 = step.social * uniform(word2) * (leader - x);
  const float v = clip(step.inertia * velocity + pull1 + pull2, -step.max_velocity, step.max_velocity);
  const float free = x + v;
  const float inside = clip(free, step.low, step.high);
  velocity = inside != free && free == free ? -v : v;  // NaN has met no wall
  position = inside;
}

}  // namespace spurge::swarm
