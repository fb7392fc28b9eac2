#include "core/isa.hpp"

#include <cstdlib>
#include <string>

#include "core/check.hpp"

namespace spurge {

const char* name(Isa level) {
  switch (level) {
    case Isa::baseline: return "baseline";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "?";
}

bool compiled(Isa level) {
#ifdef SPURGE_X86_LEVELS
  (void)level;
  return true;
#else
  return level == Isa::baseline;
#endif
}

bool supported(Isa level) {
#ifdef SPURGE_X86_LEVELS
  switch (level) {
    case Isa::baseline: return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("f16c");
  }
  return false;
#else
  return level == Isa::baseline;
#endif
}

namespace {

Isa choose() {
  constexpr Isa levels[] = {Isa::avx512, Isa::avx2, Isa::baseline};
  const char* wanted = std::getenv("SPURGE_ISA");
  if (!wanted || !*wanted) {
    for (Isa level : levels)
      if (compiled(level) && supported(level)) return level;
  } else {
    for (Isa level : levels)
      if (std::string(wanted) == name(level)) {
        SPURGE_CHECK(compiled(level), "SPURGE_ISA: ", wanted, " is not compiled into this build");
        SPURGE_CHECK(supported(level), "SPURGE_ISA: this processor does not support ", wanted);
        return level;
      }
    fail("SPURGE_ISA: expected baseline, avx2 or avx512, got ", wanted);
  }
  return Isa::baseline;
}

}  // namespace

Isa selected_isa() {
  static const Isa level = choose();
  return level;
}

}  // namespace spurge
