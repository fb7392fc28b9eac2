#pragma once
// Storage types of the 16-bit formats: read, compute wider, write back. No arithmetic of their own.
#include <cstdint>
#include <cstring>

// Always inlined, because some callers are compiled once per instruction set: no copy of one set may
// be linked in place of another's.
#ifdef __CUDACC__
#define SPURGE_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define SPURGE_HD __forceinline
#else
#define SPURGE_HD __attribute__((always_inline)) inline
#endif

namespace spurge {

struct bf16 {
  std::uint16_t bits;
};

struct f16 {
  std::uint16_t bits;
};

// The type a kernel computes and accumulates in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

SPURGE_HD float float_of_bits(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SPURGE_HD std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SPURGE_HD float widen(float x) { return x; }
SPURGE_HD double widen(double x) { return x; }
SPURGE_HD float widen(bf16 x) { return float_of_bits(std::uint32_t(x.bits) << 16); }
SPURGE_HD float widen(f16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu, wide = magnitude << 13;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | wide);
  // From half's bias to float's. A subnormal half is first added to 2^-14: nothing here is a subnormal float, which
  // a processor may have been told to take for 0.
  const float normal = float_of_bits(wide + 0x38000000u), raised = float_of_bits(wide + 0x38800000u);
  return float_of_bits(sign | bits_of_float(magnitude < 0x400u ? raised - float_of_bits(0x38800000u) : normal));
#endif
}

// Round to nearest, ties to even.
SPURGE_HD void narrow(float& to, float x) { to = x; }
SPURGE_HD void narrow(double& to, double x) { to = x; }
SPURGE_HD void narrow(bf16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const std::uint32_t bits = bits_of_float(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = std::uint16_t(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}
SPURGE_HD void narrow(f16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const std::uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the subnormal's bits, rounded
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to.bits = std::uint16_t(sign | half);
#endif
}

}  // namespace spurge
