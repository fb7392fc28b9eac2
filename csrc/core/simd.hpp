#pragma once
// Lanes<float> and Lanes<double> of the level this file is compiled for, and One<...>, a single lane
// with the same face for what is left over. Sixteen-bit formats are widened on load and rounded to
// nearest even on store; every level gives the same bits.
#include "core/half.hpp"

#if defined(SPURGE_LEVEL_avx2) || defined(SPURGE_LEVEL_avx512)
#include <immintrin.h>
#endif

namespace spurge::SPURGE_LEVEL {

template <class A>
struct One {
  static constexpr int n = 1;
  A v;
  SPURGE_HD explicit One(A x) : v(x) {}
  template <class T>
  SPURGE_HD static One load(const T* p) {
    return One(static_cast<A>(widen(*p)));
  }
  template <class T>
  SPURGE_HD void store(T* p) const {
    narrow(*p, v);
  }
  SPURGE_HD friend One operator+(One a, One b) { return One(a.v + b.v); }
  SPURGE_HD friend One operator*(One a, One b) { return One(a.v * b.v); }
};

#if defined(SPURGE_LEVEL_avx512)

template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int n = 16;
  __m512 v;
  SPURGE_HD explicit Lanes(__m512 x) : v(x) {}
  SPURGE_HD explicit Lanes(float x) : v(_mm512_set1_ps(x)) {}
  SPURGE_HD static Lanes load(const float* p) { return Lanes(_mm512_loadu_ps(p)); }
  SPURGE_HD static Lanes load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return Lanes(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
  SPURGE_HD static Lanes load(const f16* p) {
    return Lanes(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  SPURGE_HD void store(float* p) const { _mm512_storeu_ps(p, v); }
  SPURGE_HD void store(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(chosen));
  }
  SPURGE_HD void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  SPURGE_HD friend Lanes operator+(Lanes a, Lanes b) { return Lanes(_mm512_add_ps(a.v, b.v)); }
  SPURGE_HD friend Lanes operator*(Lanes a, Lanes b) { return Lanes(_mm512_mul_ps(a.v, b.v)); }
};

template <>
struct Lanes<double> {
  static constexpr int n = 8;
  __m512d v;
  SPURGE_HD explicit Lanes(__m512d x) : v(x) {}
  SPURGE_HD explicit Lanes(double x) : v(_mm512_set1_pd(x)) {}
  SPURGE_HD static Lanes load(const double* p) { return Lanes(_mm512_loadu_pd(p)); }
  SPURGE_HD static Lanes load(const float* p) { return Lanes(_mm512_cvtps_pd(_mm256_loadu_ps(p))); }
  SPURGE_HD void store(double* p) const { _mm512_storeu_pd(p, v); }
  SPURGE_HD friend Lanes operator+(Lanes a, Lanes b) { return Lanes(_mm512_add_pd(a.v, b.v)); }
  SPURGE_HD friend Lanes operator*(Lanes a, Lanes b) { return Lanes(_mm512_mul_pd(a.v, b.v)); }
};

#elif defined(SPURGE_LEVEL_avx2)

template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int n = 8;
  __m256 v;
  SPURGE_HD explicit Lanes(__m256 x) : v(x) {}
  SPURGE_HD explicit Lanes(float x) : v(_mm256_set1_ps(x)) {}
  SPURGE_HD static Lanes load(const float* p) { return Lanes(_mm256_loadu_ps(p)); }
  SPURGE_HD static Lanes load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return Lanes(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
  SPURGE_HD static Lanes load(const f16* p) {
    return Lanes(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  SPURGE_HD void store(float* p) const { _mm256_storeu_ps(p, v); }
  SPURGE_HD void store(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1)));
  }
  SPURGE_HD void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  SPURGE_HD friend Lanes operator+(Lanes a, Lanes b) { return Lanes(_mm256_add_ps(a.v, b.v)); }
  SPURGE_HD friend Lanes operator*(Lanes a, Lanes b) { return Lanes(_mm256_mul_ps(a.v, b.v)); }
};

template <>
struct Lanes<double> {
  static constexpr int n = 4;
  __m256d v;
  SPURGE_HD explicit Lanes(__m256d x) : v(x) {}
  SPURGE_HD explicit Lanes(double x) : v(_mm256_set1_pd(x)) {}
  SPURGE_HD static Lanes load(const double* p) { return Lanes(_mm256_loadu_pd(p)); }
  SPURGE_HD static Lanes load(const float* p) { return Lanes(_mm256_cvtps_pd(_mm_loadu_ps(p))); }
  SPURGE_HD void store(double* p) const { _mm256_storeu_pd(p, v); }
  SPURGE_HD friend Lanes operator+(Lanes a, Lanes b) { return Lanes(_mm256_add_pd(a.v, b.v)); }
  SPURGE_HD friend Lanes operator*(Lanes a, Lanes b) { return Lanes(_mm256_mul_pd(a.v, b.v)); }
};

#else

template <class A>
using Lanes = One<A>;  // the compiler's own vectoriser does what it can

#endif

}  // namespace spurge::SPURGE_LEVEL
