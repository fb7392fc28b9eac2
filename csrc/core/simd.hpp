#pragma once
// The words that vector loops are written in. The names and intrinsics of an instruction set stand here and in
// the files simd_*.hpp, and nowhere else.
//
//   Vec<E>    n neighbours of E: load (which widens storage types), store, operators; larger, smaller, positive,
//             magnitude, fused, rounded, times_power, sum, largest, bits_as; in registers also exponent, mantissa,
//             looked_up, low_product, low_halves
//   Mask<E>   where a comparison of two Vec<E> holds: any, every, select, counted
//   Lanes<T>  two Vec of neighbours of storage type T, widened: load, store, + and *, magnitude, larger_or_nan
//   One<T>    the same face for a single neighbour, for what is left over
//
// Vec is a register, and SPURGE_REGISTERS defined, where simd_registers.hpp says; elsewhere it is an array. Numbers
// are rounded to nearest even, and every instruction set gives the same bits, except by what says otherwise.
#include "core/half.hpp"

#if defined(SPURGE_LEVEL_avx512)
#include "core/simd_avx512.hpp"
#elif defined(SPURGE_LEVEL_avx2)
#include "core/simd_avx2.hpp"
#else
#include "core/simd_arrays.hpp"
#endif

// Before a loop over registers: what is indexed by a variable would lie in memory.
#if defined(__clang__)
#define SPURGE_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define SPURGE_UNROLL _Pragma("GCC unroll 16")
#else
#define SPURGE_UNROLL
#endif

namespace spurge::SPURGE_LEVEL {

// ---- made of the others ---------------------------------------------------------------------------

template <class E>
SPURGE_HD Vec<E> positive(Vec<E> x) {  // NaN stays NaN
  return larger(Vec<E>::all(E(0)), x);
}

// The largest lane; NaN where there is one.
template <class E>
SPURGE_HD E largest(Vec<E> x) {
  E lanes[Vec<E>::n];
  x.store(lanes);
  E top = lanes[0];
  for (E lane : lanes) top = lane > top || lane != lane ? lane : top;
  return top;
}

// ---- memory and modes -----------------------------------------------------------------------------

// Asks for a cache line early: into the nearest cache, or the second one.
SPURGE_HD void fetch([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#endif
}
SPURGE_HD void fetch_to_second([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#endif
}

// Numbers below the smallest normal one cost a hundred times as much as others. While this lives, they are 0.
class FlushTiny {
 public:
#if defined(__SSE2__)
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushTiny() { _mm_setcsr(before_); }
  FlushTiny(const FlushTiny&) = delete;
  FlushTiny& operator=(const FlushTiny&) = delete;

 private:
  unsigned before_;
#endif
};

// ---- a single one ---------------------------------------------------------------------------------

// Software conversions where the instruction set has none.
template <class T>
SPURGE_HD Acc<T> get_one(const T* p) {
  return widen(*p);
}
template <class T>
SPURGE_HD void put_one(T* p, Acc<T> x) {
  narrow(*p, x);
}
#ifdef SPURGE_REGISTERS
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
  SPURGE_HD friend One magnitude(One x) { return One(x.v < 0 ? -x.v : x.v); }
  SPURGE_HD friend One larger_or_nan(One a, One b) { return a.v > b.v || a.v != a.v ? a : b; }
};

// ---- two registers --------------------------------------------------------------------------------

#ifdef SPURGE_REGISTERS

// store_past_caches, to addresses that are multiples of 64 bytes, does not first read what it is about to
// overwrite; finish() before anyone else reads.
SPURGE_HD void finish() { _mm_sfence(); }

// Neighbours stay in order, or are split into even and odd ones where that is cheaper: bfloat16 takes a shift
// and a mask then, where widening in order takes a shuffle. Accumulators are loaded and stored in the same order.
template <class T>
struct Lanes {
  using V = Vec<Acc<T>>;
  static constexpr int n = 2 * V::n;
  V a, b;
  SPURGE_HD Lanes(V x, V y) : a(x), b(y) {}
  SPURGE_HD explicit Lanes(Acc<T> x) : a(V::all(x)), b(a) {}
  template <class From>
  SPURGE_HD static Lanes load(const From* p) {
    return Lanes(V::load(p), V::load(p + V::n));
  }
  template <class To>
  SPURGE_HD void store(To* p) const {
    a.store(p), b.store(p + V::n);
  }
  SPURGE_HD void store_past_caches(T* p) const { a.store_past_caches(p), b.store_past_caches(p + V::n); }
};

template <>
struct Lanes<bf16> {  // a: the even neighbours, b: the odd ones
  using V = Vec<float>;
  using Words = Vec<std::uint32_t>;
  static constexpr int n = 2 * V::n;
  V a, b;
  SPURGE_HD Lanes(V x, V y) : a(x), b(y) {}
  SPURGE_HD explicit Lanes(float x) : a(V::all(x)), b(a) {}
  SPURGE_HD static Lanes load(const bf16* p) {
    const Words x = Words::of_bytes(p);
    return Lanes(bits_as<float>(x << 16), bits_as<float>(x & Words::all(0xffff0000u)));
  }
  SPURGE_HD static Lanes load(const float* p) {
    Lanes x(V::load(p), V::load(p + V::n));
    split(x.a, x.b);
    return x;
  }
  SPURGE_HD void store(bf16* p) const { joined().store_bytes(p); }
  SPURGE_HD void store_past_caches(bf16* p) const { joined().store_past_caches(p); }
  SPURGE_HD void store(float* p) const {
    Lanes x = *this;
    merge(x.a, x.b);
    x.a.store(p), x.b.store(p + V::n);
  }

 private:
  // The upper half of each word becomes the rounded bfloat16. A NaN must be quiet, with an empty lower half, as
  // every NaN is that arithmetic makes or takes over from a bfloat16: then no carry can reach its exponent.
  SPURGE_HD static Words rounded(V x) {
    const Words bits = bits_as<std::uint32_t>(x), last = (bits >> 16) & Words::all(1);
    return bits + Words::all(0x7fff) + last;
  }
  SPURGE_HD Words joined() const { return upper_halves(rounded(b), rounded(a) >> 16); }
};

template <class T>
SPURGE_HD Lanes<T> operator+(Lanes<T> x, Lanes<T> y) {
  return Lanes<T>(x.a + y.a, x.b + y.b);
}
template <class T>
SPURGE_HD Lanes<T> operator*(Lanes<T> x, Lanes<T> y) {
  return Lanes<T>(x.a * y.a, x.b * y.b);
}
template <class T>
SPURGE_HD Lanes<T> magnitude(Lanes<T> x) {
  return Lanes<T>(magnitude(x.a), magnitude(x.b));
}

// The larger one; NaN where one is.
template <class E>
SPURGE_HD Vec<E> larger_or_nan(Vec<E> a, Vec<E> b) {
  return select(is_nan(a), a, larger(a, b));
}
template <class T>
SPURGE_HD Lanes<T> larger_or_nan(Lanes<T> x, Lanes<T> y) {
  return Lanes<T>(larger_or_nan(x.a, y.a), larger_or_nan(x.b, y.b));
}

#else

SPURGE_HD void finish() {}

template <class T>
using Lanes = One<T>;  // the compiler's own vectoriser does what it can

#endif

}  // namespace spurge::SPURGE_LEVEL
