#pragma once
// Vec in a register, by the operators that compilers have for vector types: the same for AVX2 and AVX-512. What no
// operator does stands in simd_avx2.hpp and simd_avx512.hpp.
#include <immintrin.h>

#include "core/half.hpp"

#define SPURGE_REGISTERS

namespace spurge::SPURGE_LEVEL {

#ifdef SPURGE_LEVEL_avx512
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif

// ---- N neighbours of a storage type, as float32 ---------------------------------------------------

template <int N>
struct Floats;

template <>
struct Floats<4> {
  SPURGE_HD static __m128i bits(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  SPURGE_HD static __m128 load(const float* p) { return _mm_loadu_ps(p); }
  SPURGE_HD static __m128 load(const f16* p) { return _mm_cvtph_ps(bits(p)); }
  SPURGE_HD static __m128 load(const bf16* p) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits(p)), 16));
  }
};

template <>
struct Floats<8> {
  SPURGE_HD static __m128i bits(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  SPURGE_HD static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  SPURGE_HD static __m256 load(const f16* p) { return _mm256_cvtph_ps(bits(p)); }
  SPURGE_HD static __m256 load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits(p)), 16));
  }
};

#ifdef SPURGE_LEVEL_avx512
template <>
struct Floats<16> {
  SPURGE_HD static __m256i bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  SPURGE_HD static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  SPURGE_HD static __m512 load(const f16* p) { return _mm512_cvtph_ps(bits(p)); }
  SPURGE_HD static __m512 load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits(p)), 16));
  }
};
SPURGE_HD __m512d doubles(__m256 x) { return _mm512_cvtps_pd(x); }
#else
SPURGE_HD __m256d doubles(__m128 x) { return _mm256_cvtps_pd(x); }
#endif

// ---- Vec ------------------------------------------------------------------------------------------

template <class E>
struct Vec {
  static constexpr int n = kBytes / sizeof(E);
  typedef E Register __attribute__((vector_size(kBytes)));
  Register v;

  SPURGE_HD static Vec all(E x) { return {x - Register{}}; }
  SPURGE_HD static Vec steps() {  // 0, 1, 2, ...
    Vec to;
    for (int i = 0; i < n; ++i) to.v[i] = E(i);
    return to;
  }
  SPURGE_HD static Vec of_bytes(const void* p) {
    Vec to;
    memcpy(&to.v, p, kBytes);
    return to;
  }
  SPURGE_HD void store_bytes(void* p) const { memcpy(p, &v, kBytes); }
  SPURGE_HD static Vec load(const E* p) { return of_bytes(p); }
  template <class T>
  SPURGE_HD static Vec load(const T* p) {
    if constexpr (sizeof(E) == 8) return {doubles(Floats<n>::load(p))};
    else return {Floats<n>::load(p)};
  }
  SPURGE_HD void store(E* p) const { store_bytes(p); }
  SPURGE_HD static Vec load(const E* p, std::int64_t some) {  // the first few lanes; the others are 0
    Vec to;
    load_some(to, p, some);
    return to;
  }
  SPURGE_HD void store(E* p, std::int64_t some) const { store_some(*this, p, some); }
  SPURGE_HD void store(f16* p) const { store_halves(p, *this); }
  template <class T>
  SPURGE_HD void store_past_caches(T* p) const {
    stream(p, *this);
  }

  SPURGE_HD friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  SPURGE_HD friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  SPURGE_HD friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  SPURGE_HD friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  SPURGE_HD friend Vec operator&(Vec a, Vec b) { return {a.v & b.v}; }
  SPURGE_HD friend Vec operator|(Vec a, Vec b) { return {a.v | b.v}; }
  SPURGE_HD friend Vec operator^(Vec a, Vec b) { return {a.v ^ b.v}; }
  SPURGE_HD friend Vec operator<<(Vec a, int by) { return {a.v << by}; }
  SPURGE_HD friend Vec operator>>(Vec a, int by) { return {a.v >> by}; }
};

template <class E>
SPURGE_HD Vec<E> larger(Vec<E> a, Vec<E> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class E>
SPURGE_HD Vec<E> smaller(Vec<E> a, Vec<E> b) {
  return {a.v < b.v ? a.v : b.v};
}

template <class To, class E>
SPURGE_HD Vec<To> bits_as(Vec<E> x) {
  return {(typename Vec<To>::Register)x.v};
}

SPURGE_HD Vec<float> magnitude(Vec<float> x) {
  return bits_as<float>(bits_as<std::uint32_t>(x) & Vec<std::uint32_t>::all(0x7fffffffu));
}
SPURGE_HD Vec<double> magnitude(Vec<double> x) {
  return bits_as<double>(bits_as<std::uint64_t>(x) & Vec<std::uint64_t>::all(0x7fffffffffffffffu));
}

}  // namespace spurge::SPURGE_LEVEL
