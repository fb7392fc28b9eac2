#pragma once
// The same words as in simd_avx512.hpp, which says what they mean.
#include "core/simd_registers.hpp"

namespace spurge::avx2 {

// ---- memory ---------------------------------------------------------------------------------------

template <class I>
SPURGE_HD __m256i first_lanes(std::int64_t some) {
  return (__m256i)(Vec<I>::steps().v < static_cast<I>(some));
}
SPURGE_HD void load_some(Vec<float>& to, const float* p, std::int64_t some) {
  to.v = _mm256_maskload_ps(p, first_lanes<std::int32_t>(some));
}
SPURGE_HD void load_some(Vec<double>& to, const double* p, std::int64_t some) {
  to.v = _mm256_maskload_pd(p, first_lanes<std::int64_t>(some));
}
SPURGE_HD void store_some(Vec<float> x, float* p, std::int64_t some) {
  _mm256_maskstore_ps(p, first_lanes<std::int32_t>(some), x.v);
}
SPURGE_HD void store_some(Vec<double> x, double* p, std::int64_t some) {
  _mm256_maskstore_pd(p, first_lanes<std::int64_t>(some), x.v);
}

SPURGE_HD __m128i halves(Vec<float> x) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SPURGE_HD void store_halves(f16* p, Vec<float> x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves(x));
}
SPURGE_HD void stream(float* p, Vec<float> x) { _mm256_stream_ps(p, x.v); }
SPURGE_HD void stream(double* p, Vec<double> x) { _mm256_stream_pd(p, x.v); }
SPURGE_HD void stream(f16* p, Vec<float> x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), halves(x)); }
SPURGE_HD void stream(bf16* p, Vec<std::uint32_t> x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x.v);
}

// ---- numbers --------------------------------------------------------------------------------------

SPURGE_HD Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
SPURGE_HD Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}

SPURGE_HD Vec<float> larger(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
SPURGE_HD Vec<double> larger(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }

SPURGE_HD double sum(Vec<double> x) {
  double lanes[4];
  x.store(lanes);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

SPURGE_HD Vec<double> rounded(Vec<double> x) {
  return {_mm256_round_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SPURGE_HD Vec<double> times_power(Vec<double> x, Vec<double> k) {
  const __m256i whole = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(k.v));
  const __m256i power = _mm256_slli_epi64(_mm256_add_epi64(whole, _mm256_set1_epi64x(1023)), 52);
  return {x.v * _mm256_castsi256_pd(power)};
}

SPURGE_HD Vec<float> exponent(Vec<float> x) {
  const auto biased = bits_as<std::uint32_t>(x) >> 23;
  return {_mm256_cvtepi32_ps((__m256i)(biased - Vec<std::uint32_t>::all(127)).v)};
}
SPURGE_HD Vec<float> mantissa(Vec<float> x) {
  using Words = Vec<std::uint32_t>;
  return bits_as<float>((bits_as<std::uint32_t>(x) & Words::all(0x7fffffu)) | Words::all(0x3f800000u));
}

constexpr int kTable = 8;
SPURGE_HD Vec<float> looked_up(const float* table, Vec<std::uint32_t> i) {
  return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)i.v)};
}

// ---- comparisons ----------------------------------------------------------------------------------

template <class E>
struct Mask {  // all bits of a lane, or none
  typename Vec<E>::Register v;
  SPURGE_HD __m256i bits() const { return (__m256i)v; }
  SPURGE_HD friend Mask operator&(Mask a, Mask b) { return of(_mm256_and_si256(a.bits(), b.bits())); }
  SPURGE_HD friend Mask operator|(Mask a, Mask b) { return of(_mm256_or_si256(a.bits(), b.bits())); }
  SPURGE_HD friend bool any(Mask m) { return _mm256_movemask_epi8(m.bits()) != 0; }
  SPURGE_HD friend bool every(Mask m) { return _mm256_movemask_epi8(m.bits()) == -1; }
  SPURGE_HD static Mask of(__m256i bits) { return {(typename Vec<E>::Register)bits}; }
};

SPURGE_HD Mask<std::int32_t> operator<(Vec<std::int32_t> a, Vec<std::int32_t> b) { return {a.v < b.v}; }
SPURGE_HD Mask<std::int64_t> operator<(Vec<std::int64_t> a, Vec<std::int64_t> b) { return {a.v < b.v}; }
SPURGE_HD Mask<double> operator<(Vec<double> a, Vec<double> b) {
  return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)};
}
SPURGE_HD Mask<float> is_nan(Vec<float> x) { return {_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)}; }
SPURGE_HD Mask<double> is_nan(Vec<double> x) { return {_mm256_cmp_pd(x.v, x.v, _CMP_UNORD_Q)}; }

template <class E>
SPURGE_HD Vec<E> select(Mask<E> m, Vec<E> a, Vec<E> b) {
  return {(typename Vec<E>::Register)_mm256_blendv_epi8((__m256i)b.v, (__m256i)a.v, m.bits())};
}

template <class E>
SPURGE_HD Vec<E> counted(Vec<E> count, Mask<E> m) {
  return {count.v - m.v};
}

// ---- lanes of other widths ------------------------------------------------------------------------

SPURGE_HD Vec<std::uint64_t> low_product(Vec<std::uint64_t> a, Vec<std::uint64_t> b) {
  return {(Vec<std::uint64_t>::Register)_mm256_mul_epu32((__m256i)a.v, (__m256i)b.v)};
}
SPURGE_HD Vec<std::uint32_t> low_halves(Vec<std::uint64_t> evens, Vec<std::uint64_t> odds) {
  const __m256i upper = (__m256i)(odds << 32).v;
  return {(Vec<std::uint32_t>::Register)_mm256_blend_epi32((__m256i)evens.v, upper, 0xaa)};
}

SPURGE_HD Vec<std::uint32_t> upper_halves(Vec<std::uint32_t> upper, Vec<std::uint32_t> lower) {
  return {(Vec<std::uint32_t>::Register)_mm256_blend_epi16((__m256i)lower.v, (__m256i)upper.v, 0xaa)};
}

SPURGE_HD void split(Vec<float>& a, Vec<float>& b) {
  const __m256 evens = _mm256_shuffle_ps(a.v, b.v, 0x88), odds = _mm256_shuffle_ps(a.v, b.v, 0xdd);
  a.v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(evens), 0xd8));
  b.v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odds), 0xd8));
}
SPURGE_HD void merge(Vec<float>& a, Vec<float>& b) {
  const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
  a.v = _mm256_permute2f128_ps(low, high, 0x20);
  b.v = _mm256_permute2f128_ps(low, high, 0x31);
}

}  // namespace spurge::avx2
