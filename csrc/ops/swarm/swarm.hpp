#pragma once
// Inner loop of the CPU kernel; swarm_simd.cpp is compiled once per instruction set.
#include "core/isa.hpp"
#include "spurge/swarm.hpp"

namespace spurge::swarm {

SPURGE_EACH_LEVEL(void move_row(float* position, float* velocity, const float* best, const float* leader,
                                std::int64_t dimensions, std::int64_t particle, const Step& step);)

}  // namespace spurge::swarm
