#pragma once
// Philox-4x32-10: 128 random bits from a 128-bit counter and a 64-bit key, without state.
//
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Any element of
// the stream is computed on its own, so who computes it (thread, instruction set, GPU) cannot matter.
#include <cstdint>

#include "core/half.hpp"

namespace spurge {

constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u;  // golden ratio
constexpr std::uint32_t kPhiloxWeyl1 = 0xBB67AE85u;  // sqrt(3) - 1
constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
  std::uint32_t word[4];
};

SPURGE_HD PhiloxBlock philox(PhiloxBlock counter, std::uint32_t key0, std::uint32_t key1) {
  std::uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t a = std::uint64_t(kPhiloxMultiplier0) * c0;
    const std::uint64_t b = std::uint64_t(kPhiloxMultiplier1) * c2;
    c0 = std::uint32_t(b >> 32) ^ c1 ^ key0;
    c1 = std::uint32_t(b);
    c2 = std::uint32_t(a >> 32) ^ c3 ^ key1;
    c3 = std::uint32_t(a);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The upper 24 bits as a number in [0, 1): every step of it is exact in float32.
SPURGE_HD float uniform(std::uint32_t word) {
  return static_cast<float>(static_cast<std::int32_t>(word >> 8)) * 0x1p-24f;
}

}  // namespace spurge
