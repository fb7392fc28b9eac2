#pragma once
// Instruction-set levels of the CPU kernels, chosen once per process.
//
// An op's inner loops stand in x_simd.cpp, which is compiled once per level into its own namespace.
// Such a file may include core/simd.hpp and core/half.hpp only: whatever else it shared with the rest
// (a std:: template, say) could be linked in from the copy that was compiled for a better processor.

namespace spurge {

enum class Isa : int { baseline, avx2, avx512 };

const char* name(Isa level);
bool compiled(Isa level);
bool supported(Isa level);  // by this processor

// The highest level that is compiled in and supported, or the one that the environment variable
// SPURGE_ISA names when the first kernel runs.
Isa selected_isa();

}  // namespace spurge

// Inside namespace spurge::<stem>: SPURGE_EACH_LEVEL(declarations) declares them once per level, and
// SPURGE_SELECT(f) is the f of the selected level.
#ifdef SPURGE_X86_LEVELS
#define SPURGE_EACH_LEVEL(...)       \
  namespace baseline { __VA_ARGS__ } \
  namespace avx2 { __VA_ARGS__ }     \
  namespace avx512 { __VA_ARGS__ }
#define SPURGE_SELECT(...)                                     \
  (selected_isa() == Isa::avx512 ? &avx512::__VA_ARGS__        \
   : selected_isa() == Isa::avx2 ? &avx2::__VA_ARGS__          \
                                 : &baseline::__VA_ARGS__)
#else
#define SPURGE_EACH_LEVEL(...) \
  namespace baseline { __VA_ARGS__ }
#define SPURGE_SELECT(...) (&baseline::__VA_ARGS__)
#endif
