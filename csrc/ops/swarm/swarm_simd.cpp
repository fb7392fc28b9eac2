#include "ops/swarm/swarm.hpp"
#include "ops/swarm/swarm_math.hpp"

#if defined(SPURGE_LEVEL_avx2) || defined(SPURGE_LEVEL_avx512)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own avx512fintrin.h
#endif

namespace spurge::swarm::SPURGE_LEVEL {

namespace {

using Words = std::uint32_t[4][kLanes];  // word k of block j of a chunk

#if defined(SPURGE_LEVEL_avx512)

// 32-bit words in the lower halves of 64-bit lanes; the upper halves hold leftovers that nobody reads.
struct Lanes {
  static constexpr int n = 8;
  __m512i v;

  static Lanes all(std::uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static Lanes even(std::uint32_t x) {  // x, x + 2, x + 4, ...
    return {_mm512_add_epi64(all(x).v, _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0))};
  }
  friend Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_epu32(a.v, b.v)}; }
  friend Lanes mix(Lanes product, Lanes word, Lanes key) {  // upper half of the product ^ word ^ key
    return {_mm512_ternarylogic_epi64(_mm512_srli_epi64(product.v, 32), word.v, key.v, 0x96)};
  }
  static void store(std::uint32_t* out, Lanes even, Lanes odd) {
    _mm512_storeu_si512(out, _mm512_mask_blend_epi32(0xAAAA, even.v, _mm512_slli_epi64(odd.v, 32)));
  }
};

#elif defined(SPURGE_LEVEL_avx2)

struct Lanes {  // as above
  static constexpr int n = 4;
  __m256i v;

  static Lanes all(std::uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  static Lanes even(std::uint32_t x) { return {_mm256_add_epi64(all(x).v, _mm256_set_epi64x(6, 4, 2, 0))}; }
  friend Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_epu32(a.v, b.v)}; }
  friend Lanes mix(Lanes product, Lanes word, Lanes key) {
    return {_mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product.v, 32), word.v), key.v)};
  }
  static void store(std::uint32_t* out, Lanes even, Lanes odd) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xAA));
  }
};

#endif

#if defined(SPURGE_LEVEL_avx2) || defined(SPURGE_LEVEL_avx512)

struct Blocks {  // Lanes::n counters of Philox
  Lanes c0, c1, c2, c3;

  void round(Lanes key0, Lanes key1) {
    const Lanes a = Lanes::all(kPhiloxMultiplier0) * c0;
    const Lanes b = Lanes::all(kPhiloxMultiplier1) * c2;
    c0 = mix(b, c1, key0);
    c1 = b;
    c2 = mix(a, c3, key1);
    c3 = a;
  }
};

void draw_chunk(Words& words, std::int64_t chunk, std::int64_t particle, const Step& step) {
  const Lanes row = Lanes::all(static_cast<std::uint32_t>(particle));
  const Lanes iteration = Lanes::all(step.iteration), zero = Lanes::all(0);
  for (int j = 0; j < kLanes; j += 2 * Lanes::n) {
    const auto first = static_cast<std::uint32_t>(chunk * kLanes + j);
    Blocks even{Lanes::even(first), row, iteration, zero}, odd{Lanes::even(first + 1), row, iteration, zero};
    auto key0 = static_cast<std::uint32_t>(step.seed), key1 = static_cast<std::uint32_t>(step.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      even.round(Lanes::all(key0), Lanes::all(key1));
      odd.round(Lanes::all(key0), Lanes::all(key1));
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    Lanes::store(words[0] + j, even.c0, odd.c0);
    Lanes::store(words[1] + j, even.c1, odd.c1);
    Lanes::store(words[2] + j, even.c2, odd.c2);
    Lanes::store(words[3] + j, even.c3, odd.c3);
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
