#pragma once
// Vec on any processor: an array that the compiler makes registers of. simd_registers.hpp and simd_avx512.hpp
// say what the words mean.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/half.hpp"

namespace spurge::SPURGE_LEVEL {

template <class E>
struct Vec {
  static constexpr int n = 4;
  E v[n];

  template <class F>
  SPURGE_HD static Vec each(F f) {
    Vec to;
    for (int i = 0; i < n; ++i) to.v[i] = static_cast<E>(f(i));
    return to;
  }
  SPURGE_HD static Vec all(E x) {
    return each([&](int) { return x; });
  }
  SPURGE_HD static Vec steps() {
    return each([](int i) { return i; });
  }
  template <class T>
  SPURGE_HD static Vec load(const T* p) {
    if constexpr (sizeof(T) == 2) return each([&](int i) { return widen(p[i]); });
    else return each([&](int i) { return p[i]; });
  }
  SPURGE_HD static Vec load(const E* p, std::int64_t some) {
    return each([&](int i) { return i < some ? p[i] : E(0); });
  }
  SPURGE_HD void store(E* p) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  SPURGE_HD void store(E* p, std::int64_t some) const {
    for (int i = 0; i < some; ++i) p[i] = v[i];
  }

  SPURGE_HD friend Vec operator+(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  SPURGE_HD friend Vec operator-(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  SPURGE_HD friend Vec operator*(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  SPURGE_HD friend Vec operator/(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  SPURGE_HD friend Vec operator&(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] & b.v[i]; });
  }
  SPURGE_HD friend Vec operator|(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] | b.v[i]; });
  }
  SPURGE_HD friend Vec operator^(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] ^ b.v[i]; });
  }
  SPURGE_HD friend Vec operator<<(Vec a, int by) {
    return each([&](int i) { return a.v[i] << by; });
  }
  SPURGE_HD friend Vec operator>>(Vec a, int by) {
    return each([&](int i) { return a.v[i] >> by; });
  }
  SPURGE_HD friend Vec larger(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  SPURGE_HD friend Vec smaller(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  SPURGE_HD friend Vec magnitude(Vec x) {
    return each([&](int i) { return x.v[i] < 0 ? -x.v[i] : x.v[i]; });
  }
  SPURGE_HD friend Vec fused(Vec a, Vec b, Vec c) { return a * b + c; }
};

template <class To, class E>
SPURGE_HD Vec<To> bits_as(Vec<E> x) {
  Vec<To> to;
  static_assert(sizeof to == sizeof x, "lanes of the same width");
  memcpy(to.v, x.v, sizeof x);
  return to;
}

SPURGE_HD double sum(Vec<double> x) { return (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]); }
SPURGE_HD Vec<double> rounded(Vec<double> x) {
  return Vec<double>::each([&](int i) { return __builtin_nearbyint(x.v[i]); });
}
SPURGE_HD Vec<double> times_power(Vec<double> x, Vec<double> k) {
  return Vec<double>::each(
      [&](int i) { return __builtin_ldexp(x.v[i], k.v[i] == k.v[i] ? static_cast<int>(k.v[i]) : 0); });
}

// ---- comparisons ----------------------------------------------------------------------------------

template <int Bytes>
struct MaskLane {
  using type = std::int32_t;
};
template <>
struct MaskLane<8> {
  using type = std::int64_t;
};

template <class E>
struct Mask {  // all bits of a lane, or none
  using Lane = typename MaskLane<sizeof(E)>::type;
  Vec<Lane> lanes;
  template <class F>
  SPURGE_HD static Mask where(F f) {
    return {Vec<Lane>::each([&](int i) { return -static_cast<Lane>(f(i)); })};
  }
  SPURGE_HD friend Mask operator&(Mask a, Mask b) { return {a.lanes & b.lanes}; }
  SPURGE_HD friend Mask operator|(Mask a, Mask b) { return {a.lanes | b.lanes}; }
  SPURGE_HD friend bool any(Mask m) {
    Lane some = 0;
    for (Lane lane : m.lanes.v) some |= lane;
    return some;
  }
  SPURGE_HD friend bool every(Mask m) {
    Lane all = -1;
    for (Lane lane : m.lanes.v) all &= lane;
    return all;
  }
};

template <class E>
SPURGE_HD Mask<E> operator<(Vec<E> a, Vec<E> b) {
  return Mask<E>::where([&](int i) { return a.v[i] < b.v[i]; });
}
template <class E>
SPURGE_HD Mask<E> is_nan(Vec<E> x) {
  return Mask<E>::where([&](int i) { return x.v[i] != x.v[i]; });
}

template <class E>
SPURGE_HD Vec<E> select(Mask<E> m, Vec<E> a, Vec<E> b) {
  return Vec<E>::each([&](int i) { return m.lanes.v[i] ? a.v[i] : b.v[i]; });
}
template <class E>
SPURGE_HD Vec<E> counted(Vec<E> count, Mask<E> m) {
  return count - m.lanes;
}

}  // namespace spurge::SPURGE_LEVEL
