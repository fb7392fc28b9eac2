#pragma once
// Run-time dtype -> compile-time type.
#include "core/check.hpp"
#include "core/half.hpp"
#include "spurge/types.hpp"

namespace spurge {

constexpr const char* name(DType t) {
  switch (t) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
  }
  return "?";
}

template <class T>
struct Tag {
  using type = T;
};

// f is called once, with Tag<float>, Tag<double>, Tag<bf16> or Tag<f16>.
template <class F>
decltype(auto) dispatch_floating(DType t, F&& f) {
  switch (t) {
    case DType::f32: return f(Tag<float>{});
    case DType::f64: return f(Tag<double>{});
    case DType::bf16: return f(Tag<bf16>{});
    case DType::f16: return f(Tag<f16>{});
  }
  fail("unsupported dtype ", static_cast<int>(t));
}

// f is called once, with Tag<float> or Tag<double>.
template <class F>
decltype(auto) dispatch_32_or_64(const char* arg, DType t, F&& f) {
  if (t == DType::f64) return f(Tag<double>{});
  SPURGE_CHECK(t == DType::f32, arg, ": dtype must be float32 or float64, got ", name(t));
  return f(Tag<float>{});
}

}  // namespace spurge
