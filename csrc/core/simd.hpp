#pragma once
// Lanes<T>: the widened values of Lanes<T>::n neighbours of storage type T, for the instruction set this
// file is compiled for; One<T>: the same face for a single one, for what is left over.
//
// Two registers at a time: bfloat16 neighbours are split into even and odd ones, which takes one shift and
// one mask where a widening shuffle would cost more. Values are rounded to nearest even on store, and every
// instruction set gives the same bits. Accumulators can be loaded and stored in the same order.
// store_past_caches, to addresses that are multiples of 64 bytes, does not first read what it is about
// to overwrite; finish() before anyone else reads.
#include "core/half.hpp"

#if defined(SPURGE_LEVEL_avx2) || defined(SPURGE_LEVEL_avx512)
#include <immintrin.h>
#define SPURGE_LANES
#endif

namespace spurge::SPURGE_LEVEL {

// Software conversions where the instruction set has none.
template <class T>
SPURGE_HD Acc<T> get_one(const T* p) {
  return widen(*p);
}
template <class T>
SPURGE_HD void put_one(T* p, Acc<T> x) {
  narrow(*p, x);
}
#ifdef SPURGE_LANES
SPURGE_HD float get_one(const f16* p) { return _cvtsh_ss(p->bits); }
SPURGE_HD void put_one(f16* p, float x) { p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#endif

template <class T>
struct One {
  static constexpr int n = 1;
  Acc<T> v;
  SPURGE_HD explicit One(Acc<T> x) : v(x) {}
  template <class From>
  SPURGE_HD static One load(const From* p) {
    return One(static_cast<Acc<T>>(get_one(p)));
  }
  template <class To>
  SPURGE_HD void store(To* p) const {
    put_one(p, v);
  }
  SPURGE_HD void store_past_caches(T* p) const { store(p); }
  SPURGE_HD friend One operator+(One a, One b) { return One(a.v + b.v); }
  SPURGE_HD friend One operator*(One a, One b) { return One(a.v * b.v); }
};

#ifdef SPURGE_LANES
SPURGE_HD void finish() { _mm_sfence(); }
#else
SPURGE_HD void finish() {}
#endif

#ifdef SPURGE_LANES

// ---- what the two instruction sets call differently ------------------------------------------------

#ifdef SPURGE_LEVEL_avx512

using F = __m512;
using D = __m512d;
using I = __m512i;
using Half = __m256i;  // a register's worth of lanes, 16 bits each
SPURGE_HD F get(const float* p) { return _mm512_loadu_ps(p); }
SPURGE_HD D get(const double* p) { return _mm512_loadu_pd(p); }
SPURGE_HD D get_wide(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
SPURGE_HD I get(const bf16* p) { return _mm512_loadu_si512(p); }
SPURGE_HD F get(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const Half*>(p)));
}
SPURGE_HD void put(float* p, F x) { _mm512_storeu_ps(p, x); }
SPURGE_HD void put(double* p, D x) { _mm512_storeu_pd(p, x); }
SPURGE_HD void put(bf16* p, I x) { _mm512_storeu_si512(p, x); }
SPURGE_HD void put(f16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<Half*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SPURGE_HD void stream(float* p, F x) { _mm512_stream_ps(p, x); }
SPURGE_HD void stream(double* p, D x) { _mm512_stream_pd(p, x); }
SPURGE_HD void stream(bf16* p, I x) { _mm512_stream_si512(reinterpret_cast<I*>(p), x); }
SPURGE_HD void stream(f16* p, F x) {
  _mm256_stream_si256(reinterpret_cast<Half*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SPURGE_HD F all(float x) { return _mm512_set1_ps(x); }
SPURGE_HD D all(double x) { return _mm512_set1_pd(x); }
SPURGE_HD F add(F a, F b) { return _mm512_add_ps(a, b); }
SPURGE_HD D add(D a, D b) { return _mm512_add_pd(a, b); }
SPURGE_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
SPURGE_HD D mul(D a, D b) { return _mm512_mul_pd(a, b); }
SPURGE_HD F even(I x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
SPURGE_HD F odd(I x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000)))); }
// The upper half of each lane becomes the rounded bfloat16. A NaN must be quiet, with an empty lower half, as
// every NaN is that arithmetic makes or takes over from a bfloat16: then no carry can reach its exponent.
SPURGE_HD I rounded(F x) {
  const I bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
}
SPURGE_HD I joined(F evens, F odds) {
  const I low = _mm512_srli_epi32(rounded(evens), 16), mask = _mm512_set1_epi32(int(0xffff0000));
  return _mm512_ternarylogic_epi32(mask, rounded(odds), low, 0xca);  // mask ? odds : low
}
// a0 a1 a2 ... , b0 b1 b2 ... <-> a0 b0 a1 b1 ...
SPURGE_HD void split(F& a, F& b) {
  const I pick = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const F evens = _mm512_permutex2var_ps(a, pick, b);
  b = _mm512_permutex2var_ps(a, _mm512_add_epi32(pick, _mm512_set1_epi32(1)), b);
  a = evens;
}
SPURGE_HD void merge(F& a, F& b) {
  const I pick = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const F low = _mm512_permutex2var_ps(a, pick, b);
  b = _mm512_permutex2var_ps(a, _mm512_add_epi32(pick, _mm512_set1_epi32(8)), b);
  a = low;
}

#else  // avx2

using F = __m256;
using D = __m256d;
using I = __m256i;
using Half = __m128i;
SPURGE_HD F get(const float* p) { return _mm256_loadu_ps(p); }
SPURGE_HD D get(const double* p) { return _mm256_loadu_pd(p); }
SPURGE_HD D get_wide(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
SPURGE_HD I get(const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
SPURGE_HD F get(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const Half*>(p))); }
SPURGE_HD void put(float* p, F x) { _mm256_storeu_ps(p, x); }
SPURGE_HD void put(double* p, D x) { _mm256_storeu_pd(p, x); }
SPURGE_HD void put(bf16* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }
SPURGE_HD void put(f16* p, F x) {
  _mm_storeu_si128(reinterpret_cast<Half*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SPURGE_HD void stream(float* p, F x) { _mm256_stream_ps(p, x); }
SPURGE_HD void stream(double* p, D x) { _mm256_stream_pd(p, x); }
SPURGE_HD void stream(bf16* p, I x) { _mm256_stream_si256(reinterpret_cast<I*>(p), x); }
SPURGE_HD void stream(f16* p, F x) {
  _mm_stream_si128(reinterpret_cast<Half*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SPURGE_HD F all(float x) { return _mm256_set1_ps(x); }
SPURGE_HD D all(double x) { return _mm256_set1_pd(x); }
SPURGE_HD F add(F a, F b) { return _mm256_add_ps(a, b); }
SPURGE_HD D add(D a, D b) { return _mm256_add_pd(a, b); }
SPURGE_HD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
SPURGE_HD D mul(D a, D b) { return _mm256_mul_pd(a, b); }
SPURGE_HD F even(I x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
SPURGE_HD F odd(I x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000)))); }
SPURGE_HD I rounded(F x) {
  const I bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
}
SPURGE_HD I joined(F evens, F odds) {
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded(evens), 16), rounded(odds), 0xaa);
}
SPURGE_HD void split(F& a, F& b) {
  const F evens = _mm256_shuffle_ps(a, b, 0x88), odds = _mm256_shuffle_ps(a, b, 0xdd);
  a = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(evens), 0xd8));
  b = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odds), 0xd8));
}
SPURGE_HD void merge(F& a, F& b) {
  const F low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
}

#endif

// ---- the common face -------------------------------------------------------------------------------

template <class T>
struct Lanes {  // float and f16: neighbours stay in order
  static constexpr int h = sizeof(F) / 4, n = 2 * h;
  F a, b;
  SPURGE_HD Lanes(F x, F y) : a(x), b(y) {}
  SPURGE_HD explicit Lanes(float x) : Lanes(all(x), all(x)) {}
  template <class From>
  SPURGE_HD static Lanes load(const From* p) {
    return Lanes(get(p), get(p + h));
  }
  template <class To>
  SPURGE_HD void store(To* p) const {
    put(p, a), put(p + h, b);
  }
  SPURGE_HD void store_past_caches(T* p) const { stream(p, a), stream(p + h, b); }
  SPURGE_HD friend Lanes operator+(Lanes x, Lanes y) { return Lanes(add(x.a, y.a), add(x.b, y.b)); }
  SPURGE_HD friend Lanes operator*(Lanes x, Lanes y) { return Lanes(mul(x.a, y.a), mul(x.b, y.b)); }
};

template <>
struct Lanes<bf16> {  // a: the even neighbours, b: the odd ones
  static constexpr int h = sizeof(F) / 4, n = 2 * h;
  F a, b;
  SPURGE_HD Lanes(F x, F y) : a(x), b(y) {}
  SPURGE_HD explicit Lanes(float x) : Lanes(all(x), all(x)) {}
  SPURGE_HD static Lanes load(const bf16* p) {
    const I x = get(p);
    return Lanes(even(x), odd(x));
  }
  SPURGE_HD static Lanes load(const float* p) {
    F x = get(p), y = get(p + h);
    split(x, y);
    return Lanes(x, y);
  }
  SPURGE_HD void store(bf16* p) const { put(p, joined(a, b)); }
  SPURGE_HD void store_past_caches(bf16* p) const { stream(p, joined(a, b)); }
  SPURGE_HD void store(float* p) const {
    F x = a, y = b;
    merge(x, y);
    put(p, x), put(p + h, y);
  }
  SPURGE_HD friend Lanes operator+(Lanes x, Lanes y) { return Lanes(add(x.a, y.a), add(x.b, y.b)); }
  SPURGE_HD friend Lanes operator*(Lanes x, Lanes y) { return Lanes(mul(x.a, y.a), mul(x.b, y.b)); }
};

template <>
struct Lanes<double> {
  static constexpr int h = sizeof(D) / 8, n = 2 * h;
  D a, b;
  SPURGE_HD Lanes(D x, D y) : a(x), b(y) {}
  SPURGE_HD explicit Lanes(double x) : Lanes(all(x), all(x)) {}
  SPURGE_HD static Lanes load(const double* p) {
    return Lanes(get(p), get(p + h));
  }
  SPURGE_HD static Lanes load(const float* p) { return Lanes(get_wide(p), get_wide(p + h)); }
  SPURGE_HD void store(double* p) const { put(p, a), put(p + h, b); }
  SPURGE_HD void store_past_caches(double* p) const { stream(p, a), stream(p + h, b); }
  SPURGE_HD friend Lanes operator+(Lanes x, Lanes y) { return Lanes(add(x.a, y.a), add(x.b, y.b)); }
  SPURGE_HD friend Lanes operator*(Lanes x, Lanes y) { return Lanes(mul(x.a, y.a), mul(x.b, y.b)); }
};

#undef SPURGE_LANES
#else

template <class T>
using Lanes = One<T>;  // the compiler's own vectoriser does what it can

#endif

}  // namespace spurge::SPURGE_LEVEL
