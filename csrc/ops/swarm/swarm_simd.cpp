#include "core/simd.hpp"
#include "ops/swarm/swarm.hpp"
#include "ops/swarm/swarm_math.hpp"

namespace spurge::swarm::SPURGE_LEVEL {

using spurge::SPURGE_LEVEL::Vec;

namespace {

using Words = std::uint32_t[4][kLanes];  // word k of block j of a chunk

#ifdef SPURGE_REGISTERS

using Lanes = Vec<std::uint64_t>;  // words in the lower halves; the upper ones hold leftovers that nobody reads

struct Blocks {  // Lanes::n counters of Philox
  Lanes c0, c1, c2, c3;

  SPURGE_HD void round(Lanes key0, Lanes key1) {
    const Lanes a = low_product(Lanes::all(kPhiloxMultiplier0), c0);
    const Lanes b = low_product(Lanes::all(kPhiloxMultiplier1), c2);
    c0 = (b >> 32) ^ c1 ^ key0;
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ key1;
    c3 = a;
  }
};

void draw_chunk(Words& words, std::int64_t chunk, std::int64_t particle, const Step& step) {
  const Lanes row = Lanes::all(static_cast<std::uint32_t>(particle));
  const Lanes iteration = Lanes::all(step.iteration), zero = Lanes::all(0), evens = Lanes::steps() << 1;
  for (int j = 0; j < kLanes; j += 2 * Lanes::n) {
    const Lanes first = Lanes::all(static_cast<std::uint32_t>(chunk * kLanes + j)) + evens;
    Blocks even{first, row, iteration, zero}, odd{first + Lanes::all(1), row, iteration, zero};
    auto key0 = static_cast<std::uint32_t>(step.seed), key1 = static_cast<std::uint32_t>(step.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      even.round(Lanes::all(key0), Lanes::all(key1));
      odd.round(Lanes::all(key0), Lanes::all(key1));
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    low_halves(even.c0, odd.c0).store(words[0] + j);
    low_halves(even.c1, odd.c1).store(words[1] + j);
    low_halves(even.c2, odd.c2).store(words[2] + j);
    low_halves(even.c3, odd.c3).store(words[3] + j);
  }
}

#else

void draw_chunk(Words& words, std::int64_t chunk, std::int64_t particle, const Step& step) {
  for (int j = 0; j < kLanes; ++j) {
    const PhiloxBlock block = draw(step, particle, chunk * kLanes + j);
    for (int k = 0; k < 4; ++k) words[k][j] = block.word[k];
  }
}

#endif

void move_lanes(float* __restrict position, float* __restrict velocity, const float* __restrict best,
                const float* __restrict leader, const std::uint32_t* __restrict word1,
                const std::uint32_t* __restrict word2, std::int64_t n, const Step& step) {
  for (std::int64_t j = 0; j < n; ++j)
    move(position[j], velocity[j], best[j], leader[j], word1[j], word2[j], step);
}

}  // namespace

void move_row(float* position, float* velocity, const float* best, const float* leader, std::int64_t dimensions,
              std::int64_t particle, const Step& step) {
  const Step mine = step;  // a copy that no store below can change
  alignas(64) Words words;
  std::int64_t d = 0;
  for (; d + kChunk <= dimensions; d += kChunk) {
    draw_chunk(words, d / kChunk, particle, mine);
    for (int half = 0; half < 2; ++half) {
      const std::int64_t at = d + half * kLanes;
      move_lanes(position + at, velocity + at, best + at, leader + at, words[2 * half], words[2 * half + 1], kLanes,
                 mine);
    }
  }
  if (d == dimensions) return;
  draw_chunk(words, d / kChunk, particle, mine);
  for (int half = 0; half < 2 && d < dimensions; ++half, d += kLanes) {
    const std::int64_t n = dimensions - d < kLanes ? dimensions - d : kLanes;
    move_lanes(position + d, velocity + d, best + d, leader + d, words[2 * half], words[2 * half + 1], n, mine);
  }
}

}  // namespace spurge::swarm::SPURGE_LEVEL
