#pragma once
#include "core/simd_registers.hpp"

namespace spurge::avx512 {

// ---- memory ---------------------------------------------------------------------------------------

SPURGE_HD unsigned first_bits(std::int64_t some) { return (1u << some) - 1; }
SPURGE_HD void load_some(Vec<float>& to, const float* p, std::int64_t some) {
  to.v = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(some)), p);
}
SPURGE_HD void load_some(Vec<double>& to, const double* p, std::int64_t some) {
  to.v = _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_bits(some)), p);
}
SPURGE_HD void store_some(Vec<float> x, float* p, std::int64_t some) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_bits(some)), x.v);
}
SPURGE_HD void store_some(Vec<double> x, double* p, std::int64_t some) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_bits(some)), x.v);
}

SPURGE_HD __m256i halves(Vec<float> x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SPURGE_HD void store_halves(f16* p, Vec<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves(x));
}
SPURGE_HD void stream(float* p, Vec<float> x) { _mm512_stream_ps(p, x.v); }
SPURGE_HD void stream(double* p, Vec<double> x) { _mm512_stream_pd(p, x.v); }
SPURGE_HD void stream(f16* p, Vec<float> x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves(x)); }
SPURGE_HD void stream(bf16* p, Vec<std::uint32_t> x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x.v);
}

// ---- numbers --------------------------------------------------------------------------------------

// a * b + c, rounded once where the instruction set can.
SPURGE_HD Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
SPURGE_HD Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}

// The larger one; b where one is NaN.
SPURGE_HD Vec<float> larger(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
SPURGE_HD Vec<double> larger(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }

// The order of the sum is the instruction set's.
SPURGE_HD double sum(Vec<double> x) { return _mm512_reduce_add_pd(x.v); }

SPURGE_HD Vec<double> rounded(Vec<double> x) {  // to a whole number
  return {_mm512_roundscale_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x 2^k
SPURGE_HD Vec<double> times_power(Vec<double> x, Vec<double> k) { return {_mm512_scalef_pd(x.v, k.v)}; }

// Of a positive normal number x = mantissa * 2^exponent, with the mantissa in [1, 2).
SPURGE_HD Vec<float> exponent(Vec<float> x) { return {_mm512_getexp_ps(x.v)}; }
SPURGE_HD Vec<float> mantissa(Vec<float> x) {
  return {_mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)};
}

// table[i % kTable]
constexpr int kTable = 32;
SPURGE_HD Vec<float> looked_up(const float* table, Vec<std::uint32_t> i) {
  return {_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)i.v, _mm512_loadu_ps(table + 16))};
}

// ---- comparisons ----------------------------------------------------------------------------------

template <class E>
struct Mask {
  unsigned bits;
  SPURGE_HD friend Mask operator&(Mask a, Mask b) { return {a.bits & b.bits}; }
  SPURGE_HD friend Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
  SPURGE_HD friend bool any(Mask m) { return m.bits; }
  SPURGE_HD friend bool every(Mask m) { return m.bits == first_bits(Vec<E>::n); }
};

SPURGE_HD Mask<std::int32_t> operator<(Vec<std::int32_t> a, Vec<std::int32_t> b) {
  return {_mm512_cmplt_epi32_mask((__m512i)a.v, (__m512i)b.v)};
}
SPURGE_HD Mask<std::int64_t> operator<(Vec<std::int64_t> a, Vec<std::int64_t> b) {
  return {_mm512_cmplt_epi64_mask((__m512i)a.v, (__m512i)b.v)};
}
SPURGE_HD Mask<double> operator<(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)};
}
SPURGE_HD Mask<float> is_nan(Vec<float> x) { return {_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q)}; }
SPURGE_HD Mask<double> is_nan(Vec<double> x) { return {_mm512_cmp_pd_mask(x.v, x.v, _CMP_UNORD_Q)}; }

// a where the mask holds, and b elsewhere.
template <class E>
SPURGE_HD Vec<E> select(Mask<E> m, Vec<E> a, Vec<E> b) {
  using R = typename Vec<E>::Register;
  if constexpr (sizeof(E) == 4)
    return {(R)_mm512_mask_blend_epi32(static_cast<__mmask16>(m.bits), (__m512i)b.v, (__m512i)a.v)};
  else
    return {(R)_mm512_mask_blend_epi64(static_cast<__mmask8>(m.bits), (__m512i)b.v, (__m512i)a.v)};
}

// One more where the mask holds.
template <class E>
SPURGE_HD Vec<E> counted(Vec<E> count, Mask<E> m) {
  return select(m, count + Vec<E>::all(1), count);
}

// ---- lanes of other widths ------------------------------------------------------------------------

// Of the lower halves of 64-bit lanes.
SPURGE_HD Vec<std::uint64_t> low_product(Vec<std::uint64_t> a, Vec<std::uint64_t> b) {
  return {(Vec<std::uint64_t>::Register)_mm512_mul_epu32((__m512i)a.v, (__m512i)b.v)};
}
SPURGE_HD Vec<std::uint32_t> low_halves(Vec<std::uint64_t> evens, Vec<std::uint64_t> odds) {
  const __m512i upper = (__m512i)(odds << 32).v;
  return {(Vec<std::uint32_t>::Register)_mm512_mask_blend_epi32(0xaaaa, (__m512i)evens.v, upper)};
}

// The upper 16 bits of each word of one, the lower 16 of the other.
SPURGE_HD Vec<std::uint32_t> upper_halves(Vec<std::uint32_t> upper, Vec<std::uint32_t> lower) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));  // mask ? upper : lower
  const __m512i joined = _mm512_ternarylogic_epi32(mask, (__m512i)upper.v, (__m512i)lower.v, 0xca);
  return {(Vec<std::uint32_t>::Register)joined};
}

// a0 a1 a2 ... , b0 b1 b2 ... <-> a0 b0 a1 b1 ...
SPURGE_HD void split(Vec<float>& a, Vec<float>& b) {
  const __m512i pick = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 evens = _mm512_permutex2var_ps(a.v, pick, b.v);
  b.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(pick, _mm512_set1_epi32(1)), b.v);
  a.v = evens;
}
SPURGE_HD void merge(Vec<float>& a, Vec<float>& b) {
  const __m512i pick = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512 low = _mm512_permutex2var_ps(a.v, pick, b.v);
  b.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(pick, _mm512_set1_epi32(8)), b.v);
  a.v = low;
}

}  // namespace spurge::avx512
